// What transformers.js makes of an exported folder, the same under Node and in a browser.
//
// job      {"texts": [text], "chats": [[message]], "answer": chat to answer, "new_tokens"}
// returns  {"said": {"ids", "rendered", "rendered_ids": per text or chat, "prompt", "greedy": ids, "text"},
//           "logits": Float32Array (positions, vocabulary) of the answered chat's prompt}
const plain = (tensor) => tensor.tolist()[0].map(Number);

export async function ask(tokenizer, model, job) {
  const asked = { add_generation_prompt: true, return_dict: true };
  const prompt = tokenizer.apply_chat_template(job.answer, asked);
  const ids = plain(prompt.input_ids);
  const { logits } = await model(prompt);
  const generated = await model.generate({ ...prompt, max_new_tokens: job.new_tokens, do_sample: false });
  const greedy = plain(generated).slice(ids.length);
  const said = {
    ids: job.texts.map((text) => tokenizer.encode(text)),
    rendered: job.chats.map((chat) => tokenizer.apply_chat_template(chat, { tokenize: false, add_generation_prompt: true })),
    rendered_ids: job.chats.map((chat) => plain(tokenizer.apply_chat_template(chat, asked).input_ids)),
    prompt: ids,
    greedy,
    text: tokenizer.decode(greedy, { skip_special_tokens: true }),
  };
  return { said, logits: logits.data };
}

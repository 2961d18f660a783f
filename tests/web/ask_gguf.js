// In the browser: the sample page's own way to its GGUF file, asked as tests ask it.
//
// wllama speaks texts and chats, not ids, and tells probabilities of tokens that are whole characters only, so what it
// made of a text is proven by the distribution behind it: over all tokens but job.unspoken, which are biased out.
//
// job      {"texts", "chats", "answer", "new_tokens", "unspoken": ids, "params": of loadModel, "threads"}
// returns  {"said": {"counts": ids of each text and chat, "greedy": ids, "text", "threads"},
//           "logits": {"next": Float32Array (texts + chats, vocabulary), log-probabilities; -Infinity where unspoken}}
import { open } from "./gguf.js";

export async function ask(job) {
  const wllama = await open({ ...job.params, n_threads: job.threads, n_parallel: 1 });
  const vocabulary = wllama.getLoadedContextInfo().n_vocab;
  const distribution = {
    max_tokens: 1,
    temperature: 1,
    samplers: [], // else top-k and the like cut the distribution before it is told
    n_probs: vocabulary - job.unspoken.length,
    post_sampling_probs: true, // else the bias is not in it
    logit_bias: job.unspoken.map((id) => [id, false]),
    cache_prompt: false,
  };
  const asked = [
    ...job.texts.map((prompt) => () => wllama.createCompletion({ prompt, ...distribution })),
    ...job.chats.map((messages) => () => wllama.createChatCompletion({ messages, logprobs: true, top_logprobs: distribution.n_probs, ...distribution })),
  ];
  const next = new Float32Array(asked.length * vocabulary).fill(-Infinity);
  const counts = [];
  for (const [row, question] of asked.entries()) {
    const { choices, usage } = await question();
    counts.push(usage.prompt_tokens);
    for (const { id, prob } of choices[0].logprobs.content[0].top_probs) next[row * vocabulary + id] = Math.log(prob);
  }
  const answered = await wllama.createChatCompletion({
    messages: job.answer,
    max_tokens: job.new_tokens,
    temperature: 0,
    return_tokens: true,
    verbose: true,
  });
  const text = answered.choices[0].message.content;
  const said = { counts, greedy: answered.__verbose.tokens, text, threads: wllama.getNumThreads() };
  await wllama.exit();
  return { said, logits: { next } };
}

// An exported GGUF file in node-llama-cpp, its prebuilt llama.cpp on the processor.
//
//   node llama.mjs job.json answers.json
//
// job      {"model", "adapter": the exact adapter of layout split or null, "exact": KV cache in float32 and no flash
//           attention, "texts", "chats", "answer", "new_tokens", "context": tokens, "logits": folder}
// answers  {"release", "ids": per text, "rendered_ids": per chat, "greedy": ids, "text"}
// logits/  node.f32: little-endian float32 (positions, vocabulary), log-probabilities of the answered chat's prompt
import fs from "node:fs";
import path from "node:path";
import { LlamaChatSession, LlamaLogLevel, getLlama, resolveChatWrapper } from "node-llama-cpp";

const [jobFile, answerFile] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(jobFile, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.warn, maxThreads: 1 });
const model = await llama.loadModel({ modelPath: job.model });
const exact = { flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32" };
const context = await model.createContext({
  contextSize: job.context,
  ...(job.exact ? exact : {}),
  ...(job.adapter ? { lora: { adapters: [{ filePath: job.adapter }] } } : {}),
});
const sequence = context.getSequence();
const opened = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];

// A chat as LlamaChatSession renders it before the model's turn.
const roles = { system: (text) => ({ type: "system", text }), user: (text) => ({ type: "user", text }), assistant: (text) => ({ type: "model", response: [text] }) };
const wrapper = resolveChatWrapper(model);
function rendered(chat) {
  const history = chat.map(({ role, content }) => roles[role](content));
  const { contextText } = wrapper.generateContextState({ chatHistory: [...history, { type: "model", response: [""] }] });
  return contextText.tokenize(model.tokenizer);
}

const prompt = rendered(job.answer);
const told = await sequence.controlledEvaluate(prompt.map((id) => [id, { generateNext: { probabilities: true } }]));
const vocabulary = told[0].next.probabilities.size;
const rows = new Float32Array(told.length * vocabulary);
told.forEach(({ next }, row) => next.probabilities.forEach((probability, id) => (rows[row * vocabulary + id] = Math.log(probability))));
fs.writeFileSync(path.join(job.logits, "node.f32"), new Uint8Array(rows.buffer));

await sequence.clearHistory();
const greedy = [];
for await (const id of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
  greedy.push(id);
  if (model.isEogToken(id) || greedy.length === job.new_tokens) break;
}
await sequence.clearHistory();
const session = new LlamaChatSession({ contextSequence: sequence });
session.setChatHistory([]); // else it puts a system prompt of its own first
const text = await session.prompt(job.answer[0].content, { temperature: 0, maxTokens: job.new_tokens });
const answers = {
  release: llama.llamaCppRelease.release,
  ids: job.texts.map((each) => [...opened, ...model.tokenize(each, true)]),
  rendered_ids: job.chats.map(rendered),
  greedy,
  text,
};
fs.writeFileSync(answerFile, JSON.stringify(answers));
await llama.dispose();

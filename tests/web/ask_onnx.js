// In the browser: the sample page's own way to its ONNX folder, asked as tests ask it.
import { ask as askTransformers } from "./ask_transformers.js";
import { env, open } from "./onnx.js";

export async function ask(job) {
  env.backends.onnx.wasm.numThreads = job.threads;
  const { tokenizer, model } = await open();
  const { said, logits } = await askTransformers(tokenizer, model, job);
  return { said: { ...said, threads: env.backends.onnx.wasm.numThreads }, logits: { wasm: logits } };
}

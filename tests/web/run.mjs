// An exported folder as a user of JavaScript has it: transformers.js without an option, and onnxruntime-web's wasm.
//
//   node run.mjs job.json answers.json
//
// job      as ask_transformers.js, and {"folder", "logits": folder}
// answers  what ask_transformers.js says, and {"wasm_greedy": ids}
// logits/  node.f32, wasm.f32: little-endian float32 (positions, vocabulary) of the answered chat's prompt
import fs from "node:fs";
import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
import * as web from "onnxruntime-web";
import { ask } from "./ask_transformers.js";

const [jobFile, answerFile] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(jobFile, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(job.folder) + "/";
const name = path.basename(job.folder);
const writeFloats = (file, data) => fs.writeFileSync(path.join(job.logits, file), new Uint8Array(data.buffer, data.byteOffset, data.byteLength));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);
const { said, logits } = await ask(tokenizer, model, job);
writeFloats("node.f32", logits);
said.wasm_greedy = await wasmGreedy(said.prompt);
fs.writeFileSync(answerFile, JSON.stringify(said));

// The browser's backend with the folder's two files in memory, as a page would hand them over.
async function wasmGreedy(ids) {
  web.env.wasm.numThreads = 1;
  const file = path.join(job.folder, "onnx", "model.onnx");
  const session = await web.InferenceSession.create(fs.readFileSync(file), {
    executionProviders: ["wasm"],
    externalData: [{ path: "model.onnx_data", data: fs.readFileSync(file + "_data") }],
  });
  let cache = Object.fromEntries(
    session.inputMetadata
      .filter((input) => input.name.startsWith("past_key_values"))
      .map((input) => [input.name, new web.Tensor(input.type, new Float32Array(0), emptyShape(input.shape))]),
  );
  const found = [];
  const ends = [model.generation_config.eos_token_id].flat();
  for (let next = ids, length = 0; found.length < job.new_tokens; ) {
    length += next.length;
    const outputs = await session.run({ input_ids: int64(next), attention_mask: int64(Array(length).fill(1)), ...cache });
    if (length === ids.length) writeFloats("wasm.f32", outputs.logits.data);
    const last = outputs.logits.data.subarray(-outputs.logits.dims.at(-1));
    next = [last.reduce((best, value, index) => (value > last[best] ? index : best), 0)];
    found.push(next[0]);
    if (ends.includes(next[0])) break;
    cache = Object.fromEntries(Object.keys(cache).map((key) => [key, outputs[key.replace("past_key_values", "present")]]));
  }
  return found;
}

function int64(values) {
  return new web.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

function emptyShape(shape) {
  return shape.map((size) => (typeof size === "number" ? size : size === "batch_size" ? 1 : 0));
}

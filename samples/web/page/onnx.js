// An exported ONNX folder in transformers.js, on WebAssembly.
import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "./vendor/transformers.min.js";

export { env };

const NAME = "model"; // the folder beside this file
env.allowRemoteModels = false;
env.allowLocalModels = true; // off in browsers unless said
env.localModelPath = new URL(".", import.meta.url).pathname; // an address of its own would count as remote
env.useBrowserCache = env.useWasmCache = false; // what was made again under the same address is asked for again
const runtime = new URL("vendor/ort-wasm-simd-threaded.asyncify", import.meta.url).href;
env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` }; // a CDN's unless said

export async function open() {
  const tokenizer = await AutoTokenizer.from_pretrained(NAME);
  const model = await AutoModelForCausalLM.from_pretrained(NAME, { device: "wasm" });
  return { tokenizer, model };
}

export async function load() {
  const { tokenizer, model } = await open();
  return {
    runtime: `transformers.js ${env.version}`,
    async answer(chat, maxTokens, onText) {
      const prompt = tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true });
      let text = "";
      const streamer = new TextStreamer(tokenizer, {
        skip_prompt: true,
        skip_special_tokens: true,
        callback_function: (piece) => onText((text += piece)),
      });
      const all = await model.generate({ ...prompt, max_new_tokens: maxTokens, do_sample: false, streamer });
      const answered = all.tolist()[0].slice(prompt.input_ids.dims.at(-1));
      return tokenizer.decode(answered, { skip_special_tokens: true });
    },
  };
}

// An exported GGUF file in wllama: llama.cpp as WebAssembly.
import { Wllama, LoggerWithoutDebug } from "./vendor/wllama.min.js";

const beside = (name) => new URL(name, import.meta.url).href;

// params: of wllama's loadModel. n_gpu_layers 0: the processor, whose arithmetic verify-parity has judged.
export async function open(params = {}, file = "model.gguf") {
  const wllama = new Wllama({ default: beside("vendor/wllama.wasm") }, { logger: LoggerWithoutDebug });
  wllama.setCompat(null); // else Safari would be sent to a CDN
  const answer = await fetch(beside(file));
  if (!answer.ok) throw new Error(`${file}: ${answer.status} ${answer.statusText}`);
  await wllama.loadModel([await answer.blob()], { n_gpu_layers: 0, ...params });
  return wllama;
}

export async function load({ context }) {
  const wllama = await open({ n_ctx: context });
  return {
    runtime: `wllama, llama.cpp ${Wllama.getLibllamaVersion()}`,
    async answer(chat, maxTokens, onText) {
      let text = "";
      const chunks = await wllama.createChatCompletion({ messages: chat, max_tokens: maxTokens, temperature: 0, stream: true });
      for await (const chunk of chunks) onText((text += chunk.choices[0]?.delta?.content ?? ""));
      return text;
    },
  };
}

// The page: loads the folder's one model with the runtime it is for, and answers what is asked, greedily.
//
// model.json   {"kind": "onnx" or "gguf", "title", "question": what stands in the box at first, "max_tokens", "context"}
const element = (id) => document.getElementById(id);

try {
  const described = await (await fetch("model.json")).json();
  element("title").textContent = document.title = described.title;
  element("question").value = described.question;
  const { load } = await import(described.kind === "onnx" ? "./onnx.js" : "./gguf.js");
  const started = performance.now();
  const model = await load(described);
  element("about").textContent = `${model.runtime}, ${threads()}. Loaded in ${seconds(started)}; nothing leaves this page.`;
  element("ask").disabled = false;
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    answer(model, element("question").value, described.max_tokens);
  });
} catch (error) {
  failed(error);
}

async function answer(model, question, maxTokens) {
  element("ask").disabled = true;
  element("answer").textContent = element("took").textContent = "";
  try {
    const started = performance.now();
    const text = await model.answer([{ role: "user", content: question }], maxTokens, (sofar) => {
      element("answer").textContent = sofar;
    });
    element("answer").textContent = text;
    element("took").textContent = `Answered in ${seconds(started)}.`;
  } catch (error) {
    failed(error);
  } finally {
    element("ask").disabled = false;
  }
}

function failed(error) {
  console.error(error);
  element("about").textContent = `This does not work here: ${error?.message ?? error}`;
}

function seconds(started) {
  return `${((performance.now() - started) / 1000).toFixed(1)} s`;
}

function threads() {
  return crossOriginIsolated ? "with threads" : "one thread: the server sends no cross-origin isolation headers";
}

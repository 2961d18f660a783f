// A real browser on a folder that is served from loopback. No other host can be reached, and a try is reported.
//
//   node browser.mjs job.json answers.json
//
// job      {"chromium": program, "address", "logits": folder for float32, and one of
//           "module": name of a module in the folder whose ask(job) is called, "job": its argument
//           "question": what is put to the page, "screenshot": file}
// answers  {"elsewhere": addresses asked for on other hosts, "errors": of the page, "isolated", and what ask() said,
//           or "about", "answer", "took": what stands on the page}
import fs from "node:fs";
import path from "node:path";
import { chromium } from "playwright-core";

const [jobFile, answerFile] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(jobFile, "utf8"));
const { host } = new URL(job.address);
const answers = { elsewhere: [], errors: [] };
const browser = await chromium.launch({
  executablePath: job.chromium,
  // Names resolve nowhere, so that nothing leaves the machine even where no request is seen. Tests run as root in
  // containers, where Chromium's sandbox does not start.
  args: ["--no-sandbox", `--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE ${new URL(job.address).hostname}`],
});
try {
  const page = await browser.newPage({ viewport: { width: 720, height: 520 } });
  page.setDefaultTimeout(job.timeout);
  page.on("pageerror", (error) => answers.errors.push(String(error.stack ?? error)));
  page.on("request", (request) => {
    const { protocol, host: asked } = new URL(request.url());
    if (!["blob:", "data:"].includes(protocol) && asked !== host) answers.elsewhere.push(request.url());
  });
  await (job.module ? askModule(page) : usePage(page));
  answers.isolated = await page.evaluate(() => crossOriginIsolated);
} finally {
  await browser.close();
}
fs.writeFileSync(answerFile, JSON.stringify(answers));

async function askModule(page) {
  await page.goto(job.address + "ask.html");
  const { said, floats } = await page.evaluate(
    async ([module, argument]) => {
      const { said, logits } = await (await import(module)).ask(argument);
      const base64 = (data) =>
        new Promise((resolve) => {
          const reader = new FileReader();
          reader.onload = () => resolve(reader.result.split(",")[1]);
          reader.readAsDataURL(new Blob([data]));
        });
      const floats = {};
      for (const [name, data] of Object.entries(logits)) floats[name] = await base64(data);
      return { said, floats };
    },
    [job.address + job.module, job.job],
  );
  Object.assign(answers, said);
  for (const [name, data] of Object.entries(floats)) fs.writeFileSync(path.join(job.logits, `${name}.f32`), Buffer.from(data, "base64"));
}

async function usePage(page) {
  await page.goto(job.address);
  await page.locator("#ask:enabled").waitFor();
  await page.fill("#question", job.question);
  await page.click("#ask");
  await page.locator("#took:not(:empty)").waitFor();
  for (const name of ["about", "answer", "took"]) answers[name] = await page.textContent(`#${name}`);
  await page.screenshot({ path: job.screenshot });
}

// node browser.mjs JOB.json: opens the page in Chromium, gives it the job's files one after the other and prints what it
// shows as JSON, a line for each.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(job.modules + "/")("playwright-core");
const browser = await chromium.launchPersistentContext(job.profile, {
  executablePath: job.chromium, headless: true,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"],
});
try {
  const page = await browser.newPage(), errors = [];
  page.setDefaultTimeout(job.patience);
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  await page.goto(job.page);
  await page.waitForFunction(() => !document.getElementById("state").textContent.startsWith("Loading"));
  for (const file of job.files) {
    if (!await page.isDisabled("#file")) {
      await page.setInputFiles("#file", file);
      await page.waitForFunction(() => {
        const state = document.getElementById("state");
        return state.textContent.startsWith("Done") || state.classList.contains("error");
      });
    }
    console.log(JSON.stringify(await page.evaluate(() => {
      const text = (id) => document.getElementById(id).textContent;
      const pixels = (id) => {
        const canvas = document.getElementById(id);
        return { width: canvas.width, height: canvas.height,
                 rgba: Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data) };
      };
      return { state: text("state"), verification: text("verification"), class: text("class"), image: pixels("image"),
               picture: pixels("picture"), rows: Array.from(document.querySelectorAll("#probabilities tr"),
                 (row) => Array.from(row.cells, (cell) => cell.textContent)) };
    })));
    if (job.screenshot) await page.screenshot({ path: job.screenshot, fullPage: true });
  }
  if (errors.length) console.error(errors.join("\n"));
} finally {
  await browser.close();
}

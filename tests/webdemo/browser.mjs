// node browser.mjs JOB.json: opens the page in Chromium at each of the job's widths, drops its files, classifies, and
// prints what the page shows as JSON, a line for each width.

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
  for (const width of job.widths) {
    const page = await browser.newPage(), errors = [], outside = [];
    page.setDefaultTimeout(job.patience);
    await page.setViewportSize({ width, height: 900 });
    page.on("pageerror", (error) => errors.push(String(error)));
    page.on("request", (request) => {
      const url = request.url();
      if (!url.startsWith(job.page) && /^https?:/.test(url)) outside.push(url);
    });
    await page.goto(job.page);
    await page.locator("input[type=file]").first().setInputFiles(job.files);
    await page.waitForFunction((count) => document.querySelectorAll("button img, img[alt]").length >= count,
                               job.files.length);
    await page.getByRole("button", { name: "Classify" }).click();
    await page.waitForSelector(".adapter .bar");
    await page.waitForFunction(  // the gallery is filled after the classes are shown, and what is out of sight is not loaded
      (count) => Array.from(document.images).filter((image) => image.naturalWidth >= 224).length >= count, job.maps);
    const shown = await page.evaluate(() => ({
      adapters: Array.from(document.querySelectorAll(".adapter > h4:first-child"), (title) => title.textContent),
      bars: document.querySelectorAll(".adapter .bar").length,
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      maps: Array.from(document.images).filter((image) => image.naturalWidth >= 224).length,
    }));
    console.log(JSON.stringify({ ...shown, errors, outside }));
    if (job.screenshot) await page.screenshot({ path: `${job.screenshot}-${width}.png`, fullPage: true });
    await page.close();
  }
} finally {
  await browser.close();
}

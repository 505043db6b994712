// Open pages in headless Chromium: `node open_pages.js CHROMIUM FILE...` prints one JSON line a file.
const { chromium } = require("playwright-core");
const [executablePath, ...files] = process.argv.slice(2);
(async () => {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  for (const file of files) {
    const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
    const outside = [], dialogs = [];
    page.on("request", (r) => { if (r.url() !== "file://" + file && !r.url().startsWith("data:")) outside.push(r.url()); });
    page.on("dialog", (d) => { dialogs.push(d.message()); d.dismiss(); });
    const started = Date.now();
    await page.goto("file://" + file, { waitUntil: "load" });
    await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
    const milliseconds = Date.now() - started;
    const found = await page.evaluate(async () => {
      for (const one of document.querySelectorAll("details")) one.open = true;
      for (const one of document.querySelectorAll("main *, section *, td *")) one.dispatchEvent(new Event("mouseover"));
      await new Promise((done) => setTimeout(done, 200));
      const search = document.querySelector("#search"), rows = () => [...document.querySelectorAll("tbody tr:not([hidden])")];
      const result = { hit: window.hit ?? null, scripts: document.scripts.length, rows: rows().length, width: document.documentElement.scrollWidth };
      if (search) {
        search.value = "3"; search.dispatchEvent(new Event("input"));
        result.searched = rows().map((row) => row.dataset.latent);
        search.value = ""; search.dispatchEvent(new Event("input"));
        const button = document.querySelector("th[data-key=latent] button");
        button.click(); button.click();
        result.sorted = rows().slice(0, 3).map((row) => row.dataset.latent);
      }
      return result;
    });
    await page.setViewportSize({ width: 390, height: 800 });
    found.phone = await page.evaluate(() => document.documentElement.scrollWidth);
    console.log(JSON.stringify({ file, milliseconds, outside, dialogs, ...found }));
    await page.close();
  }
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });

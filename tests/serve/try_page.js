// Use the page to try a model in headless Chromium: `node try_page.js CHROMIUM JSON`, of {url, token, prompt, answers, pictures}, prints what it saw.
const { chromium } = require("playwright-core");
const [executablePath, asked] = process.argv.slice(2);
const { url, token, prompt, answers, pictures } = JSON.parse(asked);
(async () => {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const page = await browser.newPage({ viewport: { width: 1440, height: 900 } });
  const requests = [], faults = [], dialogs = [];
  page.on("request", (r) => requests.push({ url: r.url(), authorised: "authorization" in r.headers() }));
  page.on("pageerror", (error) => faults.push(String(error)));
  page.on("console", (message) => { if (/Content Security Policy/.test(message.text())) faults.push(message.text()); });
  page.on("dialog", (d) => { dialogs.push(d.message()); d.dismiss(); });
  await page.goto(url, { waitUntil: "networkidle" });
  const found = { asked_for_token: await page.isVisible("#access") };
  if (token) {
    await page.fill("#token", "a-wrong-token-of-some-length");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#fault:not([hidden])");
    found.refused = await page.textContent("#fault");
    await page.fill("#token", token);
    await page.keyboard.press("Enter");
    await page.waitForSelector("#access", { state: "hidden" });
  }
  found.model = await page.textContent("#model");
  await page.fill("#prompt", prompt);
  await page.fill("#answer-a", answers[0]);
  if (answers[1]) await page.fill("#answer-b", answers[1]);
  await page.keyboard.press("Control+Enter");
  await page.waitForSelector("#results:not([hidden]), #fault:not([hidden])");
  found.fault = (await page.isVisible("#fault")) ? await page.textContent("#fault") : "";
  const rewards = () => page.$$eval("#rewards [data-value]", (all) => all.map((one) => Number(one.dataset.value)));
  found.rewards = await rewards();
  found.begins = await page.$$eval(".begin", (all) => all.map((one) => one.textContent));
  found.rows = await page.$$eval("#features tr[data-latent]", (all) => all.map((one) => ({ latent: Number(one.dataset.latent), name: one.querySelector(".name").textContent })));
  found.texts = await page.$$eval(".tokens", (all) => all.map((one) => one.textContent));
  found.marked = await page.$$eval(".tokens .up, .tokens .down", (all) => all.length);
  // By keys alone: the first weight to its left end, then a text from its second token on.
  await page.focus("#features input");
  await page.keyboard.press("Home");
  found.edited = await rewards();
  found.json = JSON.parse(await page.inputValue("#json"));
  found.python = await page.inputValue("#python");
  await page.focus(".tokens");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  found.detail = await page.textContent("#detail");
  await page.click("#features .name");
  found.chosen = await page.textContent("#what");
  await page.click("#features .name");
  await page.click("#post");
  await page.waitForFunction(() => document.querySelector("#posted").textContent);
  found.posted = await page.textContent("#posted");
  found.widths = {};
  for (const width of [390, 820, 1440]) {
    await page.setViewportSize({ width, height: 900 });
    found.widths[width] = await page.evaluate(() => document.documentElement.scrollWidth);
    if (pictures) await page.screenshot({ path: pictures + "/try-" + width + ".png", fullPage: true });
  }
  if (pictures) {
    await page.setViewportSize({ width: 1100, height: 900 });
    await page.screenshot({ path: pictures + "/try-page.png", fullPage: true });
    await page.emulateMedia({ colorScheme: "dark" });
    await page.screenshot({ path: pictures + "/try-dark.png", fullPage: true });
    await page.emulateMedia({ colorScheme: "light", media: "print" });
    await page.screenshot({ path: pictures + "/try-print.png", fullPage: true });
    await page.emulateMedia({ media: "screen" });
  }
  await page.click("#reset");
  found.reset = await rewards();
  found.hidden_edit = await page.isHidden("#edit");
  // Every field, button and slider has a name for who cannot see it.
  found.nameless = await page.$$eval("input, textarea, select, button", (all) => all.filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim())).length);
  found.hit = await page.evaluate(() => window.hit ?? null);
  found.stored = await page.evaluate(() => localStorage.length + sessionStorage.length + document.cookie.length);
  console.log(JSON.stringify({ ...found, requests, faults, dialogs }));
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });

// What the page to try a model says of it, without a browser: `node try_page_model.js SCRIPT JSON`, of an entry of `/v1/models`, prints the line.
const fs = require("fs");
const [script, model] = process.argv.slice(2);
const elements = {};
const element = () => new Proxy({ value: "" }, { get: (own, name) => (name in own ? own[name] : () => element()) });
globalThis.document = { getElementById: (id) => (elements[id] ??= element()), querySelectorAll: () => [], querySelector: () => element(), createElement: element };
globalThis.Node = class {};
globalThis.fetch = async () => ({ ok: true, status: 200, headers: { get: () => null }, json: async () => ({ data: [JSON.parse(model)] }) });
eval(fs.readFileSync(script, "utf8"));
setTimeout(() => console.log(elements.model.textContent), 100);

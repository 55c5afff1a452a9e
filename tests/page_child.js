// Run the script of the page of `certify serve` on a stand-in for a browser, with prepared replies.
// Reads {html, replies: {path: reply}} from stdin; prints what the page displays after the example, then after a radius.
"use strict";
const { html, replies } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const settings = /<script id="settings"[^>]*>(.*?)<\/script>/s.exec(html)[1];
const script = /<script>(.*?)<\/script>/s.exec(html)[1];
const made = {}, sent = [];

function element(name) {
  const own = { name, hidden: false, textContent: "", className: "", value: "", children: [], files: [], listeners: {} };
  return Object.assign(own, {
    addEventListener: (kind, listener) => { own.listeners[kind] = listener; },
    setAttribute: () => {}, append: (...more) => own.children.push(...more),
    replaceChildren: (...all) => { own.children = all; }, classList: { toggle: () => {} },
    getContext: () => ({ drawImage: () => {}, putImageData: (data) => { own.painted = data; },
      getImageData: (x, y, width, height) => ({ width, height, data: new Uint8ClampedArray(4 * width * height).fill(100) }) }),
  });
}

const get = (name) => made[name] ??= element(name);
const panels = ["image", "changed", "change"].map(get);
get("settings").textContent = settings;
Object.assign(globalThis, {
  document: { getElementById: get, querySelector: get, querySelectorAll: () => panels, createElement: element,
    createElementNS: (_, name) => element(name), addEventListener: () => {} },
  location: { search: "" },
  createImageBitmap: async () => ({ width: 8, height: 8 }),
  ImageData: class { constructor(width, height) { Object.assign(this, { width, height,
    data: new Uint8ClampedArray(4 * width * height) }); } },
  fetch: async (path, options) => {
    sent.push(path);
    const reply = replies[path];
    return { ok: reply.error === undefined, json: async () => reply, blob: async () => new Blob(["image"]) };
  },
});
URL.createObjectURL = () => "blob:image"; URL.revokeObjectURL = () => {};
new Function(`${script}\nglobalThis.ask = ask;`)();

function displayed() {
  const texts = Object.fromEntries(["about", "verdict", "claim", "cost", "state", "grey", "gain"].map((id) =>
    [id, get(id).textContent]));
  const votes = get("votes").children.map((line) => [line.children[0].textContent, line.children[2].textContent]);
  const painted = panels.map((panel) => panel.painted && [...panel.painted.data].filter((_, i) => i % 4 === 0));
  return { ...texts, votes, allowed: !get("allowed").hidden, answer: !get("answer").hidden, painted };
}

(async () => {
  const file = new File(["image"], "a.png", { type: "image/png" }), found = [];
  for (const radius of ["", "0.1", "9"]) {
    get("radius").value = radius;
    await ask(file);
    found.push(displayed());
  }
  console.log(JSON.stringify({ found, sent }));
})();

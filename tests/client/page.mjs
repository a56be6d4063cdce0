// node page.mjs CASE JOB.json: a case of the page's code in Node. What a browser and onnxruntime do is played here:
// canvases hold bytes, a PNG file is one of the job's or what a canvas wrote, the graph gives the job's weights.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

const job = JSON.parse(readFileSync(process.argv[3], "utf8"));
const bytes = (name) => new Uint8Array(readFileSync(`${job.folder}/${name}`));
const text64 = (content) => Buffer.from(content).toString("base64");
const float64 = (vector) => text64(new Uint8Array(Float32Array.from(vector).buffer));
let noise = 0; // levels that this browser adds to what is read from a canvas

globalThis.ImageData = class {
  constructor(width, height) { Object.assign(this, { width, height, data: new Uint8ClampedArray(width * height * 4) }); }
};
class Canvas {
  constructor(width, height) { Object.assign(this, { width, height, pixels: null }); }

  getContext() {
    return {
      fillRect() {}, putImageData: (pixels) => { this.pixels = pixels.data; },
      drawImage: (bitmap) => { this.pixels = bitmap.rgba; },
      getImageData: () => ({ data: this.pixels.map((level, i) => i % 97 === 0 ? level ^ noise : level) }),
    };
  }

  async convertToBlob() { return new Blob([Uint32Array.of(this.width, this.height), this.pixels]); }
}
globalThis.OffscreenCanvas = Canvas;
globalThis.createImageBitmap = async (blob) => {
  const content = new Uint8Array(await blob.arrayBuffer()), known = job.images[text64(content)];
  if (known !== undefined) return { ...known, rgba: Uint8ClampedArray.from(Buffer.from(known.rgba, "base64")), close() {} };
  const [width, height] = new Uint32Array(content.slice(0, 8).buffer);
  return { width, height, rgba: Uint8ClampedArray.from(content.slice(8)), close() {} };
};
const elements = {};
function element(id) {
  return elements[id] ??= {
    id, value: "", textContent: "", rows: [], files: [], disabled: true, canvas: new Canvas(0, 0), failed: false,
    classList: { toggle: (_, on) => { elements[id].failed = on; } }, getContext() { return this.canvas.getContext(); },
    addEventListener(type, listener) { this[type] = listener; }, replaceChildren() { this.rows = []; },
    insertRow() {
      const cells = [];
      this.rows.push(cells);
      return { insertCell() { const cell = {}; cells.push(cell); return cell; } };
    },
  };
}
globalThis.document = { baseURI: "http://page/", getElementById: element };
globalThis.location = { search: "?host=http://host", origin: "http://page" };
globalThis.weights = job.weights;

const manifest = JSON.parse(readFileSync(`${job.folder}/manifest.json`, "utf8")), changed = {}, requests = [];
const golden = "data:image/png;base64," + text64(bytes("golden_picture.png"));
const host = { embed: async (body) => body.input === golden ? job.golden : job.rows[0], answer: null, models: null };
globalThis.fetch = async (address, options = {}) => {
  const url = new URL(address);
  const answered = (content) => new Response(typeof content === "string" || content instanceof Uint8Array ? content
    : JSON.stringify(content));
  if (url.pathname === "/model/manifest.json") return answered(manifest);
  if (url.pathname.startsWith("/model/")) {
    const name = url.pathname.slice("/model/".length);
    return answered(changed[name] ?? bytes(name));
  }
  const body = options.body === undefined ? null : JSON.parse(options.body);
  requests.push({ base: url.origin, path: url.pathname, body, key: options.headers.Authorization });
  if (url.pathname === "/v1/models") return answered(host.models ?? "no list");
  if (host.answer !== null) return answered(host.answer);
  return answered({ data: [{ index: 0, embedding: float64(await host.embed(body, url.origin)) }] });
};

async function change(name, content) {
  changed[name] = content;
  const digest = Buffer.from(await crypto.subtle.digest("SHA-256", content)).toString("hex");
  manifest.files[name] = { bytes: content.length, sha256: digest };
}

function npy(numbers, ...shape) {
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`.padEnd(117) + "\n";
  const start = Buffer.from("\x93NUMPY\x01\x00" + String.fromCharCode(header.length, 0) + header, "latin1");
  return new Uint8Array(Buffer.concat([start, Buffer.from(Float32Array.from(numbers).buffer)]));
}

const module = await import(`${job.web}/client.js`);
const ort = await import(`${job.web}/ort/ort.wasm.min.mjs`);
const load = () => module.loadClient("model");
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const image = new Blob([bytes("golden_image.png")]);

async function page() {
  await import(`${job.web}/page.js`);
  assert.match(element("state").textContent, /^Ready/);
}

function choose(level) { // a picture of one colour
  const content = new Uint8Array(8 + 32 * 32 * 4).fill(level);
  content.set(new Uint8Array(Uint32Array.of(32, 32).buffer));
  element("file").files = [new Blob([content])];
  element("file").change();
}

const isOf = (level, body) => Buffer.from(body.input.split(",")[1], "base64")[8] === level;

const cases = {
  async loads() {
    const client = await load();
    assert.equal((await client.verify("http://host")).ok, true);
    const features = await client.embed("http://host", (await client.picture(image)).picture);
    assert.equal(client.classify(features)[0].name, "a");
  },
  async "a canvas that is changed"() {
    noise = 1;
    await assert.rejects(load(), /changes pixels on a canvas/);
  },
  async "other weights"() {
    globalThis.weights = { ...job.weights, data: job.weights.data.toReversed() };
    await assert.rejects(load(), /golden_picture.png is not the picture that this browser makes/);
  },
  async "weights that are not finite"() {
    globalThis.weights = { ...job.weights, data: job.weights.data.map((_, i) => i === 3 ? NaN : 0.1) };
    await assert.rejects(load(), /weights that are not finite/);
  },
  async "no secure context"() {
    Object.defineProperty(globalThis, "crypto", { value: {} });
    await assert.rejects(load(), /opened over https or from localhost/);
  },
  async "shapes"() {
    const before = structuredClone(manifest.files);
    for (const [name, message, ...shape] of [
      ["library.npy", /library.npy must have the shape 12,192, got 12,191/, 12, 191],
      ["library_rest.npy", /library_rest.npy must have the shape 12,192, got 192,12/, 192, 12],
      ["golden_embedding.npy", /golden_embedding.npy must have the shape 48, got 30/, 30],
      ["mistakes.npy", /mistakes.npy must have the shape \d+,48, got 2,48/, 2, 48],
      ["head_weight.npy", /head_weight.npy must have the shape any,48, got 3,30/, 3, 30],
      ["head_bias.npy", /head_bias.npy must have the shape 3, got 2/, 2],
    ]) {
      await change(name, npy(new Float32Array(shape.reduce((a, b) => a * b)), ...shape));
      await assert.rejects(load(), message);
      delete changed[name];
      manifest.files = structuredClone(before);
    }
    delete manifest.files["head_bias.npy"];
    await assert.rejects(load(), /head_bias.npy must have the shape 3, got no file/);
    manifest.files = structuredClone(before);
    await change("head_bias.npy", npy([1, NaN, 2], 3));
    await assert.rejects(load(), /head_bias.npy contains NaN/);
    delete changed["head_bias.npy"];
    manifest.files = before;
    manifest.golden.threshold = 0;
    await assert.rejects(load(), /golden.threshold must be over 0/);
  },
  async "bad answers"() {
    const client = await load();
    const { picture } = await client.picture(image);
    for (const [answer, message] of [
      ["null", /answered no JSON object/], ["<html>", /answered no JSON object/], ["3", /answered no JSON object/],
      [{}, /returned no embedding/], [{ data: [] }, /returned no embedding/], [{ data: { length: 1 } }, /no embedding/],
      ...[null, "%%%", "AAA=", { length: 48 }, [null, true, "3"], 3].map((embedding) =>
        [{ data: [{ embedding }] }, /neither a list of numbers nor base64/]),
      ...[[], "", Array(48).fill(1e39)].map((embedding) => [{ data: [{ embedding }] }, /empty or not finite/]),
      [{ data: [{ embedding: Array(30).fill(1) }] }, /returned 30 numbers, the model has 48/],
      [{ data: [{ embedding: float64(Array(96).fill(1)) }] }, /returned 96 numbers, the model has 48/],
    ]) {
      host.answer = answer;
      await assert.rejects(client.embed("http://host", picture), message);
    }
    host.answer = { data: [{ embedding: Array(48).fill(1) }] };
    assert.equal((await client.embed("http://host", picture)).length, 48);
  },
  async "addresses"() {
    const client = await load();
    for (const [url, message] of [["", /must be http/], ["ftp://host", /must be http/], ["http://host/?a=b", /a query/],
                                  ["http://me:secret@host", /user or password/]])
      await assert.rejects(client.verify(url), message);
    assert.equal(requests.length, 0);
  },
  async "mistakes"() {
    const client = await load(), { mistakes } = manifest.golden, all = client.files["mistakes.npy"].data;
    mistakes.forEach(({ name }, i) => assert.equal(client.judge(all.subarray(48 * i, 48 * i + 48), "it").likely, name));
    const moved = job.golden.map((v, i) => v + 0.15 * (i % 3 - 1)), found = client.judge(moved, "it");
    assert.equal(found.ok, false);
    assert.equal(found.likely, null);
    assert.match(found.message, /the nearest mistake is .*Likely: unknown/);
    assert.equal(client.judge(job.golden.map((v) => -v), "it").likely, "another model");
    assert.equal(client.judge(job.golden.map((v) => 3 * v), "it").likely, "scaled embeddings");
    assert.equal(client.judge(job.golden, "it").ok, true);
  },
  async "the model that is asked for"() {
    const client = await load(), { fingerprint } = manifest.backbone;
    const one = { id: "one", object: "model" }, adapter = { id: "birds", object: "adapter", fingerprint };
    for (const [models, expected] of [
      [{ data: [one] }, "one"], [{ data: [one, adapter] }, "one"], [{ data: [one, { id: "two" }] }, undefined],
      [{ data: [one, { id: "two", object: "model", fingerprint }] }, "two"], [{ data: [null, 3, { id: 4 }] }, undefined],
      [{ data: { id: "one" } }, undefined], [null, undefined],
    ]) {
      host.models = models;
      await client.verify("http://host");
      assert.equal(requests.at(-1).body.model, expected);
    }
  },
  async "half way between two levels"() {
    manifest.prompts = { kind: "patches", placement: "replace", rows: 2, added: true };
    manifest.backbone.image_size = [32, 32];
    const files = { "library.npy": { data: [0] }, "added.npy": { data: new Float32Array(32 * 96) } };
    const data = Uint8Array.from({ length: 32 * 96 }, (_, i) => 101 + Math.floor(i / 96) % 2);
    const image = { width: 32, height: 32, data };
    globalThis.weights = { dims: [8, 1], data: Float32Array.of(1, 1, 1, 1, 1, 1, 1, 1) };
    for (const [rounds, level] of [[true, 101], [undefined, 101], [false, 102]]) {
      manifest.prompts.round_pixels = rounds;
      const client = new module.Client(manifest, files, await ort.InferenceSession.create());
      client.library = new Float64Array(192);
      assert.deepEqual(new Set((await client.prompt(image)).data.slice(96, 15 * 96)), new Set([level]));
    }
  },
  async "a line of pixels"() {
    const line = { width: 1500, height: 1, data: new Uint8Array(4500) };
    assert.throws(() => module.resized(line, [224, 224], "crop"), /1500 x 1 pixels, an aspect ratio that is too extreme/);
    assert.equal(module.resized(line, [224, 224], "squash").data.length, 224 * 224 * 3);
  },
  async "a second picture while the first is at the host"() {
    host.embed = async (body) => {
      if (body.input === golden) return job.golden;
      await wait(isOf(10, body) ? 200 : 20);
      return job.rows[isOf(10, body) ? 0 : 1];
    };
    await page();
    choose(10);
    await wait(80);
    choose(20);
    await wait(400);
    assert.equal(requests.filter(({ body }) => body !== null && body.input !== golden).length, 2);
    assert.equal(element("class").textContent, "b");
    assert.deepEqual(element("probabilities").rows.map(([name]) => name.textContent).slice(0, 1), ["b"]);
    assert.equal(element("probabilities").rows.length, 3);
    assert.equal(element("state").textContent, "Done.");
    assert.equal(element("verify").disabled, false);
  },
  async "a second picture before the first is sent"() {
    host.embed = async (body) => {
      await wait(50);
      return body.input === golden ? job.golden : job.rows[1];
    };
    await page();
    choose(10);
    await wait(20);
    choose(20);
    await wait(300);
    const sent = requests.filter(({ body }) => body !== null && body.input !== golden);
    assert.deepEqual(sent.map(({ body }) => isOf(20, body)), [true]);
    assert.equal(element("class").textContent, "b");
  },
  async "another address while the host is verified"() {
    host.embed = async (body) => {
      element("url").value = "http://elsewhere";
      element("key").value = "other";
      return body.input === golden ? job.golden : job.rows[0];
    };
    await page();
    element("key").value = "secret";
    choose(10);
    await wait(100);
    assert.deepEqual([...new Set(requests.map(({ base, key }) => `${base} ${key}`))], ["http://host Bearer secret"]);
    assert.equal(element("state").textContent, "Done.");
  },
  async "a host that is gone"() {
    await page();
    await element("verify").click();
    await wait(50);
    assert.match(element("verification").textContent, /is right/);
    assert.equal(element("state").textContent, "Verified.");
    host.embed = async () => { throw new Error("gone"); };
    element("verify").click();
    await wait(50);
    assert.equal(element("verification").textContent, "");
    assert.match(element("state").textContent, /cannot be reached from this page: gone/);
    assert.equal(element("state").failed, true);
    host.embed = async () => job.rows[0];
    choose(10);
    await wait(50);
    assert.match(element("verification").textContent, /is refused/);
    assert.equal(element("state").textContent, "Not sent: the host was refused.");
    assert.equal(requests.filter(({ body }) => body !== null && body.input !== golden).length, 0);
  },
};

if (process.argv[2] === "list") console.log(JSON.stringify(Object.keys(cases)));
else await cases[process.argv[2]]();

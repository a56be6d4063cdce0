// The Python client in a browser: the same files, the same arithmetic, onnxruntime-web in place of onnxruntime.

import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

const FORMAT = 1;
const MAX_PIXELS = 100_000_000;
const LARGEST_COVER = 2 ** 25; // pixels of an image that was scaled to be cropped
const TIE = 1e-3; // levels, where training rounds: a shrunk pixel half way between two levels goes down
const SURE = 0.5;
const LIKELY = 0.6;
const NEAR = 0.6;
const NOISE = 1e-3;
const LENGTH = 0.02;

// The folder at an address, with every file that the manifest names checked and read.
export async function loadClient(address) {
  if (globalThis.crypto?.subtle === undefined)
    throw new Error("this page must be opened over https or from localhost: elsewhere browsers do not check files");
  const base = new URL(address.endsWith("/") ? address : address + "/", document.baseURI);
  const manifest = JSON.parse(new TextDecoder().decode(await fetched(new URL("manifest.json", base))));
  if (manifest.format !== FORMAT) throw new Error(`manifest.json: format must be ${FORMAT}, got ${manifest.format}`);
  const files = {};
  for (const [name, stated] of Object.entries(manifest.files)) {
    if (!/^[\w.]+$/.test(name)) throw new Error(`manifest.json: ${name} is no file name`);
    const content = await fetched(new URL(name, base));
    if (content.byteLength !== stated.bytes || await sha256(content) !== stated.sha256)
      throw new Error(`${name} is damaged: it is not the file that the manifest describes`);
    files[name] = name.endsWith(".npy") ? parseNpy(name, content) : content;
  }
  checkFiles(manifest, files);
  const session = files["generator.onnx"] === undefined ? null
    : await ort.InferenceSession.create(new Uint8Array(files["generator.onnx"]), { executionProviders: ["wasm"] });
  const client = new Client(manifest, files, session);
  await client.checkBrowser();
  return client;
}

// That there is every array that the manifest speaks of, of the shape that it says.
function checkFiles(manifest, files) {
  const { backbone, prompts, head, class_names: names, golden } = manifest;
  const [height, width] = backbone.image_size, features = backbone.width, numbers = 3 * backbone.patch_size ** 2;
  const need = (name, ...shape) => {
    const found = files[name]?.shape;
    if (found?.length !== shape.length || !shape.every((side, i) => side === null || side === found[i]))
      throw new Error(`${name} must have the shape ${shape.map((side) => side ?? "any")}, got ${found ?? "no file"}`);
    return found[0];
  };
  need("golden_embedding.npy", features);
  need("mistakes.npy", golden.mistakes.length, features);
  if (prompts.kind === "patches") {
    need("library.npy", prompts.library_size, numbers);
    if (prompts.rest) need("library_rest.npy", prompts.library_size, numbers);
    if (prompts.offset) need("offset.npy", prompts.num_prompts, numbers);
  }
  if (prompts.added) need("added.npy", height, width, 3);
  for (const name of ["golden_image.png", "golden_picture.png", ...(prompts.kind === "patches" ? ["generator.onnx"] : [])])
    if (files[name] === undefined) throw new Error(`manifest.json: files lacks ${name}`);
  if (!(golden.threshold > 0 && golden.threshold <= 1))
    throw new Error(`manifest.json: golden.threshold must be over 0 and at most 1, got ${golden.threshold}`);
  if (head === null) return;
  let rows, out = features;
  if (head.kind === "linear") {
    rows = need("head_weight.npy", null, features);
    need("head_bias.npy", rows);
  } else {
    for (let i = 0; i < head.layers; i++) {
      out = need(`projection${i}_weight.npy`, null, out);
      need(`projection${i}_bias.npy`, out);
    }
    rows = need("class_embeddings.npy", null, out);
  }
  if (names?.length !== rows) throw new Error("manifest.json: class_names must be one for each class of the head");
}

export class Client {
  constructor(manifest, files, session) {
    Object.assign(this, { manifest, files, session, classNames: manifest.class_names });
    [this.height, this.width] = manifest.backbone.image_size;
    this.patch = manifest.backbone.patch_size;
    this.rows = manifest.prompts.rows ?? 0;
    this.verified = new Map();
    if (session !== null) {
      const library = files["library.npy"].data, rest = files["library_rest.npy"];
      this.library = rest === undefined ? Float64Array.from(library)
        : Float64Array.from(library, (level, i) => level + rest.data[i]);
    }
    if (manifest.prompts.placement === "replace")
      this.shrink = shrinkWeights(this.height, this.height - this.rows * this.patch);
  }

  // A file → {image, picture}: {width, height, data} with data uint8 (height, width, 3).
  async picture(blob) {
    const image = resized(await decode(blob), [this.height, this.width], this.manifest.preprocessing.resize);
    return { image, picture: await this.prompt(image) };
  }

  // An image of the backbone's size → the picture with its prompts.
  async prompt(image) {
    const { height, width, patch, rows, files } = this;
    let top = image;
    const added = files["added.npy"];
    if (added !== undefined)
      top = { width, height, data: Uint8Array.from(image.data, (level, i) => toUint8(level + added.data[i])) };
    if (this.session === null) return top;
    if (this.shrink !== undefined) top = shrunk(top, this.shrink, this.manifest.prompts.round_pixels === false ? 0 : TIE);
    const input = new ort.Tensor("uint8", image.data, [1, height, width, 3]);
    const weights = (await this.session.run({ image: input })).weights;
    if (!weights.data.every(Number.isFinite)) throw new Error("generator.onnx made weights that are not finite");
    const [count, entries] = weights.dims, size = 3 * patch * patch, columns = width / patch;
    const data = new Uint8Array(top.data.length + rows * patch * width * 3);
    data.set(top.data);
    const offset = files["offset.npy"];
    const mixed = new Float64Array(size);
    for (let k = 0; k < count; k++) {
      mixed.fill(0);
      for (let m = 0; m < entries; m++) {
        const weight = weights.data[k * entries + m];
        for (let i = 0; i < size; i++) mixed[i] += weight * this.library[m * size + i];
      }
      const row = Math.floor(k / columns) * patch, column = (k % columns) * patch;
      for (let i = 0; i < size; i++) {
        const channel = Math.floor(i / (patch * patch)), y = Math.floor(i / patch) % patch, x = i % patch;
        const level = mixed[i] + (offset === undefined ? 0 : offset.data[k * size + i]);
        data[((top.height + row + y) * width + column + x) * 3 + channel] = toUint8(level);
      }
    }
    return { width, height: top.height + rows * patch, data };
  }

  // That this browser makes the golden picture that the exporting machine made, to one level, and keeps its pixels: some
  // browsers change what a page reads from a canvas.
  async checkBrowser() {
    const golden = await decode(new Blob([this.files["golden_picture.png"]], { type: "image/png" }));
    const { picture } = await this.picture(new Blob([this.files["golden_image.png"]], { type: "image/png" }));
    const kept = await decode(await pngBlob(picture));
    if (kept.data.some((level, i) => level !== picture.data[i]))
      throw new Error("this browser changes pixels on a canvas (protection against fingerprinting does), so the host would "
                      + "get another picture: allow this page to read canvases, or use another browser");
    if (golden.width !== picture.width || golden.height !== picture.height
        || golden.data.some((level, i) => Math.abs(level - picture.data[i]) > 1))
      throw new Error("golden_picture.png is not the picture that this browser makes of golden_image.png: the model's "
                      + "files do not belong together, or the browser computes something else");
  }

  // A picture's embedding by the host, Float32Array.
  async embed(url, picture, key = "") {
    const base = hostBase(url), model = this.verified.get(base), { width } = this.manifest.backbone;
    const vector = await this.request(base, await pngUrl(picture), key, model);
    if (vector.length !== width) throw new Error(`${base} returned ${vector.length} numbers, the model has ${width}`);
    return vector;
  }

  async request(base, png, key, model) {
    const { data } = await call(base + "/v1/embeddings", key, { input: png, encoding_format: "base64", model });
    if (!Array.isArray(data) || data.length !== 1) throw new Error(`${base} returned no embedding`);
    const vector = numbersOf(data[0]?.embedding);
    if (vector === null) throw new Error(`${base} returned an embedding that is neither a list of numbers nor base64`);
    if (vector.length === 0 || !vector.every(Number.isFinite))
      throw new Error(`${base} returned an embedding that is empty or not finite`);
    return vector;
  }

  // {ok, cosine, likely, message} for the host, by its embedding of the golden picture.
  async verify(url, key = "") {
    const base = hostBase(url);
    this.verified.delete(base);
    let models = [];
    try {
      const { data } = await call(base + "/v1/models", key);
      models = Array.isArray(data) ? data.filter((entry) => typeof entry?.id === "string") : [];
    } catch { /* a host need not list what it has */ }
    const backbones = models.filter((entry) => (entry.object ?? "model") === "model");
    const model = (backbones.find((entry) => entry.fingerprint === this.manifest.backbone.fingerprint)
                   ?? (backbones.length === 1 ? backbones[0] : undefined))?.id;
    const golden = "data:image/png;base64," + base64(new Uint8Array(this.files["golden_picture.png"]));
    const found = this.judge(await this.request(base, golden, key, model), base);
    if (found.ok) this.verified.set(base, model);
    return found;
  }

  judge(embedding, who) {
    const right = this.files["golden_embedding.npy"].data, { threshold, mistakes } = this.manifest.golden;
    if (embedding.length !== right.length)
      return { ok: false, cosine: NaN, likely: "another model", message:
        `${who} is refused: its embeddings have ${embedding.length} numbers, not ${right.length}. Likely: another model.` };
    const cos = cosine(right, embedding), measured = `the cosine of its embedding and the right one is ${cos.toFixed(6)}`;
    const refused = (likely, why) => ({ ok: false, cosine: cos, likely, message:
      `${who} is refused: ${measured}${why}. Likely: ${likely ?? "unknown"}.` });
    const all = this.files["mistakes.npy"].data, distance = (c) => Math.sqrt(Math.max(0, 2 - 2 * c));
    const far = mistakes.map((_, i) => distance(cosine(all.subarray(i * right.length, (i + 1) * right.length), embedding)));
    const nearest = far.indexOf(Math.min(...far)), away = distance(cos);
    const known = nearest >= 0 && away > NOISE && far[nearest] <= NEAR, part = known ? far[nearest] / away : Infinity;
    if (part <= SURE || (cos < threshold && part <= LIKELY))
      return refused(mistakes[nearest].name, `; that of a mistake is nearer (${mistakes[nearest].detail})`);
    if (cos < threshold && known)
      return refused(null, `, below the threshold ${threshold}; the nearest mistake is ${mistakes[nearest].name} `
                           + `(${mistakes[nearest].detail})`);
    if (cos < threshold) return refused("another model", `, below the threshold ${threshold}`);
    const length = norm(embedding) / norm(right);
    if (Math.abs(length - 1) > LENGTH && !this.ignoresLength())
      return refused("scaled embeddings", `, but its length is ${length.toPrecision(3)} times the right one`);
    return { ok: true, cosine: cos, likely: null, message: `${who} is right: ${measured}.` };
  }

  ignoresLength() {
    const head = this.manifest.head;
    return head?.kind === "cosine" && head.layers <= 1
      && (head.layers === 0 || this.files["projection0_bias.npy"].data.every((b) => b === 0));
  }

  // Features of the host → [{name, probability}, ...], the most probable first.
  classify(features) {
    const head = this.manifest.head;
    if (head === null) throw new Error("the model has no head");
    let x = Array.from(features), logits;
    if (head.kind === "linear") {
      logits = product(this.files["head_weight.npy"], x).map((v, i) => v + this.files["head_bias.npy"].data[i]);
    } else {
      for (let i = 0; i < head.layers; i++) {
        const bias = this.files[`projection${i}_bias.npy`].data;
        x = product(this.files[`projection${i}_weight.npy`], i > 0 ? x.map(gelu) : x).map((v, j) => v + bias[j]);
      }
      const length = Math.max(norm(x), 1e-12);
      logits = product(this.files["class_embeddings.npy"], x.map((v) => v / length)).map((v) => head.scale * v);
    }
    const largest = Math.max(...logits), exp = logits.map((v) => Math.exp(v - largest));
    const total = exp.reduce((a, b) => a + b, 0);
    return exp.map((v, i) => ({ name: this.classNames[i], probability: v / total }))
      .sort((a, b) => b.probability - a.probability);
  }
}

// ---------------------------------------------------------------- pixels

// Any image file that the browser reads, upright, over white.
export async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`the image has ${width} x ${height} pixels, ${MAX_PIXELS} are taken`);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data, data = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    data[j++] = rgba[i];
    data[j++] = rgba[i + 1];
    data[j++] = rgba[i + 2];
  }
  return { width, height, data };
}

// Bicubic with antialiasing to [height, width], columns before rows, in Pillow's integer arithmetic.
export function resized(image, [height, width], resize) {
  let [rows, columns] = [height, width];
  if (resize === "crop") {
    const scale = Math.max(height / image.height, width / image.width);
    rows = Math.max(height, roundEven(image.height * scale));
    columns = Math.max(width, roundEven(image.width * scale));
    if (rows * columns > LARGEST_COVER)
      throw new Error(`the image has ${image.width} x ${image.height} pixels, an aspect ratio that is too extreme to crop`);
  }
  const wide = image.width === columns ? image : resampleRows(image, columns);
  const full = image.height === rows ? wide : transposed(resampleRows(transposed(wide), rows));
  const top = roundEven((rows - height) / 2), left = roundEven((columns - width) / 2);
  const data = new Uint8Array(height * width * 3);
  for (let y = 0; y < height; y++) {
    const start = ((top + y) * columns + left) * 3;
    data.set(full.data.subarray(start, start + width * 3), y * width * 3);
  }
  return { width, height, data };
}

function resampleRows(image, width) {
  const scale = image.width / width, stretch = Math.max(scale, 1), support = 2 * stretch;
  const data = new Uint8Array(width * image.height * 3);
  for (let x = 0; x < width; x++) {
    const center = (x + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const count = Math.min(Math.trunc(center + support + 0.5), image.width) - first;
    const taps = Array.from({ length: count }, (_, i) => bicubic((i + first - center + 0.5) * (1 / stretch)));
    let total = 0;
    for (const tap of taps) total += tap;
    const whole = taps.map((tap) => Math.trunc((tap / total) * 2 ** 22 + (tap / total < 0 ? -0.5 : 0.5)));
    for (let y = 0; y < image.height; y++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** 21;
        for (let i = 0; i < count; i++) sum += image.data[(y * image.width + first + i) * 3 + channel] * whole[i];
        data[(y * width + x) * 3 + channel] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** 22)));
      }
    }
  }
  return { width, height: image.height, data };
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

function transposed({ width, height, data }) {
  const turned = new Uint8Array(data.length);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let channel = 0; channel < 3; channel++)
        turned[(x * height + y) * 3 + channel] = data[(y * width + x) * 3 + channel];
  return { width: height, height: width, data: turned };
}

// For each of `next` rows the rows it is a mean of, and their weights: antialiased bilinear resampling of `old` rows.
function shrinkWeights(old, next) {
  const scale = old / next;
  return Array.from({ length: next }, (_, i) => {
    const middle = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(middle - scale + 0.5), 0);
    const count = Math.min(Math.trunc(middle + scale + 0.5), old) - first;
    const weights = Array.from({ length: count }, (_, tap) =>
      Math.max(1 - Math.abs(first + tap + 0.5 - middle) / scale, 0));
    let total = 0;
    for (const weight of weights) total += weight;
    return { first, weights: weights.map((weight) => weight / total) };
  });
}

function shrunk({ width, data }, rows, tie) {
  const line = width * 3, small = new Uint8Array(rows.length * line);
  rows.forEach(({ first, weights }, y) => {
    for (let x = 0; x < line; x++) {
      let sum = 0;
      weights.forEach((weight, tap) => { sum += weight * data[(first + tap) * line + x]; });
      small[y * line + x] = toUint8(sum - tie);
    }
  });
  return { width, height: rows.length, data: small };
}

function roundEven(x) {
  const below = Math.floor(x), part = x - below;
  return part === 0.5 ? below + (below % 2 !== 0 ? 1 : 0) : Math.round(x);
}

function toUint8(level) {
  return Math.min(255, Math.max(0, roundEven(level)));
}

// A picture on a canvas, and as the data URL of a PNG file.
export function draw(canvas, { width, height, data }) {
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    pixels.data.set(data.subarray(3 * i, 3 * i + 3), 4 * i);
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

async function pngBlob(picture) {
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  draw(canvas, picture);
  return canvas.convertToBlob({ type: "image/png" });
}

async function pngUrl(picture) {
  const blob = await pngBlob(picture);
  return "data:image/png;base64," + base64(new Uint8Array(await blob.arrayBuffer()));
}

// ---------------------------------------------------------------- numbers

function product({ shape: [rows, columns], data }, x) {
  return Array.from({ length: rows }, (_, i) => {
    let sum = 0;
    for (let j = 0; j < columns; j++) sum += data[i * columns + j] * x[j];
    return sum;
  });
}

function norm(x) {
  return Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
}

function cosine(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum / Math.max(norm(a) * norm(b), 1e-30);
}

// x Φ(x); the error function by Abramowitz and Stegun 7.1.26, to 1.5e-7.
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
  const poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const erf = 1 - poly * Math.exp(-z * z);
  return x * 0.5 * (1 + (x < 0 ? -erf : erf));
}

// ---------------------------------------------------------------- files and the host

async function fetched(url) {
  const response = await fetch(url, { cache: "no-cache" });
  if (!response.ok) throw new Error(`${url.pathname} cannot be read: ${response.status}`);
  return response.arrayBuffer();
}

async function sha256(content) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// A .npy file of uint8, float16 or float32, rows first.
export function parseNpy(name, content) {
  const view = new DataView(content), version = view.getUint8(6);
  const start = version === 1 ? 10 : 12;
  const length = version === 1 ? view.getUint16(8, true) : view.getUint32(8, true);
  const header = new TextDecoder().decode(new Uint8Array(content, start, length));
  const type = /'descr': '([^']+)'/.exec(header)?.[1], shape = /'shape': \(([^)]*)\)/.exec(header)?.[1];
  if (type === undefined || shape === undefined || !header.includes("'fortran_order': False"))
    throw new Error(`${name} is no array that this page reads`);
  const body = content.slice(start + length), sides = shape.split(",").filter((s) => s.trim() !== "").map(Number);
  const readers = { "|u1": (b) => new Uint8Array(b), "<f4": (b) => new Float32Array(b),
                    "<f2": (b) => Float32Array.from(new Uint16Array(b), half) };
  if (!(type in readers)) throw new Error(`${name} has numbers of kind ${type}, which this page does not read`);
  const data = readers[type](body);
  if (data.length !== sides.reduce((a, b) => a * b, 1)) throw new Error(`${name} is damaged: its size is not its shape's`);
  if (!data.every(Number.isFinite)) throw new Error(`${name} contains NaN or infinite values`);
  return { shape: sides, data };
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return NaN;
  return exponent === 0 ? sign * fraction * 2 ** -24 : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function base64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

// An embedding as JSON has it, a list of numbers or base64 of float32 → Float32Array; null for anything else.
function numbersOf(value) {
  if (Array.isArray(value)) return value.every((entry) => typeof entry === "number") ? Float32Array.from(value) : null;
  if (typeof value !== "string") return null;
  try {
    return new Float32Array(Uint8Array.from(atob(value), (c) => c.charCodeAt(0)).buffer);
  } catch {
    return null;
  }
}

function hostBase(url) {
  let parsed = null;
  try {
    parsed = new URL(url);
  } catch { /* named below */ }
  if (!["http:", "https:"].includes(parsed?.protocol))
    throw new Error(`the host must be http://HOST or https://HOST, got ${url}`);
  if (parsed.username || parsed.password) throw new Error("the host's address must not hold a user or password");
  if (parsed.search) throw new Error("the host's address must not have a query (?…)");
  return (parsed.origin + parsed.pathname).replace(/\/+$/, "").replace(/\/v1(\/embeddings)?$/, "");
}

async function call(url, key, body) {
  const headers = { Accept: "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response, text;
  try {
    response = await fetch(url, { method: body === undefined ? "GET" : "POST", headers, redirect: "error",
                                  body: body === undefined ? undefined : JSON.stringify(body),
                                  signal: AbortSignal.timeout(30_000) });
    text = await response.text();
  } catch (error) {
    throw new Error(`${url} cannot be reached from this page: ${error.message} (a host of another origin has to allow it)`);
  }
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch { /* named below */ }
  if (!response.ok) throw new Error(`${url} answered ${response.status}: ${answer?.error?.message ?? response.statusText}`);
  if (answer === null || typeof answer !== "object") throw new Error(`${url} answered no JSON object`);
  return answer;
}

// The page: ?folder=ADDRESS of what `fastprompt export --client` wrote (default "model"), ?host=ADDRESS.

import { draw, loadClient } from "./client.js";

const query = new URLSearchParams(location.search);
const $ = (id) => document.getElementById(id);
$("url").value = query.get("host") ?? location.origin;
let runs = 0;

function say(id, text, failed = false) {
  $(id).textContent = text;
  $(id).classList.toggle("error", failed);
}

// `work(run)` with the host as the page has it now. A later run takes over: the earlier one shows nothing more, and sends
// nothing more once `run.on()` is false.
async function run(work) {
  const number = ++runs, on = () => number === runs;
  say("state", "…");
  say("verification", "");
  $("verify").disabled = true;
  try {
    await work({ url: $("url").value, key: $("key").value, on });
  } catch (error) {
    if (on()) say("state", error.message, true);
  }
  if (on()) $("verify").disabled = false;
}

async function verified(client, { url, key, on }) {
  const found = await client.verify(url, key);
  if (!on()) return false;
  say("verification", found.message, !found.ok);
  return found.ok;
}

async function show(client, file, { url, key, on }) {
  $("class").textContent = "–";
  $("probabilities").replaceChildren();
  const { image, picture } = await client.picture(file);
  if (!on()) return;
  draw($("image"), image);
  draw($("picture"), picture);
  if (!await verified(client, { url, key, on })) return on() && say("state", "Not sent: the host was refused.", true);
  const features = await client.embed(url, picture, key);
  if (!on()) return;
  if (client.classNames === null) return say("state", `Done: ${features.length} features, the model has no head.`);
  const classes = client.classify(features);
  $("class").textContent = classes[0].name;
  for (const { name, probability } of classes.slice(0, 10)) {
    const row = $("probabilities").insertRow();
    row.insertCell().textContent = name;
    row.insertCell().textContent = probability.toFixed(4);
  }
  say("state", "Done.");
}

try {
  const client = await loadClient(query.get("folder") ?? "model");
  $("verify").addEventListener("click", () => run(async (now) => {
    const ok = await verified(client, now);
    if (now.on()) say("state", ok ? "Verified." : "The host was refused.", !ok);
  }));
  $("file").addEventListener("change", () => {
    const file = $("file").files[0];
    if (file !== undefined) run((now) => show(client, file, now));
  });
  $("file").disabled = false;
  say("state", `Ready: pictures of ${client.manifest.picture_size.join(" x ")} pixels for ${client.manifest.backbone.name}.`);
} catch (error) {
  say("state", error.message, true);
}

// The page: ?folder=ADDRESS of what `fastprompt export --client` wrote (default "model"), ?host=ADDRESS.

import { draw, loadClient } from "./client.js";

const query = new URLSearchParams(location.search);
const $ = (id) => document.getElementById(id);
$("url").value = query.get("host") ?? location.origin;

function say(id, text, failed = false) {
  $(id).textContent = text;
  $(id).classList.toggle("error", failed);
}

async function verified(client) {
  const found = await client.verify($("url").value, $("key").value);
  say("verification", found.message, !found.ok);
  return found.ok;
}

async function show(client, file) {
  say("state", "…");
  $("class").textContent = "–";
  $("probabilities").replaceChildren();
  const { image, picture } = await client.picture(file);
  draw($("image"), image);
  draw($("picture"), picture);
  if (!await verified(client)) return say("state", "Not sent: the host was refused.", true);
  const features = await client.embed($("url").value, picture, $("key").value);
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
  const run = (work) => work().catch((error) => say("state", error.message, true));
  $("verify").addEventListener("click", () => run(() => verified(client)));
  $("file").addEventListener("change", () => $("file").files.length && run(() => show(client, $("file").files[0])));
  $("file").disabled = false;
  say("state", `Ready: pictures of ${client.manifest.picture_size.join(" x ")} pixels for ${client.manifest.backbone.name}.`);
} catch (error) {
  say("state", error.message, true);
}

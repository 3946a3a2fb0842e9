// The page: four views, chosen by the address's fragment; `#video_…` is a video being watched.
// @ts-check

import { showGallery } from "./gallery.js";
import { showLive } from "./live.js";
import { showLoad } from "./load.js";
import { askJson, create } from "./service.js";
import { watch } from "./watching.js";

const EXAMPLES = [
  "a red ball bouncing on a sand floor at sunset",
  "a large blue cube spinning on a grey floor at noon",
  "a small cyan cone moving left on a navy floor at night",
  "a green cylinder moving closer on a grey floor at noon",
];
const VIEWS = ["make", "live", "gallery", "load"];
const NUMBERS = ["seconds", "num_inference_steps", "guidance_scale", "seed"];

/** @param {string} id @returns {any} */
const find = (id) => document.getElementById(id);
/** What the view in front has running. */
let showing = new AbortController();

function fillExamples() {
  for (const prompt of EXAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => { find("prompt").value = prompt; find("prompt").focus(); });
    find("examples").append(button);
  }
}

async function fillModels() {
  const { data } = await askJson("v1/models");
  const chosen = find("model").value;
  find("model").replaceChildren(...data.map((/** @type {any} */ model) => new Option(model.id)));
  if (data.some((/** @type {any} */ model) => model.id === chosen)) find("model").value = chosen;
  const limit = () => {
    const { limits, decoders } = data.find((/** @type {any} */ model) => model.id === find("model").value) ?? {};
    if (!limits) return;
    find("decoders").hidden = !decoders?.includes("tiny");
    if (find("decoders").hidden) find("decoder").value = "";
    find("seconds").max = limits.max_seconds;
    find("num_inference_steps").max = limits.max_steps ?? "";
    find("seconds").placeholder = limits.default_seconds ?? "";
    find("size").placeholder = limits.default_size ?? "";
  };
  find("model").addEventListener("change", limit);
  limit();
}

/** @param {SubmitEvent} submitted */
async function makeOne(submitted) {
  submitted.preventDefault();
  const form = /** @type {HTMLFormElement} */ (submitted.target);
  /** @type {Record<string, unknown>} */
  const body = {};
  for (const [name, value] of new FormData(form)) {
    if (value !== "") body[name] = NUMBERS.includes(name) ? Number(value) : value;
  }
  const button = /** @type {HTMLButtonElement} */ (form.querySelector("[type=submit]"));
  button.disabled = true;
  find("refused").textContent = "";
  try {
    location.hash = (await create(body)).id;
  } catch (error) {
    find("refused").textContent = error instanceof Error ? error.message : String(error);
  } finally {
    button.disabled = false;
  }
}

function show() {
  const wanted = location.hash.slice(1) || "make";
  const video = wanted.startsWith("video_") ? wanted : null;
  const view = video ? "make" : VIEWS.includes(wanted) ? wanted : "make";
  showing.abort();
  showing = new AbortController();
  for (const name of VIEWS) find(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    link.toggleAttribute("aria-current", /** @type {HTMLElement} */ (link).dataset.view === view);
  }
  const shown = { make: video ? watch : null, live: showLive, gallery: showGallery, load: showLoad }[view];
  find("watching").hidden = video === null;
  shown?.(showing.signal, video ?? "").catch((error) => {
    if (error.name !== "AbortError") find("refused").textContent = error.message;
  });
}

find("key").value = sessionStorage.getItem("key") ?? "";
find("key").addEventListener("change", () => {
  sessionStorage.setItem("key", find("key").value.trim());
  fillModels().then(show, show);
});
find("ask").addEventListener("submit", makeOne);
addEventListener("hashchange", show);
fillExamples();
fillModels().catch((error) => { find("refused").textContent = error.message; });
show();

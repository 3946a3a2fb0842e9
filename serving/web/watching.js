// One video being watched: the player, a lane for each stage, and what is known of it.
// @ts-check

import { VideoFailed } from "./fragments.js";
import { play } from "./player.js";
import { ask, askJson, events, objectUrl } from "./service.js";

/** @param {string} id @returns {any} */
const find = (id) => document.getElementById(id);
const SHOWN = ["prompt", "revised_prompt", "model", "size", "seconds", "seed", "num_inference_steps", "guidance_scale"];

/** @param {AbortSignal} signal @param {string} id */
export async function watch(signal, id) {
  const element = /** @type {HTMLVideoElement} */ (find("player"));
  reset();
  find("cancel").onclick = () => ask(`v1/videos/${id}/cancel`, { method: "POST" }).catch(say);
  const playing = play(element, id, signal).catch((error) => {
    if (!(error instanceof VideoFailed)) throw error; // its events say so too
  });
  describe(await askJson(`v1/videos/${id}`, { signal }));
  for await (const event of events(id, signal)) tell(event, element);
  const video = await askJson(`v1/videos/${id}`, { signal });
  describe(video);
  await playing;
  if (video.status === "completed") {
    find("download").href = await objectUrl(`v1/videos/${id}/content`);
    find("download").download = `${id}.mp4`;
    find("download").hidden = false;
  }
}

function reset() {
  find("state").textContent = "Waiting";
  find("lane-queue").textContent = "";
  find("lane-denoise").value = 0;
  find("lane-steps").textContent = "";
  find("lane-decode").replaceChildren();
  find("download").hidden = true;
  find("cancel").disabled = false;
  find("facts").replaceChildren();
}

/** @param {import("./service.js").ServerEvent} event @param {HTMLVideoElement} element */
function tell(event, element) {
  const { data } = event;
  if (event.name === "queued") {
    find("lane-queue").textContent = data.position ? `${data.position} ahead` : "next";
    find("state").textContent = "In the queue";
  } else if (event.name === "started") {
    find("lane-queue").textContent = data.attempt > 1 ? `through, try ${data.attempt}` : "through";
    find("state").textContent = "Being made";
  } else if (event.name === "progress") {
    find("lane-denoise").value = data.progress;
    find("lane-steps").textContent = data.steps ? `${data.step} of ${data.steps}` : "";
  } else if (event.name === "chunk") {
    const seconds = data.start_seconds + data.seconds;
    find("state").textContent = `${seconds.toFixed(1)} s to watch`;
    const early = coming(data.index);
    if (early) early.replaceWith(chunk(data, element));
    else find("lane-decode").append(chunk(data, element));
  } else if (event.name === "preview") {
    if (!coming(data.index)) find("lane-decode").append(preview(data));
  } else {
    find("cancel").disabled = true;
    if (event.name === "completed") find("lane-denoise").value = 100;
    if (!find("lane-queue").textContent) find("lane-queue").textContent = "through";
    find("state").textContent = event.name === "failed" ? `Failed: ${data.error.message}` : "Finished";
  }
}

/** A chunk that can't be watched yet, if it was shown. @param {number} index @returns {any} */
function coming(index) {
  return find("lane-decode").querySelector(`[data-coming="${index}"]`);
}

/** What a chunk's latents look like, until it is decoded. @param {any} data */
function preview(data) {
  const picture = new Image();
  picture.src = data.preview;
  picture.alt = `Chunk ${data.index + 1}, not decoded yet`;
  picture.dataset.coming = data.index;
  return picture;
}

/** A chunk's first frame; pressing it goes there. @param {any} data @param {HTMLVideoElement} element */
function chunk(data, element) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = `from ${data.start_seconds.toFixed(2)} s`;
  const picture = new Image();
  picture.src = data.preview;
  picture.alt = `Chunk ${data.index + 1}, ${button.title}`;
  button.append(picture);
  button.addEventListener("click", () => { element.currentTime = data.start_seconds; });
  return button;
}

/** @param {any} video */
function describe(video) {
  find("facts").replaceChildren(
    ...SHOWN.filter((name) => video[name] !== null && video[name] !== undefined).flatMap((name) => {
      const term = document.createElement("dt");
      const value = document.createElement("dd");
      term.textContent = name.replaceAll("_", " ");
      value.textContent = video[name];
      return [term, value];
    }),
  );
  const [width, height] = video.size.split("x");
  find("player").style.aspectRatio = `${width} / ${height}`;
  find("again").onclick = () => {
    for (const name of SHOWN) if (find(name)) find(name).value = video[name];
    find("prompt").focus();
  };
}

/** @param {Error} error */
function say(error) {
  find("state").textContent = error.message;
}

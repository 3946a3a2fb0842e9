// An interactive session: an endless video whose prompt may be changed while it plays.
// @ts-check

import { canPlayLive, playFragments } from "./player.js";
import { askJson } from "./service.js";

/** @param {string} id @returns {any} */
const find = (id) => document.getElementById(id);
const OPEN = ["live-pause", "live-stop"];
const NUMBERS = ["num_inference_steps", "seed"];

/** The connection, while there is a session. @type {WebSocket | null} */
let socket = null;
let paused = false;

/** @param {AbortSignal} signal */
export async function showLive(signal) {
  signal.addEventListener("abort", () => socket?.close(), { once: true });
  find("live-ask").onsubmit = (/** @type {SubmitEvent} */ submitted) => {
    submitted.preventDefault();
    if (socket) say("session.update", { session: { prompt: find("live-prompt").value } });
    else begin(signal);
  };
  find("live-pause").onclick = () => say(paused ? "session.resume" : "session.pause");
  find("live-stop").onclick = () => say("session.stop");
  const { data } = await askJson("v1/models", { signal });
  const models = data.filter((/** @type {any} */ model) => model.realtime);
  find("live-model").replaceChildren(...models.map((/** @type {any} */ model) => new Option(model.id)));
  const possible = models.length > 0 && canPlayLive;
  find("live-begin").disabled = !possible;
  if (!possible) tell(models.length ? "This browser can't play a live session." : "No causal model is served here.");
}

/** @param {string} kind @param {object} [fields] */
function say(kind, fields = {}) {
  socket?.send(JSON.stringify({ type: kind, ...fields }));
}

/** @param {string} words */
function tell(words) {
  find("live-state").textContent = words;
}

/** @param {boolean} open */
function show(open) {
  for (const id of OPEN) find(id).disabled = !open;
  find("live-begin").textContent = open ? "Change the prompt" : "Begin";
  find("live-settings").disabled = open;
  paused = false;
  find("live-pause").textContent = "Pause";
}

/** @param {AbortSignal} signal */
function begin(signal) {
  const form = new FormData(find("live-ask"));
  /** @type {Record<string, unknown>} */
  const session = {};
  for (const [name, value] of form) if (value !== "") session[name] = NUMBERS.includes(name) ? Number(value) : value;
  const url = new URL("v1/realtime", document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  const key = sessionStorage.getItem("key");
  const opened = new WebSocket(url, key ? ["realtime", `rushes-api-key.${key}`] : ["realtime"]);
  opened.binaryType = "arraybuffer";
  socket = opened;
  show(true);
  tell("Connecting");
  find("live-prompts").replaceChildren();
  opened.onopen = () => say("session.create", { session });
  const playing = playFragments(find("live-player"), fragments(opened), signal, true);
  playing.catch((error) => { if (error.name !== "AbortError") tell(error.message); }).finally(() => opened.close());
}

/**
 * What the session sends, each acknowledged when the player has taken it; ends with the connection.
 * @param {WebSocket} opened @returns {AsyncGenerator<import("./fragments.js").Fragment>}
 */
async function* fragments(opened) {
  /** @type {any[]} */
  const messages = [];
  let wake = () => {};
  opened.onmessage = ({ data }) => { messages.push(data); wake(); };
  opened.onclose = () => { messages.push(null); wake(); };
  let init = new Uint8Array(0);
  /** @type {any} */
  let announced = null;
  let ended = "The connection was lost";
  while (true) {
    while (!messages.length) await new Promise((resolve) => { wake = () => resolve(undefined); });
    const message = messages.shift();
    if (message === null) break;
    if (typeof message === "string") {
      const event = JSON.parse(message);
      if (event.type === "init" || event.type === "fragment") announced = event;
      else if (event.type === "session.ended") ended = `Ended. ${event.message}`;
      else if (event.type === "error" && !announced) { ended = event.error.message; opened.close(); }
      else heard(event);
    } else if (announced.type === "init") init = new Uint8Array(message);
    else {
      yield { index: announced.index, init, data: new Uint8Array(message) };
      came(announced);
      if (opened.readyState === WebSocket.OPEN) say("fragment.ack", { index: announced.index });
    }
  }
  if (socket === opened) socket = null;
  show(false);
  tell(ended);
}

/** @param {any} event */
function heard(event) {
  if (event.type === "session.created") tell("The first chunk is being made");
  else if (event.type === "session.updated") tell("The new prompt comes with the next chunk");
  else if (event.type === "error") tell(event.error.message);
  else if (event.type === "session.paused" || event.type === "session.resumed") {
    paused = event.type === "session.paused";
    find("live-pause").textContent = paused ? "Resume" : "Pause";
    if (paused) find("live-player").pause();
    else find("live-player").play().catch(() => {}); // a browser that wants a click first shows its button
    tell(paused ? "Paused" : "Going on");
  }
}

/** @param {any} fragment */
function came(fragment) {
  if (!paused) tell(`${(fragment.start_seconds + fragment.seconds).toFixed(1)} s made`);
  if (!fragment.prompt_changed) return;
  const line = document.createElement("li");
  line.textContent = `${fragment.start_seconds.toFixed(1)} s: ${fragment.prompt}`;
  find("live-prompts").append(line);
}

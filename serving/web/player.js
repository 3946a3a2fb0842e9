// Plays a video while it is made, through Media Source Extensions.
// @ts-check

import { fragments, mimeOf } from "./fragments.js";
import { objectUrl } from "./service.js";

// Safari on phones has it under another name.
const Source = /** @type {typeof MediaSource | undefined} */ (
  /** @type {any} */ (window).ManagedMediaSource ?? window.MediaSource
);
// What was played so long ago may go when there is no room.
const KEPT_SECONDS = 30;

/** @typedef {import("./fragments.js").Fragment} Fragment */

/** Whether this browser can play what isn't finished. */
export const canPlayLive = Source !== undefined;

/**
 * Show the video from its first fragment on, until its end or until `signal`. Throws `VideoFailed`.
 * @param {HTMLVideoElement} element @param {string} id @param {AbortSignal} signal
 */
export async function play(element, id, signal) {
  if (canPlayLive) return playFragments(element, fragments(id, signal), signal);
  // Wait for the file.
  for await (const _ of fragments(id, signal));
  element.src = await objectUrl(`v1/videos/${id}/content`);
}

/**
 * Show fragments as they come, for as long as they come. What was played some time ago is forgotten if `endless`.
 * @param {HTMLVideoElement} element @param {AsyncIterable<Fragment>} coming @param {AbortSignal} signal
 * @param {boolean} [endless]
 */
export async function playFragments(element, coming, signal, endless = false) {
  if (!Source) throw new Error("This browser can't play a video that isn't finished.");
  const source = new Source();
  /** @type {any} */ (element).disableRemotePlayback = true;
  element.src = URL.createObjectURL(source);
  signal.addEventListener("abort", () => URL.revokeObjectURL(element.src), { once: true });
  await once(source, "sourceopen", signal);
  /** @type {SourceBuffer | null} */
  let buffer = null;
  try {
    for await (const fragment of coming) {
      if (buffer === null) {
        buffer = source.addSourceBuffer(mimeOf(fragment.init));
        await append(buffer, fragment.init, element, signal);
      }
      await append(buffer, fragment.data, element, signal);
      if (endless && element.currentTime > buffer.buffered.start(0) + 2 * KEPT_SECONDS) {
        buffer.remove(0, element.currentTime - KEPT_SECONDS);
        await once(buffer, "updateend", signal);
      }
      if (fragment.index === 0) element.play().catch(() => {}); // a browser that wants a click first shows its button
    }
  } finally {
    if (source.readyState === "open" && !signal.aborted) source.endOfStream();
  }
}

/** @param {SourceBuffer} buffer @param {Uint8Array} bytes @param {HTMLVideoElement} element @param {AbortSignal} signal */
async function append(buffer, bytes, element, signal) {
  while (true) {
    try {
      buffer.appendBuffer(/** @type {BufferSource} */ (bytes));
      await once(buffer, "updateend", signal);
      return;
    } catch (error) {
      if (!(error instanceof DOMException) || error.name !== "QuotaExceededError") throw error;
      if (element.currentTime > KEPT_SECONDS) {
        buffer.remove(0, element.currentTime - KEPT_SECONDS);
        await once(buffer, "updateend", signal);
      }
      await once(element, "timeupdate", signal);
    }
  }
}

/** @param {EventTarget} target @param {string} name @param {AbortSignal} signal @returns {Promise<void>} */
function once(target, name, signal) {
  return new Promise((resolve, reject) => {
    target.addEventListener(name, () => resolve(), { once: true, signal });
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

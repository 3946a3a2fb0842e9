// A video's stream as whole fragments, over as many connections as it takes: none twice, none left out.
// @ts-check

import { Refused, ask, askJson, pause } from "./service.js";

/** @typedef {{index: number, init: Uint8Array, data: Uint8Array}} Fragment */

const ERROR_SCHEME = "urn:rushes:error:2026";

export class VideoFailed extends Error {}

/** Top-level boxes of an MP4 that comes in pieces (ISO/IEC 14496-12, 4.2). */
class Boxes {
  #held = new Uint8Array(0);

  /** @param {Uint8Array} piece @returns {Generator<{kind: string, bytes: Uint8Array}>} */
  *feed(piece) {
    this.#held = joined(this.#held, piece);
    while (this.#held.length >= 8) {
      const size = new DataView(this.#held.buffer, this.#held.byteOffset).getUint32(0);
      if (this.#held.length < size) return;
      const bytes = this.#held.slice(0, size);
      this.#held = this.#held.slice(size);
      yield { kind: String.fromCharCode(...bytes.subarray(4, 8)), bytes };
    }
  }
}

/**
 * Each fragment as soon as it is there; ends with the video. Throws `VideoFailed`.
 * @param {string} id @param {AbortSignal} signal
 * @returns {AsyncGenerator<Fragment>}
 */
export async function* fragments(id, signal) {
  let next = 0;
  while (true) {
    try {
      const answer = await ask(`v1/videos/${id}/stream?from_fragment=${next}`, { signal });
      const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
      const boxes = new Boxes();
      let init = new Uint8Array(0);
      let head = new Uint8Array(0);
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        for (const { kind, bytes } of boxes.feed(part.value)) {
          if (kind === "ftyp" || kind === "moov") init = joined(init, bytes);
          else if (kind === "moof") head = bytes;
          else if (kind === "emsg") said(bytes);
          else if (kind === "mdat") {
            // `mfhd` is a `moof`'s first box; its number counts from 1.
            const index = new DataView(head.buffer).getUint32(20) - 1;
            if (index !== next) continue;
            next += 1;
            yield { index, init, data: joined(head, bytes) };
          }
        }
      }
      const video = await askJson(`v1/videos/${id}`, { signal });
      if (video.status === "failed") throw new VideoFailed(video.error.message);
      if (video.status === "completed") return;
    } catch (error) {
      if (signal.aborted || error instanceof Refused || error instanceof VideoFailed) throw error;
    }
    await pause(300, signal);
  }
}

/** The RFC 6381 name of what is in an init segment. @param {Uint8Array} init */
export function mimeOf(init) {
  for (let at = 0; at + 8 < init.length; at += 1) {
    if (init[at] === 0x61 && init[at + 1] === 0x76 && init[at + 2] === 0x63 && init[at + 3] === 0x43) {
      const profile = Array.from(init.subarray(at + 5, at + 8), (byte) => byte.toString(16).padStart(2, "0")).join("");
      return `video/mp4; codecs="avc1.${profile}"`;
    }
  }
  throw new Error("The stream has no H.264 in it.");
}

/** Throws the error that an event message box says. @param {Uint8Array} box */
function said(box) {
  const [scheme, , data] = new TextDecoder().decode(box.subarray(32)).split("\0");
  if (scheme === ERROR_SCHEME) throw new VideoFailed(JSON.parse(data).message);
}

/** @param {Uint8Array} first @param {Uint8Array} second */
function joined(first, second) {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

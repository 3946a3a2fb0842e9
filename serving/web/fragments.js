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
  const box = (/** @type {string} */ kind) => {
    for (let at = 0; at + 12 < init.length; at += 1) {
      if (String.fromCharCode(...init.subarray(at, at + 4)) === kind) return init.subarray(at + 4, at + 12);
    }
    return null;
  };
  const two = (/** @type {number} */ number) => String(number).padStart(2, "0");
  const avc = box("avcC");
  if (avc) return mime(`avc1.${Array.from(avc.subarray(1, 4), (byte) => byte.toString(16).padStart(2, "0")).join("")}`);
  const av1 = box("av1C");
  if (av1) {
    const bits = 8 + 2 * ((av1[2] >> 6) & 1) + 2 * ((av1[2] >> 5) & 1);
    return mime(`av01.${av1[1] >> 5}.${two(av1[1] & 31)}${"MH"[av1[2] >> 7]}.${two(bits)}`);
  }
  const vp9 = box("vpcC");
  if (vp9) return mime(`vp09.${two(vp9[4])}.${two(vp9[5])}.${two(vp9[6] >> 4)}`);
  throw new Error("The stream is of no kind that is known here.");
}

/** @param {string} codec */
function mime(codec) {
  return `video/mp4; codecs="${codec}"`;
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

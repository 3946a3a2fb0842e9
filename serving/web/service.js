// The service's HTTP API, as this page needs it.
// @ts-check

/** @typedef {{name: string, id: string | null, data: any}} ServerEvent */

export class Refused extends Error {}

const root = new URL(".", document.baseURI);

/** @returns {Record<string, string>} */
function credentials() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/**
 * An answer that is no error; otherwise `Refused` with what the service says of it.
 * @param {string} path
 * @param {RequestInit} [options]
 */
export async function ask(path, options = {}) {
  const headers = { ...credentials(), .../** @type {any} */ (options.headers ?? {}) };
  const answer = await fetch(new URL(path, root), { ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Refused(body?.error?.message ?? `The service answered ${answer.status}.`);
}

/** @param {string} path @param {RequestInit} [options] */
export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

/** @param {object} body */
export function create(body) {
  return askJson("v1/videos", {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": crypto.randomUUID?.() ?? `${Math.random()}` },
    body: JSON.stringify(body),
  });
}

/** A picture behind the gate as a URL for `src`. @param {string} path */
export async function objectUrl(path) {
  return URL.createObjectURL(await (await ask(path)).blob());
}

/** @param {number} milliseconds @param {AbortSignal} signal */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

/**
 * What happens to a video until its end, over as many connections as it takes.
 * @param {string} id @param {AbortSignal} signal
 * @returns {AsyncGenerator<ServerEvent>}
 */
export async function* events(id, signal) {
  /** @type {string | null} */
  let last = null;
  while (true) {
    try {
      /** @type {Record<string, string>} */
      const headers = last === null ? {} : { "Last-Event-ID": last };
      const answer = await ask(`v1/videos/${id}/events`, { headers, signal });
      for await (const event of parsed(/** @type {ReadableStream} */ (answer.body))) {
        last = event.id ?? last;
        yield event;
        if (event.name === "completed" || event.name === "failed") return;
      }
    } catch (error) {
      if (signal.aborted || error instanceof Refused) throw error;
    }
    await pause(500, signal);
  }
}

/** @param {ReadableStream<Uint8Array>} body @returns {AsyncGenerator<ServerEvent>} */
async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      /** @type {Record<string, string>} */
      const fields = {};
      for (const line of text.slice(0, end).split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
      }
      text = text.slice(end + 2);
      if (fields.data) yield { name: fields.event, id: fields.id ?? null, data: JSON.parse(fields.data) };
    }
  }
}

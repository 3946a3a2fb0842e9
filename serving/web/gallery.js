// Past videos, the latest first.
// @ts-check

import { askJson, objectUrl } from "./service.js";

/** @param {string} id @returns {any} */
const find = (id) => document.getElementById(id);

/** @param {AbortSignal} signal */
export async function showGallery(signal) {
  find("videos").replaceChildren();
  await page(signal, "");
}

/** @param {AbortSignal} signal @param {string} after */
async function page(signal, after) {
  const listed = await askJson(`v1/videos?limit=24${after && `&after=${after}`}`, { signal });
  find("videos").append(...listed.data.map(card));
  find("no-videos").hidden = find("videos").children.length > 0;
  find("more").hidden = !listed.has_more;
  find("more").onclick = () => page(signal, listed.last_id);
}

/** @param {any} video */
function card(video) {
  const item = document.createElement("li");
  const link = document.createElement("a");
  const picture = document.createElement("div");
  const words = document.createElement("span");
  link.href = `#${video.id}`;
  picture.className = "picture";
  words.textContent = video.prompt;
  picture.textContent = video.error?.code ?? (video.status === "in_progress" ? `${video.progress} %` : video.status);
  if (video.status === "completed") {
    objectUrl(`v1/videos/${video.id}/content?variant=thumbnail`).then((url) => {
      const image = new Image();
      image.src = url;
      image.alt = "";
      picture.replaceChildren(image);
    }, () => {});
  }
  link.append(picture, words);
  item.append(link);
  return item;
}

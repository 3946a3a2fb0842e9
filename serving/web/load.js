// How busy the service is, again and again while this view is in front.
// @ts-check

import { askJson, pause } from "./service.js";

/** @param {string} id @returns {any} */
const find = (id) => document.getElementById(id);

/** @param {AbortSignal} signal */
export async function showLoad(signal) {
  while (true) {
    const load = await askJson("v1/load", { signal });
    find("jobs").textContent = `${load.queued} queued, ${load.running} being made`;
    find("stages").replaceChildren(...load.stages.map(row));
    await pause(1000, signal);
  }
}

/** @param {any} stage */
function row(stage) {
  const line = document.createElement("tr");
  const replicas = stage.replicas === stage.target_replicas ? `${stage.replicas}` : `${stage.replicas} of ${stage.target_replicas}`;
  const busy = stage.occupancy === null ? "" : `${Math.round(100 * stage.occupancy)} %`;
  for (const text of [stage.model, stage.stage, replicas, stage.waiting ?? "", stage.in_work ?? "", busy]) {
    const cell = document.createElement("td");
    cell.textContent = `${text}`;
    line.append(cell);
  }
  return line;
}

// The npm `openai` package against the service at RUSHES_URL: prints what it saw, as JSON.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: process.env.RUSHES_URL, apiKey: "unused" });
const asked = { seconds: "1", size: "64x64", num_inference_steps: 2, seed: 7 };
const seen = {};

const video = await client.videos.create({ prompt: "a red ball", model: "sora-2", ...asked });
let made = video;
while (made.status === "queued" || made.status === "in_progress") {
  await new Promise((done) => setTimeout(done, 50));
  made = await client.videos.retrieve(video.id);
}
seen.status = made.status;
const content = await client.videos.downloadContent(video.id);
seen.mp4 = Buffer.from(await content.arrayBuffer()).subarray(4, 8).toString();
const thumbnail = await client.videos.downloadContent(video.id, { variant: "thumbnail" });
seen.thumbnail = thumbnail.headers.get("content-type");

const remix = await client.videos.remix(video.id, { prompt: "a blue ball" });
seen.remixed = remix.remixed_from_video_id === video.id;
const listed = [];
for await (const one of client.videos.list({ limit: 1, order: "asc" })) listed.push(one.id);
seen.listed = listed.length === 2 && listed[0] === video.id && listed[1] === remix.id;
seen.deleted = (await client.videos.delete(remix.id)).deleted;
try {
  await client.videos.create({ prompt: "a ball", size: "100x100" });
} catch (error) {
  seen.refused = [error instanceof OpenAI.BadRequestError, error.param, error.code];
}

const line = { custom_id: "a", method: "POST", url: "/v1/videos", body: { prompt: "a ball", ...asked } };
const file = await client.files.create({
  file: await toFile(Buffer.from(JSON.stringify(line)), "in.jsonl"),
  purpose: "batch",
});
let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/videos",
  completion_window: "24h",
});
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await new Promise((done) => setTimeout(done, 50));
  batch = await client.batches.retrieve(batch.id);
}
seen.batch = [batch.status, batch.request_counts];
seen.answers = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n").length;
seen.models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify(seen));

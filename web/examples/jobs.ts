/**
 * List datasets, queue a training run, read it back, be refused, follow it to its first step, cancel it, and follow
 * the rest from where the stream was left:
 *
 *     npm ci && npm run build
 *     LORASMITH_TOKEN=$(lorasmith api-token) node build/examples/jobs.js http://127.0.0.1:8420
 */
import { connect, dataOf, ProblemError } from "../src/client/client.ts";
import { followJob } from "../src/client/events.ts";
import type { JobCreate } from "../src/client/schema.ts";

const [, , url = "http://127.0.0.1:8420"] = process.argv;
const client = connect(url, process.env["LORASMITH_TOKEN"] ?? "");

const datasets = await dataOf(client.GET("/api/v1/finetune/datasets", { params: { query: { limit: 10 } } }));
console.log("datasets:", datasets.data.map((dataset) => `${dataset.name} ${dataset.num_examples}`).join(", "));

const dataset = datasets.data[0]?.name ?? "signatures";
const body: JobCreate = {
  base_model: "starter",
  dataset_id: dataset,
  preset: "tiny",
  training_config: { num_epochs: 1000, compile: "off" }, // it is cancelled below
};
const queued = await dataOf(client.POST("/api/v1/finetune/jobs", { body }));
const params = { path: { job_id: queued.id } };
const job = await dataOf(client.GET("/api/v1/finetune/jobs/{job_id}", { params }));
console.log("job:", job.name, job.status, "rank", job.lora_config?.rank);

const jobs = await dataOf(client.GET("/api/v1/finetune/jobs", { params: { query: { kind: "training" } } }));
console.log("listed:", jobs.data.some((one) => one.id === job.id));

try {
  await dataOf(client.POST("/api/v1/finetune/jobs", { body: { ...body, dataset_id: "nothing" } }));
} catch (error) {
  if (!(error instanceof ProblemError)) throw error;
  console.log("refused:", error.problem.status, error.problem.code, error.message);
}

let lastEventId = "";
for await (const message of followJob(client, job.id)) {
  if (message.kind === "status") console.log("status:", message.status.status);
  if (message.kind !== "said") continue;
  console.log("said:", message.said.seq, message.said.type);
  lastEventId = message.id;
  if (message.said.type === "step") break; // which closes the stream
}

await dataOf(client.DELETE("/api/v1/finetune/jobs/{job_id}", { params }));
console.log("asked to cancel behind:", lastEventId);
for await (const message of followJob(client, job.id, { lastEventId })) {
  if (message.kind === "said") console.log("then said:", message.said.seq, message.said.type);
  else console.log("then:", message.kind === "status" ? message.status.status : message.kind);
}

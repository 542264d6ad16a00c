/** What the types must refuse: tsc fails where a line below an expected error has none, as it would behind an `any`. */
import { connect, dataOf } from "../src/client/client.ts";
import type { JobCreate } from "../src/client/schema.ts";

const client = connect("");
const jobs = await dataOf(client.GET("/api/v1/finetune/jobs"));
const job = jobs.data[0]!;

// @ts-expect-error no such path
void client.GET("/api/v1/finetune/job");
// @ts-expect-error dataset_id is missing
void client.POST("/api/v1/finetune/jobs", { body: { base_model: "starter" } });
// @ts-expect-error no such field of a request
void ({ base_model: "starter", dataset_id: "support", epochs: 3 } satisfies JobCreate);
// @ts-expect-error no such kind of job
void client.GET("/api/v1/finetune/jobs", { params: { query: { kind: "baking" } } });
// @ts-expect-error no such field of a job
void job.state;
// @ts-expect-error a job that does not train has none
void job.lora_config.rank;
// @ts-expect-error no such field of a LoRA
void job.lora_config?.rnk;
// @ts-expect-error a status is one of nine words
void (job.status === "done");

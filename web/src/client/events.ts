/** Streams of jobs by fetch, which can send a token and `Last-Event-ID`; the browser's `EventSource` cannot. */
import { dataOf, type Lorasmith } from "./client.ts";
import type { StreamedEvent, StreamedStatus } from "./schema.ts";

export interface ServerEvent {
  /** `Last-Event-ID` to go on behind this event; empty before the first id. */
  id: string;
  event: string;
  data: string;
}

/** What a stream says. `reset`: the id was never sent, all begins anew; `end`: the job has stopped. */
export type JobMessage =
  | { kind: "said"; id: string; said: StreamedEvent }
  | { kind: "status"; status: StreamedStatus }
  | { kind: "reset" }
  | { kind: "end" };

const RECONNECT_MS = 1000;

/** A job's events from its first, or from behind `lastEventId`, to its end; a broken connection is taken up again. */
export async function* followJob(
  client: Lorasmith,
  jobId: string,
  { lastEventId = "", signal = null }: { lastEventId?: string; signal?: AbortSignal | null } = {},
): AsyncGenerator<JobMessage, void, undefined> {
  for (;;) {
    try {
      const header = lastEventId === "" ? {} : { "last-event-id": lastEventId };
      const params = { path: { job_id: jobId }, header };
      const asked = client.GET("/api/v1/finetune/jobs/{job_id}/events", { params, parseAs: "stream", signal });
      for await (const event of serverEvents((await dataOf(asked))!)) {
        const message = jobMessage(event);
        lastEventId = message.kind === "reset" ? "" : event.id || lastEventId;
        yield message;
        if (message.kind === "end") return;
      }
    } catch (error) {
      if (signal?.aborted || !(error instanceof TypeError)) throw error; // fetch's own error for a lost connection
    }
    await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
  }
}

function jobMessage({ id, event, data }: ServerEvent): JobMessage {
  switch (event) {
    case "status":
      return { kind: "status", status: JSON.parse(data) as StreamedStatus };
    case "reset":
    case "end":
      return { kind: event };
    default:
      return { kind: "said", id, said: JSON.parse(data) as StreamedEvent };
  }
}

/** Server-sent events of a body, as the HTML standard reads them; leaving the loop closes the connection. */
export async function* serverEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<ServerEvent, void, undefined> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const next: ServerEvent = { id: "", event: "", data: "" };
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/); // a last \r may be half of \r\n
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (line === "") {
          if (next.data !== "") yield { ...next, event: next.event || "message", data: next.data.slice(0, -1) };
          next.event = next.data = "";
          continue;
        }
        const [, field = "", text = ""] = /^([^:]*)(?:: ?(.*))?$/s.exec(line) ?? [];
        if (field === "data") next.data += `${text}\n`;
        else if (field === "event" || (field === "id" && !text.includes("\0"))) next[field] = text;
      }
    }
  } finally {
    await reader.cancel();
  }
}

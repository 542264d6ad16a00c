/** The REST API of a server: every path, body and answer is typed by `schema.ts`, which is generated. */
import createClient, { type Client } from "openapi-fetch";

import type { paths, Problem } from "./schema.ts";

export type Lorasmith = Client<paths>;

/** Of a server at `baseUrl`. Without a token the page's own session counts, whose changes need the header below. */
export function connect(baseUrl: string, token?: string): Lorasmith {
  const headers = token === undefined ? { "X-Lorasmith-Request": "1" } : { Authorization: `Bearer ${token}` };
  return createClient<paths>({ baseUrl, headers });
}

/** What the server would not do; `problem.code` is stable, `problem.hint` is the way out. */
export class ProblemError extends Error {
  override readonly name = "ProblemError";

  constructor(readonly problem: Problem) {
    super(problem.hint ? `${problem.detail} (${problem.hint})` : problem.detail);
  }
}

type Answer<T> = { data: T; error?: never; response: Response } | { data?: never; error: Problem; response: Response };

/** The data of an answer. Throws `ProblemError`, or `Error` where something between answered that is no lorasmith server. */
export async function dataOf<T>(asked: Promise<Answer<T>>): Promise<T> {
  const { data, error, response } = await asked;
  if (response.ok) return data as T;
  if (isProblem(error)) throw new ProblemError(error);
  throw new Error(`${response.status} ${response.statusText} from ${response.url}`);
}

function isProblem(error: unknown): error is Problem {
  return typeof error === "object" && error !== null && "code" in error && "detail" in error;
}

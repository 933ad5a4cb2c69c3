// Names of weights, as people read them.

import { live } from "./core.js";

/** The title of a run, or its name. */
export const runTitle = (run) => live.status?.runs.find((each) => each.id === run)?.title || run;

/** "final", "step 40", or nothing for an upload. */
export const versionOf = (each) => (each.kind === "upload" ? "" : each.step ? `step ${each.step}` : "final");

/** What an id says by itself: {run, kind, step, text}. */
export function partsOf(id) {
  const [, run, last] = String(id).split("/");
  const step = Number(last?.match(/-(\d+)$/)?.[1] ?? 0) || null;
  if (last === undefined) return { run: null, kind: "upload", step: null, text: run ?? String(id), short: run ?? String(id) };
  const short = step ? `step ${step}` : "final";
  return { run, kind: last.split("-")[0], step, text: `${runTitle(run)}, ${short}`, short };
}

/** The short name of a base model, from its name or its address. */
export function baseName(bases, value) {
  return bases.find((each) => each.name === value || each.hub_id === value)?.name ?? value ?? null;
}

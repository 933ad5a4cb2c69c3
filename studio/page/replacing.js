// Find and replace in all captions of a dataset: every change is shown before anything is written.

import { api, count, debounced, path } from "./core.js";
import { field, fill, h, toast } from "./dom.js";
import { ask } from "./asking.js";

const SHOWN = 100;

/** `images`: names to look at, null is all. `after()` is called after a change. */
export async function findAndReplace(dataset, images, after) {
  const url = (suffix) => `${path("api/datasets", dataset)}${suffix}`;
  const find = h("input", { autocomplete: "off", required: true }), into = h("input", { autocomplete: "off" });
  const regex = h("input", { type: "checkbox" }), word = h("input", { type: "checkbox" });
  const result = h("div", { class: "changes", role: "status", tabindex: 0, "aria-label": "Changes" }, h("p", { class: "dim" }, "Type what to find. Every change is shown here before anything is written."));
  const given = (dry) => ({ find: find.value, with: into.value, regex: regex.checked, word: word.checked, names: images, dry_run: dry });
  let asked = 0;
  const preview = debounced(async () => {
    const mine = (asked += 1);
    if (!find.value) { fill(result, h("p", { class: "dim" }, "Type what to find.")); return; }
    try {
      const { changes } = await api("POST", url("/replace"), given(true));
      if (mine !== asked) return;
      fill(
        result,
        h("p", { class: "dim" }, changes.length ? `${count(changes.length, "caption")} would change` : "No caption contains this text."),
        changes.slice(0, SHOWN).map(change),
        changes.length > SHOWN && h("p", { class: "dim" }, `and ${changes.length - SHOWN} more`),
      );
    } catch (error) { if (mine === asked) fill(result, h("p", { class: "error" }, error.message)); }
  }, 150);
  for (const each of [find, into, regex, word]) each.addEventListener("input", preview);
  const body = [
    h("div", { class: "fields" }, field("find", "Find", find), field("with", "Replace with", into)),
    h("div", { class: "row ticks" }, h("label", { class: "row" }, word, "Whole words"), h("label", { class: "row" }, regex, "Regular expression")),
    result,
  ];
  const done = await ask(images ? `Find and replace in ${count(images.length, "caption")} shown` : "Find and replace in all captions", body, "Replace all", () => api("POST", url("/replace"), given(false)), { wide: true });
  if (!done) return;
  await after();
  const undo = async () => {
    try { await api("POST", url("/undo"), { undo: done.undo }); await after(); } catch (error) { if (error.name !== "AbortError") toast(error.message, { bad: true }); }
  };
  toast(`${count(done.changes.length, "caption")} changed`, done.undo && { action: ["Undo", undo] });
}

/** One caption before and after; what differs is marked. */
function change({ image, before, after }) {
  const [start, end] = common(before, after);
  const row = (tag, text) => h(tag, null, text.slice(0, start), h("mark", null, text.slice(start, text.length - end)), end ? text.slice(-end) : "");
  return h("div", { class: "change" }, h("small", null, image), row("del", before), row("ins", after));
}

function common(one, other) {
  const most = Math.min(one.length, other.length);
  let start = 0, end = 0;
  while (start < most && one[start] === other[start]) start += 1;
  while (end < most - start && one.at(-1 - end) === other.at(-1 - end)) end += 1;
  return [start, end];
}

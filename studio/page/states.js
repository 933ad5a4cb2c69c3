// The state of a run in words and shapes, small curves, and the commands that a run allows.

import { api, count, duration, newKey, path } from "./core.js";
import { ask, wrongField } from "./asking.js";
import { button, field, h, icon, menu, toast } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = { queued: "more", running: "play", pausing: "pause", paused: "pause", stopping: "stop", stopped: "stop", failed: "warning", done: "check" };
export const LIVE = ["running", "pausing", "stopping"];

/** The state in words. */
export function stateText(run) {
  if (run.state === "queued") return "waiting";
  if (run.state === "paused") return run.freed ? "paused, GPU free" : "paused";
  if (run.state !== "running" || !run.phase || run.phase.name === "training") return run.state;
  return run.phase.name;
}

/** What a live run does at present, with counts: "encoding images, 3 of 16". */
export function phaseText(run) {
  if (!run.phase) return "";
  const { name, done, of } = run.phase;
  return of ? `${name}, ${done.toLocaleString("en")} of ${of.toLocaleString("en")}` : name;
}

/** The state as word and shape. */
export function stateMark(run) {
  return h("span", { class: `state ${run.state}` }, h("i", { class: "shape" }, icon(SHAPES[run.state] ?? "more")), h("span", null, stateText(run)));
}

/** A small curve of the loss. */
export function sparkline(values, width = 120, height = 28) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ viewBox: `0 0 ${width} ${height}`, width, height, class: "spark", "aria-hidden": "true", preserveAspectRatio: "none" })) svg.setAttribute(name, value);
  const known = values.filter((each) => each !== null);
  if (known.length < 2) return svg;
  const low = Math.min(...known), high = Math.max(...known), span = high - low || 1;
  let d = "", open = false;
  values.forEach((value, index) => {
    if (value === null) { open = false; return; }
    const x = 1 + (index * (width - 2)) / (values.length - 1), y = 2 + (1 - (value - low) / span) * (height - 4);
    d += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  });
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", d);
  svg.append(line);
  return svg;
}

// ---- Commands ----------------------------------------------------------------------------------

/** Sends a command; the answer's run. */
export const command = async (id, what, more = {}) => (await api("POST", path("api/runs", id, "commands"), { do: what, key: newKey(), ...more })).run;

/** Moves a run to the trash and offers to undo it. Resolves to whether it was moved. */
export async function remove(run, after) {
  const { trash } = await api("DELETE", path("api/runs", run.id));
  toast(`${run.title} was moved to the trash`, {
    action: ["Undo", async () => {
      try { await api("POST", path("api/trash", trash, "restore")); after?.(); } catch (error) { toast(error.message, { bad: true }); }
    }],
  });
}

/** Asks for further steps; null: closed. */
function askSteps(run) {
  const input = h("input", { inputmode: "numeric", autocomplete: "off", value: Math.max(1, Math.round(run.steps / 2)) });
  const help = `A new run goes on from step ${run.steps.toLocaleString("en")}. This one stays as it is.`;
  return ask("More steps", field("more-steps", "Further steps", input, { help }), "Add to queue", () => {
    const steps = Number(input.value);
    if (Number.isInteger(steps) && steps >= 1 && steps <= 100000) return { steps };
    throw wrongField("more-steps", "Give a whole number from 1 to 100,000.");
  });
}

/** Asks for a prompt; null: closed. */
function askPrompt() {
  const prompt = h("textarea", { rows: 2 }), seed = h("input", { inputmode: "numeric", autocomplete: "off", placeholder: "any" });
  return ask("Preview of a prompt", [field("preview-prompt", "Prompt", prompt), field("preview-seed", "Seed", seed)], "Generate", () => {
    if (!prompt.value.trim()) throw wrongField("preview-prompt", "Write what the image shows.");
    if (!/^\d*$/.test(seed.value.trim())) throw wrongField("preview-seed", "Give a whole number, or nothing.");
    return { prompt: prompt.value.trim(), ...(seed.value.trim() && { seed: Number(seed.value) }) };
  });
}

const BUSY = { pause: "Pausing…", free: "Pausing…", stop: "Stopping…", keep: "Stopping…", save: "Saving…", preview: "Asking for a preview…", resume: "Resuming…", start: "Starting…", restart: "Starting again…", keep_weights: "Keeping…", more: "Adding…", end: "Ending…", delete: "Moving to the trash…" };

/** The buttons of what a run allows. `say(text, bad)` shows what happens beside them. */
export function actions(run, { say, changed, current }) {
  const can = new Set(run.allowed), has = (name) => can.has(name);
  const place = h("div", { class: "row actions" });
  const act = (what, given) => async () => {
    const more = given ? await given(current()) : {};
    if (!more) return;
    for (const each of place.querySelectorAll("button")) each.disabled = true;
    say(BUSY[what]);
    try {
      if (what === "delete") {
        await remove(current(), changed);
        location.hash = "#/runs";
        return;
      }
      const answer = await command(run.id, what, more);
      say(what === "keep_weights" ? "The newest weights are the result of this run now." : what === "save" ? "Weights are saved after this step." : what === "preview" ? "The preview is made after this step." : "");
      if (answer.id !== run.id) {
        toast(`${answer.title} was added to the queue`);
        location.hash = `#/runs/${encodeURIComponent(answer.id)}`;
      }
      changed?.(answer);
    } catch (error) { say(error.message, true); }
    for (const each of place.querySelectorAll("button")) each.disabled = false;
  };
  const one = (what, text, kind = "", iconName, given) => has(what) && place.append(button(text, act(what, given), { kind, iconName }));
  const several = (text, iconName, items) => {
    const shown = items.filter(([what]) => has(what)).map(([what, itemText, detail, given]) => ({ text: itemText, detail, onclick: act(what, given) }));
    if (shown.length) place.append(menu(text, shown, { iconName }));
  };
  one("start", "Start now", "primary", "play");
  one("resume", run.checkpoint && (run.state !== "paused" || run.freed) ? `Resume from step ${run.checkpoint.toLocaleString("en")}` : "Resume", "primary", "play");
  if (run.state === "paused") one("free", "Free the GPU", "", "pause");
  else several("Pause", "pause", [
    ["pause", "Keep the memory", "goes on at once; the GPU stays in use"],
    ["free", "Free the GPU", "writes a checkpoint; going on loads the model again"],
  ]);
  several("Stop", "stop", [
    ["keep", "Stop and keep", "writes the weights as they are now, with checks and report"],
    ["stop", "Stop for later", "writes a checkpoint; the run can be resumed"],
  ]);
  one("save", "Save now", "", "save");
  several("Preview now", "image", [["preview", "The run's prompts", "or its default prompt"], ["preview", "Another prompt …", "and a seed", askPrompt]]);
  one("keep_weights", "Keep as weights", "", "save");
  one("more", "More steps", "", "plus", askSteps);
  one("restart", "Start again", "", "again");
  one("delete", "Delete", "quiet", "trash");
  return place;
}

/** What is lost if a run is ended now. */
export function lostSteps(run) {
  const lost = Math.max(0, run.step - (run.checkpoint ?? 0));
  return lost ? `End now, lose ${count(lost, "step")}` : "End now";
}

/** "12:40", or with the day if it is not today. */
export function clock(time) {
  const date = new Date(time * 1000), hour = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  return date.toDateString() === new Date().toDateString() ? hour : `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${hour}`;
}

/** How long a run took or has taken. */
export const took = (run) => (run.started ? duration(Math.max(0, (run.ended ?? Date.now() / 1000) - run.started)) : "–");

/** Keeps the children of a node as the items say: `create(item)` gives {node, update(item)}. */
export function keyed(node, create) {
  const rows = new Map();
  return (items, key = (item) => item.id) => {
    const wanted = new Set(items.map(key));
    for (const [name, row] of rows) if (!wanted.has(name)) { row.node.remove(); rows.delete(name); }
    items.forEach((item, index) => {
      let row = rows.get(key(item));
      if (!row) rows.set(key(item), (row = create(item)));
      row.update(item);
      if (node.children[index] !== row.node) node.insertBefore(row.node, node.children[index] ?? null);
    });
  };
}

// What can be done with a run: exactly what the server allows.

import { api, newKey, path, refresh } from "./core.js";
import { button, dialog, field, h, linkButton, menu, toast } from "./dom.js";

/** Sends a command to a run, and says what came of it. */
export async function act(run, wanted, more = {}) {
  try {
    if (wanted === "delete") {
      const { trash } = await api("DELETE", path("api/runs", run.id));
      if (location.hash.includes(encodeURIComponent(run.id))) location.hash = "#/runs";
      toast(`${run.title || run.id} deleted`, { action: ["Undo", async () => { await api("POST", path("api/trash", trash, "restore")); refresh(); }] });
    } else {
      const answer = await api("POST", path("api/runs", run.id, "commands"), { do: wanted, key: newKey(), ...more });
      if (["restart", "more"].includes(wanted) && answer.run.id !== run.id) location.hash = `#/runs/${encodeURIComponent(answer.run.id)}`;
      else if (wanted === "save") toast("The weights are saved after this step");
      else if (wanted === "preview") toast("Previews are made after this step");
    }
  } catch (error) { toast(error.message, { bad: true }); }
  refresh();
}

const ask = async (run, title, text, wanted, word) => { if (await dialog(title, h("p", null, text), [["Cancel", null], [word, true, "danger"]])) act(run, wanted); };

/** The buttons of a run, in the order of their use. */
export function buttons(run) {
  const can = new Set(run.allowed), found = [];
  const one = (name, text, options = {}) => { if (can.has(name)) found.push(button(text, (event) => { event.currentTarget.disabled = true; act(run, name); }, options)); };
  one("resume", run.state === "paused" || !run.checkpoint ? "Resume" : `Resume from step ${run.checkpoint}`, { kind: "primary", iconName: "play" });
  one("start", "Start now", { kind: "primary", iconName: "play" });
  if (can.has("pause") && can.has("free")) {
    found.push(menu("Pause", [
      { text: "Keep the memory", detail: "goes on at once", onclick: () => act(run, "pause") },
      { text: "Free the memory", detail: "saves a checkpoint and ends the process; resuming loads again", onclick: () => act(run, "free") },
    ], { iconName: "pause" }));
  } else { one("pause", "Pause", { iconName: "pause" }); one("free", "Free the memory"); }
  if (can.has("stop") && can.has("keep")) {
    found.push(menu("Stop", [
      { text: "Stop and keep", detail: "the weights of this step, checks and report", onclick: () => act(run, "keep") },
      { text: "Stop for later", detail: "a checkpoint, to resume from", onclick: () => act(run, "stop") },
    ], { iconName: "stop" }));
  } else { one("stop", "Stop", { iconName: "stop" }); one("keep", "Stop and keep"); }
  one("save", "Save now", { iconName: "save" });
  one("preview", "Preview now", { iconName: "image" });
  if (run.stuck && can.has("end")) found.push(button("End now", () => ask(run, "End the process?", "What came after the last checkpoint is lost.", "end", "End now"), { kind: "danger" }));
  if (run.weights) found.push(linkButton("Generate", `#/generate/${encodeURIComponent(`runs/${run.id}/final`)}`, { kind: "primary", iconName: "image" }));
  if (run.report) found.push(linkButton("Report", path("api/runs", run.id, "report"), { target: "_blank", rel: "noopener" }));
  one("keep_weights", "Keep as weights", { iconName: "save" });
  const rest = [
    can.has("more") && { text: "More steps", onclick: () => moreSteps(run) },
    can.has("restart") && { text: "Start again", detail: "a new run with the same settings", onclick: () => act(run, "restart") },
    { text: "Rename, note", onclick: () => rename(run) },
    can.has("end") && !run.stuck && { text: "End the process", danger: true, onclick: () => ask(run, "End the process?", "What came after the last checkpoint is lost.", "end", "End now") },
    can.has("delete") && { text: "Delete", danger: true, onclick: () => act(run, "delete") },
  ].filter(Boolean);
  found.push(menu("", rest, { iconName: "more", label: "More" }));
  return found;
}

async function moreSteps(run) {
  const input = h("input", { inputmode: "numeric", value: Math.ceil(run.steps / 2) });
  if (await dialog("More steps", field("more-steps", "Further steps", input), [["Cancel", null], ["Train on", true, "primary"]])) act(run, "more", { steps: Number(input.value) });
}

async function rename(run) {
  const title = h("input", { value: run.title, maxlength: 100 }), note = h("textarea", { rows: 4, value: run.note });
  if (!(await dialog("Rename", h("div", { class: "stack" }, field("run-title", "Title", title), field("run-note", "Note", note)), [["Cancel", null], ["Save", true, "primary"]]))) return;
  try { await api("PATCH", path("api/runs", run.id), { title: title.value, note: note.value }); } catch (error) { toast(error.message, { bad: true }); }
  refresh();
}

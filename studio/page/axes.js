// The grid of a job: one or two settings with several values each.

import { fill, h } from "./dom.js";
import { partsOf } from "./names.js";

const NAMES = [["", "nothing"], ["scale", "LoRA scale"], ["checkpoint", "Checkpoint"], ["steps", "Steps"], ["seed", "Seed"], ["guidance", "Guidance"]];
const FIRST = { scale: "0.6, 0.8, 1", steps: "4, 8, 12", seed: "1, 2, 3", guidance: "1, 2, 4" };

/** The name of a value of an axis, for its column or row. */
export const axisLabel = (name, value) => (name === "checkpoint" ? partsOf(typeof value === "string" && value.includes("/") ? value : `runs//${value === "final" ? "final" : `checkpoint-${value}`}`).short : `${name} ${value}`);

/** Fields for both axes. `form` holds `across` and `down`; `steps()` gives {label, id} of all weights
 * of the run. Returns {node, values(), draw()}. */
export function axesFields(form, steps, changed) {
  const node = h("div", { class: "stack" });

  /** The values of an axis; null where there is none. Words stay, so that the server can name them. */
  function read(axis) {
    if (!axis.name) return null;
    const words = axis.text.split(/[,;]+|\s+/).filter(Boolean);
    if (!words.length) return null;
    if (axis.name !== "checkpoint") return { name: axis.name, values: words.map((each) => (Number.isFinite(Number(each)) ? Number(each) : each)) };
    return { name: axis.name, values: words.map((each) => steps().find((one) => one.word === each)?.id ?? (Number.isFinite(Number(each)) ? Number(each) : each)) };
  }

  function one(key, label) {
    const axis = form[key];
    const name = h("select", { "aria-label": `${label}: what changes`, onchange: () => {
      axis.name = name.value;
      axis.text = axis.name === "checkpoint" ? steps().map((each) => each.word).slice(-3).join(", ") : FIRST[axis.name] ?? "";
      draw();
      changed();
    } }, NAMES.map(([value, text]) => h("option", { value, disabled: value !== "" && value === form[key === "across" ? "down" : "across"].name }, text)));
    name.value = axis.name;
    const text = h("input", { "aria-label": `${label}: values`, value: axis.text, placeholder: "values, with commas", disabled: !axis.name, autocomplete: "off", oninput: () => { axis.text = text.value; pressed(); changed(); } });
    const chips = h("div", { class: "row tight", hidden: axis.name !== "checkpoint" });
    const words = () => text.value.split(/[,;\s]+/).filter(Boolean);
    const toggle = (word) => {
      const now = words(), order = steps().map((each) => each.word);
      const next = now.includes(word) ? now.filter((each) => each !== word) : [...now, word];
      axis.text = text.value = next.sort((a, b) => order.indexOf(a) - order.indexOf(b)).join(", ");
      pressed();
      changed();
    };
    const pressed = () => { for (const each of chips.children) each.setAttribute("aria-pressed", String(words().includes(each.dataset.word))); };
    if (axis.name === "checkpoint") {
      fill(chips, steps().length ? steps().map((each) => h("button", { type: "button", class: "button small", dataset: { word: each.word }, onclick: () => toggle(each.word) }, each.label)) : h("small", null, "Choose weights of a run first."));
      pressed();
    }
    return h("div", { class: "stack tight" }, h("div", { class: "axis" }, h("span", { class: "dim", "aria-hidden": "true" }, label), name, text), chips);
  }

  function draw() {
    if (!form.across.name) { form.down.name = ""; form.down.text = ""; }
    fill(node, one("across", "Across"), form.across.name && one("down", "Down"));
  }
  draw();
  return { node, draw, values: () => [read(form.across), read(form.down)].filter(Boolean) };
}

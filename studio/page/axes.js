// One axis of a grid: what changes, and its values.

import { h } from "./dom.js";

const NAMES = { "": "none", scale: "scale", seed: "seed", steps: "steps", guidance: "guidance", checkpoint: "checkpoint" };
const EXAMPLES = { scale: "0.6, 0.8, 1", seed: "1, 2, 3", steps: "4, 8, 16", guidance: "1, 2.5, 4" };

/** Fields of an axis; `axis` {name, values} is changed in place. */
export function axisField(label, axis, changed, weights, draft) {
  const values = h("input", { value: (axis.values ?? []).join(", "), "aria-label": `${label}: values` });
  const read = () => { axis.values = values.value.split(",").map((each) => each.trim()).filter(Boolean).map((each) => (Number.isFinite(Number(each)) ? Number(each) : each)); changed(); };
  values.addEventListener("input", read);
  const draw = () => { values.hidden = !axis.name; values.placeholder = EXAMPLES[axis.name] ?? ""; };
  const name = h("select", { "aria-label": `${label}: setting`, onchange: () => {
    axis.name = name.value;
    const run = weights.find((each) => each.id === draft.weights[0]?.id)?.run;
    const steps = weights.filter((each) => each.run === run && each.kind === "checkpoint").map((each) => each.step).sort((a, b) => a - b);
    values.value = axis.name === "checkpoint" ? [...steps.slice(-3), "final"].join(", ") : EXAMPLES[axis.name] ?? "";
    draw();
    read();
  } }, Object.entries(NAMES).map(([value, text]) => h("option", { value, selected: value === (axis.name ?? "") }, text)));
  draw();
  return h("div", { class: "field" }, h("span", { class: "label" }, label), name, values);
}

// The plan of a training: does it fit, how long, how much disk; before anything starts.

import { bytes, count, duration } from "./core.js";
import { fill, h, icon } from "./dom.js";

const PARTS = 6; // colours
const beside = (most) => (most ? `, each with ${most > 1 ? `up to ${most} control images` : "a control image"}` : "");

/** Draws what the server counted into `place`. */
export function drawPlan(place, plan) {
  const total = plan.parts.reduce((sum, each) => sum + each.bytes, 0);
  const whole = Math.max(plan.gpu_bytes ?? 0, total, 1);
  const words = plan.parts.map((each) => `${each.name} ${bytes(each.bytes)}`).join(", ");
  const bar = h("div", { class: "parts", role: "img", "aria-label": `Memory: ${words}` }, plan.parts.map((each, index) => {
    const part = h("span", { class: `part-${index % PARTS}`, title: `${each.name} ${bytes(each.bytes)}` });
    part.style.width = `${(100 * each.bytes) / whole}%`;
    return part;
  }));
  const legend = h("ul", { class: "legend" }, plan.parts.map((each, index) => h("li", null, h("i", { class: `part-${index % PARTS}` }), h("span", { class: "grow" }, each.name), h("span", { class: "dim" }, bytes(each.bytes)))));
  const low = plan.disk_free !== null && plan.disk_bytes > plan.disk_free;
  const time = plan.seconds ? `about ${duration(plan.seconds)}` : "known after the first steps";
  const each = plan.seconds_per_step ? `${plan.steps.toLocaleString("en")} steps × ${duration(plan.seconds_per_step)}, previews, checks` : "";
  fill(
    place,
    h("div", { class: "stack tight" },
      h("div", { class: "row between nowrap-row" }, verdict(plan), h("small", { class: "nowrap" }, plan.gpu_bytes ? `${bytes(plan.peak_bytes)} of ${bytes(plan.gpu_bytes)}` : `${bytes(plan.peak_bytes)} at most`)),
      bar),
    legend,
    h("dl", { class: "facts" },
      h("dt", null, "Work"), h("dd", null, `${plan.steps.toLocaleString("en")} steps from ${count(plan.images, "image")}${beside(plan.control_images)}`),
      h("dt", null, "Time"), h("dd", null, time, each && h("small", { class: "block" }, each)),
      h("dt", null, "Memory"), h("dd", null, plan.mode),
      h("dt", null, "Disk"), h("dd", { class: low ? "error" : "" }, `${bytes(plan.disk_bytes)} of ${bytes(plan.disk_free)} free`)),
    plan.warnings.map((one) => h("p", { class: "note warn" }, icon("warning"), h("span", { class: "grow" }, one.text, one.dataset && [" ", h("a", { href: `#/datasets/${encodeURIComponent(one.dataset)}` }, `Show ${one.dataset}`)]))),
    modes(plan),
  );
}

function verdict({ fits, mode }) {
  if (fits === null) return h("p", { class: "verdict" }, "No GPU here: the CPU trains");
  return fits ? h("p", { class: "verdict good" }, icon("check"), `Fits: ${mode}`) : h("p", { class: "verdict bad" }, icon("warning"), "Does not fit");
}

/** What other ways of saving memory would need. */
function modes({ modes: all, mode }) {
  const sizes = new Set(all.map((each) => each.peak_bytes));
  if (sizes.size < 2) return null;
  return h("details", { class: "modes" }, h("summary", null, "Other ways to save memory"), h("table", null, h("tbody", null, all.map((each) => h(
    "tr", { class: each.mode === mode ? "chosen" : "" },
    h("td", null, each.mode, each.mode === mode && h("small", null, " this plan")), h("td", { class: "number" }, bytes(each.peak_bytes)),
    h("td", null, each.fits === null ? "" : h("span", { class: each.fits ? "fits" : "dim" }, each.fits ? "fits" : "does not fit")))))));
}

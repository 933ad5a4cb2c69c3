// Loss curves by uPlot, with colours of the style sheet, and a table for who cannot see them.

import { button, dialog, h } from "./dom.js";
import { precise } from "./core.js";

/** Adam-like smoothing: the mean of the last values, corrected for its start. null is a gap. */
export function smooth(values, keep) {
  let mean = 0, weight = 0;
  return values.map((each) => {
    if (each === null || !Number.isFinite(each)) return null;
    mean = keep * mean + (1 - keep) * each;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const COLOURS = ["accent", "warn", "good", "bad"];

/** A plot. `lines`: [{label, colour, width, dots, dash}]; `draw(data, {log, xLabel})` shows columns. */
export function plot(label, lines, signal, { height = 240, marks } = {}) {
  const holder = h("div", { class: "plot", role: "img", "aria-label": label });
  let chart = null, last = null, options = {};
  const axis = () => ({ stroke: colour("dim"), font: "11px system-ui", grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, size: 44 });
  function make() {
    chart?.destroy();
    const width = Math.max(200, holder.clientWidth || 600);
    chart = new uPlot({
      width, height, legend: { show: true, live: true }, cursor: { sync: { key: "loss" }, points: { size: 6 } },
      scales: { x: { time: false }, y: options.log ? { distr: 3 } : {} },
      axes: [{ ...axis(), size: 30, values: (_, all) => all.map((each) => each?.toLocaleString("en")) }, { ...axis(), size: 52, values: (_, all) => all.map((each) => (each === null ? "" : Number(each.toPrecision(3)).toString())) }],
      series: [{ label: options.xLabel ?? "step" }, ...lines.map((each) => ({ label: each.label, stroke: colour(each.colour) + (each.faint ? "55" : ""), width: each.width ?? 1.5, dash: each.dash, points: { show: Boolean(each.dots), size: 5 }, spanGaps: Boolean(each.dots), value: (_, value) => precise(value) }))],
      hooks: { draw: [(u) => marks?.(u, colour)] },
    }, last, holder);
  }
  const observer = new ResizeObserver(() => { if (chart && holder.clientWidth && chart.width !== holder.clientWidth) chart.setSize({ width: holder.clientWidth, height }); });
  observer.observe(holder);
  const redraw = () => { if (last) make(); };
  document.addEventListener("theme", redraw, { signal });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw, { signal });
  signal.addEventListener("abort", () => { observer.disconnect(); chart?.destroy(); });
  const table = button("Table", () => {
    if (!last) return;
    const rows = last[0].length, step = Math.max(1, Math.ceil(rows / 40));
    dialog(label, h("div", { class: "scroll" }, h("table", null, h("thead", null, h("tr", null, h("th", null, options.xLabel ?? "step"), lines.map((each) => h("th", null, each.label)))), h("tbody", null, last[0].map((x, index) => (index % step === 0 || index === rows - 1) && h("tr", null, h("td", null, precise(x) === "–" ? "" : Number(x).toLocaleString("en")), last.slice(1).map((column) => h("td", null, precise(column[index])))))))), [], { wide: true });
  }, { kind: "quiet small" });
  let frame = 0;
  return {
    node: holder, table,
    draw(data, wanted = {}) {
      const same = chart && wanted.log === options.log && wanted.xLabel === options.xLabel;
      last = data;
      options = wanted;
      if (!same) { make(); return; }
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => chart.setData(last));
    },
  };
}

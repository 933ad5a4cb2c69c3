// Plots: uPlot in the page's colours, with a readout, a shared cursor and a table.

import { duration, precise } from "./core.js";
import { button, dialog, fill, h } from "./dom.js";

const HEIGHT = 236;
if (!globalThis.uPlot) await new Promise((loaded, failed) => { // its script does not hold up the other screens
  const script = document.querySelector('script[src*="uPlot"]');
  const fail = () => failed(new Error("the plots could not be loaded; reload the page"));
  if (document.readyState === "complete") fail(); // which waits for the script
  script.addEventListener("load", loaded);
  script.addEventListener("error", fail);
});

const known = new Map();
/** The value of a colour variable of the page, in its present theme. */
export function colour(name) {
  if (!known.has(name)) {
    const probe = h("i", { hidden: true, style: { color: `var(${name})` } });
    document.body.append(probe);
    known.set(name, getComputedStyle(probe).color);
    probe.remove();
  }
  return known.get(name);
}
document.addEventListener("theme", () => known.clear());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  known.clear();
  document.dispatchEvent(new Event("theme"));
});

/** Plots over the same steps: they share cursor and zoom. `end()` is where the longest ends; `part`: {min, max} if zoomed. */
export class Shared {
  constructor(end) { Object.assign(this, { end, part: null, plots: [], key: uPlot.sync(`plots-${Math.random()}`).key, busy: false }); }

  /** The x scale: from 0 to the end of all plots, unless a part was chosen. */
  get scale() {
    const range = (plot, min, max) => {
      const xs = plot.data[0];
      return min === null || min === undefined || min === max || (min === xs[0] && max === xs.at(-1)) ? [0, this.end()] : [min, max];
    };
    return { time: false, range };
  }

  /** One of the plots shows another part: all do. */
  zoom(from) {
    if (this.busy) return;
    this.busy = true;
    const { min, max } = from.plot.scales.x;
    this.part = min > 0 || max < this.end() ? { min, max } : null;
    for (const { plot } of this.plots) if (plot && (plot.scales.x.min !== min || plot.scales.x.max !== max)) plot.setScale("x", { min, max });
    this.busy = false;
  }
}

/** A plot that follows its place's width and the theme. `make()` gives {options, data} of uPlot. */
export class Plot {
  constructor(make, { label, signal, shared, readout }) {
    Object.assign(this, { make, shared, readout, height: HEIGHT });
    shared.plots.push(this);
    this.node = h("div", { class: "plot", role: "img", "aria-label": label, style: { height: `${HEIGHT}px` } });
    this.watch = new ResizeObserver(() => this.#fit());
    this.watch.observe(this.node);
    const redraw = () => this.plot?.redraw(false, true);
    document.addEventListener("theme", redraw, { signal });
    signal.addEventListener("abort", () => { this.watch.disconnect(); this.plot?.destroy(); this.plot = null; this.ended = true; });
  }

  #fit() {
    const width = Math.floor(this.node.clientWidth);
    if (width < 50 || this.ended) return;
    if (!this.plot) this.build();
    else if (this.plot.width !== width) this.plot.setSize({ width, height: this.height });
  }

  /** Draws it anew, with new options. */
  build() {
    const width = Math.floor(this.node.clientWidth);
    if (width < 50 || this.ended) return;
    this.plot?.destroy();
    const { options, data } = this.make();
    this.plot = new uPlot({
      ...options, width, height: this.height, legend: { show: false }, padding: [12, 20, 0, 0],
      scales: { x: this.shared.scale, y: options.y ?? {} },
      cursor: { points: { size: 7 }, drag: { x: true, y: false, dist: 6 }, sync: { key: this.shared.key, scales: ["x", null], setSeries: false } },
      hooks: {
        draw: options.draw ? [drawn(options.draw)] : [],
        setCursor: [(plot) => this.readout(plot.cursor.idx ?? null)],
        setScale: [(plot, scale) => { if (scale === "x" && this.plot === plot) this.shared.zoom(this); }],
      },
    }, data, this.node);
    if (this.shared.part) this.plot.setScale("x", this.shared.part);
    this.readout(null);
  }

  /** New data in the old options; soon, and once for many calls. */
  update() {
    this.wanted ??= requestAnimationFrame(() => {
      this.wanted = null;
      if (!this.plot) return;
      const { data } = this.make();
      const { part } = this.shared;
      if (part) this.plot.batch(() => { this.plot.setData(data, false); this.plot.setScale("x", part); });
      else this.plot.setData(data);
      this.readout(this.plot.cursor.idx ?? null);
    });
  }
}

/** The axes in the page's colours. */
export function axes({ time = false, log = false, y } = {}) {
  const font = "11px system-ui, sans-serif";
  const each = { stroke: () => colour("--dim"), font, grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false } };
  return [
    { ...each, grid: { show: false }, size: 26, gap: 6, space: 70, values: (_, values) => values.map((value) => (value === null ? "" : time ? duration(value) : value.toLocaleString("en"))), incrs: time ? [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 36000, 86400] : [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000] },
    { ...each, size: 52, gap: 6, space: 36, ...(log ? { filter: (_, splits) => splits.map((value) => ([1, 2, 5].includes(Number((value / 10 ** Math.floor(Math.log10(value) + 1e-9)).toFixed(3))) ? value : null)) } : {}), values: (_, values) => values.map((value) => (value === null || value === undefined ? "" : y ? y(value) : String(Number(value.toPrecision(3))))) },
  ];
}

/** The y scale, linear or logarithmic. */
export const yScale = (log) => (log ? { distr: 3, range: (plot, min, max) => (min > 0 ? [min * 0.94, max * 1.06] : [0.1, 1]) } : {});

/** A segmented choice. options: [[value, text]]. */
export function segmented(label, options, value, onchange) {
  const node = h("div", { class: "segmented small", role: "group", "aria-label": label });
  for (const [each, text] of options) {
    node.append(h("button", {
      type: "button", "aria-pressed": String(each === value),
      onclick: (event) => {
        for (const other of node.children) other.setAttribute("aria-pressed", String(other === event.currentTarget));
        onchange(each);
      },
    }, text));
  }
  return node;
}

/** A slider for the number of steps that the loss is smoothed over, in even ratios. */
export function smoothingSlider(value, onchange) {
  const shown = h("output", { class: "dim" }), slider = h("input", { type: "range", min: 0, max: 60, "aria-label": "Smoothing, in steps" });
  const steps = () => Math.round(10 ** (slider.value / 20)); // 1 to 1,000
  const show = () => {
    shown.textContent = steps() === 1 ? "off" : `${steps().toLocaleString("en")} steps`;
    slider.setAttribute("aria-valuetext", shown.textContent);
  };
  slider.value = Math.round(20 * Math.log10(value));
  slider.addEventListener("input", () => { show(); onchange(steps()); });
  show();
  return h("label", { class: "smoothing" }, h("span", null, "Smoothing"), slider, shown);
}

/** A button that shows a plot's values as a table. `rows()` gives [heads, rows of texts]. */
export function tableButton(title, rows) {
  return button("Table", () => {
    const [heads, lines] = rows();
    const table = h("table", { class: "numbers" }, h("thead", null, h("tr", null, heads.map((each) => h("th", { scope: "col" }, each)))), h("tbody", null, lines.map((line) => h("tr", null, line.map((each) => h("td", null, each))))));
    dialog(title, lines.length ? h("div", { class: "scroll" }, table) : h("p", { class: "dim" }, "There is nothing yet."), [], { wide: true });
  }, { kind: "quiet small", "aria-label": `${title} as a table` });
}

/** A readout: names and values in a line that keeps its height. */
export class Readout {
  constructor() { this.node = h("p", { class: "readout" }); }

  show(parts) {
    fill(this.node, parts.filter(Boolean).map(([name, value, mark]) => h("span", null, mark && h("i", { class: `mark ${mark}` }), h("span", { class: "dim" }, name), " ", h("b", null, typeof value === "number" ? precise(value) : value ?? "–"))));
  }
}

/** Draws something in the plot's area, clipped to it. */
function drawn(draw) {
  return (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 6 * devicePixelRatio, bbox.top, bbox.width + 12 * devicePixelRatio, bbox.height);
    ctx.clip();
    draw(ctx, bbox, devicePixelRatio, (x) => plot.valToPos(x, "x", true), (y) => plot.valToPos(y, "y", true));
    ctx.restore();
  };
}

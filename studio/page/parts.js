// Small parts that several screens show.

import { h } from "./dom.js";

const STATES = { queued: "queued", running: "running", pausing: "pausing", paused: "paused", stopping: "stopping", stopped: "stopped", failed: "failed", done: "done" };
const KIND = { running: "running", done: "good", failed: "bad", paused: "warn", pausing: "warn", stopping: "warn" };

/** The state of a run as a word with a shape. */
export function badge(run) {
  const more = run.state === "paused" ? (run.freed ? ", memory freed" : ", memory kept") : "";
  return h("span", { class: `badge ${KIND[run.state] ?? ""}`, title: run.why || null }, h("span", { class: `dot ${run.state}` }), `${STATES[run.state] ?? run.state}${more}`);
}

/** A small curve of the loss. */
export function spark(values) {
  const found = (values ?? []).filter((each) => each !== null);
  if (found.length < 2) return h("span", { class: "dim" }, "–");
  const low = Math.min(...found), high = Math.max(...found), width = 96, height = 24;
  const points = found.map((each, index) => `${(2 + (index * (width - 4)) / (found.length - 1)).toFixed(1)},${(height - 3 - ((each - low) / (high - low || 1)) * (height - 6)).toFixed(1)}`);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", role: "img", "aria-label": `loss from ${found[0].toPrecision(3)} to ${found.at(-1).toPrecision(3)}` }, svg("polyline", { points: points.join(" ") }));
}

function svg(tag, properties, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Buttons of which one is pressed. */
export function segmented(label, choices, now, chosen) {
  const buttons = choices.map(([value, text]) => h("button", { type: "button", "aria-pressed": String(value === now), onclick: (event) => {
    for (const each of buttons) each.setAttribute("aria-pressed", String(each === event.currentTarget));
    chosen(value);
  } }, text));
  return h("div", { class: "segmented", role: "group", "aria-label": label }, buttons);
}

/** Tabs: [[name, draw(panel)]]; each is drawn when it is opened. Returns {node, redraw()}. */
export function tabs(label, choices) {
  const panel = h("div", { class: "tab-panel", role: "tabpanel", tabindex: 0 });
  let now = 0;
  const open = (index) => {
    now = index;
    buttons.forEach((each, at) => { each.setAttribute("aria-selected", String(at === index)); each.tabIndex = at === index ? 0 : -1; });
    panel.setAttribute("aria-label", choices[index][0]);
    panel.replaceChildren();
    choices[index][1](panel);
  };
  const buttons = choices.map(([name], index) => h("button", { type: "button", role: "tab", onclick: () => open(index), onkeydown: (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (index + step + choices.length) % choices.length;
    open(next);
    buttons[next].focus();
  } }, name));
  open(0);
  return { node: h("div", { class: "stack" }, h("div", { class: "tabs", role: "tablist", "aria-label": label }, buttons), panel), current: () => choices[now][0], redraw: () => open(now) };
}

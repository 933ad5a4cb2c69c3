// One run, live: curves, previews, log, settings, checks, files.

import { ago, api, bytes, debounced, duration, onStatus, path, precise, schema, stored, watchRun } from "./core.js";
import { buttons } from "./actions.js";
import { badge, segmented, tabs } from "./parts.js";
import { button, fill, h, icon, linkButton, toast } from "./dom.js";
import { humanName } from "./forms.js";
import { title } from "./main.js";
import { plot, smooth } from "./plots.js";
import { previews } from "./previews.js";

const phase = (each) => `${each.name}${each.of > 1 ? ` ${each.done ?? 0} of ${each.of}` : ""}`;

/** Shows a run until the signal. */
export async function showRun(root, id, signal) {
  const get = (...parts) => api("GET", path("api/runs", id, ...parts), undefined, { signal });
  let [run, series] = await Promise.all([get(), get("series")]);
  if (signal.aborted) return;
  const view = { smoothing: stored.get("smoothing", 0.9), log: false, time: false };
  title(run.title || run.id);

  // ---- Head ----
  const name = h("h1", null, run.title || run.id), state = h("span", { role: "status" }), actions = h("div", { class: "row" });
  const facts = h("p", { class: "dim facts-line" }), bar = h("div", null), notes = h("div", { class: "stack tight" });
  const progress = h("div", { class: "progress", role: "progressbar", "aria-label": "steps" }, bar);
  let drawnButtons = "";

  function drawHead() {
    name.textContent = run.title || run.id;
    fill(state, badge(run));
    const active = ["running", "pausing", "stopping"].includes(run.state);
    const end = run.seconds_left && new Date(Date.now() + 1000 * run.seconds_left).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    facts.textContent = [
      active && run.phase && phase(run.phase), `step ${run.step} of ${run.steps}`, run.seconds_per_step && `${duration(run.seconds_per_step)} a step`,
      active && run.seconds_left && `${duration(run.seconds_left)} left, done ${end}`, active && run.last_sign && `last sign of life ${ago(run.last_sign)}`,
      !active && run.ended && `ended ${ago(run.ended)}`, run.base_model, run.tokens.join(" "),
    ].filter(Boolean).join(" · ");
    const share = run.steps ? (100 * run.step) / run.steps : 0;
    bar.style.width = `${share}%`;
    progress.setAttribute("aria-valuenow", Math.round(share));
    const key = JSON.stringify([run.allowed, run.stuck, run.state, run.weights, run.report, run.checkpoint, run.title, run.note]);
    if (key !== drawnButtons) { drawnButtons = key; fill(actions, buttons(run)); }
    const error = run.error;
    fill(notes,
      run.note && h("p", { class: "note" }, run.note),
      run.why && !error && !["running", "done"].includes(run.state) && h("p", { class: "note warn" }, icon("warning"), run.why),
      error && h("div", { class: "note bad", role: "alert" }, icon("warning"), h("span", { class: "grow" }, error.text, error.what_to_do && h("span", null, "; ", error.what_to_do))),
      ["failed", "stopped"].includes(run.state) && run.log_tail?.length > 0 && h("details", null, h("summary", null, "The last lines of the log"), h("pre", { class: "code" }, run.log_tail.join("\n"))),
      (run.warnings ?? []).slice(-3).map((each) => h("p", { class: "note warn" }, icon("warning"), each.text)),
      run.headline && h("dl", { class: "headline" }, run.headline.map((each) => h("div", null, h("dt", null, each.name), h("dd", null, each.value === null || each.value === undefined ? each.text : h("strong", null, typeof each.value === "number" ? precise(each.value) : each.value, each.unit && each.unit !== "" ? ` ${each.unit}` : ""), each.value !== null && each.value !== undefined && each.text && h("small", null, each.text))))));
  }

  // ---- Curves ----
  const marks = (u, colour) => {
    const place = (steps, draw) => { for (const step of steps) { const at = series.steps.indexOf(step); const x = view.time ? series.clock?.[at] : step; if (x !== undefined) draw(u.valToPos(x, "x", true)); } };
    const { ctx } = u, bottom = u.bbox.top + u.bbox.height, size = 4 * devicePixelRatio;
    ctx.save();
    ctx.fillStyle = colour("dim");
    place(series.checkpoints, (x) => { ctx.beginPath(); ctx.moveTo(x, bottom - 2 * size); ctx.lineTo(x + size, bottom); ctx.lineTo(x - size, bottom); ctx.fill(); });
    ctx.fillStyle = colour("accent");
    place([...new Set(series.previews.map((each) => each.step))], (x) => { ctx.beginPath(); ctx.arc(x, bottom - size, size * 0.7, 0, 7); ctx.fill(); });
    ctx.fillStyle = colour("bad");
    series.loss.forEach((each, index) => { if (each === null && series.steps[index] !== undefined) ctx.fillRect(u.valToPos(view.time ? series.clock[index] : series.steps[index], "x", true) - 1, u.bbox.top, 2, 3 * size); });
    ctx.restore();
  };
  const loss = plot("Training loss", [{ label: "each step", colour: "accent", width: 1, faint: true }, { label: "smoothed", colour: "accent", width: 2 }, { label: "given up", colour: "dim", width: 1, dash: [3, 3] }], signal, { marks });
  const held = plot("Held-out loss", [{ label: "mean", colour: "accent", width: 2, dots: true }, { label: "σ 1", colour: "good", dots: true }, { label: "σ 2", colour: "warn", dots: true }, { label: "σ 3", colour: "bad", dots: true }, { label: "σ 4", colour: "dim", dots: true }], signal);
  const smoothing = h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: view.smoothing, "aria-label": "Smoothing", oninput: () => { view.smoothing = Number(smoothing.value); stored.set("smoothing", view.smoothing); drawCurves(); } });
  const heldPlace = h("div", null, held.node), noHeld = h("p", { class: "dim" }, "Measured at the start and every few steps; it appears here."), noLoss = h("p", { class: "dim" }, "The curve begins with the first step.");
  const heldTitle = h("h2", null, "Held-out loss");

  function drawCurves() {
    let seconds = 0;
    series.clock = series.seconds.map((each) => (seconds += each ?? 0));
    const time = view.time && series.clock.length === series.steps.length;
    const xs = time ? series.clock : series.steps;
    // A resume cuts the line: smoothing begins anew there.
    const cuts = (series.resumed ?? []).map((step) => series.steps.findIndex((each) => each > step)).filter((at) => at > 0);
    const smoothed = [];
    for (const [index, start] of [0, ...cuts].entries()) smoothed.push(...smooth(series.loss.slice(start, cuts[index] ?? undefined), view.smoothing));
    noLoss.hidden = xs.length > 0;
    loss.node.hidden = !xs.length;
    const old = new Map((series.void ?? []).flatMap((each) => each.steps.map((step, index) => [step, each.loss[index]])));
    if (xs.length) loss.draw([xs, series.loss, smoothed.slice(0, xs.length), series.steps.map((step) => (time ? null : old.get(step) ?? null))], { log: view.log, xLabel: time ? "seconds" : "step" });
    const found = series.validation;
    noHeld.hidden = found.length > 0;
    held.node.hidden = !found.length;
    if (found.length) {
      heldTitle.textContent = found.at(-1).kind === "fit" ? "Loss at fixed noise levels" : "Held-out loss";
      const levels = Object.keys(found[0].sigmas ?? {});
      held.draw([found.map((each) => each.step), found.map((each) => each.mean), ...[0, 1, 2, 3].map((index) => found.map((each) => each.sigmas?.[levels[index]] ?? null))], { log: view.log });
    }
  }

  // ---- Events ----
  const grid = previews(run, () => series, signal);
  const drawSoon = debounced(() => { drawCurves(); }, 120);
  const reread = debounced(async () => { const found = await get(); if (!signal.aborted) { run = found; drawHead(); pages.redraw(); } }, 400);
  function take(event) {
    if (event.type === "steps") {
      if (series.steps.length > 6000) { again(); return; }
      event.loss.forEach((each, index) => {
        series.steps.push(event.from + index);
        series.loss.push(Number.isFinite(each) ? each : null);
        series.seconds.push([].concat(event.seconds)[index] ?? null);
      });
      drawSoon();
    } else if (event.type === "preview") { series.previews.push(event); grid.draw(); drawSoon(); }
    else if (event.type === "validation") { series.validation.push(Array.isArray(event.sigmas) ? { ...event, sigmas: Object.fromEntries(event.sigmas.map((each, index) => [each.toFixed(2), event.loss[index]])) } : event); drawSoon(); }
    else if (event.type === "checkpoint" || event.type === "saved") { series[event.type === "saved" ? "saved" : "checkpoints"].push(event.step); drawSoon(); reread(); }
    else if (event.type === "resumed" || event.type === "started") again();
    else if (!["phase", "command"].includes(event.type)) reread();
    if (event.type === "done" || event.type === "command") again();
  }
  const again = debounced(async () => { series = await get("series"); drawCurves(); grid.draw(); reread(); }, 300);

  // ---- Tabs ----
  let logText = "";
  const log = h("pre", { class: "log", tabindex: 0, "aria-label": "Log" });
  async function readLog() {
    const more = await get("log").catch(() => null);
    if (!more || signal.aborted || more.text === logText) return;
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
    logText = more.text;
    log.textContent = logText || "Nothing yet.";
    if (follow) log.scrollTop = log.scrollHeight;
  }
  const file = (name) => `${path("api/runs", id, "files")}/${name.split("/").map(encodeURIComponent).join("/")}`;
  const pages = tabs("About this run", [
    ["Log", (panel) => { panel.append(log, h("div", { class: "row" }, button("Copy", () => navigator.clipboard?.writeText(logText).then(() => toast("Copied")), { iconName: "copy", kind: "quiet" }), linkButton("Download", file("log.txt"), { kind: "quiet", iconName: "download", download: "log.txt" }))); readLog().then(() => { log.scrollTop = log.scrollHeight; }); }],
    ["Settings", (panel) => drawSettings(panel)],
    ["Checks", (panel) => fill(panel, run.checks.length ? h("ul", { class: "checks" }, run.checks.map((each) => h("li", null, h("span", { class: `badge ${{ passed: "good", warning: "warn", failed: "bad" }[each.result] ?? ""}` }, { passed: "passed", warning: "doubtful", failed: "failed" }[each.result] ?? each.result), h("div", { class: "grow" }, h("strong", null, humanName(each.name)), h("small", null, ` ${each.text}`))))) : h("p", { class: "dim" }, "After the last step the result is checked: does it load, does it show the subject, is the rest unchanged."))],
    ["Files", (panel) => fill(panel, h("table", null, h("tbody", null, run.files.map((each) => h("tr", null, h("td", null, h("a", { href: file(each.path), download: each.path.split("/").at(-1) }, each.path)), h("td", { class: "number dim" }, bytes(each.bytes)))))))],
  ]);
  async function drawSettings(panel) {
    const used = run.used ?? {}, given = run.given ?? {};
    const known = new Set((await schema()).fields.map((each) => each.name));
    const rows = Object.entries(used).filter(([key]) => known.has(key)).sort(([a], [b]) => (b in given) - (a in given));
    if (pages && pages.current() !== "Settings") return;
    fill(panel, h("dl", { class: "facts settings" }, rows.map(([key, value]) => [h("dt", { class: key in given ? "given" : "" }, humanName(key)), h("dd", null, value === null ? "–" : Array.isArray(value) ? value.join(", ") || "–" : String(value))])), h("p", { class: "dim" }, "First those that you set."));
  }

  fill(root,
    h("nav", { class: "crumbs", "aria-label": "Breadcrumb" }, h("a", { href: "#/runs" }, "Runs")),
    h("div", { class: "heading" }, h("div", { class: "row" }, name, state), actions),
    facts, progress, notes,
    h("div", { class: "curves" },
      h("section", { class: "card stack tight" },
        h("div", { class: "row between" }, h("h2", null, "Training loss"), h("div", { class: "row" }, h("label", { class: "row slider" }, h("small", null, "smoothing"), smoothing), segmented("Scale", [[false, "linear"], [true, "log"]], false, (value) => { view.log = value; drawCurves(); }), segmented("Across", [[false, "steps"], [true, "time"]], false, (value) => { view.time = value; drawCurves(); }), loss.table)),
        loss.node, noLoss, h("small", null, "It jumps with the noise level that each step draws; look at the smoothed line. ▲ checkpoint, ● preview.")),
      h("section", { class: "card stack tight" }, h("div", { class: "row between" }, heldTitle, held.table), heldPlace, noHeld, h("small", null, "The same images and noise each time, so it shows progress."))),
    grid.node,
    h("section", { class: "card" }, pages.node));
  drawHead();
  drawCurves();
  grid.draw();

  onStatus((status) => {
    const now = status.runs.find((each) => each.id === id);
    if (!now) return;
    const changed = now.state !== run.state;
    Object.assign(run, now);
    drawHead();
    if (changed) reread();
    if (pages.current() === "Log") readLog();
  }, signal);
  watchRun(id, series.offset, take, signal);
  const clock = setInterval(drawHead, 1000);
  signal.addEventListener("abort", () => clearInterval(clock));
}

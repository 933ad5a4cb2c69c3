// A run's page.

import { ago, api, count, debounced, duration, live, onStatus, path, precise, watchRun } from "./core.js";
import { button, empty, fill, h, icon, field, linkButton, menu, toast } from "./dom.js";
import { ask } from "./asking.js";
import { checksPanel, filesPanel, logPanel, settingsPanel, tabs } from "./details.js";
import { lossPlots } from "./loss.js";
import { keys, title } from "./main.js";
import { previewGrid } from "./previews.js";
import { Series } from "./series.js";
import { LIVE, actions, clock, command, lostSteps, phaseText, stateMark, stateText, took } from "./states.js";

const QUIET = 10_000; // ms between two announcements
const POINTS = 2000; // of a curve; of twice as many, means are read again

/** Shows the run. */
export async function show(root, id, signal) {
  const address = path("api/runs", id);
  // The curves first; what else there is comes after they are drawn.
  const read = () => api("GET", `${address}/series?points=${POINTS}`, undefined, { signal });
  let columns;
  try { columns = await read(); } catch (error) {
    if (error.status !== 404) throw error;
    fill(root, h("h1", { class: "visually-hidden" }, "Run"), empty("search", "There is no such run", "It may have been moved to the trash, or its folder may have got another name.", linkButton("All runs", "#/runs", { kind: "primary" })));
    return;
  }
  const first = live.status?.runs.find((each) => each.id === id) ?? await api("GET", address, undefined, { signal });
  let run = first, weights = [], known = false;
  let detail = { ...first, given: {}, used: {}, files: [], checks: [], warnings: [], error: null, log_tail: [], headline: null };
  const series = new Series(columns);
  keys.screen = [["← →", "Full view: step"], ["↑ ↓", "Full view: prompt"], ["Space", "Full view, held: first preview"]];

  // ---- The head -------------------------------------------------------------------------------
  const name = h("h1"), note = h("p", { class: "dim run-note" }), state = h("span"), facts = h("dl", { class: "run-head-facts" });
  const said = h("p", { class: "said", role: "status" }), buttons = h("div"), notes = h("div", { class: "stack tight notes" }), spoken = h("p", { class: "visually-hidden", "aria-live": "polite" });
  const bar = h("div"), progress = h("div", { class: "progress", role: "progressbar", "aria-label": "Steps", "aria-valuemin": 0 }, bar);
  const headline = h("div", { class: "headline" });
  const say = (text, bad = false) => { said.textContent = text ?? ""; said.classList.toggle("error", bad); };
  const more = menu("", [
    { text: "Rename, or write a note", onclick: rename },
    { text: "Copy the run's name", detail: id, onclick: () => navigator.clipboard?.writeText(id).then(() => toast("Copied")) },
  ], { kind: "quiet", iconName: "more", label: "More about this run" });

  async function rename() {
    const text = h("input", { value: run.title, maxlength: 200 }), about = h("textarea", { rows: 3, value: run.note ?? "" });
    const saved = await ask("Rename the run", [field("title", "Title", text), field("note", "Note", about)], "Save", () => api("PATCH", address, { title: text.value.trim(), note: about.value.trim() }));
    if (saved) head((run = saved));
  }

  let buttonsOf = "", spokenAt = 0, spokenState = stateText(first), shownNotes = "";
  function head() {
    title(run.title);
    name.textContent = run.title;
    note.textContent = run.note;
    note.hidden = !run.note;
    fill(state, stateMark(run));
    const fact = (label, value, sign) => h("div", null, h("dt", null, label), h("dd", sign ? { dataset: { sign } } : null, value));
    const isLive = LIVE.includes(run.state), training = !run.phase || run.phase.name === "training";
    fill(facts, [
      fact("Step", `${run.step.toLocaleString("en")} of ${run.steps.toLocaleString("en")}`),
      isLive && !training && run.phase.of && fact("Now", phaseText(run)),
      run.seconds_per_step !== null && fact("A step", duration(run.seconds_per_step)),
      isLive && fact("Left", run.seconds_left === null ? "–" : duration(run.seconds_left)),
      isLive && fact("Done at", run.seconds_left === null ? "–" : clock(Date.now() / 1000 + run.seconds_left)),
      run.loss !== null && fact("Loss, smoothed", precise(run.loss)),
      isLive && fact("Last sign of life", ago(run.last_sign), run.last_sign ?? 0),
      !isLive && run.ended && fact("Ended", clock(run.ended)),
      !isLive && run.started && fact("Took", took(run)),
      fact("Base model", run.base_model || "–"),
      fact("Dataset", run.datasets.length ? run.datasets.map((each, index) => [index ? ", " : "", h("a", { href: `#/datasets/${encodeURIComponent(each)}` }, each)]) : "–"),
    ].filter(Boolean));
    const part = run.steps ? run.step / run.steps : 0;
    bar.style.width = `${100 * part}%`;
    progress.setAttribute("aria-valuemax", run.steps);
    progress.setAttribute("aria-valuenow", run.step);
    progress.className = `progress ${run.state}`;
    const wanted = JSON.stringify([run.state, run.freed, run.allowed, run.checkpoint]);
    if (wanted !== buttonsOf && !buttons.querySelector(":popover-open")) {
      const focused = buttons.contains(document.activeElement) && document.activeElement.textContent;
      if (buttonsOf && JSON.parse(buttonsOf)[0] !== run.state) say("");
      buttonsOf = wanted;
      fill(buttons, actions(run, { say, changed: changedRun, current: () => run }), run.report && linkButton("Report", `${address}/report`, { target: "_blank", iconName: "check" }), more);
      if (focused) [...buttons.querySelectorAll("button")].find((each) => each.textContent === focused)?.focus();
    }
    problems();
    const now = Date.now();
    if (stateText(run) !== spokenState && now - spokenAt > QUIET) {
      spokenState = stateText(run);
      spokenAt = now;
      spoken.textContent = `${run.title}: ${spokenState}, step ${run.step}`;
    }
  }

  /** What is wrong, in words, with what to do. */
  function problems() {
    const wanted = JSON.stringify([known, run.stuck, run.state, run.why, detail.error, detail.warnings.length, run.stuck && lostSteps(run), run.stuck && phaseText(run), detail.log_tail.at(-1), isOver() && run.step]);
    if (wanted === shownNotes) return;
    shownNotes = wanted;
    if (!known && ["failed", "stopped"].includes(run.state)) return; // the reason and the log come at once, together
    const failed = run.state === "failed", broken = run.state === "stopped" && run.why && !/asked|command|stopped by/i.test(run.why);
    const end = button(lostSteps(run), async () => {
      end.disabled = true;
      say("Ending…");
      try { changedRun(await command(id, "end")); say(""); } catch (error) { say(error.message, true); }
      end.disabled = false;
    }, { kind: "danger" });
    fill(
      notes,
      run.stuck && h("div", { class: "note warn" }, icon("warning"), h("div", { class: "grow" }, h("b", null, LIVE.includes(run.state) ? `It has been ${run.state} for over a minute. ` : "The run is over, but its process has not ended. "), run.phase ? `It waits for: ${phaseText(run)}.` : "It does not say what it waits for."), run.allowed.includes("end") && end),
      (failed || broken) && h("div", { class: `note ${failed ? "bad" : "warn"}` }, icon("warning"), h("div", { class: "grow stack tight" },
        failed
          ? [h("b", null, run.step ? `It failed at step ${run.step.toLocaleString("en")}` : "It failed before the first step"), h("p", null, detail.error?.text || run.why)]
          : h("p", null, h("b", null, `It ended at step ${run.step.toLocaleString("en")} without being stopped: `), run.why), detail.error?.what_to_do && h("p", null, detail.error.what_to_do),
        detail.log_tail.length > 0 && h("details", { open: failed }, h("summary", null, "Last lines of the log"), h("pre", { class: "log tail", tabindex: 0 }, detail.log_tail.slice(-50).join("\n"))))),
      !failed && !broken && run.why && ["stopped", "done", "stopping", "pausing"].includes(run.state) && h("div", { class: "note" }, h("span", null, run.why)),
      detail.warnings.slice(-2).map((each) => h("div", { class: "note warn" }, icon("warning"), h("span", null, each.text))),
      detail.warnings.length > 2 && h("small", null, `and ${count(detail.warnings.length - 2, "more warning")} under Checks`),
    );
    for (const each of notes.querySelectorAll("pre")) each.scrollTop = each.scrollHeight;
  }

  const isOver = () => ["stopped", "failed", "done"].includes(run.state);

  // ---- The body -------------------------------------------------------------------------------
  const plots = lossPlots(series, signal, isOver);
  const previews = previewGrid({
    id, series, signal, weights: usable,
    others: () => (live.status?.runs ?? []).filter((each) => each.id !== id && each.preview).slice(0, 30),
    load: async (other) => (await api("GET", `${path("api/runs", other, "series")}?points=10`, undefined, { signal })).previews,
  });
  const log = logPanel(id, signal);
  const panels = { settings: h("div"), checks: h("div"), files: h("div") };
  let tab = "log";
  const details = tabs([["log", "Log", log.node], ["settings", "Settings", panels.settings], ["checks", "Checks", panels.checks], ["files", "Files", panels.files]], (chosen) => {
    tab = chosen;
    if (chosen === "log") requestAnimationFrame(log.shown);
  });

  /** The weights to generate with at a step, or the newest before it. */
  function usable(step) {
    let found = null;
    for (const each of weights) {
      const at = each.step ?? (each.kind === "final" ? run.step : null);
      if (at !== null && at <= step && (!found || at > found.step)) found = { id: each.id, step: at };
    }
    return found && found.step > 0 ? found : null;
  }

  function fillDetails() {
    fill(panels.settings, settingsPanel(detail));
    fill(panels.checks, checksPanel(detail));
    fill(panels.files, filesPanel(detail));
    fill(headline, (detail.headline ?? []).map((each) => h("div", { class: `card ${each.state ?? ""}`, title: each.text }, h("small", null, each.name), h("b", null, typeof each.value === "number" ? precise(each.value) : each.value, each.unit && h("small", null, ` ${each.unit}`)), h("small", null, each.text))));
    headline.hidden = !detail.headline?.length;
    previews.explain(Number(detail.used.sample_every) === 0 && !series.previews.length && !(detail.used.sample_prompts ?? []).length
      ? `This run makes no previews by itself. ${isOver() ? "" : "“Preview now” makes one while it trains."}`
      : isOver() ? "This run has made no previews." : "The first preview is not there yet.");
  }

  const load = async () => {
    try {
      const [next, list] = await Promise.all([api("GET", address, undefined, { signal }), api("GET", "/api/weights", undefined, { signal })]);
      detail = next;
      known = true;
      run = { ...next };
      weights = list.weights.filter((each) => each.run === id);
      head();
      fillDetails();
      previews.update();
      plots.update();
      log.more();
    } catch (error) { if (!signal.aborted) say(error.message, true); }
  };
  const reload = debounced(load, 400);

  function changedRun(next) {
    if (next && next.id === id) { run = next; head(); }
    reload();
  }

  fill(
    root,
    h("div", { class: "run-head" },
      h("nav", { class: "crumb", "aria-label": "Place" }, h("a", { href: "#/runs" }, icon("left"), "Runs")),
      h("div", { class: "heading" }, h("div", { class: "row run-name-row" }, name, state), h("div", { class: "buttons-place" }, buttons)),
      note, facts, progress, said),
    spoken, notes, headline, plots.node, previews.node, details,
  );
  buttons.className = "row";
  head();
  previews.update();
  requestAnimationFrame(() => setTimeout(load));

  // ---- What goes on ---------------------------------------------------------------------------
  onStatus((status) => {
    const next = status.runs.find((each) => each.id === id);
    if (!next) return;
    const before = run;
    run = next;
    head();
    if (before.state !== run.state || before.freed !== run.freed || before.weights !== run.weights || before.report !== run.report) reload();
    previews.update();
  }, signal);
  const watch = (after) => watchRun(id, after, (event) => {
    if (series.add(event)) plots.update();
    if (series.steps.length > 2 * POINTS) thin();
    if (["preview", "generated", "resumed"].includes(event.type)) previews.update();
    if (["checkpoint", "saved", "check", "warning", "error", "done", "stopped", "paused"].includes(event.type)) reload();
    if (event.type === "saved" && said.textContent.startsWith("Weights")) say(`Weights of step ${event.step.toLocaleString("en")} are saved.`);
    if (event.type === "generated" && said.textContent.startsWith("The preview")) say("The preview is there.");
    if (event.type === "preview" && said.textContent.startsWith("The preview")) say("The previews are there.");
    if (event.type === "command" && event.accepted === false) say(event.why || "The run has refused it.", true);
  }, signal);
  watch(columns.offset);

  let thinning = false;
  async function thin() {
    if (thinning) return;
    thinning = true;
    try {
      const next = await read();
      series.take(next);
      plots.update();
      watch(next.offset);
    } catch { /* the curves stay as they are */ }
    thinning = false;
  }
  const timer = setInterval(() => {
    for (const each of facts.querySelectorAll("[data-sign]")) each.textContent = ago(Number(each.dataset.sign));
    if (tab === "log" && (LIVE.includes(run.state) || run.state === "paused") && !document.hidden) log.more();
  }, 1000);
  signal.addEventListener("abort", () => { clearInterval(timer); reload.cancel(); });
}

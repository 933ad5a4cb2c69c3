// Previews of a run: a grid of prompts and steps, and one of them in full view.

import { path, stored } from "./core.js";
import { button, closer, fill, h, linkButton, showModal, withTokens } from "./dom.js";
import { zoomable } from "./zoom.js";

const file = (id, name) => path("api/runs", id, "files", name);
const stepText = (step, first) => (step === 0 ? "before" : step === first ? `first, ${step.toLocaleString("en")}` : step.toLocaleString("en"));

/** Rows of prompts with their images by step. */
function rowsOf(id, title, previews) {
  const rows = new Map();
  for (const each of previews) {
    const key = `${each.number}|${each.prompt}|${each.seed}`;
    if (!rows.has(key)) rows.set(key, { key: `${id}|${key}`, id, title, prompt: each.prompt, seed: each.seed, number: each.number, files: new Map() });
    rows.get(key).files.set(each.step, each.file);
  }
  return [...rows.values()].sort((a, b) => a.number - b.number);
}

/** The image of a row at a step, or the nearest one: {step, file}. */
export function nearest(files, step) {
  let found = null;
  for (const [at, name] of files) if (!found || Math.abs(at - step) < Math.abs(found.step - step)) found = { step: at, file: name };
  return found;
}

/** The previews: {node, update()}. `weights(step)` gives the weights to generate with: {id, step}. `others()` lists runs, `load(id)` gives another run's previews. */
export function previewGrid({ id, series, weights, others, load, signal }) {
  let steps = [], rows = [], other = null, shown = "", following = true;
  const images = new Map();
  const table = h("table", { class: "previews" });
  const scroller = h("div", { class: "scroll previews-scroll", tabindex: 0, role: "region", "aria-label": "Previews by prompt and step" }, table);
  const slider = h("input", { type: "range", min: 0, "aria-label": "Step of the previews" });
  const at = h("output", { class: "step-output" });
  const size = h("input", { type: "range", min: 64, max: 512, step: 16, "aria-label": "Size of the previews", class: "size-slider" });
  const generate = h("span", { class: "generate-place" });
  const said = h("p", { class: "error", role: "alert" });
  const choice = h("select", { "aria-label": "Compare the previews with another run", class: "compare-choice" });
  const strip = h("div", { class: "asked" });
  const waiting = h("p", { class: "plot-empty dim" });
  const tools = h("div", { class: "preview-tools" }, h("label", { class: "smoothing grow" }, h("span", null, "Step"), slider, at), h("label", { class: "smoothing" }, h("span", null, "Size"), size), choice, generate);
  const node = h("section", { class: "card stack" }, h("h2", null, "Previews"), tools, said, scroller, waiting, strip);

  size.value = stored.get("preview-size", 128);
  const resize = () => table.style.setProperty("--preview", `${size.value}px`);
  size.addEventListener("input", () => { resize(); stored.set("preview-size", Number(size.value)); });
  slider.addEventListener("input", () => { following = Number(slider.value) === steps.length - 1; mark(true); });
  choice.addEventListener("change", async () => {
    other = null;
    said.textContent = "";
    if (choice.value) {
      choice.disabled = true;
      try { other = { id: choice.value, title: choice.selectedOptions[0].textContent, previews: await load(choice.value) }; } catch (error) { if (!signal.aborted) said.textContent = error.message; choice.value = ""; }
      choice.disabled = false;
    }
    update(true);
  });
  resize();

  const shownStep = () => steps[Number(slider.value)] ?? steps.at(-1);

  function mark(scroll) {
    const index = Number(slider.value), step = steps[index];
    at.textContent = step === undefined ? "" : stepText(step, -1);
    slider.setAttribute("aria-valuetext", step === 0 ? "before training" : `step ${step}`);
    for (const each of table.querySelectorAll("[data-column]")) each.classList.toggle("chosen", Number(each.dataset.column) === index);
    const head = table.querySelector(`th[data-column="${index}"]`);
    if (scroll && head) scroller.scrollLeft = head.offsetLeft - (scroller.clientWidth - head.offsetWidth) / 2;
    const usable = step === undefined ? null : weights(step);
    const text = usable ? `Generate with step ${usable.step.toLocaleString("en")}` : "";
    if (generate.dataset.text !== text + (usable?.id ?? "")) {
      generate.dataset.text = text + (usable?.id ?? "");
      fill(generate, usable && linkButton(text, `#/generate/${encodeURIComponent(usable.id)}`, { iconName: "image" }));
    }
  }

  /** The other run's row of the same prompt, of the same seed if there is one. */
  function match(row) {
    const theirs = rowsOf(other.id, other.title, other.previews).filter((each) => each.prompt === row.prompt);
    return theirs.find((each) => each.seed === row.seed) ?? theirs[0];
  }

  function cell(row, index, step) {
    const found = row.id === id ? row.files.has(step) && { step, file: row.files.get(step) } : nearest(row.files, step);
    const content = h("td", { dataset: { column: index } });
    if (!found) return content;
    const key = `${row.key}|${step}|${found.file}`;
    if (!images.has(key)) {
      images.set(key, h("button", { type: "button", class: "plate preview", onclick: () => full(row, step) }, h("img", { src: file(row.id, found.file), alt: `${row.prompt}, ${found.step === 0 ? "before training" : `step ${found.step}`}, seed ${row.seed}`, loading: "lazy" })));
    }
    content.append(images.get(key));
    if (found.step !== step) content.append(h("small", { class: "nearest" }, `step ${found.step.toLocaleString("en")}`));
    return content;
  }

  function update(whole = false) {
    const next = `${series.previews.length} ${series.previews.at(-1)?.file} ${series.generated.length} ${other?.id}`;
    if (next !== shown || whole) {
      shown = next;
      rows = rowsOf(id, "", series.previews);
      steps = [...new Set(series.previews.map((each) => each.step))].sort((a, b) => a - b);
      const lines = rows.flatMap((row) => {
        if (!other) return [row];
        return [row, match(row)].filter(Boolean);
      });
      fill(
        table,
        h("thead", null, h("tr", null, h("td"), steps.map((step, index) => h("th", { scope: "col", dataset: { column: index } }, stepText(step, steps[0]))))),
        h("tbody", null, lines.map((row) => h("tr", { class: row.id === id ? "" : "other" }, h("th", { scope: "row" }, row.id === id ? h("span", { class: "prompt" }, withTokens(row.prompt)) : h("span", { class: "dim" }, row.title), h("small", null, `seed ${row.seed}`)), steps.map((step, index) => cell(row, index, step))))),
      );
      slider.max = Math.max(0, steps.length - 1);
      if (following) slider.value = steps.length - 1;
      if (other && !lines.some((row) => row.id !== id)) said.textContent = `${other.title} has no preview of these prompts.`;
      tools.hidden = scroller.hidden = steps.length === 0;
      waiting.hidden = steps.length > 0;
      fill(strip, series.generated.length > 0 && [h("h3", null, "Generated on request"), h("div", { class: "asked-images" }, series.generated.map((each) => h("figure", null, h("a", { class: "plate preview", href: file(id, each.file), target: "_blank" }, h("img", { src: file(id, each.file), alt: `${each.prompt}, step ${each.step}, seed ${each.seed}`, loading: "lazy" })), h("figcaption", null, h("span", null, withTokens(each.prompt ?? "")), h("small", null, `step ${each.step}, seed ${each.seed}`)))))]);
      mark(following);
    } else mark(false);
    if (choice.childElementCount <= 1) {
      fill(choice, h("option", { value: "" }, "Compare with …"), others().map((each) => h("option", { value: each.id }, each.title)));
      choice.hidden = choice.childElementCount <= 1;
    }
  }

  /** One preview, as large as the window. */
  function full(row, step) {
    const own = rows.find((each) => each === row || (each.prompt === row.prompt && each.number === row.number)) ?? rows[0];
    let line = rows.indexOf(own), column = steps.indexOf(step), first = false;
    const plates = h("div", { class: "viewer-plates" }), caption = h("p", { class: "viewer-caption" }), place = h("p", { class: "dim" }), link = h("span");
    const go = (across, down) => () => {
      column = Math.max(0, Math.min(steps.length - 1, column + across));
      line = (line + down + rows.length) % rows.length;
      draw();
    };
    const hold = button("Hold: first preview", null, {});
    const press = (on) => () => { if (first !== on) { first = on; draw(); } };
    hold.addEventListener("pointerdown", press(true));
    for (const each of ["pointerup", "pointerleave", "pointercancel", "blur"]) hold.addEventListener(each, press(false));
    const box = h("dialog", { class: "viewer", "aria-label": "Preview" });
    fill(
      box, h("header", null, h("div", { class: "viewer-text grow" }, caption, place), zoomable(box), closer(() => box.close())),
      plates,
      h("footer", null,
        h("div", { class: "row" }, button("", go(-1, 0), { iconName: "left", label: "Earlier step (←)" }), button("", go(1, 0), { iconName: "right", label: "Later step (→)" }), rows.length > 1 && button("Next prompt", go(0, 1)), hold),
        link),
    );
    const figure = (title, found, seed, prompt) => h("figure", null, h("div", { class: "plate" }, h("img", { src: found.file, alt: `${prompt}, step ${found.step}, seed ${seed}` })), title && h("figcaption", { class: "dim" }, title));
    function draw() {
      const current = rows[line], wanted = first ? steps[0] : steps[column], mine = nearest(current.files, wanted);
      const theirs = other && match(current);
      const found = theirs && nearest(theirs.files, wanted);
      fill(plates, figure(theirs ? "this run" : "", { step: mine.step, file: file(id, mine.file) }, current.seed, current.prompt), found && figure(`${other.title}, step ${found.step}${theirs.seed === current.seed ? "" : `, seed ${theirs.seed}`}`, { step: found.step, file: file(other.id, found.file) }, theirs.seed, current.prompt));
      fill(caption, withTokens(current.prompt));
      place.textContent = `${mine.step === 0 ? "before training" : `step ${mine.step.toLocaleString("en")}`} · ${column + 1} of ${steps.length} · seed ${current.seed}`;
      hold.setAttribute("aria-pressed", String(first));
      const usable = weights(mine.step);
      fill(link, usable && linkButton(`Generate with step ${usable.step.toLocaleString("en")}`, `#/generate/${encodeURIComponent(usable.id)}`, { kind: "primary", iconName: "image" }));
    }
    box.addEventListener("keydown", (event) => {
      const step = !event.shiftKey && { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (step) go(...step)();
      else if (event.key === " ") press(true)();
      else return;
      event.preventDefault();
    });
    box.addEventListener("keyup", (event) => { if (event.key === " ") { event.preventDefault(); press(false)(); } });
    draw();
    box.tabIndex = -1;
    showModal(box, () => { slider.value = column; following = column === steps.length - 1; mark(true); }, signal);
    box.focus();
  }

  return { node, update, step: shownStep, explain: (text) => { waiting.textContent = text; } };
}

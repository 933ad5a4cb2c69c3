// Previews of a run: prompts × steps, and one of them large.

import { path } from "./core.js";
import { button, fill, h, linkButton, withTokens } from "./dom.js";

/** The grid. `series()` gives the run's series now. Returns {node, draw()}. */
export function previews(run, series, signal) {
  const body = h("div", { class: "scroll" });
  const size = h("input", { type: "range", min: 64, max: 320, value: 128, "aria-label": "Size of the previews", oninput: () => body.style.setProperty("--size", `${size.value}px`) });
  const node = h("section", { class: "card stack" }, h("div", { class: "row between" }, h("h2", null, "Previews"), h("label", { class: "row slider" }, h("small", null, "size"), size)), body);
  body.style.setProperty("--size", "128px");
  let drawn = "";
  const url = (file) => `${path("api/runs", run.id, "files")}/${file.split("/").map(encodeURIComponent).join("/")}`;

  function table() {
    const rows = new Map(), steps = new Set();
    for (const each of [...series().previews, ...(series().generated ?? []).map((one) => ({ ...one, number: `now ${one.prompt} ${one.seed}` }))]) {
      const key = `${each.number} ${each.prompt}`;
      if (!rows.has(key)) rows.set(key, { prompt: each.prompt, seed: each.seed, images: new Map() });
      rows.get(key).images.set(each.step, each);
      steps.add(each.step);
    }
    return { rows: [...rows.values()], steps: [...steps].sort((a, b) => a - b) };
  }

  function draw() {
    const { rows, steps } = table();
    const key = JSON.stringify([rows.map((row) => [row.prompt, [...row.images.values()].map((each) => each.file)]), steps]);
    if (key === drawn) return;
    drawn = key;
    if (!rows.length) { fill(body, h("p", { class: "dim" }, "Images of the same prompts, made while it trains, appear here. The first ones are made before the first step.")); return; }
    const end = body.scrollLeft + body.clientWidth >= body.scrollWidth - 20;
    fill(body, h("table", { class: "preview-table" },
      h("thead", null, h("tr", null, h("th", null, "Prompt"), steps.map((step) => h("th", null, step === 0 ? "before" : step)))),
      h("tbody", null, rows.map((row, index) => h("tr", null, h("th", { scope: "row" }, withTokens(row.prompt ?? "")), steps.map((step) => {
        const each = row.images.get(step);
        return h("td", null, each ? h("button", { type: "button", class: "plate preview", onclick: () => full(index, step), "aria-label": `${row.prompt}, step ${step}, larger` }, h("img", { src: url(each.file), alt: `${row.prompt}, step ${step}, seed ${row.seed}`, loading: "lazy" })) : null);
      }))))));
    if (end) body.scrollLeft = body.scrollWidth;
  }

  /** One preview in full, with the keys of the specification. */
  function full(index, step) {
    const image = h("img", null), text = h("p", { class: "grow" }), note = h("small", null);
    const slider = h("input", { type: "range", min: 0, "aria-label": "Step" });
    const actions = h("div", { class: "row" });
    const box = h("dialog", { class: "viewer", "aria-label": "Preview" },
      h("div", { class: "viewer-head" }, text, note, button("", () => box.close(), { kind: "quiet", iconName: "close", label: "Close" })),
      h("div", { class: "plate viewer-plate" }, image), h("div", { class: "viewer-foot" }, slider, actions));
    let before = false;
    const show = () => {
      const { rows, steps } = table();
      const row = rows[index];
      const at = [...row.images.keys()].sort((a, b) => a - b);
      if (!at.includes(step)) step = at.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best), at[0]);
      const shown = row.images.get(before ? at[0] : step);
      image.src = url(shown.file);
      image.alt = `${row.prompt}, step ${shown.step}, seed ${row.seed}`;
      fill(text, withTokens(row.prompt ?? ""));
      note.textContent = `${shown.step === 0 ? "before training" : `step ${shown.step}`} · seed ${row.seed}`;
      slider.max = at.length - 1;
      slider.value = at.indexOf(step);
      slider.oninput = () => { step = at[Number(slider.value)]; show(); };
      const saved = [...(series().saved ?? [])].includes(step) ? "saved" : (series().checkpoints ?? []).includes(step) ? "checkpoint" : null;
      fill(actions, h("small", null, "← → step, ↑ ↓ prompt, hold space: before"), saved && linkButton(`Generate with step ${step}`, `#/generate/${encodeURIComponent(`runs/${run.id}/${saved}-${String(step).padStart(6, "0")}`)}`, { onclick: () => box.close() }), linkButton("Download", url(shown.file), { iconName: "download", download: "" }));
      return { rows, steps, at };
    };
    box.addEventListener("keydown", (event) => {
      const { rows, at } = show();
      const along = { ArrowRight: 1, ArrowLeft: -1 }[event.key], down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (along) step = at[Math.max(0, Math.min(at.length - 1, at.indexOf(step) + along))];
      else if (down) index = Math.max(0, Math.min(rows.length - 1, index + down));
      else if (event.key === " " && !event.target.closest("a, button")) before = true;
      else return;
      event.preventDefault();
      show();
    });
    box.addEventListener("keyup", (event) => { if (event.key === " ") { before = false; show(); } });
    box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
    box.addEventListener("close", () => box.remove());
    signal.addEventListener("abort", () => box.close());
    document.body.append(box);
    show();
    box.showModal();
    slider.focus();
  }
  return { node, draw };
}

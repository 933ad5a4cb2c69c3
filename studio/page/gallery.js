// Generated images, newest first; a job fills while its images are made.

import { ago, api, count, onStatus, path } from "./core.js";
import { axisLabel } from "./axes.js";
import { button, fill, h, icon, toast, withTokens } from "./dom.js";
import { thumbnails } from "./input_images.js";
import { partsOf } from "./names.js";
import { MOST, sideBySide } from "./side_by_side.js";
import { keyOf, viewer } from "./viewer.js";

const LIVE = ["waiting", "running"];
const BADGE = { waiting: "", running: "running", failed: "bad", canceled: "warn" };

/** The gallery. `on`: {again(settings, seedToo), changed(), empty(), baseOf(settings), withoutLora(image), useAs(input, image), takesReferences()}. */
export function gallery(signal, on) {
  const list = h("div", { class: "jobs" });
  const older = button("Show older images", () => load(true), { kind: "quiet", hidden: true });
  const told = h("p", { class: "visually-hidden", role: "status" });
  const selected = h("span", { class: "grow", role: "status" });
  const compare = button("Compare", () => sideBySide(made(), signal), { kind: "primary", iconName: "grid" });
  const clear = button("Clear", () => {
    list.querySelector(".pick :checked")?.focus(); // the bar disappears
    chosen.clear();
    drawChosen();
  }, { kind: "quiet" });
  const bar = h("div", { class: "card row choice-bar", role: "group", "aria-label": "Images to compare", hidden: true }, selected, compare, clear);
  const node = h("section", { class: "stack", "aria-label": "Gallery" }, told, list, older, bar);
  const chosen = new Set(); // keys of images to compare, in the order of their choice
  const cards = new Map(); // by the job's id, in the gallery's order
  let each = null;

  const get = (...parts) => api("GET", path("api/images", ...parts), undefined, { signal });

  async function load(more = false) {
    const last = [...cards.keys()].at(-1);
    const found = await api("GET", `/api/images?limit=12${more && last ? `&before=${encodeURIComponent(last)}` : ""}`, undefined, { signal });
    each = found.seconds ?? each;
    for (const job of found.jobs) take(job, true);
    older.hidden = !found.more;
    drawEmpty();
    on.changed();
  }

  function take(job, last = false) {
    let card = cards.get(job.id);
    if (!card) {
      card = newCard(job);
      if (last) { cards.set(job.id, card); list.append(card.node); }
      else {
        const rest = [...cards];
        cards.clear();
        for (const [id, one] of [[job.id, card], ...rest]) cards.set(id, one);
        list.prepend(card.node);
      }
      list.querySelector(":scope > .empty")?.remove();
    }
    card.update(job);
    if (chosen.size) drawChosen();
  }

  function drawEmpty() {
    if (!cards.size && !list.children.length) list.append(on.empty());
  }

  async function added(id) { take(await get(id)); }

  async function refresh(id) {
    try {
      const job = await get(id);
      if (signal.aborted) return;
      const before = cards.get(id)?.job;
      take(job);
      if (before && LIVE.includes(before.state) && !LIVE.includes(job.state)) {
        told.textContent = job.state === "done" ? `${count(job.done, "image")} done` : `${job.state}: ${job.error ?? ""}`;
        const found = await api("GET", "/api/images?limit=1", undefined, { signal });
        each = found.seconds ?? each;
        on.changed();
      }
    } catch (error) { if (error.name !== "AbortError" && error.status !== 404) toast(error.message, { bad: true }); }
  }

  const seen = new Map();
  onStatus((status) => {
    const tasks = status.tasks.filter((task) => task.kind === "images" && /^\d{4}-\d\d-\d\d-\d+$/.test(task.id));
    for (const task of tasks) {
      const key = `${task.state} ${task.done}`;
      if (seen.get(task.id) === key) continue;
      const isNew = !seen.has(task.id) && !cards.has(task.id);
      seen.set(task.id, key);
      if (!isNew || LIVE.includes(task.state)) refresh(task.id);
    }
    for (const [id, card] of cards) if (LIVE.includes(card.job.state) && !tasks.some((task) => task.id === id)) refresh(id);
  }, signal);

  async function remove(job) {
    try {
      const { trash } = await api("DELETE", path("api/images", job.id));
      cards.get(job.id)?.node.remove();
      cards.delete(job.id);
      drawEmpty();
      drawChosen();
      toast(`${count(job.done, "image")} moved to the trash`, { action: ["Undo", async () => { await api("POST", path("api/trash", trash, "restore")); restore(job); }] });
    } catch (error) { toast(error.message, { bad: true }); }
  }

  /** Moves one image to the trash; with the last one, its job. The focus goes to the next image. */
  async function removeOne({ job, image }, focus = false) {
    const pictures = [...list.querySelectorAll(".picture")], now = pictures.findIndex((each) => each.dataset.key === keyOf({ job, image }));
    if (job.images.length === 1) await remove(job);
    else try {
      const { trash } = await api("DELETE", image.file.split("?")[0]);
      await refresh(job.id);
      toast("Image moved to the trash", { action: ["Undo", async () => {
        try { await api("POST", path("api/trash", trash, "restore")); await refresh(job.id); } catch (error) { toast(error.message, { bad: true }); }
      }] });
    } catch (error) { toast(error.message, { bad: true }); }
    if (focus) (pictures.slice(now + 1).find((each) => each.isConnected) ?? pictures.slice(0, now + 1).findLast((each) => each.isConnected))?.focus();
  }

  /** Back to its place between the others. */
  function restore(job) {
    const rest = [...cards.values()].map((card) => card.job);
    list.replaceChildren();
    cards.clear();
    for (const one of [...rest, job].sort((a, b) => b.created - a.created)) take(one, true);
  }

  async function cancel(job) {
    try { take(await api("POST", path("api/images", job.id, "cancel"))); } catch (error) { toast(error.message, { bad: true }); }
  }

  /** All images that are there, in the order of the gallery. */
  const all = () => [...cards.values()].flatMap(({ job }) => job.images.map((image) => ({ job, image, base: on.baseOf(image.settings) })));
  const open = (job, image) => viewer(all, keyOf({ job, image }), signal, { ...on, remove, removeOne, withoutLora, choose, choice });

  // ---- Side by side ----

  const choice = (key) => ({ checked: chosen.has(key), disabled: !chosen.has(key) && chosen.size >= MOST });
  const made = () => { const images = all(); return [...chosen].map((key) => images.find((each) => keyOf(each) === key)).filter(Boolean); };

  function choose(key) {
    if (!chosen.delete(key) && chosen.size < MOST) chosen.add(key);
    drawChosen();
  }

  function drawChosen() {
    const there = new Set(all().map(keyOf));
    for (const key of chosen) if (!there.has(key) && !LIVE.includes(cards.get(key.split(" ")[0])?.job.state)) chosen.delete(key);
    const missing = [...chosen].filter((key) => !there.has(key)).length;
    list.classList.toggle("choosing", chosen.size > 0);
    for (const each of list.querySelectorAll(".pick input")) Object.assign(each, choice(each.value));
    bar.hidden = !chosen.size;
    const text = missing ? `${missing} of ${chosen.size} images not generated yet` : `${count(chosen.size, "image")} selected${chosen.size < 2 ? `; select up to ${MOST}` : ""}`;
    if (selected.textContent !== text) selected.textContent = text;
    compare.disabled = missing > 0 || chosen.size < 2;
  }

  /** Puts the same image without the LoRA beside it: the one that is there, or a new one. */
  async function withoutLora(each) {
    const same = (one) => JSON.stringify([one.base, one.image.seed, ...["prompt", "negative_prompt", "width", "height", "steps", "guidance", "reference_images", "image", "mask", "prompt_strength"].map((name) => one.image.settings[name] ?? null)]);
    const known = all().find((one) => !one.image.settings.weights?.length && same(one) === same(each));
    try {
      const key = known ? keyOf(known) : `${await on.withoutLora(each)} 1`;
      chosen.clear();
      for (const one of [keyOf(each), key]) chosen.add(one);
      if (!known) await added(key.split(" ")[0]);
      drawChosen();
      if (known) sideBySide(made(), signal);
    } catch (error) { if (!signal.aborted) toast(error.message, { bad: true }); }
  }

  function newCard(first) {
    const text = h("p", { class: "job-prompt grow" }, withTokens(first.prompt)), facts = h("small", { class: "dim" }), state = h("span", { class: "job-state" }), actions = h("div", { class: "row tight" }), area = h("div", null), note = h("div", null);
    const card = { job: first, node: h("article", { class: "job-card stack tight", "aria-label": first.prompt.slice(0, 80) }, h("div", { class: "row job-head" }, text, actions), h("div", { class: "row tight" }, state, facts), thumbnails(first.settings), note, area), update };
    let drawn = "", drawnState = "";
    const places = new Map(); // by row and column, or number

    const blank = (settings) => h("div", { class: "plate waiting", style: { "aspect-ratio": `${settings.width || 1} / ${settings.height || 1}` } });
    const plate = (job, settings) => h("div", { class: "place" }, blank(settings));
    function layout(job) {
      const settings = job.settings;
      places.clear();
      if (!job.axes.length) {
        area.className = "pictures";
        fill(area, Array.from({ length: job.of }, (_, index) => { const one = plate(job, settings); places.set(index + 1, one); return one; }));
        return;
      }
      const [across, down] = job.axes;
      area.className = "scroll";
      area.tabIndex = 0;
      area.setAttribute("role", "region");
      area.setAttribute("aria-label", "Grid of images");
      fill(area, h("table", { class: "picture-grid" },
        h("thead", null, h("tr", null, down && h("td", null), across.values.map((value) => h("th", { scope: "col" }, axisLabel(across.name, value))))),
        h("tbody", null, (down?.values ?? [null]).map((below, row) => h("tr", null, down && h("th", { scope: "row" }, axisLabel(down.name, below)), across.values.map((_, column) => { const one = plate(job, settings); places.set(row * across.values.length + column + 1, one); return h("td", null, one); }))))));
    }

    function update(job) {
      card.job = job;
      if (!places.size) layout(job);
      const live = LIVE.includes(job.state), there = new Set(job.images.map((each) => each.number));
      card.node.classList.toggle("live", live);
      for (const [number, place] of places) { // what is in the trash leaves a gap only in a grid
        if (!there.has(number) && place.querySelector("img")) fill(place, blank(job.settings));
        place.hidden = job.state === "done" && !job.axes.length && !there.has(number);
      }
      for (const image of job.images) {
        const place = places.get(image.number);
        if (!place || place.querySelector("img")) continue;
        const { settings } = image, axes = [job.axes[0] && axisLabel(job.axes[0].name, job.axes[0].values[image.column]), job.axes[1] && axisLabel(job.axes[1].name, job.axes[1].values[image.row])].filter(Boolean).join(", ");
        const picture = h("img", { src: image.file, alt: `${settings.prompt}${axes ? `, ${axes}` : ""}, seed ${image.seed}`, loading: "lazy", "data-small": Number(settings.width) < 200 });
        const key = keyOf({ job, image }), pick = h("input", { type: "checkbox", value: key, ...choice(key), "aria-label": `Select to compare: image ${image.number}`, onchange: () => choose(key) });
        const show = () => ({ job: card.job, image }), bin = button("", () => removeOne(show(), true), { kind: "small bin", iconName: "trash", label: `Move image ${image.number} to the trash` });
        fill(place, h("label", { class: "pick", title: "Select to compare" }, pick), bin, h("button", { type: "button", class: "plate picture", dataset: { key }, onkeydown: (event) => { if (event.key === "Delete" && !LIVE.includes(card.job.state)) { event.preventDefault(); removeOne(show(), true); } }, style: { "aspect-ratio": `${settings.width || 1} / ${settings.height || 1}` }, onclick: () => open(card.job, image) }, picture));
      }
      if (!live) for (const place of places.values()) place.querySelector(".waiting")?.classList.add("never");
      const weights = (job.settings.weights ?? []).map((one) => `${partsOf(one.id).text}${Number(one.scale) === 1 ? "" : ` × ${one.scale}`}`).join(" + ") || "base model alone";
      const line = [weights, job.settings.width && `${job.settings.width}×${job.settings.height}`, ago(job.created), job.run && `by ${partsOf(`runs/${job.run}/final`).text.replace(/, final$/, "")}`].filter(Boolean).join(" · ");
      if (line !== drawn) { drawn = line; facts.textContent = line; }
      const key = `${job.state} ${job.done}`;
      if (key === drawnState) return;
      drawnState = key;
      const words = { waiting: "waiting", running: `${job.done} of ${job.of}`, failed: "failed", canceled: `canceled at ${job.done} of ${job.of}` }[job.state];
      fill(state, words && h("span", { class: `badge ${BADGE[job.state]}` }, job.state === "running" && h("span", { class: "dot running" }), words));
      fill(note, job.error && job.state === "failed" && h("p", { class: "note bad" }, icon("warning"), job.error));
      fill(actions,
        button("Use again", () => on.again({ ...job.settings, seed: null }, false), { kind: "quiet small", iconName: "again" }),
        !live ? button("", () => remove(card.job), { kind: "quiet small", iconName: "trash", label: "Move to the trash" }) : button("Cancel", (event) => { event.currentTarget.disabled = true; cancel(job); }, { kind: "small" }));
    }
    return card;
  }

  return { node, load, added, secondsEach: () => each };
}

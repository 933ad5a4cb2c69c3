// One dataset: its images with their captions, and the selected image large.

import { api, bytes, count, debounced, onStatus, path, schema, stored } from "./core.js";
import { button, empty, field, fill, h, heading, icon, linkButton, menu, toast } from "./dom.js";
import { ask } from "./asking.js";
import { editor, forget } from "./captions.js";
import { captionStatus, writeCaptions } from "./captioning.js";
import { removeDataset, rename, restore, tokenOf } from "./datasets.js";
import { inspector } from "./inspector.js";
import { keys, title } from "./main.js";
import { findAndReplace } from "./replacing.js";
import { acceptDrops, arrivals, pickFiles, send } from "./uploads.js";

const FIRST = 40, MORE = 120; // rows made at once, and in each pause after that
const VIEWS = {
  all: ["All", () => true],
  marked: ["With marks", (each) => each.marks.length > 0],
  bare: ["No caption", (each) => each.default_caption],
};
const hasProblem = (each) => each.marks.some((mark) => mark.kind === "problem");

export async function showOne(root, name, signal) { await new Dataset(root, name, signal).start(); }

class Dataset {
  constructor(root, name, signal) {
    title(name);
    Object.assign(this, { name, signal, rows: new Map(), order: new Map(), seen: [], view: "all", words: "", old: false });
    this.state = {
      name, signal, images: [], controls: new Map(), selected: null, base: "", resolution: "", folders: "", plain: false, token: tokenOf(name), defaultCaption: "a photo of TOK",
      get word() { return this.plain ? "" : this.token; }, // for the server; empty: without a placeholder token
      get query() { return new URLSearchParams({ token: this.word, default_caption: this.defaultCaption }); },
      find(one) { return this.images.find((each) => each.name === one) ?? this.controls.get(one) ?? null; },
    };
    this.list = h("ul", { class: "images", "aria-label": "Images and captions" });
    this.summary = h("p", { class: "dim grow", role: "status" });
    this.problems = h("div", { class: "stack tight general" });
    this.views = h("div", { class: "segmented", role: "group", "aria-label": "Which images" });
    this.side = h("aside", { class: "side", "aria-label": "Selected image" });
    this.large = inspector(this.side, this.state, { load: () => this.load(), remove: (each) => this.remove(each), loaded: (undo) => this.loaded(undo) });
    this.captions = captionStatus(this.state, (wait) => { this.soon ??= setTimeout(() => { this.soon = null; this.load({ quiet: true }).catch(() => {}); }, wait); });
    this.later = debounced(() => this.load({ quiet: true }).catch(() => {}), 1500);
    signal.addEventListener("abort", () => this.later.cancel());
    this.draw(root);
  }

  url(suffix = "") { return `${path("api/datasets", this.name)}${suffix}`; }
  async add(files) { if (files.length) await send(this.name, files); }
  async choose(how) { await this.add(await pickFiles(how)); }

  draw(root) {
    const search = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter by caption or name", oninput: () => { this.words = search.value.toLowerCase(); this.arrange(true); } });
    this.writer = button("Write captions", () => writeCaptions(this.state), { iconName: "edit", disabled: true });
    const train = linkButton("Train", `#/train/${encodeURIComponent(this.name)}`, { kind: "primary", iconName: "play" });
    fill(
      root,
      h("div", { class: "stack tight" },
        h("nav", { class: "crumbs", "aria-label": "Breadcrumb" }, h("a", { href: "#/datasets" }, "Datasets"), icon("right")),
        heading(
          this.name,
          menu("Add", [
            { text: "Images and captions", detail: "files; a zip or tar too", onclick: () => this.choose() },
            { text: "A folder", onclick: () => this.choose({ folder: true }) },
          ], { iconName: "plus" }),
          this.writer,
          menu("More", [
            { text: "Find and replace", detail: "in captions, shown before it is done", onclick: () => this.replace() },
            { text: "Word for the subject", detail: "what TOK becomes", onclick: () => this.changeToken() },
            null,
            { text: "Download as zip", onclick: () => { location.href = this.url("/zip"); } },
            { text: "Rename", onclick: async () => { const found = await rename(this.name); if (found) location.hash = `#/datasets/${encodeURIComponent(found)}`; } },
            { text: "Delete", danger: true, onclick: () => removeDataset(this.name, () => { location.hash = "#/datasets"; }, () => { location.hash = `#/datasets/${encodeURIComponent(this.name)}`; }) },
          ]),
          train,
        ),
        this.summary),
      this.captions.node, this.problems,
      h("div", { class: "split" }, h("section", { class: "stack", "aria-label": "Images" }, h("div", { class: "row between toolbar" }, this.views, h("div", { class: "search" }, search)), this.list), this.side),
    );
  }

  async start() {
    const { signal } = this;
    acceptDrops((files) => this.add(files), signal);
    arrivals.addEventListener("arrived", (event) => { if (event.detail === this.name) this.load().catch(() => {}); }, { signal });
    keys.screen = [["↑ ↓", "Image before, next"], ["Enter", "Edit the caption"], ["Ctrl Enter", "Save, and edit the next"], ["r", "Replace the image"], ["Delete", "Remove the image"]];
    addEventListener("keydown", (event) => this.key(event), { signal });
    let before = null; // the server's tasks: an archive is unpacked, images are checked
    onStatus((status) => {
      this.captions.update(status.tasks);
      const mine = status.tasks.filter((task) => task.kind !== "captions" && (task.name === this.name || task.name.startsWith(`${this.name}/`)));
      const ended = mine.filter((task) => ["done", "failed"].includes(task.state)).map((task) => task.id);
      const busy = mine.find((task) => task.state === "running");
      this.busy = busy ? `checking ${busy.done} of ${busy.of}` : "";
      this.tell();
      if (before && ended.some((id) => !before.has(id))) this.load({ quiet: true }).catch(() => {});
      before = new Set(ended);
    }, signal);
    const draft = stored.get("train draft")?.settings ?? {};
    this.state.base = draft.base_model && draft.base_model !== "auto" ? draft.base_model : "";
    this.state.folders = String(draft.controls ?? "");
    if (typeof draft.default_caption === "string") this.state.defaultCaption = draft.default_caption;
    this.state.plain = draft.train_placeholder_token === false;
    const about = await schema().catch(() => null);
    if (about && !about.bases.some((each) => each.name === this.state.base)) this.state.base = about.automatic;
    this.state.modelSize = about?.bases.find((each) => each.name === this.state.base)?.training_resolution;
    await this.load();
  }

  /** Reads the dataset. `quiet`: rows that are there stay where they are. */
  async load({ quiet = false } = {}) {
    const { state } = this;
    const query = state.query;
    if (state.folders) query.set("controls", state.folders);
    if (state.base) query.set("base", state.base);
    if (state.resolution) query.set("resolution", state.resolution);
    const mine = (this.asked = (this.asked ?? 0) + 1), asked = performance.now();
    const found = await api("GET", `${this.url()}?${query}`, undefined, { signal: this.signal });
    if (mine !== this.asked || this.signal.aborted) return;
    const known = new Map(state.images.map((each) => [each.caption, each.length]));
    for (const each of found.images) each.length = known.get(each.caption) ?? null;
    state.images = found.images.filter((each) => !each.is_control);
    state.controls = new Map(found.images.filter((each) => each.is_control).map((each) => [each.name, each]));
    for (const each of found.images) this.rows.get(each.name)?.update(each, asked);
    fill(this.problems, found.problems.filter((each) => !each.image).map((each) => h("p", { class: `note ${each.kind === "problem" ? "bad" : "warn"}` }, icon("warning"), each.text)));
    this.arrange(!quiet);
    this.countTokens();
  }

  /** Texts and lengths; the server's tokenizer may need a while, or be missing. */
  async countTokens() {
    const { state } = this;
    const texts = [...new Set(state.images.filter((each) => !each.length).map((each) => each.caption))].slice(0, 2000);
    if (!texts.length || !state.base || this.noTokens) return;
    try {
      const { tokens, lost, most } = await api("POST", "/api/tokens", { base: state.base, token: state.token, texts: texts.map((each) => each.replaceAll(/\bTOK\b/g, state.token)) }, { signal: this.signal });
      if (!tokens || tokens[0] === null) { this.noTokens = true; return; }
      const known = new Map(texts.map((each, index) => [each, { tokens: tokens[index], lost: lost[index], most }]));
      for (const each of state.images) if (known.has(each.caption)) { each.length = known.get(each.caption); this.rows.get(each.name)?.update(each); }
    } catch { this.noTokens = true; }
  }

  // ---- The list ----

  tell() {
    const { images, controls } = this.state, pairs = images.some((each) => each.controls.length);
    this.writer.disabled = !images.length || pairs;
    this.writer.title = pairs ? "A model describes images; captions of pairs are instructions" : "";
    const problems = images.filter(hasProblem).length;
    this.summary.textContent = images.length ? [
      count(images.length, "image"), controls.size && count(controls.size, "control image"), count(images.filter((each) => !each.default_caption).length, "caption"),
      bytes([...images, ...controls.values()].reduce((sum, each) => sum + each.bytes, 0)), problems && `${count(problems, "problem")}, shown first`, this.busy,
    ].filter(Boolean).join(" · ") : this.busy || "";
  }

  /** Shows the images that are wanted; `sort`: problems first, otherwise those that are there stay. */
  arrange(sort) {
    const { images } = this.state;
    const rank = (each) => (hasProblem(each) ? 0 : each.marks.length ? 1 : 2);
    if (sort) this.order = new Map([...images].sort((a, b) => rank(a) - rank(b)).map((each, index) => [each.name, index]));
    const place = (each) => this.order.get(each.name) ?? Infinity;
    const [, wanted] = VIEWS[this.view];
    this.seen = images.filter((each) => this.rows.get(each.name)?.busy || (wanted(each) && (!this.words || `${each.name} ${each.caption}`.toLowerCase().includes(this.words)))).sort((a, b) => place(a) - place(b) || 0);
    fill(this.views, Object.entries(VIEWS).map(([key, [label, test]]) => h("button", { type: "button", "aria-pressed": String(key === this.view), onclick: () => { this.view = key; this.arrange(true); this.views.querySelector("[aria-pressed=true]").focus(); } }, label, h("span", { class: "tally" }, images.filter(test).length.toLocaleString("en")))));
    this.views.parentNode.hidden = !images.length;
    this.tell();
    clearTimeout(this.pause);
    if (!this.seen.length) {
      fill(this.list, h("li", { class: "plain" }, images.length ? h("p", { class: "dim pad" }, this.words ? "No image has these words." : "No image here. That is good.")
        : empty("upload", "Drop images here", "5 to 30 images of one subject, from different sides and in different light. JPEG, PNG, WebP, HEIC and others. Captions come as text files of the same names, or are written here.", button("Choose images", () => this.choose(), { kind: "primary", iconName: "upload" }), button("Choose a folder", () => this.choose({ folder: true })))));
      this.select(null);
      return;
    }
    this.place(0, Math.max(FIRST, this.list.children.length));
    const still = this.seen.find((each) => each.name === this.state.selected) ?? this.seen[0];
    this.select(still.name, false, still.name === this.state.selected ? this.looked : null);
  }

  /** Puts rows into the list from `from` on; the rest in pauses, so that the first paint is soon. */
  place(from, to) {
    const { list, seen } = this;
    let at = list.children[from] ?? null;
    for (const image of seen.slice(from, to)) {
      let row = this.rows.get(image.name);
      if (!row) {
        row = editor(image, this.state, { select: (one, scroll) => this.select(one, scroll), next: (step, edit) => this.next(step, edit), look: (control) => { this.select(image.name, false, control); this.large.open(); }, changed: () => { this.large.drawText(); this.tell(); this.later(); }, show: () => this.large.open() });
        this.rows.set(image.name, row);
      }
      if (row.node === at) at = at.nextSibling;
      else if (row.node.isConnected && list.moveBefore) list.moveBefore(row.node, at); // keeps the cursor in a text
      else list.insertBefore(row.node, at);
    }
    if (to < seen.length) this.pause = setTimeout(() => this.place(to, to + MORE), 16);
    else while (list.children.length > seen.length) list.lastChild.remove();
  }

  /** Selects a row; `looked`: and shows this control image of it large. */
  select(name, scroll = true, looked = null) {
    const before = this.rows.get(this.state.selected), row = this.rows.get(name);
    const stops = (one, tabIndex) => { for (const each of [one.text, ...one.node.querySelectorAll(".before button")]) each.tabIndex = tabIndex; };
    if (before && before !== row) { before.node.removeAttribute("data-selected"); stops(before, -1); }
    this.state.selected = name;
    if (row) { row.node.dataset.selected = ""; stops(row, 0); }
    if (row && scroll) row.node.scrollIntoView({ block: "nearest" });
    this.looked = looked;
    this.large.draw(this.state.find(looked) ?? this.state.find(name));
  }

  /** Selects the image `step` rows further; `edit`: and opens its caption. */
  next(step, edit = false) {
    const now = this.seen.findIndex((each) => each.name === this.state.selected);
    const target = this.seen[Math.max(0, Math.min(this.seen.length - 1, now + step))];
    const row = target && this.rows.get(target.name);
    if (!row) return;
    this.select(target.name);
    if (edit && this.seen[now] !== target) row.edit();
    else row.text.focus({ preventScroll: true });
  }

  key(event) {
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, textarea, select, dialog, .menu")) return;
    const onControl = event.target.closest("button, a, summary") && !event.target.closest(".images");
    const image = this.state.images.find((each) => each.name === this.state.selected);
    if (!image) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); this.next(event.key === "ArrowDown" ? 1 : -1); }
    else if (onControl) return; // its own keys
    else if (event.key === "Enter" && event.target.tagName !== "BUTTON") { event.preventDefault(); this.rows.get(image.name)?.edit(); }
    else if (event.key === "Delete") this.remove(this.state.find(this.looked) ?? image);
    else if (event.key === "r") this.large.replace();
  }

  // ---- Changes ----

  async loaded(undo) {
    await this.load({ quiet: true });
    if (undo) toast(...undo);
  }

  async remove(image) {
    const index = this.seen.findIndex((each) => each.name === image.name);
    try {
      const { trash } = await api("DELETE", this.url(`/images/${encodeURIComponent(image.name)}`));
      this.rows.get(image.name)?.node.remove();
      this.rows.delete(image.name);
      forget(this.name, image.name);
      if (index >= 0) this.state.selected = (this.seen[index + 1] ?? this.seen[index - 1])?.name ?? null;
      await this.load({ quiet: true });
      if (!document.querySelector("dialog[open]")) this.rows.get(this.state.selected)?.text.focus({ preventScroll: true });
      toast(`${image.name} removed`, { action: ["Undo", () => restore(trash, async () => { this.state.selected = image.name; await this.load(); })] });
    } catch (error) { if (error.name !== "AbortError") toast(error.message, { bad: true }); }
  }

  async changeToken() {
    const input = h("input", { value: this.state.token, maxlength: 64, class: "mono", autocomplete: "off" });
    const help = "A made-up word that stands for the subject in prompts, such as <zwx>. Write TOK in captions; it becomes this word.";
    const token = await ask("Word for the subject", field("token", "Word", input, { help }), "Use it", async () => input.value.trim() || "<zwx>");
    if (!token) return;
    this.state.token = token;
    stored.set(`token ${this.name}`, token);
    await this.load({ quiet: true });
  }

  async replace() {
    const some = this.words || this.view !== "all";
    await findAndReplace(this.name, some ? this.seen.map((each) => each.name) : null, () => this.load({ quiet: true }));
  }
}

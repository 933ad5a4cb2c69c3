// Train: a few fields first, all fields behind a fold, the plan before anything starts.

import { api, bytes, count, debounced, newKey, path, schema, stored } from "./core.js";
import { button, closer, empty, field, fill, h, heading, icon, linkButton, showErrors, toast } from "./dom.js";
import { tokenOf } from "./datasets.js";
import { control, humanName } from "./forms.js";
import { drawPlan } from "./plan.js";
import { asCommand, asYaml } from "./settings_text.js";

const DRAFT = "train draft";
const PURPOSES = { character: ["Character", "a person, a pet, a figure"], style: ["Style", "a look, without its content"], concept: ["Concept", "a thing, a garment, a pose"], quick_test: ["Quick test", "a fifth of the steps, to try a dataset"] };
const BY_HAND = ["base_model", "preset", "steps", "resolution", "sample_prompts", "sample_every", "placeholder_token"];
const HELP = { steps: "More steps, more likeness. From the number of images.", resolution: "Edge length; several with commas.", sample_prompts: "One a line; TOK is the subject. Made before, halfway and at the end.", sample_every: "0: only before, halfway and at the end.", controls: "Folders of the dataset with the images before the edit, with commas. Not needed for folders named control, control_2." };
const OF_SUBJECTS = ["dataset", "datasets", "token", "placeholder_token", "subjects", "name"]; // errors shown there

/** Shows the screen; an address with a dataset's name chooses it. */
export async function show(root, parts, signal) {
  fill(root, heading("Train"));
  const [about, { datasets }, kept] = await Promise.all([
    schema(), api("GET", "/api/datasets", undefined, { signal }),
    stored.get(DRAFT) ?? api("GET", "/api/drafts/train", undefined, { signal }).catch(() => null),
  ]);
  if (signal.aborted) return;
  const usable = datasets.filter((each) => each.images);
  if (parts[0] && !usable.some((each) => each.name === parts[0])) {
    const there = datasets.some((each) => each.name === parts[0]);
    root.append(empty("image", there ? `${parts[0]} has no images` : `There is no dataset ${parts[0]}`, "Training learns from a few images of one subject. Add some, then come back.", linkButton(there ? `Open ${parts[0]}` : "Go to Datasets", there ? `#/datasets/${encodeURIComponent(parts[0])}` : "#/datasets", { kind: "primary" })));
    return;
  }
  if (!usable.length) {
    root.append(empty("image", "First, a dataset", "Training learns from a few images of one subject. Add some, then come back.", linkButton("Go to Datasets", "#/datasets", { kind: "primary" })));
    return;
  }
  const draft = { title: "", ...(kept && typeof kept === "object" ? kept : {}) };
  draft.settings = draft.settings && typeof draft.settings === "object" ? draft.settings : {};
  draft.subjects = (Array.isArray(draft.subjects) ? draft.subjects : []).filter((each) => usable.some((one) => one.name === each.name));
  if (parts[0] && !draft.subjects.some((each) => each.name === parts[0])) draft.subjects = [{ name: parts[0], token: tokenOf(parts[0]) }];
  if (!draft.subjects.length) draft.subjects = [{ name: usable[0].name, token: tokenOf(usable[0].name) }];
  new Form(root, draft, about, usable, signal);
}

class Form {
  constructor(root, draft, about, datasets, signal) {
    Object.assign(this, { root, draft, about, datasets, signal, fields: new Map(about.fields.map((each) => [each.name, each])), view: "yaml", asked: 0, dirty: false });
    this.plan = h("div", { class: "stack plan" });
    this.counting = h("small", { class: "counting", role: "status" });
    this.general = h("div", { class: "trouble" });
    this.ask = debounced(() => this.count(), 350);
    this.keep = debounced(() => this.save(), 400);
    signal.addEventListener("abort", () => { this.ask.cancel(); this.keep.cancel(); this.save(); });
    addEventListener("pagehide", () => this.save(), { signal });
    this.draw();
    this.changed(false);
  }

  /** The user changed something: the draft is written, and a start is another one. */
  touch() {
    this.dirty = true;
    this.key = null;
    this.keep();
  }

  save() {
    if (!this.dirty) return;
    this.dirty = false;
    stored.set(DRAFT, this.draft);
    api("PUT", "/api/drafts/train", this.draft, { keepalive: true }).catch(() => {});
  }

  draw() {
    const { draft } = this;
    Object.assign(this, { controls: new Map(), nodes: new Map() });
    this.subjects = h("div", { class: "stack tight" });
    this.text = h("pre", { class: "code", tabindex: 0, role: "region", "aria-label": "Settings as text" });
    const name = h("input", { value: draft.title, maxlength: 100, placeholder: "the dataset and the day", autocomplete: "off", oninput: () => { draft.title = name.value; this.touch(); } });
    this.starters = [button("Start now", () => this.start("now"), { kind: "primary", iconName: "play" }), button("Add to queue", () => this.start("queue"))];
    fill(
      this.root,
      heading("Train", button("Start over", () => this.startOver(), { kind: "quiet", iconName: "again" })),
      h("div", { class: "split wide-side" },
        h("form", { class: "stack form", onsubmit: (event) => event.preventDefault() },
          section("Subjects", "What to learn, and the made-up word that will stand for it in prompts.", this.subjects, h("div", { class: "row" }, this.adder = button("Another subject", () => this.addSubject(), { iconName: "plus", kind: "quiet flush-left" })), h("div", { dataset: { field: "dataset" } }, h("p", { class: "error", role: "alert" }))),
          section("Base model", null, this.bases()),
          section("Purpose", null, this.purposes()),
          section("Steps and previews", null,
            h("div", { class: "fields two" }, this.one("steps", "Steps"), this.one("resolution", "Resolution")),
            this.one("sample_prompts", "Preview prompts"),
            h("div", { class: "fields two" }, this.one("sample_every", "Steps between previews"), field("title", "Name of the run", name, { help: "For you; it can be changed later." }))),
          this.all(), this.texts(),
        ),
        h("aside", { class: "side", "aria-label": "Plan" },
          h("section", { class: "card stack" }, h("div", { class: "row between" }, h("h2", null, "Plan"), this.counting), this.plan, this.general, h("div", { class: "row starters" }, this.starters))),
      ),
    );
    this.drawSubjects();
  }

  startOver() {
    const before = structuredClone(this.draft);
    Object.assign(this.draft, { title: "", settings: {} });
    this.draw();
    this.changed();
    toast("All settings are the defaults again", { action: ["Undo", () => { Object.assign(this.draft, before); this.draw(); this.changed(); }] });
  }

  // ---- Subjects, base, purpose ----

  drawSubjects() {
    const { subjects } = this.draft;
    fill(this.subjects, subjects.map((each, index) => {
      const found = this.datasets.find((one) => one.name === each.name);
      const choose = h("select", { "aria-label": `Dataset of subject ${index + 1}`, onchange: () => { each.name = choose.value; each.token = tokenOf(each.name); this.drawSubjects(); this.changed(); } }, this.datasets.map((one) => h("option", { value: one.name, selected: one.name === each.name }, one.name)));
      const token = h("input", { value: each.token ?? "", "aria-label": `Word of subject ${index + 1}`, class: "mono", maxlength: 64, autocomplete: "off", spellcheck: "false", oninput: () => { each.token = token.value.trim(); stored.set(`token ${each.name}`, each.token); this.changed(); } });
      const state = found.problems ? h("a", { class: "badge bad", href: `#/datasets/${encodeURIComponent(each.name)}` }, icon("warning"), count(found.problems, "problem")) : h("small", null, count(found.images, "image"));
      return h("div", { class: "subject" },
        h("a", { class: "plate subject-thumb", href: `#/datasets/${encodeURIComponent(each.name)}`, "aria-label": `Open ${each.name}` }, found.thumb && h("img", { src: `${path("api/datasets", each.name, "thumbs")}/${encodeURIComponent(found.thumb)}?v=${found.changed}`, alt: "" })),
        h("div", { class: "grow" }, choose), h("div", { class: "token-field" }, token),
        h("div", { class: "subject-state" }, state),
        subjects.length > 1 && closer(() => { subjects.splice(index, 1); this.drawSubjects(); this.changed(); }, { label: `Remove ${each.name}` }));
    }));
    this.adder.hidden = subjects.length >= Math.min(8, this.datasets.length);
  }

  addSubject() {
    const { subjects } = this.draft;
    const free = this.datasets.find((one) => !subjects.some((each) => each.name === one.name));
    if (!free) return;
    const taken = new Set(subjects.map((each) => each.token));
    let token = tokenOf(free.name);
    for (let number = 2; taken.has(token); number += 1) token = `<zwx${number}>`;
    subjects.push({ name: free.name, token });
    this.drawSubjects();
    this.changed();
    this.subjects.lastChild.querySelector("select").focus();
  }

  bases() {
    const { automatic } = this.about;
    const small = (each) => [`${each.training_resolution ?? each.resolution} px`, each.bytes && bytes(each.bytes), each.license, each.distilled && "fast images"].filter(Boolean).join(" · ");
    const state = (each) => (each.fits === false ? h("small", { class: "warn-text" }, "needs tricks to fit this GPU") : h("small", { class: each.here ? "here" : "" }, each.here ? [icon("check"), "on this machine"] : "downloaded at the start"));
    const auto = { name: "auto", text: "Automatic", small: `here: ${automatic}` };
    return this.radios("base_model", "Base model", [auto, ...this.about.bases.map((each) => ({ name: each.name, text: each.name, small: small(each), state: state(each) }))], "auto");
  }

  purposes() {
    const choices = [{ name: "", text: "Standard", small: "the model's own settings" }, ...this.about.presets.map((each) => ({ name: each.name, text: PURPOSES[each.name]?.[0] ?? humanName(each.name), small: PURPOSES[each.name]?.[1] ?? each.purpose }))];
    return this.radios("preset", "Purpose", choices, "");
  }

  radios(name, legend, choices, otherwise) {
    const now = this.draft.settings[name] ?? otherwise;
    return h("fieldset", { dataset: { field: name } }, h("legend", { class: "visually-hidden" }, legend),
      h("div", { class: "choices" }, choices.map((each) => h("label", { class: "choice" },
        h("input", { type: "radio", name, value: each.name, checked: each.name === now, onchange: () => this.set(name, each.name === otherwise ? undefined : each.name) }),
        h("span", { class: "grow" }, h("strong", null, each.text), h("small", null, each.small), each.state)))),
      h("p", { class: "error" }));
  }

  // ---- Fields of the schema ----

  one(name, label) {
    const about = this.fields.get(name);
    const made = control(about, this.draft.settings[name], (value) => this.set(name, value));
    const node = field(name, label ?? humanName(name), made, { help: HELP[name] ?? about.description, unit: HELP[name] ? "" : about.unit ?? "" });
    const reset = button("Default", () => { made.value = ""; this.set(name, undefined); made.focus(); }, { kind: "quiet small reset", label: "Back to the default" });
    node.querySelector("label").append(h("span", { class: "changed-mark" }, "changed"));
    node.append(reset);
    this.controls.set(name, made);
    this.nodes.set(name, node);
    return node;
  }

  all() {
    const others = this.about.fields.filter((each) => !BY_HAND.includes(each.name));
    const search = h("input", { type: "search", placeholder: "Search by name or by what it does", "aria-label": "Search settings" });
    const onlyChanged = h("input", { type: "checkbox" });
    const groups = this.about.groups.map((group) => {
      const nodes = others.filter((each) => each.group === group.name).map((each) => Object.assign(this.one(each.name), { words: `${each.name} ${humanName(each.name)} ${each.description}`.toLowerCase(), setting: each.name }));
      return nodes.length ? Object.assign(h("fieldset", { class: "group" }, h("legend", null, group.title), h("div", { class: "fields" }, nodes)), { nodes }) : null;
    }).filter(Boolean);
    const nothing = h("p", { class: "dim", hidden: true }, "No setting has these words.");
    const filter = () => {
      const words = search.value.toLowerCase().trim();
      for (const group of groups) {
        for (const node of group.nodes) {
          const unset = this.draft.settings[node.setting] === undefined;
          node.hidden = !node.words.includes(words) || (unset && (onlyChanged.checked || (node.setting === "controls" && !this.edits())));
        }
        group.hidden = group.nodes.every((node) => node.hidden);
      }
      nothing.hidden = groups.some((group) => !group.hidden);
    };
    for (const each of [search, onlyChanged]) each.addEventListener("input", filter);
    this.filter = filter;
    this.changedCount = h("span", { class: "dim" });
    this.fold = h("details", { class: "card fold" }, h("summary", null, `All ${others.length} settings `, this.changedCount), h("div", { class: "stack" }, h("div", { class: "row fold-tools" }, h("div", { class: "grow" }, search), h("label", { class: "row tick-label" }, onlyChanged, "Only changed")), groups, nothing));
    return this.fold;
  }

  texts() {
    const views = { yaml: "YAML file", command: "Command line" };
    const tabs = h("div", { class: "segmented", role: "group", "aria-label": "Form of the text" });
    const drawTabs = () => fill(tabs, Object.entries(views).map(([key, label]) => h("button", { type: "button", "aria-pressed": String(key === this.view), onclick: () => { this.view = key; drawTabs(); this.drawText(); tabs.querySelector("[aria-pressed=true]").focus(); } }, label)));
    drawTabs();
    const copy = button("Copy", async () => {
      try { await navigator.clipboard.writeText(this.text.textContent); toast("Copied"); } catch { getSelection().selectAllChildren(this.text); toast("Selected; press Ctrl C to copy"); }
    }, { iconName: "copy" });
    return h("details", { class: "card fold" }, h("summary", null, "As text, for the command line"), h("div", { class: "stack" }, h("div", { class: "row between" }, tabs, copy), this.text));
  }

  /** Whether the base model takes reference images. */
  edits() {
    const { base_model: name = "auto" } = this.draft.settings;
    return Boolean(this.about.bases.find((each) => each.name === (name === "auto" ? this.about.automatic : name))?.references);
  }

  drawText() { this.text.textContent = this.view === "yaml" ? asYaml(this.given()) : asCommand(this.given()); }

  set(name, value) {
    if (value === undefined) delete this.draft.settings[name];
    else this.draft.settings[name] = value;
    this.changed();
  }

  changed(byUser = true) {
    const { settings } = this.draft;
    const number = Object.keys(settings).filter((name) => !BY_HAND.includes(name)).length;
    this.changedCount.textContent = number ? `${number} changed` : "";
    for (const [name, node] of this.nodes) node.classList.toggle("is-changed", settings[name] !== undefined);
    this.filter();
    this.plan.classList.add("old");
    this.counting.textContent = "counting…";
    if (byUser) this.touch();
    this.ask();
    this.drawText();
  }

  given() {
    return { settings: this.draft.settings, datasets: this.draft.subjects.map((each) => ({ name: each.name, token: each.token || null })) };
  }

  // ---- Plan, start ----

  async count() {
    const mine = (this.asked += 1);
    if (!this.plan.firstChild) fill(this.plan, h("div", { class: "skeleton", "aria-hidden": "true" }, Array.from({ length: 6 }, () => h("i", null))));
    try {
      const found = await api("POST", "/api/plan", this.given(), { signal: this.signal });
      if (mine !== this.asked) return;
      this.errors(null);
      this.plan.classList.remove("old");
      this.counting.textContent = "";
      this.automatic(found.settings);
      drawPlan(this.plan, found);
    } catch (error) {
      if (mine !== this.asked || error.name === "AbortError") return;
      if (this.plan.querySelector(".skeleton")) fill(this.plan);
      this.counting.textContent = this.plan.firstChild ? "the plan before the error" : "";
      this.errors(error);
    }
  }

  /** Shows what the server fills in where the form says nothing. */
  automatic(used) {
    const base = this.about.bases.find((each) => each.name === used.base_model);
    for (const [name, made] of this.controls) made.automatic?.(name === "seed" ? "random" : name === "resolution" ? used.resolution ?? base?.training_resolution : used[name]);
  }

  /** An error of the server, at its field, or below the plan. */
  errors(error) {
    const name = error?.field && (OF_SUBJECTS.includes(error.field) ? "dataset" : error.field);
    const lost = showErrors(this.root, name ? { [name]: error.message } : {});
    const place = name && !lost.length ? this.root.querySelector(`[data-field="${CSS.escape(name)}"]`) : null;
    if (place && this.fold.contains(place)) this.fold.open = true;
    const show = () => { place.scrollIntoView({ block: "center" }); (place.querySelector("input, select, textarea") ?? this.subjects.querySelector("input"))?.focus(); };
    fill(this.general, error && h("div", { class: "note bad", role: "alert" }, icon("warning"), h("span", { class: "grow" }, error.message), place && button("Show", show, { kind: "small" })));
    for (const each of this.starters) each.disabled = error?.status === 422;
  }

  async start(when) {
    this.ask.cancel();
    this.asked += 1;
    for (const each of this.starters) each.disabled = true;
    this.counting.textContent = when === "now" ? "starting…" : "adding…";
    this.key ??= newKey();
    if (when === "now" && !stored.get("asked to notify")) {
      stored.set("asked to notify", true);
      globalThis.Notification?.requestPermission?.();
    }
    try {
      const title = this.draft.title.trim();
      const { id } = await api("POST", "/api/runs", { ...this.given(), ...(title ? { title } : {}), start: when, key: this.key });
      this.key = null;
      if (!this.signal.aborted) location.hash = `#/runs/${encodeURIComponent(id)}`;
    } catch (error) {
      if (error.status) this.key = null; // without an answer the same start is asked for again
      this.counting.textContent = "";
      for (const each of this.starters) each.disabled = false;
      this.errors(error);
    }
  }
}

function section(title, text, ...content) {
  return h("section", { class: "card stack" }, h("div", null, h("h2", null, title), text && h("small", null, text)), content);
}

// Train: a few fields first, all fields behind a fold, the plan before anything starts.

import { api, bytes, count, debounced, duration, newKey, path, schema, stored } from "./core.js";
import { button, empty, field, fill, h, heading, icon, linkButton, showErrors, toast } from "./dom.js";
import { tokenOf } from "./datasets.js";
import { control, humanName } from "./forms.js";

const DRAFT = "train draft";
const PURPOSES = { character: ["Character", "a person, a pet, a figure"], style: ["Style", "a look, without its content"], concept: ["Concept", "a thing, a garment, a pose"], quick_test: ["Quick test", "a fifth of the steps"] };
const BY_HAND = ["base_model", "preset", "steps", "resolution", "sample_prompts", "sample_every"];

/** Shows the screen; an address with a dataset's name chooses it. */
export async function show(root, parts, signal) {
  fill(root, heading("Train"));
  const [about, { datasets }, kept] = await Promise.all([
    schema(), api("GET", "/api/datasets", undefined, { signal }),
    stored.get(DRAFT) ?? api("GET", "/api/drafts/train", undefined, { signal }).catch(() => null),
  ]);
  if (signal.aborted) return;
  const usable = datasets.filter((each) => each.images);
  if (!usable.length) {
    root.append(empty("image", "First, a dataset", "Training learns from a few images of one subject. Add some, then come back.", linkButton("Go to Datasets", "#/datasets", { kind: "primary" })));
    return;
  }
  const draft = { title: "", subjects: [], settings: {}, ...(kept && typeof kept.settings === "object" ? kept : {}) };
  draft.subjects = draft.subjects.filter((each) => usable.some((one) => one.name === each.name));
  if (parts[0] && usable.some((each) => each.name === parts[0]) && !draft.subjects.some((each) => each.name === parts[0])) draft.subjects = [{ name: parts[0], token: tokenOf(parts[0]) }];
  if (!draft.subjects.length) draft.subjects = [{ name: usable[0].name, token: tokenOf(usable[0].name) }];
  new Form(root, draft, about, usable, signal);
}

class Form {
  constructor(root, draft, about, datasets, signal) {
    Object.assign(this, { root, draft, about, datasets, signal, fields: new Map(about.fields.map((each) => [each.name, each])) });
    this.controls = new Map();
    this.subjects = h("div", { class: "stack tight" });
    this.plan = h("div", { class: "stack", "aria-live": "polite" });
    this.general = h("div", null);
    this.text = h("pre", { class: "code" });
    this.changedCount = h("span", { class: "dim" });
    this.ask = debounced(() => this.count(), 350);
    this.keep = debounced(() => { stored.set(DRAFT, draft); api("PUT", "/api/drafts/train", draft).catch(() => {}); }, 400);
    this.draw();
    this.changed();
  }

  draw() {
    const { draft } = this;
    const name = h("input", { value: draft.title, maxlength: 100, placeholder: "named by the dataset and the day", oninput: () => { draft.title = name.value; this.keep(); } });
    const start = (when, text, kind, iconName) => {
      const node = button(text, () => this.start(when), { kind, iconName });
      (this.starters ??= []).push(node);
      return node;
    };
    fill(
      this.root,
      heading("Train", button("Start over", () => { stored.set(DRAFT, null); Object.assign(draft, { title: "", settings: {} }); this.starters = []; this.controls.clear(); this.draw(); this.changed(); }, { kind: "quiet" })),
      h("div", { class: "split wide-side" },
        h("form", { class: "stack form", onsubmit: (event) => event.preventDefault() },
          h("section", { class: "card stack" }, h("h2", null, "Subjects"), this.subjects, h("div", null, button("Another subject", () => this.addSubject(), { iconName: "plus", kind: "quiet" }))),
          h("section", { class: "card stack" }, this.bases(), this.purposes()),
          h("section", { class: "card stack" }, h("div", { class: "fields" }, this.one("steps", "Steps"), this.one("resolution", "Resolution")), this.one("sample_prompts", "Preview prompts"), this.one("sample_every", "Steps between previews", true), field("title", "Name of the run", name)),
          this.all(),
          h("details", { class: "card fold", ontoggle: () => this.drawText() }, h("summary", null, "As YAML and command line"), this.text, h("div", null, button("Copy", () => navigator.clipboard?.writeText(this.text.textContent).then(() => toast("Copied")), { iconName: "copy" }))),
        ),
        h("aside", { class: "side", "aria-label": "Plan" }, h("section", { class: "card stack" }, h("h2", null, "Plan"), this.plan, this.general, h("div", { class: "row starters" }, start("now", "Start now", "primary", "play"), start("queue", "Add to queue")))),
      ),
    );
    this.drawSubjects();
  }

  // ---- Subjects, base, purpose ----

  drawSubjects() {
    const { subjects } = this.draft;
    fill(this.subjects, subjects.map((each, index) => {
      const found = this.datasets.find((one) => one.name === each.name);
      const choose = h("select", { "aria-label": `Dataset of subject ${index + 1}`, onchange: () => { each.name = choose.value; each.token = tokenOf(each.name); this.drawSubjects(); this.changed(); } }, this.datasets.map((one) => h("option", { value: one.name, selected: one.name === each.name }, one.name)));
      const token = h("input", { value: each.token ?? "", "aria-label": `Token of subject ${index + 1}`, class: "mono", maxlength: 64, oninput: () => { each.token = token.value; stored.set(`token ${each.name}`, token.value); this.changed(); } });
      return h("div", { class: "subject" },
        h("a", { class: "plate subject-thumb", href: `#/datasets/${encodeURIComponent(each.name)}`, "aria-label": `Open ${each.name}` }, found.thumb && h("img", { src: `${path("api/datasets", each.name, "thumbs")}/${encodeURIComponent(found.thumb)}`, alt: "" })),
        h("div", { class: "grow" }, choose), h("div", { class: "token-field" }, token),
        h("small", { class: "nowrap" }, found.problems ? h("span", { class: "badge bad" }, icon("warning"), count(found.problems, "problem")) : `${count(found.images, "image")}`),
        button("", () => { subjects.splice(index, 1); this.drawSubjects(); this.changed(); }, { kind: "quiet", iconName: "close", label: `Remove ${each.name}`, disabled: subjects.length === 1 }));
    }));
  }

  addSubject() {
    const { subjects } = this.draft;
    const free = this.datasets.find((one) => !subjects.some((each) => each.name === one.name)) ?? this.datasets[0];
    const taken = new Set(subjects.map((each) => each.token));
    let token = tokenOf(free.name);
    for (let number = 2; taken.has(token); number += 1) token = `<zwx${number}>`;
    subjects.push({ name: free.name, token });
    this.drawSubjects();
    this.changed();
  }

  bases() {
    const { automatic } = this.about;
    const small = (each) => [`${each.training_resolution ?? each.resolution} px`, each.distilled ? "few steps, fast" : null, each.here ? "on this machine" : "is downloaded first", each.fits === false ? "does not fit the GPU as it is" : null].filter(Boolean).join(" · ");
    const auto = { name: "auto", text: "Automatic", small: `here: ${automatic}` };
    return this.radios("base_model", "Base model", [auto, ...this.about.bases.map((each) => ({ name: each.name, text: each.name, small: small(each) }))], "auto");
  }

  purposes() {
    const choices = [{ name: "", text: "Standard", small: "the model's own settings" }, ...this.about.presets.map((each) => ({ name: each.name, text: PURPOSES[each.name]?.[0] ?? humanName(each.name), small: PURPOSES[each.name]?.[1] ?? each.purpose }))];
    return this.radios("preset", "Purpose", choices, "");
  }

  radios(name, legend, choices, otherwise) {
    const now = this.draft.settings[name] ?? otherwise;
    return h("fieldset", { dataset: { field: name } }, h("legend", null, legend),
      h("div", { class: "choices" }, choices.map((each) => h("label", { class: "choice" },
        h("input", { type: "radio", name, value: each.name, checked: each.name === now, onchange: () => this.set(name, each.name === otherwise ? undefined : each.name) }),
        h("span", null, each.text, h("small", null, each.small))))),
      h("p", { class: "error" }));
  }

  // ---- Fields of the schema ----

  one(name, label, plain = false) {
    const about = this.fields.get(name);
    const made = control(about, this.draft.settings[name], (value) => this.set(name, value));
    this.controls.set(name, made);
    return field(name, label ?? humanName(name), made, { help: plain ? "" : about.description, unit: about.unit && !plain ? about.unit : "" });
  }

  all() {
    const others = this.about.fields.filter((each) => !BY_HAND.includes(each.name));
    const search = h("input", { type: "search", placeholder: "Search settings", "aria-label": "Search settings" });
    const groups = this.about.groups.map((group) => {
      const nodes = others.filter((each) => each.group === group.name).map((each) => Object.assign(this.one(each.name), { words: `${each.name} ${each.description}`.toLowerCase() }));
      return nodes.length ? Object.assign(h("fieldset", { class: "group" }, h("legend", null, group.title), h("div", { class: "fields" }, nodes)), { nodes }) : null;
    }).filter(Boolean);
    const nothing = h("p", { class: "dim", hidden: true }, "No setting has these words.");
    search.addEventListener("input", () => {
      for (const group of groups) {
        for (const node of group.nodes) node.hidden = !node.words.includes(search.value.toLowerCase().trim());
        group.hidden = group.nodes.every((node) => node.hidden);
      }
      nothing.hidden = groups.some((group) => !group.hidden);
    });
    this.fold = h("details", { class: "card fold" }, h("summary", null, `All ${this.about.fields.length} settings `, this.changedCount), h("div", { class: "stack" }, search, groups, nothing));
    return this.fold;
  }

  set(name, value) {
    if (value === undefined) delete this.draft.settings[name];
    else this.draft.settings[name] = value;
    this.changed();
  }

  changed() {
    const number = Object.keys(this.draft.settings).filter((name) => !BY_HAND.includes(name)).length;
    this.changedCount.textContent = number ? `(${number} changed)` : "";
    this.plan.classList.add("old");
    this.keep();
    this.ask();
    this.drawText();
  }

  given() {
    return { settings: this.draft.settings, datasets: this.draft.subjects.map((each) => ({ name: each.name, token: each.token || null })) };
  }

  // ---- Plan, start ----

  async count() {
    const mine = (this.asked = (this.asked ?? 0) + 1);
    if (!this.plan.firstChild) fill(this.plan, h("p", { class: "dim" }, "Counting memory and time…"));
    try {
      const found = await api("POST", "/api/plan", this.given(), { signal: this.signal });
      if (mine !== this.asked) return;
      this.errors({});
      this.drawPlan(found);
    } catch (error) {
      if (mine !== this.asked || error.name === "AbortError") return;
      this.errors(error);
    }
  }

  /** An error of the server, at its field or below the plan. */
  errors(error) {
    const at = error.field ? { [error.field]: error.message } : {};
    const lost = showErrors(this.root, at);
    const words = error.message && (!error.field || lost.length) ? error.message : "";
    fill(this.general, words && h("p", { class: "note bad", role: "alert" }, icon("warning"), h("span", null, words)), error.field && !words && h("p", { class: "note bad", role: "alert" }, icon("warning"), h("span", null, `${humanName(error.field)}: ${error.message}`)));
    for (const each of this.starters) each.disabled = Boolean(error.message) && error.status === 422;
    if (error.field && this.fold.querySelector(`[data-field="${CSS.escape(error.field)}"]`)) this.fold.open = true;
  }

  drawPlan(plan) {
    this.plan.classList.remove("old");
    const used = plan.settings;
    for (const [name, made] of this.controls) made.automatic?.(used[name]);
    const fits = plan.fits === null ? h("p", { class: "verdict" }, "Runs on the CPU") : plan.fits ? h("p", { class: "verdict good" }, icon("check"), "Fits") : h("p", { class: "verdict bad" }, icon("warning"), "Does not fit");
    const whole = Math.max(plan.gpu_bytes ?? 0, plan.parts.reduce((sum, each) => sum + each.bytes, 0));
    const bar = h("div", { class: "parts", role: "img", "aria-label": plan.parts.map((each) => `${each.name} ${bytes(each.bytes)}`).join(", ") }, plan.parts.map((each, index) => h("span", { class: `part-${index % 6}`, style: { width: `${(100 * each.bytes) / whole}%` } })));
    const legend = h("ul", { class: "legend" }, plan.parts.map((each, index) => h("li", null, h("i", { class: `part-${index % 6}` }), h("span", { class: "grow" }, each.name), h("span", { class: "dim" }, bytes(each.bytes)))));
    const low = plan.disk_free !== null && plan.disk_bytes > plan.disk_free;
    fill(
      this.plan,
      h("div", { class: "row between" }, fits, h("small", null, plan.gpu_bytes ? `${bytes(plan.peak_bytes)} of ${bytes(plan.gpu_bytes)}` : `${bytes(plan.peak_bytes)} at most`)),
      bar, legend,
      h("dl", { class: "facts" },
        h("dt", null, "Memory mode"), h("dd", null, plan.mode),
        h("dt", null, "Work"), h("dd", null, `${plan.steps.toLocaleString("en")} steps from ${count(plan.images, "image")}`),
        h("dt", null, "Time"), h("dd", null, plan.seconds ? `about ${duration(plan.seconds)}` : "measured in the first steps"),
        h("dt", null, "Disk"), h("dd", { class: low ? "error" : "" }, `${bytes(plan.disk_bytes)} of ${bytes(plan.disk_free)} free`)),
      plan.warnings.map((each) => h("p", { class: "note warn" }, icon("warning"), h("span", { class: "grow" }, each.text, each.dataset && h("span", null, " ", h("a", { href: `#/datasets/${encodeURIComponent(each.dataset)}` }, "Show"))))),
    );
  }

  async start(when) {
    this.ask.cancel();
    for (const each of this.starters) each.disabled = true;
    this.key ??= newKey();
    try {
      const { id } = await api("POST", "/api/runs", { ...this.given(), ...(this.draft.title.trim() ? { title: this.draft.title.trim() } : {}), start: when, key: this.key });
      this.key = null;
      location.hash = when === "now" ? `#/runs/${encodeURIComponent(id)}` : "#/runs";
    } catch (error) {
      this.key = error.status ? null : this.key; // without an answer the same start is asked for again
      for (const each of this.starters) each.disabled = false;
      this.errors(error);
    }
  }

  drawText() {
    const { settings, datasets } = this.given();
    const names = datasets.map((each) => `datasets/${each.name}`);
    const yaml = [datasets.length > 1 ? `dataset:\n${datasets.map((each) => `  "${each.token}": datasets/${each.name}`).join("\n")}` : `dataset: ${names[0]}\nplaceholder_token: ${JSON.stringify(datasets[0].token ?? "")}`, ...Object.entries(settings).map(([name, value]) => `${name}: ${JSON.stringify(value)}`)];
    const quote = (value) => (/^[\w./,-]+$/.test(String(value)) ? String(value) : `'${String(value).replaceAll("'", "'\\''")}'`);
    const words = [datasets.length > 1 ? `--dataset ${quote(datasets.map((each) => `${each.token}=datasets/${each.name}`).join(","))}` : `--dataset ${quote(names[0])} --placeholder_token ${quote(datasets[0].token ?? "")}`, ...Object.entries(settings).map(([name, value]) => `--${name} ${quote(value)}`)];
    this.text.textContent = `${yaml.join("\n")}\n\nzeroprior train ${words.join(" ")}`;
  }
}

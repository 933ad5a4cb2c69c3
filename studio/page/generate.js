// Generate: prompt, weights, seed, size, grid; the gallery of what was made.

import { api, debounced, duration, live, newKey, onStatus, schema, stored } from "./core.js";
import { axisField } from "./axes.js";
import { button, field, fill, h, heading, icon, showErrors, toast } from "./dom.js";
import { gallery } from "./gallery.js";
import { completion } from "./completion.js";

const DRAFT = "generate draft";
const SHAPES = { "": "Model size", "1:1": "1:1 square", "4:3": "4:3", "3:4": "3:4 portrait", "16:9": "16:9 wide", "9:16": "9:16 tall" };

export const weightName = (each) => `${each.title ?? each.name} · ${each.kind === "final" ? "final" : each.kind === "upload" ? "upload" : `step ${each.step}${each.kind === "saved" ? ", saved" : ""}`}`;

/** Shows the screen; the address may name weights. */
export async function show(root, parts, signal) {
  fill(root, heading("Generate"));
  const [about, { weights }] = await Promise.all([schema(), api("GET", "/api/weights", undefined, { signal })]);
  if (signal.aborted) return;
  const titles = new Map((live.status?.runs ?? []).map((run) => [run.id, run.title]));
  for (const each of weights) each.title = titles.get(each.run) || each.name;
  const draft = { prompt: "", negative: "", weights: [], seed: null, locked: false, shape: "", count: 1, steps: "", guidance: "", axes: [{}, {}], when: "now", ...stored.get(DRAFT, {}) };
  draft.weights = draft.weights.filter((each) => weights.some((one) => one.id === each.id));
  const wanted = parts.join("/");
  if (wanted && weights.some((each) => each.id === wanted)) draft.weights = [{ id: wanted, scale: 1 }];
  if (!draft.weights.length && weights.length && !stored.get(DRAFT)) draft.weights = [{ id: weights[0].id, scale: 1 }];
  const keep = debounced(() => stored.set(DRAFT, draft), 300);
  const tokens = () => draft.weights.flatMap((each) => weights.find((one) => one.id === each.id)?.tokens ?? []);

  const prompt = h("textarea", { rows: 3, value: draft.prompt, placeholder: `a photo of ${tokens()[0] ?? "a dog"} on a beach`, maxlength: 10000, oninput: () => { draft.prompt = prompt.value; keep(); } });
  const list = h("div", { class: "stack" });
  const amount = h("strong", null), send = button("Generate", () => go(), { kind: "primary", iconName: "image" });
  const problem = h("div", null), owner = h("div", null);
  const number = (name, label, help) => {
    const input = h("input", { inputmode: "decimal", value: draft[name], placeholder: "automatic", oninput: () => { draft[name] = input.value; keep(); } });
    return field(name, label, input, { help });
  };

  const seed = h("input", { inputmode: "numeric", value: draft.seed ?? "", placeholder: "new each time", oninput: () => { draft.seed = seed.value.trim() === "" ? null : Number(seed.value); draft.locked = draft.seed !== null; drawLock(); keep(); } });
  const lock = h("span", null);
  const drawLock = () => fill(lock, button("", () => {
    draft.locked = !draft.locked;
    if (draft.locked && draft.seed === null) { draft.seed = crypto.getRandomValues(new Uint32Array(1))[0] % 1000000; seed.value = draft.seed; }
    if (!draft.locked) { draft.seed = null; seed.value = ""; }
    drawLock();
    keep();
  }, { iconName: draft.locked ? "lock" : "unlock", label: "Keep the seed", "aria-pressed": String(draft.locked) }));

  function drawWeights() {
    if (!weights.length) { fill(list, h("p", { class: "dim" }, "No weights yet: the base model alone generates. ", h("a", { href: "#/train" }, "Train some"), ".")); return; }
    fill(list, draft.weights.map((each, index) => {
      const choose = h("select", { "aria-label": `Weights ${index + 1}`, onchange: () => { each.id = choose.value; changedWeights(); } }, weights.map((one) => h("option", { value: one.id, selected: one.id === each.id }, weightName(one))));
      const value = h("output", { class: "mono" }, each.scale.toFixed(2));
      const scale = h("input", { type: "range", min: 0, max: 2, step: 0.05, value: each.scale, "aria-label": `Scale of weights ${index + 1}`, oninput: () => { each.scale = Number(scale.value); value.textContent = each.scale.toFixed(2); keep(); } });
      return h("div", { class: "stack tight" }, h("div", { class: "row nowrap-row" }, choose, button("", () => { draft.weights.splice(index, 1); changedWeights(); }, { kind: "quiet", iconName: "close", label: "Without these weights" })), h("div", { class: "row nowrap-row" }, h("small", null, "scale"), scale, value));
    }), draft.weights.length < 2 && h("div", null, button(draft.weights.length ? "Second LoRA" : "Add weights", () => { draft.weights.push({ id: weights[draft.weights.length % weights.length].id, scale: 1 }); changedWeights(); }, { kind: "quiet", iconName: "plus" })));
  }
  function changedWeights() { drawWeights(); keep(); }

  function size() {
    if (!draft.shape) return {};
    const used = weights.find((each) => each.id === draft.weights[0]?.id)?.base_model ?? about.automatic;
    const base = about.bases.find((each) => each.name === used || each.hub_id === used || used.endsWith(`/${each.name}`)) ?? about.bases[0];
    const [a, b] = draft.shape.split(":").map(Number), area = base.resolution ** 2;
    const round = (value) => Math.max(16, Math.round(value / 16) * 16);
    return { width: round(Math.sqrt((area * a) / b)), height: round(Math.sqrt((area * b) / a)) };
  }
  const axes = () => draft.axes.filter((each) => each?.name && each.values?.length);
  const total = () => axes().reduce((product, each) => product * each.values.length, Number(draft.count) || 1);
  const drawAmount = () => { amount.textContent = total() > 1 ? `= ${total()} images` : ""; };
  const changedAxes = () => { drawAmount(); keep(); };

  const choices = (name, texts) => { const node = h("select", { onchange: () => { draft[name] = node.value; drawAmount(); keep(); } }, Object.entries(texts).map(([value, text]) => h("option", { value, selected: String(draft[name]) === value }, text))); return node; };
  const made = gallery(signal, again);
  const axisPlace = h("div", { class: "fields" });
  const drawAxes = () => fill(axisPlace, axisField("Across", draft.axes[0] ??= {}, changedAxes, weights, draft), axisField("Down", draft.axes[1] ??= {}, changedAxes, weights, draft));

  function again(settings) {
    Object.assign(draft, { prompt: settings.prompt ?? "", negative: settings.negative_prompt ?? "", seed: settings.seed ?? null, locked: true, steps: settings.num_inference_steps ?? settings.steps ?? "", guidance: settings.guidance_scale ?? settings.guidance ?? "", count: 1, axes: [{}, {}] });
    if (Array.isArray(settings.weights)) draft.weights = settings.weights.filter((each) => weights.some((one) => one.id === each.id)).map((each) => ({ id: each.id, scale: each.scale ?? 1 }));
    stored.set(DRAFT, draft);
    build();
    scrollTo({ top: 0 });
    prompt.focus();
    toast("The image's settings are in the form");
  }

  async function go() {
    send.disabled = true;
    showErrors(root, {});
    fill(problem);
    const optional = (text) => (String(text).trim() === "" ? null : Number(text));
    const body = { prompt: draft.prompt.trim() || prompt.placeholder, weights: draft.weights, seed: draft.locked ? draft.seed : null, ...size(), count: Number(draft.count), steps: optional(draft.steps), guidance: optional(draft.guidance), axes: axes(), when: busy() ? draft.when : "now", key: newKey() };
    if (draft.negative.trim()) body.negative_prompt = draft.negative;
    if (busy() && draft.when === "now") body.when = "by_run";
    try {
      const { seconds, images } = await api("POST", "/api/images", body);
      toast(`${images} ${images === 1 ? "image" : "images"} on the way${seconds ? `, about ${duration(seconds)}` : ""}`);
      made.load();
    } catch (error) {
      if (!error.field || showErrors(root, { [error.field]: error.message }).length) fill(problem, h("p", { class: "note bad", role: "alert" }, icon("warning"), error.message));
    }
    send.disabled = false;
  }

  const busy = () => { const found = live.status?.gpu?.owner; return found?.kind === "run" ? live.status.runs.find((run) => run.id === found.id) ?? { id: found.id, title: found.id } : null; };
  let busyWith = "";
  function drawOwner() {
    const run = busy();
    if ((run?.id ?? "") === busyWith) return;
    busyWith = run?.id ?? "";
    if (!run) { fill(owner); return; }
    if (draft.when === "now") draft.when = "by_run";
    const ways = { by_run: ["The run generates", "between two steps, with its weights of now"], wait: ["Wait", "until the run has ended"], pause: ["Pause the run", "frees the GPU, generates, resumes"] };
    fill(owner, h("fieldset", null, h("legend", null, `${run.title || run.id} has the GPU`), Object.entries(ways).map(([value, [text, small]]) => h("label", { class: "choice" }, h("input", { type: "radio", name: "when", value, checked: draft.when === value, onchange: () => { draft.when = value; keep(); } }), h("span", null, text, h("small", null, small))))));
  }

  function build() {
    prompt.value = draft.prompt;
    seed.value = draft.seed ?? "";
    drawWeights();
    drawLock();
    drawAxes();
    drawAmount();
    const negative = h("textarea", { rows: 2, value: draft.negative, oninput: () => { draft.negative = negative.value; keep(); } });
    fill(root, heading("Generate"),
      h("div", { class: "split generate-split" },
        h("form", { class: "card stack form", onsubmit: (event) => { event.preventDefault(); go(); }, onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); go(); } } },
          h("div", { class: "completion-holder" }, field("prompt", "Prompt", prompt, { help: "Type < for your tokens. Ctrl Enter generates." })),
          h("fieldset", { dataset: { field: "weights" } }, h("legend", null, "Weights"), list, h("p", { class: "error" })),
          h("div", { class: "fields three" }, field("shape", "Size", choices("shape", SHAPES)), field("count", "Images", choices("count", { 1: "1", 2: "2", 4: "4", 8: "8" })), h("div", { class: "seed" }, field("seed", "Seed", seed), lock)),
          h("details", { open: Boolean(draft.negative || draft.steps || draft.guidance) }, h("summary", null, "Steps, guidance, negative prompt"), h("div", { class: "stack" }, h("div", { class: "fields three" }, number("steps", "Steps"), number("guidance", "Guidance")), field("negative_prompt", "Negative prompt", negative))),
          h("details", { open: axes().length > 0 }, h("summary", null, "Grid over settings"), axisPlace),
          owner, problem, h("div", { class: "row" }, send, amount)),
        h("section", { class: "stack", "aria-label": "Gallery" }, made.node)));
  }
  build();
  completion(prompt, tokens);
  onStatus(drawOwner, signal);
  await made.load();
}

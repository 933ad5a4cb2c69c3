// Generate: the form at the left, the gallery beside it.

import { api, count, duration, live, onStatus, schema, stored } from "./core.js";
import { axesFields } from "./axes.js";
import { insert, withCompletion } from "./completion.js";
import { button, closer, empty, field, fill, h, heading, icon, linkButton, showErrors, toast } from "./dom.js";
import { gallery } from "./gallery.js";
import { imageList } from "./input_images.js";
import { keys } from "./main.js";
import { baseName, partsOf, runTitle, versionOf } from "./names.js";

const FORM = "generate form";
const EMPTY = { prompt: "", negative: "", weights: [], base: "auto", seed: "", locked: false, ratio: "1:1", width: "", height: "", count: 4, steps: "", guidance: "", reference_images: [], image: [], mask: [], prompt_strength: "", across: { name: "", text: "" }, down: { name: "", text: "" }, more: false, grid: false, when: "" };
const newSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
const number = (text) => (String(text).trim() === "" ? null : Number.isFinite(Number(text)) ? Number(text) : String(text));

/** Shows the screen; an address with an id of weights chooses them. */
export async function show(root, parts, signal) {
  fill(root, heading("Generate"));
  const get = (address) => api("GET", address, undefined, { signal });
  const [about, { weights: known }] = await Promise.all([schema(), get("/api/weights")]);
  if (signal.aborted) return;
  const kept = stored.get(FORM), form = { ...structuredClone(EMPTY), ...kept };
  const wanted = parts.join("/");
  if (wanted && known.some((each) => each.id === wanted)) form.weights = [{ id: wanted, scale: form.weights[0]?.scale ?? 1 }];
  else if (!kept && known.length) form.weights = [{ id: (known.find((each) => each.kind === "final") ?? known[0]).id, scale: 1 }];
  form.weights = form.weights.filter((each) => known.some((one) => one.id === each.id));
  if (form.seed === "") form.seed = newSeed();
  const ratios = about.generation.find((each) => each.name === "aspect_ratio").choices.filter((each) => each !== "custom");
  let drawn = false; // with the titles of runs

  const row = (id) => known.find((each) => each.id === id);
  const tokens = () => [...new Set(form.weights.flatMap((each) => row(each.id)?.tokens ?? []))];
  /** The name of the base model that settings lead to. */
  const baseOf = (weights, name) => (name && name !== "auto" ? name : baseName(about.bases, (weights ?? []).map((each) => row(each.id)?.base_model).find(Boolean)) ?? about.automatic);
  const base = () => {
    const name = baseOf(form.weights, form.base);
    return about.bases.find((each) => each.name === name) ?? about.bases.find((each) => each.name === about.automatic);
  };
  const save = () => { stored.set(FORM, form); tell(); };

  // ---- Prompt ----
  const prompt = h("textarea", { rows: 3, id: "field-prompt", value: form.prompt, placeholder: "a photo of … on a beach", oninput: () => { form.prompt = prompt.value; drawTokens(); save(); } });
  const chips = h("div", { class: "row tight chips" });
  const promptField = field("prompt", "Prompt", prompt);
  promptField.insertBefore(withCompletion(prompt, tokens), promptField.children[1]);
  promptField.append(chips);
  function drawTokens() {
    const found = tokens();
    const missing = found.length > 0 && form.prompt.trim() && !found.some((each) => form.prompt.includes(each));
    fill(chips, found.map((each) => h("button", { type: "button", class: "chip", "aria-label": `Insert ${each}`, title: "Insert into the prompt", onclick: () => insert(prompt, each) }, h("span", { class: "token" }, each))), missing && h("small", { class: "hint" }, "The prompt does not name the subject yet."));
  }

  // ---- Weights ----
  const weights = h("fieldset", { dataset: { field: "weights" } });
  const baseSelect = h("select", { onchange: () => { form.base = baseSelect.value; drawInputs(); resize(); save(); } });
  const baseField = field("base_model", "Base model", baseSelect);

  function options(select, none) {
    const groups = new Map();
    for (const each of known) {
      const group = each.run ? runTitle(each.run) : "Uploads";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(each);
    }
    fill(select, none && h("option", { value: "" }, none), [...groups].map(([group, rows]) => h("optgroup", { label: group }, rows.map((each) => h("option", { value: each.id }, each.run ? `${group}, ${versionOf(each)}` : each.name)))));
  }

  function drawWeights() {
    const shown = form.weights.length ? form.weights : [null];
    fill(weights, h("legend", null, "LoRA"), shown.map((each, index) => {
      const label = index ? "Second LoRA" : "LoRA";
      const select = h("select", { "aria-label": label, onchange: () => {
        if (!select.value) form.weights.splice(index, 1);
        else form.weights[index] = { id: select.value, scale: each?.scale ?? 1 };
        drawAll();
      } });
      options(select, index ? null : "none, the base model alone");
      select.value = each?.id ?? "";
      if (!each) return select;
      const slider = h("input", { type: "range", min: 0, max: 1.5, step: 0.05, value: each.scale, "aria-label": `Scale of the ${label}`, oninput: () => { each.scale = exact.value = Number(slider.value); save(); } });
      const exact = h("input", { class: "scale", inputmode: "decimal", value: each.scale, "aria-label": `Scale of the ${label}, exactly`, oninput: () => { each.scale = number(exact.value) ?? 1; slider.value = each.scale; save(); } });
      return h("div", { class: "stack tight" },
        h("div", { class: "row nowrap-row" }, select, shown.length > 1 && closer(() => { form.weights.splice(index, 1); drawAll(); }, { label: `Remove the ${label}` })),
        h("div", { class: "row nowrap-row" }, h("small", null, "Scale"), slider, exact));
    }), form.weights.length === 1 && known.length > 1 && button("Add a second LoRA", () => {
      const other = known.find((each) => each.id !== form.weights[0].id && each.run !== row(form.weights[0].id)?.run) ?? known.find((each) => each.id !== form.weights[0].id);
      form.weights.push({ id: other.id, scale: 1 });
      drawAll();
      weights.querySelectorAll("select")[1].focus();
    }, { kind: "quiet small", iconName: "plus" }),
    !known.length && h("small", { class: "dim" }, "Trained or uploaded LoRAs appear here."), h("p", { class: "error" }));
    const from = baseName(about.bases, form.weights.map((each) => row(each.id)?.base_model).find(Boolean));
    fill(baseSelect, h("option", { value: "auto" }, `automatic: ${from ?? about.automatic}`), about.bases.map((each) => h("option", { value: each.name }, `${each.name}${each.here ? "" : ", is downloaded first"}`)));
    baseSelect.value = form.base;
  }

  // ---- Input images ----
  const references = () => (base().references ? form.reference_images : []);
  const usesImages = () => references().length + form.image.length > 0;
  const inputs = Object.fromEntries([["reference_images", "Reference images"], ["image", "Start image"], ["mask", "Mask"]].map(([name, legend]) => [name, imageList(name, legend, signal, { insert: (text) => insert(prompt, text), changed: (ids) => {
    const had = usesImages();
    form[name] = ids;
    if (!had && usesImages() && form.ratio !== "custom") form.ratio = "image";
    resize();
    save();
  } })]));
  function drawInputs() {
    const how = base().references;
    inputs.reference_images.node.hidden = !how;
    if (how) inputs.reference_images.set(form.reference_images, { ...how, help: how.least ? `${base().name} edits images: the prompt is an instruction.` : "Optional: images to edit, or to take things from." });
    for (const name of ["image", "mask"]) inputs[name].set(form[name], { most: 1, help: { image: "Denoising starts from it.", mask: "Of the start image's size: only its white part is generated." }[name] });
  }
  /** Adds a generated image to an input. */
  async function useAs(name, { job, image: { file, number: one } }) {
    try {
      const image = new File([await (await fetch(file, { signal })).blob()], `${job.id}-${one}.png`);
      if (name === "image") { form.image = []; start.open = true; drawInputs(); }
      await inputs[name].take([image]);
      inputs[name].node.scrollIntoView({ block: "nearest" });
    } catch (error) { if (!signal.aborted) toast(error.message, { bad: true }); }
  }

  // ---- Size, seed, number ----
  const asImage = h("option", { value: "image" }, "as image");
  const ratio = h("select", { "aria-label": "Aspect ratio", onchange: () => { form.ratio = ratio.value; resize(); save(); } }, ratios.map((each) => h("option", { value: each }, each)), h("option", { value: "custom" }, "other"), asImage);
  const side = (name) => h("input", { inputmode: "numeric", "aria-label": name === "width" ? "Width in pixels" : "Height in pixels", value: form[name], oninput: (event) => { form[name] = event.target.value; form.ratio = ratio.value = "custom"; save(); } });
  const width = side("width"), height = side("height");
  const size = h("fieldset", { class: "field" }, h("legend", { class: "label" }, "Size"), h("div", { class: "size" }, ratio, h("div", { dataset: { field: "width" } }, width, h("p", { class: "error" })), h("span", { class: "dim" }, "×"), h("div", { dataset: { field: "height" } }, height, h("p", { class: "error" }))));
  /** The pixels of a ratio: as many as the base model makes. */
  function pixelsOf(name) {
    const [one, other] = name.split(":").map(Number);
    return [one / other, other / one].map((part) => Math.max(32, Math.round(((references().length ? base().references.resolution : base().resolution) * Math.sqrt(part)) / 16) * 16));
  }
  function resize() {
    asImage.hidden = !usesImages();
    if (form.ratio === "image" && asImage.hidden) form.ratio = "1:1";
    ratio.value = form.ratio;
    for (const input of [width, height]) input.placeholder = form.ratio === "image" ? "auto" : "";
    if (form.ratio === "image") { form.width = form.height = width.value = height.value = ""; return; } // the server computes it
    if (form.ratio === "custom" && form.width) return;
    [form.width, form.height] = pixelsOf(form.ratio === "custom" ? "1:1" : form.ratio);
    [width.value, height.value] = [form.width, form.height];
  }
  const seed = h("input", { inputmode: "numeric", value: form.seed, autocomplete: "off", oninput: () => { form.seed = seed.value; lock(true); save(); } });
  const lockButton = button("", () => { lock(!form.locked); save(); }, { iconName: "unlock", label: "Keep this seed" });
  const seedField = field("seed", "Seed", seed);
  seedField.insertBefore(h("div", { class: "row nowrap-row tight" }, seed, lockButton, button("", () => { form.seed = seed.value = newSeed(); save(); }, { iconName: "dice", label: "Another seed" })), seedField.children[1]);
  function lock(value) {
    form.locked = value;
    lockButton.setAttribute("aria-pressed", String(value));
    fill(lockButton, icon(value ? "lock" : "unlock"));
    lockButton.title = value ? "The seed stays. Press for a new one each time." : "A new seed each time. Press to keep this one.";
  }
  const images = h("input", { type: "number", min: 1, max: 64, value: form.count, oninput: () => { form.count = images.value; save(); } });

  // ---- The rest, grid, GPU ----
  const plain = (name, label, placeholder, help) => {
    const input = h("input", { inputmode: "decimal", value: form[name], placeholder, autocomplete: "off", oninput: () => { form[name] = input.value; save(); } });
    return field(name, label, input, { help });
  };
  const steps = plain("steps", "Steps"), guidance = plain("guidance", "Guidance", "", "More follows the prompt more closely; 1 is off.");
  const strength = plain("prompt_strength", "Strength", "automatic: 0.8", "0 keeps the start image, 1 ignores it.");
  const start = h("details", { class: "fold", open: form.image.length > 0 }, h("summary", null, "Start image and mask"), h("div", { class: "stack" }, inputs.image.node, inputs.mask.node, strength));
  const negative = h("textarea", { rows: 2, value: form.negative, oninput: () => { form.negative = negative.value; save(); } });
  const more = h("details", { class: "fold", open: form.more, ontoggle: () => { form.more = more.open; stored.set(FORM, form); } }, h("summary", null, "Steps, guidance, negative prompt"),
    h("div", { class: "stack" }, h("div", { class: "pair" }, steps, guidance), field("negative_prompt", "Negative prompt", negative, { help: "What should not be there; works with guidance above 1." }), baseField));
  const versions = () => {
    const run = form.weights.length ? partsOf(form.weights[0].id).run : null;
    const rows = known.filter((each) => run && each.run === run).sort((a, b) => (a.step ?? 1e9) - (b.step ?? 1e9));
    const steps = new Map(rows.map((each) => [each.step ?? "final", { word: String(each.step ?? "final"), label: String(each.step ?? "final"), id: each.id }]));
    return [...steps.values()];
  };
  const axes = axesFields(form, versions, save);
  const grid = h("details", { class: "fold", open: form.grid, ontoggle: () => { form.grid = grid.open; stored.set(FORM, form); tell(); } }, h("summary", null, "Grid: compare settings side by side"),
    h("div", { class: "stack tight", dataset: { field: "axes" } }, axes.node, h("p", { class: "error" })));
  const when = h("fieldset", { dataset: { field: "when" }, hidden: true });
  let drawnWhen = "";

  /** Where a run trains: the ways that there are now. */
  function drawWhen(status) {
    const owner = status.gpu?.owner ?? null, busy = owner && owner.kind !== "generator";
    const run = status.runs.find((each) => (owner?.kind === "run" ? each.id === owner.id : ["running", "pausing"].includes(each.state))) ?? status.runs.find((each) => each.state === "paused" && !each.freed);
    const own = form.weights.length > 0 && form.weights.every((each) => partsOf(each.id).run === run?.id) && usedAxes().every((each) => each.name === "seed") && !usesImages(); // it takes only its own weights, and no images
    const by = own && run?.allowed.includes("preview"), left = run?.seconds_left ? `, about ${duration(run.seconds_left)}` : "";
    const name = run?.title || run?.id;
    const choices = !run && !busy ? [] : [
      !busy && ["now", "Now, beside it", "there is no GPU to share; both become slower"],
      by && ["by_run", `By ${name} itself`, "between two steps, with its weights of that moment; its own size and steps, your prompt and seed"],
      busy && ["wait", "Wait", run ? `until ${name} has ended${left}` : "until the GPU is free"],
      busy && run?.allowed.includes("free") && ["pause", `Pause ${name}`, "saves a checkpoint, generates, and goes on by itself"],
    ].filter(Boolean);
    const key = JSON.stringify([choices.map((each) => each[0]), name, left]);
    if (key === drawnWhen) return;
    const focused = when.contains(document.activeElement) ? document.activeElement.value : null;
    drawnWhen = key;
    when.hidden = !choices.length;
    if (!choices.some(([value]) => value === form.when)) form.when = choices[0]?.[0] ?? "";
    fill(when, h("legend", null, busy ? (run ? `The GPU trains ${name}` : `The GPU is used by ${owner.id ?? "another program"}`) : `${name ?? ""} ${run?.state === "paused" ? "is paused" : "is training"}`),
      h("div", { class: "stack tight" }, choices.map(([value, text, small]) => h("label", { class: "choice" }, h("input", { type: "radio", name: "when", value, checked: value === form.when, onchange: () => { form.when = value; save(); } }), h("span", null, text, h("small", null, small))))), h("p", { class: "error" }));
    if (focused) when.querySelector(`[value="${focused}"]`)?.focus();
  }

  // ---- Generate ----
  const submit = button("Generate", null, { kind: "primary", iconName: "play", type: "submit", "aria-describedby": "generate-count" });
  const counted = h("small", { id: "generate-count", role: "status" }), wrong = h("p", { class: "error", role: "alert" });
  const usedAxes = () => (form.grid ? axes.values() : []);
  function tell() {
    const used = usedAxes(), total = used.length ? used.reduce((product, each) => product * each.values.length, 1) : Number(form.count) || 0;
    submit.querySelector("span").textContent = total > 1 ? `Generate ${total} images` : "Generate";
    const each = pictures.secondsEach();
    counted.textContent = [used.length ? `${used.map((one) => one.values.length).join(" × ")} = ${count(total, "image")}` : "", each && total ? `about ${duration(each * total)}` : ""].filter(Boolean).join(", ");
    steps.querySelector("input").placeholder = `automatic: ${base().steps}`;
    guidance.querySelector("input").placeholder = `automatic: ${base().guidance}`;
    if (live.status) drawWhen(live.status);
  }

  async function generate(event) {
    event?.preventDefault();
    if (submit.disabled) return;
    if (!form.locked) form.seed = seed.value = newSeed();
    save();
    showErrors(panel, {});
    wrong.textContent = "";
    if (!form.prompt.trim()) { showErrors(panel, { prompt: "Write what the image should show." }); prompt.focus(); return; }
    submit.disabled = true;
    const body = { prompt: form.prompt, negative_prompt: form.negative, weights: form.weights, base_model: form.base, seed: number(form.seed), width: number(form.width), height: number(form.height), count: number(form.count) ?? 1, steps: number(form.steps), guidance: number(form.guidance), reference_images: references(), image: form.image[0], mask: form.mask[0], prompt_strength: form.image.length ? number(form.prompt_strength) : null, axes: usedAxes(), when: when.hidden ? "now" : form.when };
    try {
      const answer = await api("POST", "/api/images", body);
      await pictures.added(answer.id);
      if (innerWidth < 900) pictures.node.scrollIntoView(); // below the form
    } catch (error) {
      const rest = showErrors(panel, error.field ? { [error.field]: error.message } : { "": error.message });
      if (rest.length) wrong.textContent = error.message;
      if (["steps", "guidance", "negative_prompt", "base_model"].includes(error.field)) more.open = true;
      if (["image", "mask", "prompt_strength"].includes(error.field)) start.open = true;
      panel.querySelector(".bad")?.scrollIntoView({ block: "nearest" });
    } finally { submit.disabled = false; }
  }

  /** Puts the settings of an image into the form, or of a whole job with its grid. */
  function again(settings, seedToo = true) {
    Object.assign(form, { prompt: settings.prompt, negative: settings.negative_prompt ?? "", weights: (settings.weights ?? []).filter((each) => row(each.id)).map((each) => ({ ...each })), base: settings.base_model ?? "auto", width: settings.width ?? "", height: settings.height ?? "", steps: settings.steps ?? "", guidance: settings.guidance ?? "", count: settings.count ?? 1, reference_images: settings.reference_images ?? [], image: [settings.image ?? []].flat(), mask: [settings.mask ?? []].flat(), prompt_strength: settings.prompt_strength ?? "", ratio: "custom" });
    if (seedToo && settings.seed !== undefined && settings.seed !== null) { form.seed = settings.seed; form.locked = true; }
    const used = settings.axes ?? [];
    for (const [index, key] of ["across", "down"].entries()) form[key] = used[index] ? { name: used[index].name, text: used[index].values.map((each) => (String(each).includes("/") ? (partsOf(each).step ?? "final") : each)).join(", ") } : { name: "", text: "" };
    form.grid = grid.open = used.length > 0;
    start.open = start.open || form.image.length > 0;
    form.ratio = !form.width && usesImages() ? "image" : ratios.find((each) => pixelsOf(each).join() === [form.width, form.height].map(Number).join()) ?? "custom";
    form.more = more.open = more.open || Boolean(form.steps || form.guidance || form.negative);
    drawAll();
    scrollTo({ top: 0 });
    prompt.focus();
  }

  function drawAll() {
    Object.assign(prompt, { value: form.prompt });
    Object.assign(negative, { value: form.negative });
    for (const [input, name] of [[seed, "seed"], [width, "width"], [height, "height"], [images, "count"], [steps.querySelector("input"), "steps"], [guidance.querySelector("input"), "guidance"], [strength.querySelector("input"), "prompt_strength"]]) input.value = form[name];
    ratio.value = form.ratio;
    lock(form.locked);
    drawWeights();
    drawInputs();
    resize();
    drawTokens();
    axes.draw();
    save();
  }

  /** Generates an image again without its LoRA; resolves to the job. */
  async function withoutLora({ base: name, image: { seed: same, settings } }) {
    const way = when.hidden || form.when === "by_run" ? "now" : form.when;
    return (await api("POST", "/api/images", { ...settings, weights: [], base_model: name, seed: same, count: 1, when: way })).id;
  }

  const pictures = gallery(signal, { again, withoutLora, useAs, takesReferences: () => Boolean(base().references), baseOf: (settings) => baseOf(settings.weights, settings.base_model), changed: () => tell(), empty: () => empty("image", known.length ? "Your images appear here" : "There is no LoRA yet", known.length ? "Write a prompt and press Generate. With the subject's token in it, the LoRA shows your subject." : "Train one on your images, or generate with the base model alone.", !known.length && linkButton("Train a LoRA", "#/train", { kind: "primary" })) });
  const panel = h("form", { class: "card generate-form", "aria-label": "Image settings", novalidate: true, onsubmit: generate, onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate(event); } },
    promptField, weights, inputs.reference_images.node, h("div", { class: "pair" }, seedField, field("count", "Images", images)), size, more, start, grid, when, h("div", { class: "stack tight submit" }, wrong, submit, counted));
  fill(root, heading("Generate"), h("div", { class: "generate-split" }, panel, pictures.node));
  keys.screen = [["Ctrl Enter", "Generate, in the form"], ["← →", "Image before, next, in the large view"], ["+ −", "Zoom; 0 shows the whole image"], ["Shift ←", "Pan, with each arrow"], ["Delete", "Move the image to the trash"]];
  onStatus((status) => { drawWhen(status); if (!drawn) { drawn = true; drawAll(); } }, signal);
  if (!live.status) drawAll();
  await pictures.load();
}

// One generated image in full, with its settings.

import { button, closer, fill, h, linkButton, menu, showModal, withTokens } from "./dom.js";
import { INPUTS, thumbnails } from "./input_images.js";
import { partsOf } from "./names.js";
import { zoomable } from "./zoom.js";

/** The settings of an image: [[name, value]], without those that were left to the base model. */
export function factsOf({ job, base, image: { seed, settings } }) {
  const loras = (settings.weights ?? []).map((each) => `${partsOf(each.id).text}, scale ${each.scale}`);
  return [
    ["Prompt", settings.prompt], ["Seed", seed], ["LoRA", loras.join(" + ") || "none"],
    ["Size", settings.width && `${settings.width}×${settings.height}`], ["Steps", settings.steps], ["Guidance", settings.guidance],
    ...Object.entries(INPUTS).map(([name, label]) => [label, [settings[name] ?? []].flat().join(" ")]), ["Strength", settings.prompt_strength],
    ["Base model", base], ["Negative prompt", settings.negative_prompt], ["Made", new Date(job.created * 1000).toLocaleString()],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
}

/** What is shown of a fact: of input images, whose values are ids, their thumbnails. */
export function shownFact(label, value) {
  const input = Object.keys(INPUTS).find((name) => INPUTS[name] === label);
  return input && value ? thumbnails({ [input]: String(value).split(" ") }) : String(value ?? "–");
}

/** Opens the image of `key` ("JOB NUMBER") of all() = [{job, image, base}]. `on`: as in gallery.js, and {remove, removeOne, choose(key), choice(key): {checked, disabled}}. */
export function viewer(all, key, signal, on) {
  const image = h("img", null), prompt = h("p", null), place = h("small", { role: "status" }), facts = h("dl", { class: "facts" }), actions = h("div", { class: "row tight" });
  const step = (by) => { const now = at(); key = keyOf(all()[Math.max(0, Math.min(all().length - 1, now + by))]); show(); };
  const back = button("", () => step(-1), { kind: "quiet", iconName: "left", label: "Image before" }), next = button("", () => step(1), { kind: "quiet", iconName: "right", label: "Next image" });
  const box = h("dialog", { class: "picture-viewer", "aria-label": "Image", tabindex: -1 });
  fill(box,
    h("div", { class: "picture-head" }, back, next, place, h("span", { class: "row right" }, zoomable(box), closer(() => box.close()))),
    h("div", { class: "picture-split" }, h("div", { class: "plate picture-plate" }, image), h("div", { class: "picture-side stack" }, prompt, facts, actions)));
  const choose = button("Select to compare", () => { on.choose(key); drawChoice(); }, { iconName: "grid" });
  const drawChoice = () => {
    const { checked, disabled } = on.choice(key);
    choose.setAttribute("aria-pressed", String(checked));
    choose.disabled = disabled;
  };
  const at = () => Math.max(0, all().findIndex((each) => keyOf(each) === key));

  function show() {
    const images = all(), now = at();
    if (!images.length) { box.close(); return; }
    const { job, image: one } = images[now], { settings } = one;
    key = keyOf(images[now]);
    image.src = one.file;
    image.alt = `${settings.prompt}, seed ${one.seed}`;
    image.toggleAttribute("data-small", Number(settings.width) < 200);
    place.textContent = `${now + 1} of ${images.length}`;
    back.disabled = now === 0;
    next.disabled = now === images.length - 1;
    fill(prompt, withTokens(settings.prompt));
    fill(facts, factsOf(images[now]).slice(1).map(([label, value]) => [h("dt", null, label), h("dd", null, shownFact(label, value))]));
    drawChoice();
    fill(actions,
      button("Use these again", () => { box.close(); on.again({ ...settings, seed: one.seed }, true); }, { kind: "primary", iconName: "again" }),
      linkButton("Download", one.file, { iconName: "download", download: `${job.id}-${one.number}.png` }), choose,
      menu("Use as", [on.takesReferences() && { text: "Reference image", onclick: () => use("reference_images") }, { text: "Start image", onclick: () => use("image") }].filter(Boolean)),
      settings.weights?.length > 0 && button("Same without LoRA", () => { box.close(); on.withoutLora(images[now]); }, { iconName: "grid", title: "Generate the same image without the LoRA, to compare them" }),
      !isLive(job) && [button("Trash", bin, { kind: "danger", iconName: "trash", title: "Move this image to the trash (Delete)" }),
        job.done > 1 && button(`Trash all ${job.done}`, () => { box.close(); on.remove(job); }, { kind: "danger", iconName: "trash" })]);
  }
  function use(input) {
    const shown = all()[at()];
    box.close();
    on.useAs(input, shown);
  }
  /** Moves the image that is shown to the trash, and shows the next one. */
  async function bin() {
    const now = at(), shown = all()[now];
    if (isLive(shown.job)) return;
    await on.removeOne(shown);
    const left = all();
    if (left.length) key = keyOf(left[Math.min(left.some((each) => keyOf(each) === keyOf(shown)) ? at() : now, left.length - 1)]);
    show();
    if (!box.contains(document.activeElement)) box.focus();
  }
  box.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Delete") { event.preventDefault(); bin(); }
    if (by && !event.shiftKey) { event.preventDefault(); step(by); }
  });
  show();
  showModal(box, null, signal);
}

const isLive = (job) => ["waiting", "running"].includes(job.state);

/** What names an image in the gallery. */
export const keyOf = ({ job, image }) => `${job.id} ${image.number}`;

// Captions written by a model that sees images: what to write, how far it is, what came of it.

import { api, count, path, stored } from "./core.js";
import { button, closer, field, fill, h, icon, toast } from "./dom.js";
import { ask } from "./asking.js";

const size = (each) => (each.gigabytes ? `, ${each.gigabytes} GB` : "");

/** Asks what to write, and starts it. `state`: of the dataset. */
export async function writeCaptions(state) {
  let about;
  try {
    about = await api("GET", `/api/captioners?base=${encodeURIComponent(state.base)}`, undefined, { signal: state.signal });
  } catch (error) {
    if (error.name !== "AbortError") toast(error.message, { bad: true });
    return;
  }
  const bare = state.images.filter((each) => each.default_caption || each.caption_source?.endsWith("/")).length, own = state.images.length - bare;
  const choice = (name, value, text, small, checked, changed) => h("label", { class: "choice" }, h("input", { type: "radio", name, value, checked, onchange: changed }), h("span", null, text, small && h("small", null, small)));
  const warning = h("p", { class: "note warn", role: "status" }), missing = h("div", { role: "status" });
  const kind = h("input", { maxlength: 1000, placeholder: "found from the images", autocomplete: "off" }), avoid = h("input", { maxlength: 1000, placeholder: "found from the images", autocomplete: "off" });
  const kindField = field("kind", "What the subject is", kind, { help: "Such as robot. It is not written into the captions, TOK is." });
  const models = h("select", { onchange: () => draw() }, about.models.map((each) => h("option", { value: each.name }, `${each.name}${each.here ? "" : `, not downloaded${size(each)}`}`)));
  models.value = (about.models.find((each) => each.here) ?? about.models[0]).name;
  const form = h("div", { class: "stack" }, missing,
    h("fieldset", null, h("legend", null, "Images"), h("div", { class: "stack tight" },
      choice("which", "missing", `Only those without a caption: ${bare}`, "captions that are there are not changed", true, () => draw()),
      choice("which", "all", `All: ${state.images.length}`, null, false, () => draw())), warning),
    h("fieldset", null, h("legend", null, "What they have in common"), h("div", { class: "choices" },
      choice("purpose", "subject", "A subject", null, true, () => draw()), choice("purpose", "style", "A style", null, false, () => draw()))),
    kindField,
    field("avoid", "Words that captions must not contain", avoid, { help: "What is the same in all images, with commas: it is then learned with the subject." }),
    field("model", "Written by", models));
  const chosen = (name) => form.querySelector(`[name=${name}]:checked`).value;
  const go = () => form.closest("form")?.querySelector("[type=submit]");

  function draw() {
    const all = chosen("which") === "all", style = chosen("purpose") === "style", model = about.models.find((each) => each.name === models.value);
    warning.hidden = !all || !own;
    fill(warning, icon("warning"), h("span", null, `${count(own, "caption")} will be replaced, also those that you have written. Undo brings all of them back.`));
    kindField.hidden = style;
    fill(missing, !model.here && notHere(model, about));
    if (go()) go().disabled = !model.here || (!all && !bare);
  }
  setTimeout(draw); // when the dialog is there
  await ask("Write captions", form, "Write captions", () => {
    const all = chosen("which") === "all", style = chosen("purpose") === "style";
    return api("POST", `${path("api/datasets", state.name)}/caption`, { base: state.base, model: models.value, style, all, kind: style ? "" : kind.value, avoid: avoid.value });
  });
}

/** What to do about a model that is not on this machine. */
function notHere(model, { vault, base }) {
  const download = `python -m families.download ${model.download}${vault ? "" : " --vault models"}`;
  return h("div", { class: "note warn" }, icon("warning"), h("div", { class: "grow stack tight" },
    h("p", null, `${model.name}, which writes the captions for ${base}, is not on this machine. Download it${size(model)}:`),
    h("pre", { class: "code" }, download),
    h("p", null, vault ? `with MODEL_VAULT=${vault}, as this studio has it.` : "Then start the studio again with MODEL_VAULT=models. Or run zeroprior caption once, which downloads it to the Hub's cache.")));
}

/** How far the captions of a dataset are, and what came of it: {node, update(tasks)}. `after(wait)` reads the dataset anew, in so many ms. */
export function captionStatus(state, after) {
  const node = h("div", { class: "stack tight" }), url = (suffix) => `${path("api/datasets", state.name)}${suffix}`;
  const seen = `captions seen ${state.name}`;
  const words = h("span", { class: "grow", role: "status" }), bar = h("div", null), place = h("span", { class: "row tight" });
  let drawn = "", known = null;
  const close = (id) => { stored.set(seen, id); fill(node); };

  async function request(address, body) {
    try { await api("POST", url(address), body); return true; } catch (error) { toast(error.message, { bad: true }); return false; }
  }
  async function undo(id) {
    if (!(await request("/undo", { undo: id }))) return;
    close(id);
    after(0);
  }

  function text(task) {
    if (task.state === "waiting") return task.waits_for ? `Captions wait for the GPU, which ${task.waits_for} uses` : "Captions wait for those of another dataset";
    if (task.state === "running") return task.of ? `Writing captions: ${task.done} of ${task.of}` : `Loading ${task.model} and looking at the images`;
    const edited = task.edited && `${count(task.edited, "image")} left as they were, since their captions were edited meanwhile`;
    const avoided = task.avoided && (task.avoided.length ? `They leave out: ${task.avoided.join(", ")}` : task.subject && "No features that all images share were found, so captions may mention them");
    const marked = task.marked && `${count(task.marked, "image")} to look at, marked below`;
    const how = { done: "", canceled: "Canceled. ", failed: "" }[task.state];
    return [`${how}${count(task.written, "caption")} written by ${task.model}`, avoided, marked, edited].filter(Boolean).join(". ") + ".";
  }

  function draw(task) {
    const live = ["waiting", "running"].includes(task.state), key = JSON.stringify(task);
    if (key === drawn) return;
    drawn = key;
    const said = text(task);
    if (words.textContent !== said) words.textContent = said;
    bar.style.width = `${task.of ? (100 * task.done) / task.of : 0}%`;
    if (node.dataset.state === task.state && node.dataset.task === task.id && node.firstChild) return;
    Object.assign(node.dataset, { state: task.state, task: task.id });
    fill(place, live ? button("Cancel", (event) => { event.currentTarget.disabled = true; request("/caption/cancel"); }, { kind: "small" }) : [
      task.written > 0 && button("Undo all", () => undo(task.id), { kind: "small" }), closer(() => close(task.id), { kind: "quiet small" })]);
    fill(node,
      task.error && h("p", { class: "note bad error-text" }, icon("warning"), h("span", { class: "grow" }, task.error)),
      h("div", { class: "note caption-job" }, words, place, live && h("div", { class: "progress", "aria-hidden": "true" }, bar)));
  }

  function update(tasks) {
    const task = tasks.find((each) => each.kind === "captions" && each.name === state.name);
    if (task && task.id !== stored.get(seen)) draw(task);
    else if (node.firstChild) fill(node);
    const now = task && `${task.state} ${task.written}`;
    if (known !== null && now && now !== known) after(["waiting", "running"].includes(task.state) ? 1500 : 0);
    known = now ?? "";
  }
  return { node, update };
}

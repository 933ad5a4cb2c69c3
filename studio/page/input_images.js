// Images that others are generated from: reference images, the start image, its mask.

import { api, count, path } from "./core.js";
import { button, closer, fill, h } from "./dom.js";
import { pickFiles } from "./uploads.js";

const ACCEPT = "image/*,.heic,.heif,.avif,.tif,.tiff,.jp2,.jpx";
/** Names of the inputs, as people read them. */
export const INPUTS = { reference_images: "Reference image", image: "Start image", mask: "Mask" };

/** Thumbnails of the input images of settings; null if there are none. */
export function thumbnails(settings) {
  const found = Object.entries(INPUTS).flatMap(([name, label]) => [settings[name] ?? []].flat().map((id, index, all) => [id, all.length > 1 ? `${label} ${index + 1}` : label]));
  return found.length ? h("span", { class: "input-thumbs" }, found.map(([id, label]) => picture(id, label))) : null;
}

const picture = (id, label) => h("img", { src: path("api/input_images", id), alt: label, title: label });

/** A place for the images of an input: dropped or chosen, with their order. `on`: {changed(ids), insert(name)}. */
export function imageList(name, legend, signal, on) {
  let ids = [], most = 1, called = null;
  const label = INPUTS[name], list = h("ol", { class: "input-images plain-list" }), help = h("p", { class: "help" }), wrong = h("p", { class: "error" }), told = h("small", { class: "dim", role: "status" });
  const add = button(name === "reference_images" ? "Add images" : "Add an image", choose, { kind: "small", iconName: "plus" });
  const node = h("fieldset", { class: "field drop-place", dataset: { field: name } }, h("legend", null, legend), list, h("div", { class: "row" }, add, told), help, wrong);
  const nameOf = (index) => (most > 1 ? `${label} ${index + 1}` : label);
  const has = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  node.addEventListener("dragover", (event) => { if (has(event)) { event.preventDefault(); node.classList.add("over"); } });
  node.addEventListener("dragleave", () => node.classList.remove("over"));
  node.addEventListener("drop", (event) => {
    node.classList.remove("over");
    if (!has(event)) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });

  async function choose() { await take(await pickFiles({ accept: ACCEPT, multiple: most > 1 })); }

  /** Adds files, or images with a name; those that are refused are named with the reason. */
  async function take(files) {
    const refused = [];
    wrong.textContent = "";
    for (const file of files) {
      if (ids.length >= most) { refused.push(`${file.name}: at most ${count(most, "image")}; remove one first`); continue; }
      told.textContent = `${file.name} is added`;
      try {
        const { id } = await api("PUT", path("api/input_images", file.name), file);
        if (signal.aborted) return;
        change([...ids, id]);
      } catch (error) { refused.push(error.message.includes(file.name) ? error.message : `${file.name}: ${error.message}`); }
    }
    wrong.textContent = refused.join("\n");
    tell();
  }

  function change(now) {
    ids = now;
    draw();
    on.changed(ids);
  }

  /** Moves an image; the focus stays on its button, or goes to the other one at an end. */
  function move(index, by) {
    const moved = [...ids], to = index + by;
    [moved[index], moved[to]] = [moved[to], moved[index]];
    change(moved);
    const buttons = list.children[to].querySelectorAll(".move"), same = buttons[by < 0 ? 0 : 1];
    (same.disabled ? buttons[by < 0 ? 1 : 0] : same).focus();
    told.textContent = `${label} ${to + 1} of ${ids.length}`;
  }

  function remove(index) {
    change(ids.filter((_, each) => each !== index));
    (list.children[Math.min(index, ids.length - 1)]?.querySelector(".remove") ?? add).focus();
  }

  const mover = (index, by) => button("", () => move(index, by), { kind: "quiet small move", iconName: by < 0 ? "left" : "right", label: `Move ${nameOf(index).toLowerCase()} ${by < 0 ? "earlier" : "later"}`, disabled: !(index + by in ids) });

  function draw() {
    fill(list, ids.map((id, index) => h("li", null, h("div", { class: "plate" }, picture(id, nameOf(index))),
      called && h("button", { type: "button", class: "chip", title: "Insert into the prompt", "aria-label": `Insert ${called.replace("{}", index + 1)}`, onclick: () => on.insert(called.replace("{}", index + 1)) }, h("span", { class: "token" }, called.replace("{}", index + 1))),
      h("div", { class: "row tight" }, ids.length > 1 && [mover(index, -1), mover(index, 1)], closer(() => remove(index), { kind: "quiet small remove", label: `Remove ${nameOf(index).toLowerCase()}` })))));
    tell();
  }

  function tell() {
    add.hidden = ids.length >= most;
    fill(told, ids.length ? most > 1 && `${ids.length} of at most ${most}` : "or drop here");
  }

  return {
    node, take,
    /** Shows these images. `how`: the most, a text, and what a prompt calls an image ({}: its number). */
    set(now, how = { most: 1, help: "" }) {
      [ids, most, called] = [now, how.most, how.name ?? null];
      help.textContent = how.help;
      draw();
    },
  };
}

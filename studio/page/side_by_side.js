// Two to four generated images beside each other, zoomed together, with the settings that differ.

import { closer, fill, h, showModal } from "./dom.js";
import { INPUTS } from "./input_images.js";
import { factsOf, shownFact } from "./viewer.js";
import { zoomable } from "./zoom.js";

export const MOST = 4;

/** Shows the images: [{job, image, base}]. */
export function sideBySide(images, signal) {
  const facts = images.map((each) => new Map(factsOf(each)));
  const names = [...new Set(facts.flatMap((each) => [...each.keys()]))].filter((name) => name !== "Made");
  const differs = names.filter((name) => new Set(facts.map((each) => each.get(name))).size > 1);
  const rows = (of, some) => h("dl", { class: "facts" }, some.map((name) => [h("dt", null, name), h("dd", null, shownFact(name, of.get(name)))]));
  const same = names.filter((name) => !differs.includes(name));
  const panes = images.map(({ image }, index) => h("figure", null,
    h("div", { class: "plate" }, h("img", { src: image.file, alt: differs.filter((name) => !Object.values(INPUTS).includes(name)).map((name) => `${name}: ${facts[index].get(name) ?? "–"}`).join(", ") || image.settings.prompt, "data-small": Number(image.settings.width) < 200 })),
    h("figcaption", { tabindex: 0, role: "group", "aria-label": `Settings of image ${index + 1}` }, differs.length ? rows(facts[index], differs) : h("p", { class: "dim" }, "The same settings"))));
  const box = h("dialog", { class: "picture-viewer", "aria-label": "Images side by side" });
  fill(box,
    h("div", { class: "picture-head" }, h("h2", null, "Side by side"), h("span", { class: "row right" }, zoomable(box), closer(() => box.close()))),
    h("div", { class: "beside", dataset: { count: images.length } }, panes),
    same.length > 0 && h("details", { class: "beside-same" }, h("summary", null, `The same in all: ${same.map((name) => name.toLowerCase()).join(", ")}`), rows(facts[0], same)));
  showModal(box, null, signal);
}

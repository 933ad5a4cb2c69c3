// The selected image, large: its crop frame, size, marks.

import { bytes, path } from "./core.js";
import { button, dialog, fill, h, icon, toast } from "./dom.js";
import { pickFiles, put } from "./uploads.js";

const SIZES = [256, 512, 768, 1024, 1328];
const IMAGES = "image/*,.heic,.heif,.avif,.jp2";

/** Fills `side`. `on`: {load(), remove(image), loaded(undo)}. */
export function inspector(side, state, on) {
  let now = null, shown = "", waiting;
  const sizes = h("select", { "aria-label": "Training resolution", onchange: () => { state.resolution = sizes.value; on.load({ quiet: true }); } });
  const marks = h("div", { class: "stack tight" });
  const plate = h("div", { class: "plate inspect" });
  const head = h("h2", { class: "ellipsis" }), facts = h("small", null), crop = h("p", { class: "crop-words" });
  const box = h(
    "div", { class: "card flush" }, plate,
    h("div", { class: "stack pad" },
      h("div", null, head, facts),
      h("div", { class: "crop-row" }, h("small", null, "What training sees"), crop, sizes),
      marks,
      h("div", { class: "row" }, button("Replace", () => replace(), { iconName: "upload" }), button("Remove", () => on.remove(now), { kind: "danger", iconName: "trash" }))),
  );

  function drawText() {
    fill(marks, (now?.marks ?? []).map((each) => h("p", { class: `note ${each.kind === "problem" ? "bad" : "warn"}` }, icon("warning"), each.text)));
  }

  const url = (image) => `${path("api/datasets", state.name, "images")}/${encodeURIComponent(image.name)}`;

  function draw(image) {
    now = image;
    if (!image) { fill(side); shown = ""; return; }
    if (box.parentNode !== side && !box.closest("dialog")) fill(side, box);
    const { bucket } = image;
    const key = JSON.stringify([image.name, image.version, bucket]);
    if (key !== shown) { // a new node only for another image or frame, so that nothing flickers
      shown = key;
      fill(plate, image.width ? picture(image, bucket) : h("div", { class: "no-picture" }, icon("image"), h("small", null, "No image can be shown")));
    }
    head.textContent = image.name;
    head.title = image.name;
    facts.textContent = [image.width && `${image.width}×${image.height}`, bytes(image.bytes)].filter(Boolean).join(" · ");
    if (!sizes.options.length) fill(sizes, h("option", { value: "" }, state.modelSize ? `at ${state.modelSize} px, as ${state.base} trains` : "at the model's size"), SIZES.filter((each) => each !== state.modelSize).map((each) => h("option", { value: each }, `at ${each} px`)));
    crop.parentNode.hidden = !bucket;
    if (bucket) crop.textContent = `${bucket.width}×${bucket.height}, ${cutWords(image, bucket)}${bucket.upscaled > 1.01 ? `, enlarged ${bucket.upscaled.toFixed(1)}×` : ""}`;
    drawText();
  }

  function cutWords(image, { cut, crop: [left, , right] }) {
    if (cut < 0.005) return "nothing cut off";
    return `${Math.round(100 * cut)} % cut off at ${right - left < image.width ? "left and right" : "top and bottom"}`;
  }

  function picture(image, bucket) {
    const frame = h("div", { class: "crop", "aria-hidden": "true", hidden: !bucket || bucket.cut < 0.0005 });
    if (bucket) {
      const [left, top, right, bottom] = bucket.crop;
      const place = { left: left / image.width, top: top / image.height, width: (right - left) / image.width, height: (bottom - top) / image.height };
      for (const [name, value] of Object.entries(place)) frame.style.setProperty(name, `${100 * value}%`);
    }
    const version = `?v=${encodeURIComponent(image.version)}`;
    const small = `${path("api/datasets", state.name, "thumbs")}/${encodeURIComponent(image.name)}${version}`;
    const shownImage = h("img", { src: small, alt: image.caption, width: image.width, height: image.height });
    clearTimeout(waiting); // whoever walks through the list with the keys does not load each photo whole
    waiting = setTimeout(() => { shownImage.src = `${url(image)}${version}`; }, 150);
    const holder = h("div", { class: `crop-holder ${image.width < 240 ? "small" : ""}` }, shownImage, frame);
    holder.style.setProperty("--ratio", String(image.width / image.height));
    return holder;
  }

  /** Asks for another file. What was there is kept until the page is left, for Undo. */
  async function replace() {
    const image = now;
    const [file] = await pickFiles({ accept: IMAGES, multiple: false });
    if (!file || !image) return;
    try {
      const before = image.width ? await (await fetch(`${url(image)}?v=${encodeURIComponent(image.version)}`)).blob() : null;
      await put(`${url(image)}?replace=1`, file);
      const undo = async () => {
        try { await put(`${url(image)}?replace=1`, before); await on.loaded(); } catch (error) { toast(error.message, { bad: true }); }
      };
      await on.loaded([`${image.name} replaced`, before ? { action: ["Undo", undo] } : {}]);
    } catch (error) { if (error.name !== "AbortError") toast(error.message, { bad: true }); }
  }

  /** On a narrow screen, where the side is not shown: in a dialog. */
  async function open() {
    if (!matchMedia("(max-width: 900px)").matches || !now) return;
    const holder = h("div", null, box);
    await dialog("Image", holder);
    fill(side, box);
  }
  return { draw, drawText, replace, open };
}

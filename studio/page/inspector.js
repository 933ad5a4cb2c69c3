// The large view of one image: its crop frame, size, marks.

import { api, path } from "./core.js";
import { button, fill, h, icon, toast } from "./dom.js";
import { pickFiles } from "./uploads.js";

const SIZES = ["", "256", "512", "768", "1024", "1328"];

/** Fills `side`. `on`: {load(), remove(image), replaced()}. */
export function inspector(side, state, on) {
  let now = null;
  const resolution = h("select", { "aria-label": "Training resolution", onchange: () => { state.resolution = resolution.value; on.load(); } }, SIZES.map((each) => h("option", { value: each }, each ? `${each} px` : "model size")));
  const marks = h("div", { class: "stack tight" });

  function drawText() {
    fill(marks, (now?.marks ?? []).map((each) => h("p", { class: `note ${each.kind === "problem" ? "bad" : "warn"}` }, icon("warning"), each.text)));
  }

  function draw(image) {
    now = image;
    if (!image) { fill(side); return; }
    const url = `${path("api/datasets", state.name, "images")}/${encodeURIComponent(image.name)}`;
    const frame = h("div", { class: "crop", "aria-hidden": "true" });
    const holder = h("div", { class: "crop-holder" }, h("img", { src: `${url}?v=${encodeURIComponent(image.version)}`, alt: image.caption, width: image.width, height: image.height, "data-small": image.width < 240 }), frame);
    const { bucket } = image;
    if (bucket) {
      const [left, top, right, bottom] = bucket.crop;
      const place = { left: left / image.width, top: top / image.height, width: (right - left) / image.width, height: (bottom - top) / image.height };
      for (const [name, value] of Object.entries(place)) frame.style.setProperty(name, `${100 * value}%`);
    } else frame.hidden = true;
    const sideways = bucket && bucket.crop[2] - bucket.crop[0] < image.width ? "left and right" : "top and bottom";
    const words = !bucket ? "" : bucket.cut >= 0.005 ? `cuts ${Math.round(100 * bucket.cut)} % at ${sideways}` : "nothing is cut";
    const larger = bucket?.upscaled > 1.01 ? `, enlarged ${bucket.upscaled.toFixed(1)}×` : "";
    drawText();
    fill(
      side,
      h("div", { class: "card flush" },
        h("div", { class: "plate inspect" }, holder),
        h("div", { class: "stack pad" },
          h("div", null, h("h2", { class: "ellipsis" }, image.name), h("small", null, `${image.width}×${image.height}${bucket ? ` → ${bucket.width}×${bucket.height}, ${words}${larger}` : ""}`)),
          h("label", { class: "row" }, h("small", { class: "grow" }, "Crop at"), h("span", { class: "narrow" }, resolution)),
          marks,
          h("div", { class: "row" },
            button("Replace", async () => {
              const [file] = await pickFiles();
              if (!file) return;
              try { await api("PUT", `${url}?replace=1`, file); on.replaced(); } catch (error) { toast(error.message, { bad: true }); }
            }),
            button("Remove", () => on.remove(image), { kind: "danger", iconName: "trash" }),
          ),
        )),
    );
  }
  return { draw, drawText };
}

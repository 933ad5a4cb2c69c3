// One row of a dataset: thumbnail, caption edited in place, marks.

import { api, debounced, path } from "./core.js";
import { button, fill, h, icon, withTokens } from "./dom.js";

const WAIT = 500; // ms after the last key

/** The row of an image. `on`: {select(name), next(step, edit), changed()}. */
export function editor(image, state, on) {
  let editing = null; // the text field, while open
  let saving = Promise.resolve();
  const text = h("div", { class: "caption", role: "button", tabindex: 0, title: "Edit the caption" });
  const mark = h("span", { class: "saved", role: "status" });
  const info = h("small", { class: "info" });
  const marks = h("div", { class: "marks" });
  const conflict = h("div", null);
  const place = h("div", { class: "caption-place" }, text);
  const thumb = h("img", { loading: "lazy", alt: "", decoding: "async" });
  const node = h(
    "li", { class: "image-row", dataset: { image: image.name } },
    h("button", { type: "button", class: "thumb plate", tabindex: -1, "aria-label": `Show ${image.name}`, onclick: () => on.select(image.name, false) }, thumb),
    h("div", { class: "image-text" }, place, conflict, marks, h("div", { class: "row between" }, info, mark)),
  );
  text.addEventListener("click", () => edit());
  text.addEventListener("focus", () => on.select(image.name, false));
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); edit(); }
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); on.next(event.key === "ArrowDown" ? 1 : -1); }
  });

  function drawText() {
    text.classList.toggle("default", image.default_caption);
    fill(text, withTokens(image.caption || "No caption"), image.default_caption && h("small", null, " default caption"));
  }

  function draw() {
    const url = `${path("api/datasets", state.name, "thumbs")}/${encodeURIComponent(image.name)}?v=${encodeURIComponent(image.version)}`;
    if (thumb.getAttribute("src") !== url) thumb.src = url;
    const { bucket } = image;
    const cut = bucket?.cut >= 0.005 ? `, cuts ${Math.round(100 * bucket.cut)} %` : "";
    info.textContent = [image.name, bucket && `→ ${bucket.width}×${bucket.height}${cut}`, image.tokens && `${image.tokens} tokens`].filter(Boolean).join(" · ");
    fill(marks, image.marks.map((each) => h("p", { class: each.kind === "problem" ? "mark bad" : "mark warn" }, icon("warning"), each.text)));
    if (!editing) drawText();
  }

  function say(words, kind = "") {
    mark.className = `saved ${kind}`;
    fill(mark, kind === "good" && icon("check"), words);
  }

  function edit() {
    if (editing) return;
    on.select(image.name);
    const area = (editing = h("textarea", { rows: 2, maxlength: 20000, "aria-label": `Caption of ${image.name}` }));
    area.value = image.default_caption ? "" : image.caption;
    area.placeholder = image.default_caption ? image.caption : "";
    const later = debounced(() => save(area.value), WAIT);
    const fit = () => { area.style.height = "auto"; area.style.height = `${area.scrollHeight + 2}px`; };
    area.addEventListener("input", () => { say("not saved yet"); later(); fit(); });
    area.addEventListener("blur", () => { later.cancel(); editing = null; save(area.value); fill(place, text); drawText(); });
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); on.next(1, true); if (editing === area) area.blur(); }
      else if (event.key === "Escape") { event.preventDefault(); area.blur(); text.focus(); }
      else if (event.altKey && (event.key === "ArrowDown" || event.key === "ArrowUp")) { event.preventDefault(); on.next(event.key === "ArrowDown" ? 1 : -1, true); }
    });
    fill(place, area);
    fit();
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  /** Saves a text if it differs; one request after the other, each with the version before. */
  function save(wanted) {
    saving = saving.then(async () => {
      if (wanted === (image.default_caption ? "" : image.caption)) { if (mark.textContent === "not saved yet") say("saved", "good"); return; }
      say("saving");
      await put(wanted, image.caption_version || "*");
    });
    return saving;
  }

  async function put(wanted, version) {
    const url = `${path("api/datasets", state.name, "captions")}/${encodeURIComponent(image.name)}`;
    try {
      const saved = await api("PUT", url, wanted, { headers: { "If-Match": version } });
      Object.assign(image, saved);
      image.default_caption = wanted.trim() === "";
      fill(conflict);
      say("saved", "good");
      draw();
      on.changed();
    } catch (error) {
      if (error.status !== 412) {
        say("not saved", "bad");
        fill(conflict, h("div", { class: "note bad" }, h("span", { class: "grow" }, error.message), button("Try again", () => put(wanted, version))));
        return;
      }
      const { theirs, caption_version: theirVersion } = error.content;
      say("changed elsewhere", "bad");
      fill(conflict, h(
        "div", { class: "note warn" },
        h("span", { class: "grow" }, "This caption was changed elsewhere: “", theirs, "”"),
        button("Keep mine", () => put(wanted, theirVersion)),
        button("Keep theirs", () => {
          Object.assign(image, { caption: theirs, caption_version: theirVersion, default_caption: false });
          if (editing) editing.value = theirs;
          fill(conflict);
          say("");
          draw();
        }),
      ));
    }
  }

  draw();
  return {
    node, edit, focus: () => text.focus(),
    update(found) { if (editing) Object.assign(image, { ...found, caption: image.caption, caption_version: image.caption_version }); else image = found; draw(); },
  };
}

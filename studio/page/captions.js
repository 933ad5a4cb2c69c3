// One row of a dataset: thumbnail, caption edited in place, marks.

import { api, debounced, path } from "./core.js";
import { button, fill, h, icon, toast, withTokens } from "./dom.js";

const WAIT = 500; // ms after the last key
const NEAR = 0.8; // of the limit of tokens, from where on the length is shown
const kept = new Map(); // "dataset/image": {text, version}, texts that the server does not have yet; also of screens that are gone
addEventListener("beforeunload", (event) => { if (kept.size) event.preventDefault(); });

/** Forgets the unsaved caption of an image that was removed. */
export function forget(dataset, image) { kept.delete(`${dataset}/${image}`); }

/** The row of an image. `on`: {select(name), next(step, edit), look(control), changed(), show()}. */
export function editor(image, state, on) {
  let editing = null; // the text field, while open
  let unsaved = null; // a text that the server does not have: {text, why: "failed"|"changed", version}
  let saving = Promise.resolve(), open = 0, savedAt = 0; // requests, one after the other
  const key = `${state.name}/${image.name}`;
  const text = h("div", { class: "caption", role: "button", tabindex: -1 });
  const mark = h("span", { class: "saved", role: "status" });
  const info = h("small", { class: "info" });
  const marks = h("div", { class: "marks" });
  const trouble = h("div", { class: "trouble" });
  const place = h("div", { class: "caption-place" }, text);
  const thumb = h("button", { type: "button", class: "thumb plate", tabindex: -1, "aria-label": `Show ${image.name}`, onclick: () => { text.focus({ preventScroll: true }); on.select(image.name, false); on.show(); } });
  const controls = h("div", { class: "before" }); // control images of a pair
  const node = h(
    "li", { class: "image-row", dataset: { image: image.name } },
    h("div", { class: "before-after" }, controls, icon("right"), thumb), h("div", { class: "image-text" }, place, trouble, marks, h("div", { class: "row between" }, info, mark)),
  );
  text.addEventListener("click", () => edit());
  text.addEventListener("focus", () => on.select(image.name, false));
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); edit(); }
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); on.next(event.key === "ArrowDown" ? 1 : -1); }
  });

  const current = () => unsaved?.text ?? (image.default_caption ? "" : image.caption);

  function drawText() {
    const shown = current();
    text.setAttribute("aria-label", `Caption of ${image.name}: ${shown || `${image.caption} default caption`}`);
    text.classList.toggle("default", !shown);
    fill(text, withTokens(shown || image.caption), !shown && h("small", null, " default caption"));
  }

  function draw() {
    small(thumb, image);
    const names = image.controls.join("\n");
    if (controls.dataset.names !== names) {
      controls.dataset.names = names;
      fill(controls, image.controls.map((name) => h("button", { type: "button", class: "thumb plate", tabindex: text.tabIndex, title: name, "aria-label": `Show control image ${name}`, onclick: () => on.look(name) })));
    }
    image.controls.forEach((name, index) => small(controls.children[index], state.find(name)));
    const { bucket, length } = image;
    const cut = bucket?.cut >= 0.005 ? `, cuts ${Math.round(100 * bucket.cut)} %` : "";
    info.textContent = [image.name, bucket && `→ ${bucket.width}×${bucket.height}${cut}`, image.caption_source && `caption from ${image.caption_source}`, length && length.tokens > NEAR * length.most && `${length.tokens} of ${length.most} tokens`].filter(Boolean).join(" · ");
    const long = length?.lost ? [{ kind: "warning", text: `longer than the limit of ${length.most} tokens; cut off from “${length.lost}”` }] : [];
    fill(marks, [...image.marks, ...long].map((each) => h("p", { class: each.kind === "problem" ? "mark bad" : "mark warn" }, icon("warning"), h("span", null, each.text))));
    if (!editing) drawText();
  }

  /** The thumbnail of an image in its button. */
  function small(place, one) {
    const url = one?.width && `${path("api/datasets", state.name, "thumbs")}/${encodeURIComponent(one.name)}?v=${encodeURIComponent(one.version)}`;
    if (!url) fill(place, icon("warning"));
    else if (place.firstChild?.getAttribute("src") !== url) fill(place, h("img", { loading: "lazy", decoding: "async", alt: "", src: url }));
  }

  function say(words, kind = "") {
    mark.className = `saved ${kind}`;
    fill(mark, kind === "good" && icon("check"), words);
  }

  function edit() {
    if (editing) return;
    on.select(image.name);
    const area = (editing = h("textarea", { rows: 1, maxlength: 20000, "aria-label": `Caption of ${image.name}` }));
    area.value = current();
    if (!area.value) area.placeholder = image.caption;
    const later = debounced(() => save(area.value), WAIT);
    const fit = () => { area.style.height = "auto"; area.style.height = `${area.scrollHeight + 2}px`; };
    const leave = () => {
      if (editing !== area) return;
      later.cancel();
      editing = null;
      ended.abort();
      save(area.value);
      fill(place, text);
      drawText();
    };
    const ended = new AbortController();
    state.signal.addEventListener("abort", leave, { signal: ended.signal });
    addEventListener("pagehide", () => { later.cancel(); save(area.value); }, { signal: ended.signal });
    area.addEventListener("input", () => { say("not saved yet"); later(); fit(); });
    area.addEventListener("blur", () => { if (document.hasFocus()) leave(); else { later.cancel(); save(area.value); } }); // another window: stay open
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); leave(); on.next(1, true); }
      else if (event.key === "Escape") { event.preventDefault(); event.stopPropagation(); leave(); text.focus(); }
      else if (event.altKey && (event.key === "ArrowDown" || event.key === "ArrowUp")) { event.preventDefault(); leave(); on.next(event.key === "ArrowDown" ? 1 : -1, true); }
    });
    fill(place, area);
    fit();
    area.focus({ preventScroll: true });
    area.setSelectionRange(area.value.length, area.value.length);
  }

  /** Saves a text if it differs; one request after the other, each with the version before. */
  function save(wanted) {
    if (unsaved) { // the notice below decides what is sent; it takes the newest text
      if (unsaved.text === wanted || unsaved.why === "changed") { unsaved.text = wanted; if (kept.has(key)) kept.get(key).text = wanted; return saving; }
    } else if (!open && wanted === current()) {
      if (mark.textContent === "not saved yet") say("saved", "good");
      return saving;
    }
    return put(wanted, null);
  }

  /** Sends a text, for the version that is known then or for a given one. */
  function put(wanted, version) {
    const entry = { text: wanted, version: version ?? (image.caption_version || "*") };
    const done = () => { if (kept.get(key) === entry) kept.delete(key); };
    kept.set(key, entry);
    const saved = () => {
      done();
      unsaved = null;
      savedAt = performance.now();
      fill(trouble);
      say("saved", "good");
      draw();
      on.changed(image);
    };
    const request = async () => {
      if (!unsaved && version === null && wanted === current()) { done(); say("saved", "good"); return; }
      say("saving");
      entry.version = version ?? (image.caption_version || "*");
      const url = `${path("api/datasets", state.name, "captions")}/${encodeURIComponent(image.name)}?${state.query}`;
      try {
        const found = await api("PUT", url, wanted, { headers: { "If-Match": entry.version }, keepalive: wanted.length < 15000 });
        Object.assign(image, found, { length: null, marks: [...found.marks, ...image.marks.filter((each) => !/caption|subject/.test(each.text) && !found.marks.some((one) => one.text === each.text))] });
        saved();
      } catch (error) {
        if (error.status === 412 && error.content.theirs.trim() === wanted.trim()) { take(error.content); saved(); return; } // by an earlier request
        if (error.status === 404) done(); // the image was removed
        else if (state.signal.aborted && kept.get(key) === entry) toast(`The caption of ${image.name} is not saved: ${error.message}. Open ${state.name} again.`, { bad: true });
        if (error.status === 412) changedElsewhere(wanted, error.content);
        else {
          unsaved = { text: wanted, why: "failed" };
          say("not saved", "bad");
          fill(trouble, h("div", { class: "note bad" }, icon("warning"), h("span", { class: "grow" }, error.message), button("Try again", () => put(editing?.value ?? unsaved.text, version), { kind: "small" })));
        }
        if (!editing) drawText();
      }
    };
    open += 1;
    // Without waiting where nothing is under way, so that a page that is closing still sends it.
    saving = (open === 1 ? request() : saving.then(request)).finally(() => { open -= 1; });
    return saving;
  }

  function take({ theirs, caption_version: version }) {
    Object.assign(image, { caption: theirs.trim() ? theirs : state.defaultCaption, caption_version: version, caption_source: null, default_caption: !theirs.trim() });
    savedAt = performance.now();
  }

  function changedElsewhere(wanted, { theirs, caption_version: version }) {
    unsaved = { text: wanted, why: "changed" };
    say("changed elsewhere", "bad");
    fill(trouble, h(
      "div", { class: "note warn" }, icon("warning"),
      h("div", { class: "grow stack tight" },
        h("span", null, "Someone changed this caption meanwhile. Now it is:"),
        h("q", { class: "theirs" }, theirs.trim() ? withTokens(theirs) : "(no caption)"),
        h("div", { class: "row" },
          button("Keep mine", () => put(editing?.value ?? unsaved.text, version), { kind: "small" }),
          button("Take theirs", () => {
            take({ theirs, caption_version: version });
            unsaved = null;
            kept.delete(key);
            if (editing) editing.value = current();
            fill(trouble);
            say("");
            draw();
          }, { kind: "small" }))),
    ));
  }

  const before = kept.get(key); // of an earlier screen
  if (before) {
    unsaved = { text: before.text, why: "failed" };
    image.caption_version = before.version;
  }
  draw();
  if (before) put(before.text, null);
  return {
    node, edit, text,
    get busy() { return Boolean(editing) || unsaved !== null || open > 0; },
    /** Takes what the server says now, except for a text that is being written, or was saved after `asked`. */
    update(found, asked = Infinity) {
      if (this.busy || asked < savedAt) for (const name of ["caption", "caption_version", "caption_source", "default_caption"]) found[name] = image[name];
      image = found;
      draw();
    },
  };
}

// Files into a dataset: dropped, chosen, sent four at a time.

import { api, count, path } from "./core.js";
import { button, dialog, fill, h } from "./dom.js";

const ARCHIVE = /\.(zip|tar|tar\.gz|tgz)$/i;
const CAPTION = /\.(txt|caption)$/i;
const AT_ONCE = 4;

/** Lets the browser's own dialog choose files. Resolves to a list. */
export function pickFiles({ folder = false, accept } = {}) {
  return new Promise((resolve) => {
    const input = h("input", { type: "file", multiple: true, webkitdirectory: folder, accept, hidden: true });
    input.addEventListener("change", () => { resolve([...input.files]); input.remove(); });
    input.addEventListener("cancel", () => { resolve([]); input.remove(); });
    document.body.append(input);
    input.click();
  });
}

/** Files and folders dropped anywhere on the page go to `take(files)`, until the signal. */
export function acceptDrops(take, signal) {
  const veil = h("div", { class: "drop-veil", hidden: true }, h("p", null, "Drop to add"));
  document.body.append(veil);
  signal.addEventListener("abort", () => veil.remove());
  let depth = 0;
  const has = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", (event) => { if (has(event)) { depth += 1; veil.hidden = false; } }, { signal });
  addEventListener("dragleave", (event) => { if (has(event)) { depth -= 1; veil.hidden = depth <= 0; } }, { signal });
  addEventListener("dragover", (event) => { if (has(event)) event.preventDefault(); }, { signal });
  addEventListener("drop", async (event) => {
    if (!has(event)) return;
    event.preventDefault();
    depth = 0;
    veil.hidden = true;
    const entries = [...event.dataTransfer.items].map((each) => each.webkitGetAsEntry?.()).filter(Boolean);
    const plain = [...event.dataTransfer.files];
    take(entries.some((each) => each.isDirectory) ? (await Promise.all(entries.map((each) => walk(each, "")))).flat() : plain);
  }, { signal });
}

async function walk(entry, folder) {
  if (entry.isFile) return [Object.assign(await new Promise((take, fail) => entry.file(take, fail)), { folder })];
  const reader = entry.createReader(), found = [];
  for (;;) { // a reader gives at most 100 at a time
    const more = await new Promise((take, fail) => reader.readEntries(take, fail));
    if (!more.length) break;
    found.push(...more);
  }
  return (await Promise.all(found.map((each) => walk(each, folder || entry.name)))).flat();
}

/** Sends files to a dataset, and shows the progress and each error in `place`. */
export async function send(dataset, files, place, signal) {
  const wanted = files.filter((each) => !each.name.startsWith(".") && each.name !== "Thumbs.db");
  const bar = h("div", null), text = h("span", { class: "grow" }), problems = h("ul", { class: "problems" });
  const close = button("", () => { place.hidden = true; }, { kind: "quiet", iconName: "close", label: "Close", hidden: true });
  fill(place, h("div", { class: "card stack tight" }, h("div", { class: "row" }, text, close), h("div", { class: "progress" }, bar), problems));
  place.hidden = false;
  let done = 0, failed = 0;
  const tell = () => {
    text.textContent = done < wanted.length ? `Adding ${done + 1} of ${wanted.length}` : `${count(wanted.length - failed, "file")} added${failed ? `, ${failed} refused` : ""}`;
    bar.style.width = `${(100 * done) / Math.max(1, wanted.length)}%`;
  };
  tell();
  const fail = (file, error) => { failed += 1; problems.append(h("li", { class: "error" }, h("strong", null, file.name), ` ${error.message}`)); };
  const exists = [];
  const each = async (queue, replace) => {
    for (let file = queue.shift(); file && !signal.aborted; file = queue.shift()) {
      try { await one(dataset, file, replace, signal); }
      catch (error) {
        if (error.name === "AbortError") return;
        if (error.status === 409 && !replace) exists.push(file);
        else fail(file, error);
      }
      done += 1;
      tell();
    }
  };
  // Captions after their images.
  for (const part of [wanted.filter((file) => !CAPTION.test(file.name)), wanted.filter((file) => CAPTION.test(file.name))]) {
    const queue = [...part];
    await Promise.all(Array.from({ length: AT_ONCE }, () => each(queue, false)));
  }
  if (exists.length && !signal.aborted) {
    const names = exists.slice(0, 8).map((file) => file.name).join(", ") + (exists.length > 8 ? ", …" : "");
    if (await dialog(`${count(exists.length, "file")} of the same name`, h("p", null, `The dataset already has ${names}.`), [["Keep the old ones", null], ["Replace", true, "primary"]])) {
      done -= exists.length;
      await each([...exists], true);
    }
  }
  if (!failed) setTimeout(() => { place.hidden = true; }, 2500);
  close.hidden = false;
}

async function one(dataset, file, replace, signal) {
  const to = (kind, name) => `${path("api/datasets", dataset, kind)}/${encodeURIComponent(name)}`;
  if (ARCHIVE.test(file.name)) {
    const { task } = await api("PUT", to("archives", file.name), file, { signal });
    await finished(task, signal);
  } else if (CAPTION.test(file.name)) {
    const { images } = await api("GET", path("api/datasets", dataset), undefined, { signal });
    const stem = file.name.replace(/\.[^.]+$/, "");
    const image = images.find((each) => each.name.replace(/\.[^.]+$/, "") === stem);
    if (!image) throw new Error(`belongs to no image; a caption has its image's name, as ${stem}.jpg`);
    await api("PUT", to("captions", image.name), await file.text(), { headers: { "If-Match": "*" }, signal });
  } else await api("PUT", `${to("images", file.name)}${replace ? "?replace=1" : ""}`, file, { signal });
}

/** Waits for a task of the server. */
async function finished(id, signal) {
  for (;;) {
    const { tasks } = await api("GET", "/api/status", undefined, { signal });
    const task = tasks.find((each) => each.id === id);
    if (!task || task.state === "done") return;
    if (task.error || task.state === "failed" || task.state === "canceled") throw new Error(task.error ?? task.state);
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
}

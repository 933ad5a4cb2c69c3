// Files into a dataset: dropped, chosen, sent four at a time. Sending goes on when the screen changes.

import { api, ApiError, bytes, count, path } from "./core.js";
import { closer, dialog, fill, h, icon } from "./dom.js";

const ARCHIVE = /\.(zip|tar|tar\.gz|tgz)$/i;
const CAPTION = /\.txt$/i;
const IGNORED = /^(\.|Thumbs\.db$|desktop\.ini$)/i;
const AT_ONCE = 4;

/** Told of a dataset's name when files came into it. */
export const arrivals = new EventTarget();

/** Lets the browser's own dialog choose files. Resolves to a list. */
export function pickFiles({ folder = false, accept, multiple = true } = {}) {
  return new Promise((resolve) => {
    const input = h("input", { type: "file", multiple, webkitdirectory: folder, accept, hidden: true });
    input.addEventListener("change", () => { resolve([...input.files]); input.remove(); });
    input.addEventListener("cancel", () => { resolve([]); input.remove(); });
    document.body.append(input);
    input.click();
  });
}

/** Files and folders dropped anywhere on the page go to `take(files)`, until the signal. */
export function acceptDrops(take, signal, words = "Drop to add") {
  const veil = h("div", { class: "drop-veil", hidden: true }, h("p", null, icon("upload"), words));
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
    const found = entries.some((each) => each.isDirectory) ? (await Promise.all(entries.map((each) => walk(each, "")))).flat() : plain;
    if (found.length) take(found);
  }, { signal });
}

async function walk(entry, folder) {
  if (entry.name.startsWith(".")) return []; // hidden, such as this page's own thumbnails
  if (entry.isFile) return [Object.assign(await new Promise((take, fail) => entry.file(take, fail)), { folder })];
  const reader = entry.createReader(), found = [];
  for (;;) { // a reader gives at most 100 at a time
    const more = await new Promise((take, fail) => reader.readEntries(take, fail));
    if (!more.length) break;
    found.push(...more);
  }
  return (await Promise.all(found.map((each) => walk(each, folder || entry.name)))).flat();
}

/** Sends a file; `progress(bytes)`. XMLHttpRequest, because fetch tells nothing of what was sent. */
export function put(url, body, { progress = () => {}, headers = {} } = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", url);
    for (const [name, value] of Object.entries({ "X-Studio": "1", ...headers })) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => progress(event.loaded));
    request.addEventListener("load", () => {
      let content = {};
      try { content = JSON.parse(request.responseText); } catch { /* not from the studio */ }
      if (request.status >= 200 && request.status < 300) resolve(content);
      else reject(new ApiError(request.status, content));
    });
    request.addEventListener("error", () => reject(new ApiError(0, { error: "the connection was lost", what_to_do: "add the file again" })));
    request.send(body);
  });
}

/** Sends files to a dataset, and shows the progress and each error in a panel. */
export async function send(dataset, files) {
  const hidden = (each) => IGNORED.test(each.name) || (each.webkitRelativePath || "").split("/").some((part) => part.startsWith("."));
  const wanted = files.filter((each) => !hidden(each));
  if (!wanted.length) return;
  const panel = new Panel(dataset, wanted);
  const stay = (event) => event.preventDefault();
  addEventListener("beforeunload", stay);
  let told = 0;
  const tell = (now) => {
    if (!now && Date.now() - told < 1500) return;
    told = Date.now();
    arrivals.dispatchEvent(new CustomEvent("arrived", { detail: dataset }));
  };
  const exists = [];
  const work = async (queue, replace) => {
    for (let file = queue.shift(); file; file = queue.shift()) {
      const row = panel.row(file);
      try { await one(dataset, file, replace, row); row.done(); }
      catch (error) {
        if ([409, 412].includes(error.status) && !replace && !ARCHIVE.test(file.name)) { exists.push(file); row.done(false); }
        else row.fail(error.message);
      }
      tell(false);
    }
  };
  const all = async (list, replace) => {
    // Captions after their images.
    for (const part of [list.filter((file) => !CAPTION.test(file.name)), list.filter((file) => CAPTION.test(file.name))]) {
      const queue = [...part];
      await Promise.all(Array.from({ length: AT_ONCE }, () => work(queue, replace)));
    }
  };
  await all(wanted, false);
  tell(true);
  if (exists.length) {
    const names = exists.map((file) => file.name).sort().slice(0, 8).join(", ") + (exists.length > 8 ? ", …" : "");
    const words = `${dataset} has ${names} already. The old ones go to the trash.`;
    if (await dialog(`${count(exists.length, "file")} of the same name`, h("p", null, words), [["Keep the old ones", null], ["Replace", true, "primary"]])) {
      await all(exists, true);
      tell(true);
    } else panel.kept = exists.length;
  }
  removeEventListener("beforeunload", stay);
  panel.end();
}

async function one(dataset, file, replace, row) {
  const to = (kind) => `${path("api/datasets", dataset, kind)}/${encodeURIComponent(file.name)}`;
  if (CAPTION.test(file.name)) {
    const text = await file.text();
    await put(to("captions"), text, { headers: { "If-Match": replace ? "*" : "none" } }).catch((error) => {
      if (error.status !== 412 || error.content.theirs !== text) throw error;
    });
    return;
  }
  if (!ARCHIVE.test(file.name)) { await put(`${to("images")}${replace ? "?replace=1" : ""}`, file, row); return; }
  const { task } = await put(to("archives"), file, row);
  for (;;) {
    const { tasks } = await api("GET", "/api/status");
    const found = tasks.find((each) => each.id === task);
    if (!found || found.state === "done") return;
    if (found.error || ["failed", "canceled"].includes(found.state)) throw new Error(found.error ?? found.state);
    row.say(found.of ? `checking ${found.done} of ${found.of}` : "unpacking");
    await new Promise((resolve) => setTimeout(resolve, 400));
  }
}

class Panel {
  constructor(dataset, files) {
    Object.assign(this, { dataset, total: files.length, finished: 0, failed: 0, kept: 0, sent: 0 });
    this.size = files.reduce((sum, each) => sum + each.size, 0);
    this.bar = h("div", null);
    this.text = h("strong", { class: "grow ellipsis", role: "status" });
    this.list = h("ul", { class: "plain-list upload-rows" });
    this.close = closer(() => this.node.remove(), { hidden: true });
    this.node = h("section", { class: "uploads card", "aria-label": `Adding to ${dataset}` }, h("div", { class: "row nowrap-row" }, this.text, this.close), h("div", { class: "progress" }, this.bar), this.list);
    document.querySelector(".uploads")?.remove();
    document.body.append(this.node);
    this.draw();
  }

  draw() {
    this.text.textContent = `Adding ${Math.min(this.total, this.finished + 1)} of ${this.total} to ${this.dataset}`;
    this.bar.style.width = `${Math.min(100, (100 * this.sent) / Math.max(1, this.size))}%`;
  }

  /** The line of a file while it is sent; it stays if it fails. */
  row(file) {
    const words = h("small", null, bytes(file.size));
    const line = h("li", { class: "upload-row" }, h("span", { class: "ellipsis" }, file.name), words);
    this.list.append(line);
    let sent = 0;
    const progress = (now) => { this.sent += Math.min(now, file.size) - sent; sent = Math.min(now, file.size); if (file.size > 3e6) words.textContent = `${Math.round((100 * sent) / file.size)} % of ${bytes(file.size)}`; this.draw(); };
    const ended = () => { progress(file.size); this.finished += 1; this.draw(); };
    return {
      progress, say: (text) => { words.textContent = text; },
      done: (counts = true) => { ended(); if (!counts) this.finished -= 1; line.remove(); },
      fail: (text) => { ended(); this.failed += 1; line.classList.add("failed"); fill(line, icon("warning"), h("div", { class: "grow" }, h("strong", null, file.name), h("p", { class: "error" }, text))); this.list.prepend(line); },
    };
  }

  end() {
    const added = this.total - this.failed - this.kept;
    this.text.textContent = [`${count(added, "file")} added to ${this.dataset}`, this.failed && `${this.failed} refused`, this.kept && `${this.kept} kept as they were`].filter(Boolean).join(", ");
    this.bar.style.width = "100%";
    this.close.hidden = false;
    if (!this.failed) setTimeout(() => this.node.remove(), 4000);
  }
}

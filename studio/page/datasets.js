// Datasets: the list, and one dataset with its images and captions.

import { api, bytes, count, onStatus, path, schema, stored } from "./core.js";
import { button, dialog, empty, field, fill, h, heading, icon, linkButton, menu, toast } from "./dom.js";
import { editor } from "./captions.js";
import { inspector } from "./inspector.js";
import { keys, title } from "./main.js";
import { acceptDrops, pickFiles, send } from "./uploads.js";

/** Shows the list of datasets, or the one that the address names. */
export async function show(root, parts, signal) {
  if (parts.length) await showOne(root, parts[0], signal);
  else await showList(root, signal);
}

export const tokenOf = (name) => stored.get(`token ${name}`, "<zwx>");

// ---- The list ----------------------------------------------------------------------------------

async function showList(root, signal) {
  const area = h("div", null);
  const drop = (files) => create(files, signal);
  fill(root, heading("Datasets", button("New dataset", () => create([], signal), { kind: "primary", iconName: "plus" })), area);
  acceptDrops(drop, signal);
  const { datasets } = await api("GET", "/api/datasets", undefined, { signal });
  if (!datasets.length) {
    fill(area, empty(
      "image", "Start with a few images of one subject",
      "Drop 5 to 30 images of a person, a pet, a thing or a style anywhere on this page. A folder or a zip is fine too, with captions in text files of the same names.",
      button("Choose images", async () => drop(await pickFiles()), { kind: "primary", iconName: "upload" }),
      button("Choose a folder", async () => drop(await pickFiles({ folder: true }))),
    ));
    return;
  }
  fill(area, h("div", { class: "cards" }, datasets.map(card)));
}

function card(each) {
  const problems = each.problems ? h("span", { class: "badge bad" }, icon("warning"), count(each.problems, "problem")) : null;
  return h(
    "a", { class: "card link", href: `#/datasets/${encodeURIComponent(each.name)}` },
    h("div", { class: "plate wide-plate" }, each.thumb ? h("img", { src: `${path("api/datasets", each.name, "thumbs")}/${encodeURIComponent(each.thumb)}`, alt: "", loading: "lazy" }) : icon("image")),
    h("div", { class: "text" }, h("h2", { class: "ellipsis" }, each.name), h("div", { class: "row" }, h("small", null, `${count(each.images, "image")} · ${count(each.captions, "caption")} · ${bytes(each.bytes)}`), problems)),
  );
}

/** Asks for a name, makes the dataset, and puts the files into it. */
async function create(files, signal) {
  const guess = files[0]?.webkitRelativePath?.split("/")[0] || files[0]?.folder || (files.length === 1 ? files[0].name.replace(/\.[^.]+$/, "") : "");
  const input = h("input", { value: guess, maxlength: 100, placeholder: "my-dog", autofocus: true });
  const body = h("form", { onsubmit: (event) => { event.preventDefault(); event.target.closest("dialog").querySelector("footer .primary").click(); } }, field("dataset-name", "Name", input, { help: "Letters, digits, - and _ work everywhere." }));
  const answer = await dialog(files.length ? `New dataset from ${count(files.length, "file")}` : "New dataset", body, [["Cancel", null], ["Create", "create", "primary"]]);
  if (!answer || signal.aborted) return;
  const name = input.value.trim();
  try {
    await api("POST", "/api/datasets", { name });
  } catch (error) { toast(error.message, { bad: true }); return; }
  pending = files;
  location.hash = `#/datasets/${encodeURIComponent(name)}`;
}
let pending = [];

// ---- One dataset -------------------------------------------------------------------------------

async function showOne(root, name, signal) {
  title(name);
  const state = { name, images: [], selected: null, filter: "", signal, base: "", resolution: "", token: tokenOf(name) };
  const list = h("ul", { class: "images", "aria-label": "Images and captions" });
  const summary = h("p", { class: "dim grow", role: "status" });
  const side = h("aside", { class: "side", "aria-label": "Selected image" });
  const uploads = h("div", { class: "uploads", hidden: true });
  const search = h("input", { type: "search", placeholder: "Filter by caption or name", "aria-label": "Filter images", oninput: () => { state.filter = search.value.toLowerCase(); draw(); } });
  const problems = h("div", { class: "stack tight" });
  const rows = new Map(); // by the image's name; kept, so that a text under the cursor never disappears

  const add = async (files) => { if (files.length) { await send(name, files, uploads, signal); await load(); } };
  const url = (suffix, more = "") => `${path("api/datasets", name)}${suffix}${more}`;
  fill(
    root,
    h("nav", { class: "crumbs", "aria-label": "Breadcrumb" }, h("a", { href: "#/datasets" }, "Datasets")),
    heading(
      name,
      menu("Add", [
        { text: "Images and captions", detail: "files, also a zip or tar", onclick: async () => add(await pickFiles()) },
        { text: "A folder", onclick: async () => add(await pickFiles({ folder: true })) },
      ], { iconName: "plus" }),
      menu("Edit", [
        { text: "Find and replace", detail: "in all captions, with a preview", onclick: () => replaceAll() },
        { text: "The token of this subject", detail: state.token, onclick: () => changeToken() },
        null,
        { text: "Rename", onclick: () => rename() },
        { text: "Download as zip", onclick: () => { location.href = url(".zip"); } },
        { text: "Delete", danger: true, onclick: () => removeAll() },
      ], { iconName: "edit" }),
      linkButton("Train", `#/train/${encodeURIComponent(name)}`, { kind: "primary", iconName: "play" }),
    ),
    uploads, problems,
    h("div", { class: "split" }, h("section", { class: "stack" }, h("div", { class: "row toolbar" }, summary, h("div", { class: "search" }, search)), list), side),
  );
  acceptDrops(add, signal);

  state.view = inspector(side, state, { load: () => load(), remove: (each) => remove(each), replaced: () => load() });

  async function load() {
    state.base ||= stored.get("train draft")?.settings?.base_model ?? "auto";
    if (state.base === "auto") state.base = (await schema()).automatic;
    const query = new URLSearchParams({ token: state.token, base: state.base });
    if (state.resolution) query.set("resolution", state.resolution);
    const found = await api("GET", `${url("")}?${query}`, undefined, { signal });
    state.images = found.images;
    state.general = found.problems.filter((each) => !each.image);
    draw();
  }

  function draw() {
    const order = (each) => (each.marks.some((mark) => mark.kind === "problem") ? 0 : 1);
    const shown = state.images.filter((each) => !state.filter || `${each.name} ${each.caption}`.toLowerCase().includes(state.filter)).sort((a, b) => order(a) - order(b));
    const captions = state.images.filter((each) => !each.default_caption).length;
    const marked = state.images.filter((each) => order(each) === 0).length;
    summary.textContent = `${count(state.images.length, "image")} · ${count(captions, "caption")}${marked ? ` · ${count(marked, "problem")}, shown first` : ""}${state.filter ? ` · ${shown.length} shown` : ""}`;
    fill(problems, state.general.map((each) => h("p", { class: "note warn" }, icon("warning"), each.text)));
    if (!state.images.length) {
      fill(list, h("li", { class: "plain" }, empty("upload", "Drop images here", "5 to 30 images of one subject, from different sides and in different light. PNG, JPEG or WebP; captions as text files of the same names, or written here.", button("Choose images", async () => add(await pickFiles()), { kind: "primary" }))));
      state.view.draw(null);
      return;
    }
    const wanted = shown.map((each) => {
      let row = rows.get(each.name);
      if (!row) {
        row = editor(each, state, { select, next, changed: () => state.view.drawText() });
        rows.set(each.name, row);
      } else row.update(each);
      return row.node;
    });
    const same = wanted.length === list.children.length && wanted.every((node, index) => node === list.children[index]);
    if (!same) list.replaceChildren(...wanted);
    const still = shown.find((each) => each.name === state.selected) ?? shown[0];
    if (still) select(still.name, false);
  }

  function select(image, scroll = true) {
    state.selected = image;
    for (const [key, row] of rows) row.node.toggleAttribute("data-selected", key === image);
    if (scroll) rows.get(image)?.node.scrollIntoView({ block: "nearest" });
    state.view.draw(state.images.find((each) => each.name === image));
  }

  /** Selects the image `step` rows further; `edit`: and opens its caption. */
  function next(step, edit = false) {
    const nodes = [...list.children];
    const now = nodes.findIndex((node) => node.dataset.image === state.selected);
    const target = nodes[Math.max(0, Math.min(nodes.length - 1, now + step))];
    if (!target?.dataset.image) return;
    select(target.dataset.image);
    if (edit && target === nodes[now]) return;
    if (edit) rows.get(target.dataset.image).edit();
    else rows.get(target.dataset.image).focus();
  }

  async function remove(each) {
    const { trash } = await api("DELETE", url(`/images/${encodeURIComponent(each.name)}`));
    await load();
    toast(`${each.name} removed`, { action: ["Undo", async () => { await api("POST", path("api/trash", trash, "restore")); await load(); }] });
  }

  async function removeAll() {
    const { trash } = await api("DELETE", url(""));
    location.hash = "#/datasets";
    toast(`${name} deleted`, { action: ["Undo", async () => { await api("POST", path("api/trash", trash, "restore")); location.hash = `#/datasets/${encodeURIComponent(name)}`; }] });
  }

  async function rename() {
    const input = h("input", { value: name, maxlength: 100 });
    if (!(await dialog("Rename", field("new-name", "New name", input), [["Cancel", null], ["Rename", true, "primary"]]))) return;
    try {
      await api("PATCH", url(""), { name: input.value.trim() });
      location.hash = `#/datasets/${encodeURIComponent(input.value.trim())}`;
    } catch (error) { toast(error.message, { bad: true }); }
  }

  async function changeToken() {
    const input = h("input", { value: state.token, maxlength: 64 });
    const help = "The made-up word that stands for the subject in prompts. Write TOK in captions; it becomes this token.";
    if (!(await dialog("Token", field("token", "Token", input, { help }), [["Cancel", null], ["Use it", true, "primary"]]))) return;
    state.token = input.value.trim() || "<zwx>";
    stored.set(`token ${name}`, state.token);
    await load();
  }

  async function replaceAll() {
    const find = h("input", null), into = h("input", null);
    const regex = h("input", { type: "checkbox" }), word = h("input", { type: "checkbox" });
    const result = h("div", { class: "changes", role: "status" }, h("p", { class: "dim" }, "Every change is shown here before anything is written."));
    const given = () => ({ find: find.value, with: into.value, regex: regex.checked, word: word.checked, names: null });
    let asked = 0;
    const preview = async () => {
      const mine = (asked += 1);
      if (!find.value) return;
      try {
        const { changes } = await api("POST", url("/replace"), { ...given(), dry_run: true });
        if (mine !== asked) return;
        fill(result, h("p", { class: "dim" }, changes.length ? `${count(changes.length, "caption")} would change` : "No caption contains this text."), changes.slice(0, 100).map((each) => h("div", { class: "change" }, h("small", null, each.image), h("del", null, each.before), h("ins", null, each.after))));
      } catch (error) { fill(result, h("p", { class: "error" }, error.message)); }
    };
    for (const each of [find, into, regex, word]) each.addEventListener("input", preview);
    const body = h("div", { class: "stack" }, field("find", "Find", find), field("with", "Replace with", into), h("div", { class: "row" }, h("label", { class: "row" }, word, "Whole words"), h("label", { class: "row" }, regex, "Regular expression")), result);
    if (!(await dialog("Find and replace in captions", body, [["Cancel", null], ["Replace all", true, "primary"]], { wide: true })) || !find.value) return;
    try {
      const { changes, undo } = await api("POST", url("/replace"), { ...given(), dry_run: false });
      await load();
      toast(`${count(changes.length, "caption")} changed`, undo && { action: ["Undo", async () => { await api("POST", url("/undo"), { undo }); await load(); }] });
    } catch (error) { toast(error.message, { bad: true }); }
  }

  keys.screen = [["↑ ↓", "Image before, next"], ["Enter", "Edit the caption"], ["Ctrl Enter", "Save, and edit the next"], ["Delete", "Remove the image"]];
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, textarea, select, dialog, .menu, button, a") || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); next(event.key === "ArrowDown" ? 1 : -1); }
    else if (event.key === "Enter" && rows.has(state.selected)) { event.preventDefault(); rows.get(state.selected).edit(); }
    else if (event.key === "Delete" && state.selected) remove(state.images.find((each) => each.name === state.selected));
  }, { signal });

  let before = null; // the states of the server's tasks: an archive is unpacked, images are checked
  onStatus((status) => {
    const mine = status.tasks.filter((task) => task.name.startsWith(name));
    const ended = (task) => ["done", "failed"].includes(task.state);
    if (before && mine.some((task) => ended(task) && !before.has(task.id))) load();
    before = new Set(mine.filter(ended).map((task) => task.id));
  }, signal);
  await load();
  const waiting = pending;
  pending = [];
  await add(waiting);
}

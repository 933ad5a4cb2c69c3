// Datasets: the list; what is done with a dataset as a whole.

import { api, ago, bytes, count, onStatus, path, stored } from "./core.js";
import { button, empty, field, fill, h, heading, icon, menu, toast } from "./dom.js";
import { ask } from "./asking.js";
import { showOne } from "./dataset.js";
import { acceptDrops, pickFiles, send } from "./uploads.js";

const WHAT = "Drop 5 to 30 images of a person, a pet, a thing or a style anywhere on this page. A folder or a zip is fine too, with captions in text files of the same names.";

/** Shows the list of datasets, or the one that the address names. */
export async function show(root, parts, signal) {
  if (parts.length) await showOne(root, parts[0], signal);
  else await showList(root, signal);
}

/** The token of a dataset's subject, as last used here. */
export const tokenOf = (name) => stored.get(`token ${name}`, "<zwx>");
const address = (name) => `#/datasets/${encodeURIComponent(name)}`;

async function showList(root, signal) {
  const area = h("div", null);
  const drop = (files) => create(files, signal);
  fill(root, heading("Datasets", button("New dataset", () => create([], signal), { kind: "primary", iconName: "plus" })), area);
  acceptDrops(drop, signal, "Drop to make a dataset");

  async function load() {
    const { datasets } = await api("GET", "/api/datasets", undefined, { signal });
    if (datasets.length) fill(area, h("ul", { class: "cards plain-list" }, datasets.map((each) => h("li", null, card(each, load)))));
    else {
      fill(area, empty(
        "image", "Start with a few images of one subject", WHAT,
        button("Choose images", async () => drop(await pickFiles()), { kind: "primary", iconName: "upload" }),
        button("Choose a folder", async () => drop(await pickFiles({ folder: true }))),
      ));
    }
  }

  let ended = null; // tasks of the server: an archive is unpacked, images are checked
  onStatus((status) => {
    const now = status.tasks.filter((each) => ["done", "failed", "canceled"].includes(each.state)).map((each) => each.id).join();
    if (ended !== null && now !== ended) load().catch(() => {});
    ended = now;
  }, signal);
  await load();
}

function card(each, load) {
  const preview = each.thumb ? h("img", { src: `${path("api/datasets", each.name, "thumbs")}/${encodeURIComponent(each.thumb)}?v=${each.changed}`, alt: "", loading: "lazy" }) : icon("image");
  if (each.thumb) preview.addEventListener("error", () => preview.replaceWith(icon("image")));
  const without = each.images - each.captions;
  const state = each.problems ? h("span", { class: "badge bad" }, icon("warning"), count(each.problems, "problem"))
    : !each.images ? h("span", { class: "badge" }, "empty") : without > 0 ? h("span", { class: "badge" }, `${without.toLocaleString("en")} without caption`) : null;
  return h(
    "article", { class: "card link dataset" },
    h("a", { href: address(each.name), "aria-label": `${each.name}, ${count(each.images, "image")}` }, h("div", { class: "plate wide-plate" }, preview)),
    h("div", { class: "text" },
      h("div", { class: "row nowrap-row" },
        h("h2", { class: "ellipsis grow" }, h("a", { href: address(each.name), tabindex: -1 }, each.name)),
        menu("", [
          { text: "Train", onclick: () => { location.hash = `#/train/${encodeURIComponent(each.name)}`; }, disabled: !each.images },
          { text: "Rename", onclick: async () => { if (await rename(each.name)) await load(); } },
          { text: "Download as zip", onclick: () => { location.href = path("api/datasets", each.name, "zip"); } },
          null,
          { text: "Delete", danger: true, onclick: () => removeDataset(each.name, load) },
        ], { kind: "quiet", iconName: "more", label: `More about ${each.name}` })),
      h("small", null, `${count(each.images, "image")} · ${bytes(each.bytes)}`),
      h("div", { class: "row between card-foot" }, state ?? h("span", { class: "badge good" }, icon("check"), "captions"), h("small", null, each.changed > 1e9 ? ago(each.changed) : ""))),
  );
}

// ---- What is done with a whole dataset ---------------------------------------------------------

/** Asks for a name, makes the dataset, and puts the files into it. */
async function create(files, signal) {
  const guess = files[0]?.webkitRelativePath?.split("/")[0] || files[0]?.folder || (files.length === 1 ? files[0].name.replace(/(\.tar)?\.[^.]+$/, "") : "");
  const input = h("input", { value: guess, maxlength: 100, placeholder: "my-dog", required: true, autocomplete: "off" });
  const name = await ask(
    files.length ? `New dataset from ${count(files.length, "file")}` : "New dataset",
    field("name", "Name", input, { help: "For you; the model never sees it." }), "Create",
    async () => (await api("POST", "/api/datasets", { name: input.value.trim() })).name,
  );
  if (!name) return;
  if (!signal.aborted) location.hash = address(name);
  if (files.length) await send(name, files);
}

/** Asks for the new name. Resolves to it, or to null. */
export function rename(name) {
  const input = h("input", { value: name, maxlength: 100, required: true, autocomplete: "off" });
  return ask("Rename the dataset", field("name", "New name", input), "Rename", async () => {
    const found = (await api("PATCH", path("api/datasets", name), { name: input.value.trim() })).name;
    stored.set(`token ${found}`, tokenOf(name));
    return found;
  });
}

/** Moves a dataset to the trash; the message offers to bring it back. */
export async function removeDataset(name, after, undone = after) {
  try {
    const { trash } = await api("DELETE", path("api/datasets", name));
    toast(`${name} deleted`, { action: ["Undo", () => restore(trash, undone)] });
    await after();
  } catch (error) { toast(error.message, { bad: true }); }
}

/** Brings something back from the trash. */
export async function restore(trash, after) {
  try {
    await api("POST", path("api/trash", trash, "restore"));
    await after();
  } catch (error) { if (error.name !== "AbortError") toast(error.message, { bad: true }); }
}

// Weights: all LoRAs that are here, and one of them from inside.

import { ago, api, bytes, live, onStatus, path, schema } from "./core.js";
import { button, closer, empty, fill, h, heading, icon, linkButton, menu, toast } from "./dom.js";
import { showWeights } from "./inspect.js";
import { baseName, runTitle, versionOf } from "./names.js";
import { acceptDrops, pickFiles } from "./uploads.js";

const CHECKED = { passed: ["good", "checks passed"], warnings: ["warn", "passed, doubtful"], failed: ["bad", "checks failed"] };
const KINDS = { final: "final", checkpoint: "checkpoint", saved: "saved by hand", upload: "upload" };
const ACCEPT = ".zip,.tar,.safetensors";

/** Shows the list, or the weights that the address names. */
export async function show(root, parts, signal) {
  if (parts.length) await showWeights(root, parts.join("/"), signal);
  else await showList(root, signal);
}

export const generateLink = (id) => `#/generate/${encodeURIComponent(id)}`;
export const checkedBadge = (each) => each.checked && h("span", { class: `badge ${CHECKED[each.checked][0]}` }, icon(each.checked === "passed" ? "check" : "warning"), CHECKED[each.checked][1]);
export const titleOf = (each) => (each.run ? runTitle(each.run) : each.name);

/** What can be downloaded of weights. */
export function downloads(each, options = {}) {
  const start = (kind) => { const link = h("a", { href: `${path("api/weights", each.id, "download")}?as=${kind}`, download: "" }); link.click(); };
  const plain = each.name.endsWith(".safetensors");
  return menu("Download", [
    { text: plain ? "The file" : "Everything", detail: plain ? bytes(each.bytes) : `zip with LoRA, token and settings, ${bytes(each.bytes)}`, onclick: () => start("zip") },
    !plain && { text: "Only the LoRA", detail: "safetensors, for ComfyUI and diffusers", onclick: () => start("lora") },
    !plain && each.tokens.length > 0 && { text: "Only the token", detail: `${each.tokens[0]}, an embedding for ComfyUI`, onclick: () => start("token") },
  ].filter(Boolean), { iconName: "download", ...options });
}

async function showList(root, signal) {
  const uploads = h("div", { class: "stack tight", role: "status" }), area = h("div", null);
  const choose = async () => add(await pickFiles({ accept: ACCEPT }));
  const search = h("input", { type: "search", placeholder: "Filter by name, token, base", "aria-label": "Filter weights", oninput: () => draw() });
  const searchPlace = h("div", { class: "weights-search", hidden: true }, search);
  fill(root, heading("Weights", searchPlace, button("Upload a LoRA", choose, { iconName: "upload" })), uploads, area);
  acceptDrops((files) => add(files), signal);
  let rows = [];
  const { bases } = await schema();

  async function load() {
    ({ weights: rows } = await api("GET", "/api/weights", undefined, { signal }));
    draw();
  }

  async function add(files) {
    for (const file of files) {
      const line = h("p", { class: "note" }, h("span", { class: "dot running" }), `${file.name} is uploaded and checked`);
      uploads.append(line);
      try {
        await api("PUT", path("api/weights", file.name), file);
        line.remove();
        toast(`${file.name} added`);
      } catch (error) {
        const text = error.message.startsWith(file.name) ? error.message : `${file.name}: ${error.message}`;
        if (signal.aborted) { toast(text, { bad: true }); continue; }
        line.className = "note bad";
        fill(line, icon("warning"), h("span", { class: "grow" }, text), closer(() => line.remove(), { kind: "quiet small" }));
      }
    }
    if (!signal.aborted) await load();
  }

  async function remove(each) {
    try {
      const { trash } = await api("DELETE", path("api/weights", each.id));
      await load();
      toast(`${each.name} moved to the trash`, { action: ["Undo", async () => { await api("POST", path("api/trash", trash, "restore")); load(); }] });
    } catch (error) { toast(error.message, { bad: true }); }
  }

  function line(each) {
    const step = ["checkpoint", "saved"].includes(each.kind);
    const hasReport = each.kind === "final" && live.status?.runs.find((run) => run.id === each.run)?.report;
    const more = [hasReport && { text: "Report", onclick: () => open(path("api/runs", each.run, "report"), "_blank", "noopener") }, each.run && { text: "The run", onclick: () => { location.hash = `#/runs/${encodeURIComponent(each.run)}`; } }, each.kind === "upload" && { text: "Delete", danger: true, onclick: () => remove(each) }].filter(Boolean);
    const facts = [!step && baseName(bases, each.base_model), !step && each.rank && `rank ${each.rank}`, bytes(each.bytes), ago(each.created)].filter(Boolean).join(" · ");
    const name = step ? versionOf(each) : titleOf(each);
    return h("li", { class: `weights-row ${step ? "version" : ""}` },
      h("div", { class: "grow stack tight" },
        h("div", { class: "row tight" }, h("a", { class: "weights-name", href: `#/weights/${encodeURIComponent(each.id)}`, "aria-label": step ? `${titleOf(each)}, ${name}` : null }, name), !step && h("span", { class: "badge" }, KINDS[each.kind]), each.kind === "saved" && h("span", { class: "badge" }, KINDS.saved), !step && each.tokens.map((token) => h("span", { class: "token" }, token)), !step && checkedBadge(each)),
        h("small", { class: "dim" }, facts)),
      h("div", { class: "row tight" }, linkButton("Generate", generateLink(each.id), { kind: step ? "small quiet" : "", iconName: "image", "aria-label": `Generate with ${titleOf(each)}, ${versionOf(each) || "upload"}` }), downloads(each, step ? { kind: "small quiet" } : {}), menu("", more, { iconName: "more", label: "More", kind: step ? "small quiet" : "quiet" })));
  }

  function draw() {
    searchPlace.hidden = rows.length < 6;
    if (!rows.length) {
      fill(area, empty("save", "No weights yet", "A finished training puts its LoRA here, and every checkpoint. A LoRA of someone else can be uploaded: a .zip of this program, or a .safetensors file. Drop it anywhere on this page.", button("Upload a LoRA", choose, { iconName: "upload" }), linkButton("Train one", "#/train", { kind: "primary" })));
      return;
    }
    const word = search.value.trim().toLowerCase();
    const shown = rows.filter((each) => !word || [titleOf(each), each.name, ...each.tokens, each.base_model].join(" ").toLowerCase().includes(word));
    const groups = new Map(); // a run's weights together: the final ones, then its steps
    for (const each of shown) {
      const key = each.run ?? each.id;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(each);
    }
    fill(area, shown.length ? h("div", { class: "stack" }, [...groups.values()].map((group) => {
      const main = group.filter((each) => ["final", "upload"].includes(each.kind));
      const steps = group.filter((each) => !main.includes(each)).sort((a, b) => b.step - a.step);
      const list = (some) => h("ul", { class: "weights-list" }, some.map(line));
      return h("section", { class: "card flush", "aria-label": titleOf(group[0]) },
        main.length ? list(main) : h("div", { class: "weights-row" }, h("span", { class: "weights-name grow" }, titleOf(group[0])), h("small", null, "no final weights yet")),
        steps.length > 0 && h("details", { class: "versions", open: !main.length }, h("summary", null, `${steps.length} ${steps.length === 1 ? "checkpoint" : "checkpoints"}`), list(steps)));
    })) : h("p", { class: "dim" }, "Nothing here has this name."));
  }

  const facts = (status) => status.runs.map((run) => `${run.id} ${run.weights} ${run.checkpoint} ${run.title}`).join();
  let before = live.status && facts(live.status);
  await load();
  onStatus((status) => { const now = facts(status); if (now !== before) { before = now; load().catch(() => {}); } }, signal);
}

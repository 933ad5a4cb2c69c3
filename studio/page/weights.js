// Weights: list, what is in them, downloads, how to use them.

import { ago, api, bytes, live, path, precise } from "./core.js";
import { button, dialog, empty, fill, h, heading, icon, linkButton, menu, toast, withTokens } from "./dom.js";
import { acceptDrops, pickFiles } from "./uploads.js";
import { tabs } from "./parts.js";

const CHECKED = { passed: ["good", "checks passed"], warnings: ["warn", "doubtful"], failed: ["bad", "checks failed"] };

/** Shows the screen; an address with an id opens its inspection. */
export async function show(root, parts, signal) {
  const area = h("div", { class: "stack" });
  const upload = async (files) => {
    for (const file of files) {
      const node = h("p", { class: "note" }, `Adding ${file.name} (${bytes(file.size)})…`);
      area.prepend(node);
      try { await api("PUT", path("api/weights", file.name), file, { signal }); } catch (error) { toast(`${file.name}: ${error.message}`, { bad: true }); }
      node.remove();
    }
    await load();
  };
  fill(root, heading("Weights", button("Add weights", async () => upload(await pickFiles({ accept: ".zip,.safetensors,.tar" })), { iconName: "upload" })), area);
  acceptDrops(upload, signal);

  const url = (each, ...more) => path("api/weights", each.id, ...more);
  const name = (each) => (live.status?.runs ?? []).find((run) => run.id === each.run)?.title || each.name;

  function downloads(each) {
    const get = (as) => () => { const link = h("a", { href: `${url(each, "download")}?as=${as}`, download: "", hidden: true }); document.body.append(link); link.click(); link.remove(); };
    return menu("Download", [{ text: "All", detail: "zip: LoRA, token, settings", onclick: get("zip") }, { text: "LoRA", detail: "safetensors, for ComfyUI and diffusers", onclick: get("lora") }, { text: "Token", detail: "safetensors, the embedding", onclick: get("token") }], { iconName: "download" });
  }

  function card(each, others = []) {
    const [kind, text] = CHECKED[each.checked] ?? [];
    return h("article", { class: "card stack tight weight" },
      h("div", { class: "row" }, h("h2", null, name(each)), h("span", { class: "badge" }, each.kind === "final" ? "final" : each.kind === "upload" ? "upload" : `step ${each.step}`), kind && h("span", { class: `badge ${kind}` }, kind === "good" ? icon("check") : icon("warning"), text)),
      h("p", { class: "dim" }, each.base_model ?? "unknown base model", " · ", (each.tokens ?? []).map((token) => [withTokens(token), " · "]), each.rank ? `rank ${each.rank} · ` : "", `${bytes(each.bytes)} · ${ago(each.created)}`),
      h("div", { class: "row" }, linkButton("Generate", `#/generate/${encodeURIComponent(each.id)}`, { kind: "primary", iconName: "image" }), downloads(each), button("Inspect", () => inspect(each), { iconName: "search" }),
        each.run && linkButton("Run", `#/runs/${encodeURIComponent(each.run)}`, { kind: "quiet" }),
        each.kind === "upload" && button("", () => remove(each), { kind: "quiet", iconName: "trash", label: `Delete ${each.name}` })),
      others.length > 0 && h("details", null, h("summary", null, `${others.length} checkpoint${others.length === 1 ? "" : "s"}`), h("table", null, h("tbody", null, others.map((one) => h("tr", null, h("td", null, `step ${one.step}${one.kind === "saved" ? ", saved" : ""}`), h("td", { class: "dim number" }, bytes(one.bytes)), h("td", null, h("div", { class: "row right-row" }, linkButton("Generate", `#/generate/${encodeURIComponent(one.id)}`), downloads(one), button("Inspect", () => inspect(one), { kind: "quiet" })))))))));
  }

  async function remove(each) {
    try {
      const { trash } = await api("DELETE", url(each));
      await load();
      toast(`${each.name} deleted`, { action: ["Undo", async () => { await api("POST", path("api/trash", trash, "restore")); load(); }] });
    } catch (error) { toast(error.message, { bad: true }); }
  }

  async function inspect(each) {
    const body = h("div", { class: "stack" }, h("p", { class: "dim" }, "Reading the weights…"));
    dialog(`${name(each)}, ${each.kind === "final" ? "final" : each.kind === "upload" ? "upload" : `step ${each.step}`}`, body, [], { wide: true });
    try {
      const found = await api("GET", url(each, "inspect"), undefined, { signal });
      const most = Math.max(...found.layers.map((one) => one.norm), 1e-12);
      const list = (values) => h("dl", { class: "facts" }, Object.entries(values ?? {}).map(([key, value]) => [h("dt", null, key.replaceAll("_", " ")), h("dd", { class: "mono" }, value === null ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value))]));
      fill(body, tabs("Inspection", [
        ["How to use", (panel) => fill(panel, h("div", { class: "stack" }, found.use.map((one) => h("section", { class: "stack tight" }, h("h3", null, one.program), h("p", null, one.text), one.code && h("pre", { class: "code" }, one.code))))) ],
        ["Norms", (panel) => fill(panel, h("p", { class: "dim" }, `How much each of ${found.layers.length} layers was changed`), h("ul", { class: "norms" }, found.layers.map((one) => h("li", null, h("span", { class: "ellipsis", title: one.name }, one.name), h("span", { class: "norm-bar" }, h("span", { style: { width: `${(100 * one.norm) / most}%` } })), h("span", { class: "number" }, precise(one.norm))))))],
        ["Settings", (panel) => fill(panel, list(found.settings))],
        ["Hashes", (panel) => fill(panel, list(found.hashes))],
      ]).node);
    } catch (error) { fill(body, h("p", { class: "note bad" }, icon("warning"), error.message)); }
  }

  async function load() {
    const { weights } = await api("GET", "/api/weights", undefined, { signal });
    if (!weights.length) {
      fill(area, empty("save", "No weights yet", "A finished training puts its result here: download it, look into it, or generate with it. Weights of others can be added too.", linkButton("Set up a training", "#/train", { kind: "primary" })));
      return;
    }
    const seen = new Set();
    fill(area, weights.map((each) => {
      if (!each.run) return card(each);
      if (seen.has(each.run)) return null;
      seen.add(each.run);
      const all = weights.filter((one) => one.run === each.run);
      const first = all.find((one) => one.kind === "final") ?? all[0];
      return card(first, all.filter((one) => one !== first));
    }));
    const wanted = weights.find((each) => each.id === parts.join("/"));
    if (wanted) { parts.length = 0; inspect(wanted); }
  }
  await load();
}

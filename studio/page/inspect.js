// One file of weights from inside: facts, norms by layer, settings, use in other programs.

import { api, bytes, live, path, schema } from "./core.js";
import { button, fill, h, icon, linkButton, toast } from "./dom.js";
import { humanName } from "./forms.js";
import { title } from "./main.js";
import { baseName, versionOf } from "./names.js";
import { checkedBadge, downloads, generateLink, titleOf } from "./weights.js";

const SVG = "http://www.w3.org/2000/svg";

/** Shows weights by their id. */
export async function showWeights(root, id, signal) {
  const crumbs = h("nav", { class: "crumbs", "aria-label": "Breadcrumb" }, h("a", { href: "#/weights" }, "Weights"));
  fill(root, crumbs, h("h1", null, "Weights"), h("p", { class: "dim", role: "status" }, "Reading the file"));
  let found;
  const [{ bases, fields }] = await Promise.all([schema()]);
  try { found = await api("GET", path("api/weights", id, "inspect"), undefined, { signal }); }
  catch (error) {
    if (error.name !== "AbortError") fill(root, crumbs, h("h1", null, "Weights"), h("p", { class: "note bad" }, icon("warning"), error.message));
    return;
  }
  const version = versionOf(found), name = `${titleOf(found)}${version ? `, ${version}` : ""}`;
  title(name);
  const hasReport = found.kind === "final" && live.status?.runs.find((run) => run.id === found.run)?.report;
  const facts = [
    ["Subject", found.tokens.length ? found.tokens.map((each) => h("span", { class: "token" }, each)) : "no token"],
    ["Base model", baseName(bases, found.base_model) ?? "not said in the file"], ["Rank", found.rank], ["Modules", found.modules], ["Size", bytes(found.bytes)],
    ["Made", new Date(found.created * 1000).toLocaleString()], ["From", found.run ? h("a", { href: `#/runs/${encodeURIComponent(found.run)}` }, titleOf(found)) : "an upload"],
  ].filter(([, value]) => value !== null && value !== undefined);
  const known = new Set(fields.map((each) => each.name));
  const settings = Object.entries(found.settings ?? {}).filter(([key, value]) => known.has(key) && value !== null && value !== "" && !(Array.isArray(value) && !value.length));
  const list = (rows, kind = "") => h("dl", { class: `facts ${kind}` }, rows.map(([key, value]) => [h("dt", null, key), h("dd", null, value)]));
  const copied = (text) => button("Copy", () => navigator.clipboard?.writeText(text).then(() => toast("Copied")), { kind: "quiet small", iconName: "copy" });
  fill(root, crumbs,
    h("div", { class: "heading" }, h("div", { class: "row" }, h("h1", null, name), checkedBadge(found)), h("div", { class: "row" }, hasReport && linkButton("Report", path("api/runs", found.run, "report"), { target: "_blank", rel: "noopener" }), downloads(found), linkButton("Generate", generateLink(found.id), { kind: "primary", iconName: "image" }))),
    h("div", { class: "inspect-split" },
      h("section", { class: "card stack" }, h("h2", null, "Facts"), list(facts)),
      h("section", { class: "card stack" }, norms(found.layers))),
    h("section", { class: "stack" }, h("h2", null, "Use it elsewhere"), h("div", { class: "uses" }, found.use.map((each) => h("div", { class: "card stack tight" }, h("div", { class: "row between" }, h("h3", null, each.program), copied(each.code)), h("p", { class: "dim" }, each.text), h("pre", { class: "code", tabindex: 0, "aria-label": `Code for ${each.program}` }, each.code))))),
    h("div", { class: "inspect-split even" },
      h("section", { class: "card stack" }, h("h2", null, "Settings of the training"), settings.length ? h("details", { class: "fold" }, h("summary", null, `${settings.length} settings`), list(settings.map(([key, value]) => [humanName(key), Array.isArray(value) ? value.join(", ") : String(value)]), "settings")) : h("p", { class: "dim" }, "The file does not say how it was trained.")),
      h("section", { class: "card stack" }, h("h2", null, "Checksums"), list(Object.entries(found.hashes ?? {}).filter(([, value]) => value).map(([key, value]) => [key === "file" ? "The file" : "LoRA", h("code", null, value)])))));
}

/** How far each layer is changed: a bar each, in the order of the model, and a table. */
function norms(layers) {
  const rows = layers.filter((each) => each.norm !== null), most = Math.max(...rows.map((each) => each.norm), 0);
  const head = h("h2", null, "Change by layer");
  if (!rows.length || !most) return [head, h("p", { class: "dim" }, rows.length ? "Nothing is changed." : "Not known for this kind of file.")];
  const width = 640, height = 140, each = width / rows.length;
  const one = h("p", { class: "dim norm-text" });
  const largest = rows.reduce((a, b) => (b.norm > a.norm ? b : a));
  const say = (row) => { one.textContent = row ? `${row.name}: ${row.norm.toPrecision(3)}` : `Largest: ${largest.name}, ${most.toPrecision(3)}`; };
  const make = (tag, properties) => { const node = document.createElementNS(SVG, tag); for (const [key, value] of Object.entries(properties)) node.setAttribute(key, value); return node; };
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "norms", role: "img", preserveAspectRatio: "none", "aria-label": `Norm of the change of ${rows.length} layers, the largest is ${most.toPrecision(3)} in ${largest.name}` });
  rows.forEach((row, index) => {
    const bar = make("rect", { x: index * each, y: 0, width: each, height, class: "norm-place" });
    const tall = Math.max(1, (row.norm / most) * (height - 4));
    svg.append(make("rect", { x: index * each + each * 0.15, y: height - tall, width: Math.max(0.8, each * 0.7), height: tall, class: "norm" }), bar);
    bar.addEventListener("pointerenter", () => say(row));
  });
  svg.addEventListener("pointerleave", () => say(null));
  say(null);
  const table = h("details", { class: "fold" }, h("summary", null, "As a table"), h("div", { class: "norm-table", tabindex: 0, role: "region", "aria-label": "Norms by layer" }, h("table", null, h("thead", null, h("tr", null, h("th", { scope: "col" }, "Layer"), h("th", { scope: "col" }, "Norm"))), h("tbody", null, rows.map((row) => h("tr", null, h("td", { class: "mono" }, row.name), h("td", { class: "number" }, row.norm.toPrecision(3))))))));
  return [head, svg, one, h("p", { class: "dim" }, "How much the LoRA at scale 1 changes the weights of each layer, from the first to the last."), table];
}

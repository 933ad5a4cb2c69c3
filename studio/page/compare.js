// Two to four runs: curves over each other, what differs, previews side by side.

import { api, path, precise, stored } from "./core.js";
import { fill, h, heading, withTokens } from "./dom.js";
import { humanName } from "./forms.js";
import { COLOURS, plot, smooth } from "./plots.js";

/** Shows the comparison. */
export async function compare(root, ids, signal) {
  const found = await api("GET", `/api/compare?runs=${ids.map(encodeURIComponent).join(",")}`, undefined, { signal });
  const names = found.runs.map((each) => each.title || each.id);
  const lines = names.map((name, index) => ({ label: name, colour: COLOURS[index], width: 2, dots: false }));
  const loss = plot("Smoothed training loss", lines, signal), held = plot("Held-out loss", lines.map((each) => ({ ...each, dots: true })), signal);
  const joined = (columns) => {
    const steps = [...new Set(columns.flatMap(([xs]) => xs))].sort((a, b) => a - b);
    return [steps, ...columns.map(([xs, ys]) => { const at = new Map(xs.map((x, index) => [x, ys[index]])); return steps.map((step) => at.get(step) ?? null); })];
  };
  const value = (each) => (each === null || each === undefined ? "–" : typeof each === "number" ? precise(each) === String(each) ? precise(each) : String(each) : Array.isArray(each) ? each.join(", ") : String(each));
  const image = (run, each) => (each ? h("figure", null, h("div", { class: "plate preview" }, h("img", { src: `${path("api/runs", run.id, "files")}/${each.file.split("/").map(encodeURIComponent).join("/")}`, alt: `step ${each.step}`, loading: "lazy" })), h("figcaption", null, h("small", null, `step ${each.step}`))) : h("span", { class: "dim" }, "–"));
  fill(root,
    h("nav", { class: "crumbs", "aria-label": "Breadcrumb" }, h("a", { href: "#/runs" }, "Runs")), heading("Compare"),
    h("div", { class: "curves" }, h("section", { class: "card stack tight" }, h("div", { class: "row between" }, h("h2", null, "Training loss, smoothed"), loss.table), loss.node), h("section", { class: "card stack tight" }, h("div", { class: "row between" }, h("h2", null, "Held-out loss"), held.table), held.node)),
    h("section", { class: "card stack" }, h("h2", null, "Settings that differ"), found.differ.length ? h("div", { class: "scroll" }, h("table", null, h("thead", null, h("tr", null, h("th", null, ""), names.map((name) => h("th", null, name)))), h("tbody", null, found.differ.map((each) => h("tr", null, h("th", { scope: "row" }, humanName(each.name)), each.values.map((one) => h("td", null, value(one)))))))) : h("p", { class: "dim" }, "None.")),
    h("section", { class: "card stack" }, h("h2", null, "Last previews of the same prompt and seed"), found.previews.length ? h("div", { class: "scroll" }, h("table", { class: "preview-table" }, h("thead", null, h("tr", null, h("th", null, "Prompt"), names.map((name) => h("th", null, name)))), h("tbody", null, found.previews.map((each) => h("tr", null, h("th", { scope: "row" }, withTokens(each.prompt ?? "")), each.files.map((files, index) => h("td", null, image(found.runs[index], files.at(-1))))))))) : h("p", { class: "dim" }, "These runs made no preview of the same prompt and seed.")));
  const keep = stored.get("smoothing", 0.9);
  loss.draw(joined(found.runs.map(({ series }) => [series.steps, smooth(series.loss, keep)])));
  const measured = found.runs.map(({ series }) => [series.validation.map((each) => each.step), series.validation.map((each) => each.mean)]);
  if (measured.some(([steps]) => steps.length)) held.draw(joined(measured));
}

// The gallery of generated images, newest first.

import { ago, api, path } from "./core.js";
import { button, dialog, empty, fill, h, icon, linkButton, toast, withTokens } from "./dom.js";

/** `again(settings)` puts an image's settings into the form. Returns {node, load()}. */
export function gallery(signal, again) {
  const node = h("div", { class: "stack wide-gap" });
  let jobs = [], more = false, timer = null, drawn = "";
  const file = (job, image) => path("api/images", job.id, `${image.number}.png`);
  const settings = (job, image) => ({ ...job.settings, ...image.settings, seed: image.seed, prompt: job.prompt });

  function full(job, image) {
    const all = settings(job, image);
    const rows = Object.entries(all).filter(([name, value]) => !["prompt", "axes", "key", "count"].includes(name) && value !== null && value !== "" && !(Array.isArray(value) && !value.length));
    const text = (value) => (Array.isArray(value) ? value.map((each) => (each.id ? `${each.id} × ${each.scale}` : JSON.stringify(each))).join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value));
    const body = h("div", { class: "full-image" }, h("div", { class: "plate" }, h("img", { src: file(job, image), alt: `${job.prompt}, seed ${image.seed}` })),
      h("div", { class: "stack" }, h("p", null, withTokens(job.prompt)), h("dl", { class: "facts" }, rows.map(([name, value]) => [h("dt", null, name.replaceAll("_", " ")), h("dd", null, text(value))])),
        h("div", { class: "row" }, button("Use these again", (event) => { event.target.closest("dialog").close(); again(all); }, { kind: "primary", iconName: "again" }), linkButton("Download", file(job, image), { iconName: "download", download: `${job.id}-${image.number}.png` }))));
    dialog("Image", body, [], { wide: true });
  }

  function cell(job, image) {
    return h("button", { type: "button", class: "plate picture", onclick: () => full(job, image), "aria-label": `${job.prompt}, seed ${image.seed}, larger` }, h("img", { src: file(job, image), alt: `${job.prompt}, seed ${image.seed}`, loading: "lazy" }));
  }

  function images(job) {
    const [columns, rows] = job.axes ?? [];
    if (!columns) {
      return h("div", { class: "pictures" }, job.images.map((each) => cell(job, each)), working(job) && Array.from({ length: Math.max(0, job.of - job.images.length) }, () => h("div", { class: "plate picture waiting" })));
    }
    const at = (row, column) => job.images.filter((each) => (each.row ?? 0) === row && (each.column ?? 0) === column);
    return h("div", { class: "scroll" }, h("table", { class: "preview-table" },
      h("thead", null, h("tr", null, rows && h("th", null, rows.name), columns.values.map((value) => h("th", null, `${columns.name} ${value}`)))),
      h("tbody", null, (rows?.values ?? [null]).map((value, row) => h("tr", null, rows && h("th", { scope: "row" }, String(value)), columns.values.map((_, column) => h("td", null, at(row, column).length ? at(row, column).map((each) => cell(job, each)) : h("div", { class: "plate picture waiting" }))))))));
  }

  const working = (job) => ["waiting", "queued", "loading", "running"].includes(job.state);

  function card(job) {
    return h("article", { class: "stack tight" },
      h("div", { class: "row nowrap-row" }, h("p", { class: "grow job-prompt" }, withTokens(job.prompt)), h("small", { class: "nowrap" }, working(job) ? `${job.state} ${job.done} of ${job.of}` : ago(job.created)),
        working(job) ? button("Cancel", () => api("POST", path("api/images", job.id, "cancel")).then(load), { kind: "quiet small" }) : button("", () => remove(job), { kind: "quiet", iconName: "trash", label: "Delete" })),
      job.error && h("p", { class: "note bad" }, icon("warning"), job.error), images(job));
  }

  async function remove(job) {
    try {
      const { trash } = await api("DELETE", path("api/images", job.id));
      await load();
      toast("Images deleted", { action: ["Undo", async () => { await api("POST", path("api/trash", trash, "restore")); load(); }] });
    } catch (error) { toast(error.message, { bad: true }); }
  }

  async function load(older = false) {
    clearTimeout(timer);
    if (signal.aborted) return;
    try {
      const before = older && jobs.length ? `&before=${encodeURIComponent(jobs.at(-1).id)}` : "";
      const found = await api("GET", `/api/images?limit=20${before}`, undefined, { signal });
      jobs = older ? [...jobs, ...found.jobs] : [...found.jobs, ...jobs.filter((each) => found.jobs.length && each.id < found.jobs.at(-1).id)];
      more = found.more;
    } catch (error) { if (error.name === "AbortError") return; }
    const key = JSON.stringify(jobs);
    if (key !== drawn) {
      drawn = key;
      if (jobs.length) fill(node, jobs.map(card), more && h("div", null, button("Older images", () => load(true))));
      else fill(node, empty("image", "Nothing generated yet", "Write a prompt at the left, with the token of your subject, and press Generate. Every image keeps its settings."));
    }
    if (jobs.some(working)) timer = setTimeout(load, document.hidden ? 10000 : 700);
  }
  signal.addEventListener("abort", () => clearTimeout(timer));
  return { node, load: () => load() };
}

// The tabs of a run: log, settings, checks, files.

import { api, bytes, path } from "./core.js";
import { button, h, icon, linkButton, toast } from "./dom.js";
import { humanName } from "./forms.js";

const RESULTS = { passed: ["check", "good", "passed"], warning: ["warning", "warn", "doubtful"], failed: ["close", "bad", "failed"] };
const MOST = 400_000; // characters of the log that are shown

/** Tabs with panels: [[name, title, node]]. `opened(name)` is called when one is shown. */
export function tabs(parts, opened) {
  const base = `tab-${Math.random().toString(36).slice(2)}`;
  const bar = h("div", { class: "tabs", role: "tablist" });
  const choose = (name, focus) => {
    parts.forEach(([each, , panel], index) => {
      const tab = bar.children[index], chosen = each === name;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      panel.hidden = !chosen;
      if (chosen && focus) tab.focus();
    });
    opened(name);
  };
  parts.forEach(([name, title, panel], index) => {
    bar.append(h("button", { type: "button", role: "tab", id: `${base}-${name}`, "aria-controls": `${base}-${name}-panel`, onclick: () => choose(name) }, title));
    Object.assign(panel, { id: `${base}-${name}-panel` });
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", `${base}-${name}`);
    bar.children[index].addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) choose(parts[(index + by + parts.length) % parts.length][0], true);
    });
  });
  choose(parts[0][0]);
  return h("section", { class: "card details" }, bar, parts.map(([, , panel]) => panel));
}

/** The log: {node, more()} reads on. Follows its end unless it was scrolled. */
export function logPanel(id, signal) {
  const text = h("pre", { class: "log", tabindex: 0, role: "region", "aria-label": "Log" });
  const said = h("p", { class: "error", role: "alert" });
  const latest = button("To the end", () => { follow = true; text.scrollTop = text.scrollHeight; latest.hidden = true; }, { kind: "small" });
  const node = h(
    "div", null,
    h("div", { class: "row log-tools" }, h("span", { class: "dim grow" }, "Newest last"), latest,
      button("Copy", async () => {
        try { await navigator.clipboard.writeText(text.textContent); toast("Copied"); } catch { getSelection().selectAllChildren(text); toast("Selected: copy with Ctrl+C"); }
      }, { kind: "quiet", iconName: "copy" }),
      h("a", { class: "button quiet", href: `${path("api/runs", id, "files/log.txt")}?save`, download: `${id}.txt` }, icon("download"), h("span", null, "Download"))),
    text, said,
  );
  let offset = 0, reading = false, follow = true;
  latest.hidden = true;
  text.addEventListener("scroll", () => {
    follow = text.scrollHeight - text.scrollTop - text.clientHeight < 24;
    latest.hidden = follow;
  });
  async function more() {
    if (reading || signal.aborted) return;
    reading = true;
    try {
      for (;;) {
        const answer = await api("GET", `${path("api/runs", id, "log")}?after=${offset}`, undefined, { signal });
        if (answer.offset < offset) text.textContent = "";
        if (answer.text) {
          text.append(answer.text);
          if (text.textContent.length > MOST) text.textContent = text.textContent.slice(-MOST).replace(/^[^\n]*\n/, "");
          if (follow) text.scrollTop = text.scrollHeight;
        }
        const read = answer.offset - offset;
        offset = answer.offset;
        if (read < 250_000) break;
      }
      said.textContent = "";
      if (!text.firstChild) text.append("");
      text.classList.toggle("nothing", !text.textContent);
    } catch (error) { if (!signal.aborted) said.textContent = error.message; }
    reading = false;
  }
  return { node, more, shown: () => { if (follow) text.scrollTop = text.scrollHeight; } };
}

const isEmpty = (value) => value === null || value === undefined || value === "" || (typeof value === "object" && !Array.isArray(value) && !Object.keys(value).length);
const shown = (value) => (isEmpty(value) ? h("span", { class: "dim" }, "–") : Array.isArray(value) ? (value.length ? value.map((each) => h("div", null, String(each))) : h("span", { class: "dim" }, "–")) : typeof value === "object" ? h("code", null, JSON.stringify(value)) : value === true ? "yes" : value === false ? "no" : String(value));

/** Settings as given, and as filled in. */
export function settingsPanel(run) {
  const names = Object.keys(run.used).length ? Object.keys(run.used) : Object.keys(run.given);
  const given = names.filter((name) => name in run.given), rest = names.filter((name) => !(name in run.given));
  const filter = h("input", { type: "search", placeholder: "Search settings", "aria-label": "Search settings" });
  const rows = [];
  const part = (title, text, list) => list.length > 0 && h("div", null, h("h3", null, title), h("p", { class: "help" }, text), h("dl", { class: "facts settings" }, list.map((name) => {
    const value = run.used[name] ?? run.given[name], same = JSON.stringify(value) === JSON.stringify(run.given[name]);
    const term = h("dt", { title: name }, humanName(name)), content = h("dd", null, shown(value), name in run.given && !same && h("small", null, " given: ", shown(run.given[name])));
    rows.push([`${name} ${humanName(name).toLowerCase()}`, term, content]);
    return [term, content];
  })));
  filter.addEventListener("input", () => { for (const [name, ...nodes] of rows) for (const each of nodes) each.hidden = !name.includes(filter.value.trim().toLowerCase()); });
  if (!names.length) return h("p", { class: "dim" }, "This run has no record of its settings.");
  return h("div", { class: "stack" }, h("div", { class: "filter" }, filter), h("div", { class: "settings-parts" }, part("Given", "What was chosen for this run.", given), part("Filled in", "What followed from the base model, the dataset and the defaults.", rest)));
}

/** Results of the checks, and warnings. */
export function checksPanel(run) {
  return h(
    "div", { class: "stack" },
    run.warnings.length > 0 && h("div", { class: "stack tight" }, h("h3", null, "Warnings"), run.warnings.map((each) => h("div", { class: "note warn" }, icon("warning"), h("span", null, each.text)))),
    run.checks.length ? h("ul", { class: "checks" }, run.checks.map((each) => {
      const [iconName, kind, word] = RESULTS[each.result] ?? RESULTS.passed;
      return h("li", null, h("span", { class: `badge ${kind}` }, icon(iconName), word), h("div", null, h("b", null, each.name), h("p", { class: "dim" }, each.text)));
    })) : h("p", { class: "dim" }, "The checks run when training is done: whether the weights load, and what they change."),
    run.report && h("div", null, linkButton("Open the report", path("api/runs", run.id, "report"), { target: "_blank" })),
  );
}

/** The files of the run. */
export function filesPanel(run) {
  const whole = run.files.reduce((sum, each) => sum + each.bytes, 0);
  return h(
    "div", { class: "stack" }, h("p", { class: "dim" }, `${run.files.length.toLocaleString("en")} files, ${bytes(whole)}`),
    h("div", { class: "scroll files" }, h("table", null, h("thead", null, h("tr", null, h("th", { scope: "col" }, "File"), h("th", { scope: "col" }, "Size"), h("th", { scope: "col" }, h("span", { class: "visually-hidden" }, "Download")))), h("tbody", null, run.files.map((each) => {
      const href = path("api/runs", run.id, "files", each.path);
      return h("tr", null, h("td", null, h("a", { href, target: "_blank", class: "mono" }, each.path)), h("td", { class: "size" }, bytes(each.bytes)), h("td", null, h("a", { class: "button quiet square", href: `${href}?save`, download: each.path.split("/").at(-1), "aria-label": `Download ${each.path}`, title: "Download" }, icon("download"))));
    })))),
  );
}

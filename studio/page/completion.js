// Tokens that are offered while a prompt is written: after "<", and as buttons.

import { fill, h } from "./dom.js";

/** Puts completion around a textarea. `tokens()` gives what is offered. Returns the node. */
export function withCompletion(area, tokens) {
  const id = `${area.id}-tokens`;
  const list = h("ul", { class: "menu tokens-list", id, role: "listbox", "aria-label": "Tokens", hidden: true });
  area.setAttribute("aria-autocomplete", "list");
  area.setAttribute("aria-controls", id);
  area.setAttribute("autocomplete", "off");
  let offered = [], at = 0;

  const begun = () => area.value.slice(0, area.selectionStart).match(/<[\w-]*$/)?.[0];
  function draw() {
    const start = begun();
    offered = start === undefined ? [] : tokens().filter((each) => each.toLowerCase().startsWith(start.toLowerCase()) && each !== start);
    at = Math.min(at, Math.max(0, offered.length - 1));
    list.hidden = !offered.length;
    fill(list, offered.map((each, index) => h("li", { role: "option", id: `${id}-${index}`, "aria-selected": String(index === at), onpointerdown: (event) => { event.preventDefault(); take(each); } }, h("span", { class: "token" }, each))));
    if (offered.length) area.setAttribute("aria-activedescendant", `${id}-${at}`);
    else area.removeAttribute("aria-activedescendant");
  }
  function take(token) {
    const start = begun()?.length ?? 0, end = area.selectionStart;
    area.setRangeText(token, end - start, end, "end");
    area.dispatchEvent(new Event("input", { bubbles: true }));
  }
  area.addEventListener("input", () => { at = 0; draw(); });
  area.addEventListener("click", draw);
  area.addEventListener("blur", () => { list.hidden = true; });
  area.addEventListener("keydown", (event) => {
    if (list.hidden) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) at = (at + step + offered.length) % offered.length;
    else if ((event.key === "Enter" && !event.ctrlKey && !event.metaKey) || event.key === "Tab") { event.preventDefault(); take(offered[at]); return; }
    else if (event.key === "Escape") { list.hidden = true; event.stopPropagation(); return; }
    else return;
    event.preventDefault();
    draw();
  });
  return h("div", { class: "completed" }, area, list);
}

/** Puts a token where the cursor is. */
export function insert(area, token) {
  const [start, end] = [area.selectionStart, area.selectionEnd];
  const before = start && !/\s$/.test(area.value.slice(0, start)) ? " " : "", after = /^\s|^$/.test(area.value.slice(end)) ? "" : " ";
  area.setRangeText(before + token + after, start, end, "end");
  area.focus();
  area.dispatchEvent(new Event("input", { bubbles: true }));
}

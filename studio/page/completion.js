// Offers tokens after "<" in a text field.

import { fill, h } from "./dom.js";

/** `tokens()` gives those of the chosen weights. */
export function completion(area, tokens) {
  const list = h("ul", { class: "completion", role: "listbox", "aria-label": "Tokens", hidden: true });
  area.after(list);
  let found = [], now = 0;
  const typed = () => /<[\w-]*$/.exec(area.value.slice(0, area.selectionStart))?.[0];
  const close = () => { list.hidden = true; };
  const take = (token) => {
    const end = area.selectionStart, start = end - (typed()?.length ?? 0);
    area.setRangeText(token, start, end, "end");
    close();
    area.dispatchEvent(new Event("input"));
    area.focus();
  };
  const draw = () => fill(list, found.map((token, index) => h("li", { role: "option", "aria-selected": String(index === now), onmousedown: (event) => { event.preventDefault(); take(token); } }, token)));
  area.addEventListener("input", () => {
    const start = typed();
    found = start ? [...new Set(tokens())].filter((each) => each.startsWith(start) && each !== start) : [];
    now = 0;
    list.hidden = !found.length;
    draw();
  });
  area.addEventListener("blur", close);
  area.addEventListener("keydown", (event) => {
    if (list.hidden) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") now = (now + (event.key === "ArrowDown" ? 1 : -1) + found.length) % found.length;
    else if (event.key === "Enter" || event.key === "Tab") take(found[now]);
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
    draw();
  });
}

// Nodes, icons, dialogs, menus, toasts. Texts are always text nodes; nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Creates a node. Properties: `on…` are listeners, `class`, `dataset`, `style` (an object of CSS
 * properties), booleans, and attributes. Children: nodes, texts, lists; null and false are skipped. */
export function h(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) set(node, name, value);
  add(node, children);
  return node;
}

function set(node, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name.startsWith("on")) node.addEventListener(name.slice(2).toLowerCase(), value);
  else if (name === "class") node.className = value;
  else if (name === "dataset") Object.assign(node.dataset, value);
  else if (name === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
  else if (name === "value") node.value = value;
  else node.setAttribute(name, value === true ? "" : String(value));
}

function add(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : String(child));
  }
}

/** Replaces all children of a node. */
export function fill(node, ...children) {
  node.replaceChildren();
  add(node, children);
  return node;
}

const ICONS = {
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  close: "M4 4l8 8M12 4l-8 8",
  check: "M3 8.5l3.2 3.2L13 5",
  chevron: "M4 6l4 4 4-4",
  left: "M10 3L5 8l5 5",
  right: "M6 3l5 5-5 5",
  play: "M5 3.5v9l7-4.5z",
  pause: "M5.5 3.5v9M10.5 3.5v9",
  stop: "M4 4h8v8H4z",
  save: "M8 2v8m0 0L5 7m3 3l3-3M3 13h10",
  download: "M8 2v8m0 0L5 7m3 3l3-3M3 13h10",
  upload: "M8 11V3m0 0L5 6m3-3l3 3M3 13h10",
  trash: "M3 4.5h10M6.5 4V2.5h3V4M4.5 4.5l.6 9h5.8l.6-9",
  edit: "M3 13l.6-2.8L11 2.8l2.2 2.2-7.4 7.4z",
  search: "M7 2.5a4.5 4.5 0 100 9 4.5 4.5 0 000-9zM10.5 10.5L14 14",
  image: "M2.5 3h11v10h-11zM2.5 11l3.2-3.4 2.6 2.6 2-1.8 3.2 3M10.5 6.2v.1",
  warning: "M8 2.5l6 10.8H2zM8 6.5v3.2M8 11.4v.1",
  lock: "M4 7.5h8v6H4zM5.5 7.5V5a2.5 2.5 0 015 0v2.5",
  unlock: "M4 7.5h8v6H4zM5.5 7.5V5a2.5 2.5 0 014.8-1",
  moon: "M13 9.5A5.5 5.5 0 116.5 3a4.5 4.5 0 006.5 6.5z",
  sun: "M8 5.2a2.8 2.8 0 100 5.6 2.8 2.8 0 000-5.6zM8 1.5v1.4M8 13.1v1.4M1.5 8h1.4M13.1 8h1.4M3.4 3.4l1 1M11.6 11.6l1 1M12.6 3.4l-1 1M4.4 11.6l-1 1",
  grid: "M2.5 2.5h4.5v4.5H2.5zM9 2.5h4.5v4.5H9zM2.5 9h4.5v4.5H2.5zM9 9h4.5v4.5H9z",
  drag: "M6 3v.1M10 3v.1M6 8v.1M10 8v.1M6 13v.1M10 13v.1",
  dice: "M3 3h10v10H3zM5.7 5.7v.1M10.3 10.3v.1M8 8v.1",
  copy: "M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3",
  again: "M13 8a5 5 0 11-1.6-3.7M13 2.5v3h-3",
  more: "M3.5 8v.1M8 8v.1M12.5 8v.1",
};

/** An icon; decoration only, so the control around it needs a name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button. `kind`: "", primary, quiet or danger; `label` names one that is only an icon. */
export function button(text, onclick, { kind = "", iconName, label, ...rest } = {}) {
  return h(
    "button",
    { type: "button", class: `button ${kind} ${text ? "" : "square"}`, onclick, "aria-label": label, title: label, ...rest },
    iconName && icon(iconName),
    text && h("span", null, text),
  );
}

/** A link that looks like a button. */
export function linkButton(text, href, { kind = "", iconName, ...rest } = {}) {
  return h("a", { class: `button ${kind}`, href, ...rest }, iconName && icon(iconName), h("span", null, text));
}

/** A button with a menu below it. items: {text, detail, onclick, disabled, danger}, null is a line. */
export function menu(text, items, { kind = "", iconName, label } = {}) {
  const list = h("div", { class: "menu", popover: "auto", role: "menu" });
  const opener = h(
    "button",
    { type: "button", class: `button ${kind} ${text ? "" : "square"}`, "aria-haspopup": "menu", "aria-label": label, title: label },
    iconName && icon(iconName), text && h("span", null, text), text && icon("chevron"),
  );
  opener.popoverTargetElement = list;
  list.addEventListener("toggle", (event) => {
    opener.setAttribute("aria-expanded", String(event.newState === "open"));
    if (event.newState !== "open") return;
    const box = opener.getBoundingClientRect(), width = list.offsetWidth, height = list.offsetHeight;
    const below = box.bottom + 4 + height < innerHeight || box.top < height + 8;
    list.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
    list.style.top = `${below ? box.bottom + 4 : box.top - height - 4}px`;
    list.querySelector("[role=menuitem]:not(:disabled)")?.focus();
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const rows = [...list.querySelectorAll("[role=menuitem]:not(:disabled)")];
    rows[(rows.indexOf(document.activeElement) + step + rows.length) % rows.length]?.focus();
  });
  for (const item of items) {
    if (!item) { list.append(h("hr")); continue; }
    list.append(h(
      "button",
      {
        type: "button", role: "menuitem", class: item.danger ? "danger" : "", disabled: item.disabled,
        onclick: () => { list.hidePopover(); item.onclick(); },
      },
      h("span", null, item.text), item.detail && h("small", null, item.detail),
    ));
  }
  return h("span", { class: "menu-holder" }, opener, list);
}

/** A small button that closes something. */
export const closer = (onclick, { kind = "quiet", label = "Close", ...rest } = {}) => button("", onclick, { kind, iconName: "close", label, ...rest });

/** Opens a dialog. Escape, a press beside it, and the signal close it; then `closed()` is called. */
export function showModal(box, closed, signal) {
  let pressed = null; // a text that is selected from inside to the backdrop does not close it
  box.addEventListener("pointerdown", (event) => { pressed = event.target; });
  box.addEventListener("click", (event) => { if (event.target === box && pressed === box) box.close(); });
  const toasts = document.getElementById("toasts"), outside = toasts.parentNode;
  box.addEventListener("close", () => { if (box.contains(toasts)) (outside.isConnected ? outside : document.body).append(toasts); box.remove(); closed?.(); });
  signal?.addEventListener("abort", () => box.close());
  document.body.append(box);
  box.append(toasts); // what is outside of a modal dialog can be neither seen nor used
  box.showModal();
}

/** A dialog with a title. */
export function titled(title, wide, ...content) {
  return h("dialog", { class: wide ? "wide" : "", "aria-label": title }, h("header", null, h("h2", null, title), closer((event) => event.target.closest("dialog").close())), content);
}

/** Shows a dialog. `actions`: [text, value, kind]. Resolves to the value, or null if it was closed. */
export function dialog(title, content, actions = [], { wide = false } = {}) {
  return new Promise((resolve) => {
    let value = null;
    const box = titled(
      title, wide, h("div", { class: "dialog-body" }, content),
      actions.length > 0 && h("footer", null, actions.map(([text, each, kind]) => button(text, () => { value = each; box.close(); }, { kind }))),
    );
    showModal(box, () => resolve(value));
  });
}

/** A short message at the bottom. `action`: [text, function], for example Undo. */
export function toast(text, { action, bad = false } = {}) {
  const node = h("div", { class: `toast ${bad ? "bad" : ""}` }, h("span", null, text));
  const remove = () => node.remove();
  if (action) node.append(button(action[0], () => { remove(); action[1](); }, { kind: "quiet" }));
  node.append(closer(remove));
  document.getElementById("toasts").append(node);
  setTimeout(remove, bad || action ? 12000 : 4000);
}

/** An empty place: what it is for, and the first thing to do. */
export function empty(iconName, title, text, ...actions) {
  return h("div", { class: "empty" }, icon(iconName), h("h2", null, title), h("p", null, text), h("div", { class: "row" }, actions));
}

/** The heading of a screen, with its actions at the right. */
export function heading(title, ...actions) {
  return h("div", { class: "heading" }, h("h1", null, title), h("div", { class: "row" }, actions));
}

/** A labelled control with help and a place for its error. */
export function field(name, label, control, { help, unit } = {}) {
  const id = `field-${name}`;
  control.id = id;
  control.name = name;
  control.setAttribute("aria-describedby", `${id}-help ${id}-error`);
  return h(
    "div", { class: "field", dataset: { field: name } },
    h("label", { for: id }, label, unit && h("span", { class: "unit" }, ` ${unit}`)),
    control,
    h("p", { class: "help", id: `${id}-help` }, help ?? ""),
    h("p", { class: "error", id: `${id}-error` }),
  );
}

/** Shows errors at fields by name; returns the names for which there is no field. */
export function showErrors(root, errors) {
  const without = [];
  for (const each of root.querySelectorAll("[data-field]")) {
    const text = errors[each.dataset.field] ?? "";
    each.querySelector(".error").textContent = text;
    each.classList.toggle("bad", text !== "");
  }
  for (const name of Object.keys(errors)) if (!root.querySelector(`[data-field="${CSS.escape(name)}"]`)) without.push(name);
  return without;
}

/** Texts with the subject's tokens as chips: TOK and <name>. */
export function withTokens(text) {
  return text.split(/(<[\w-]{1,40}>|\bTOK\b)/).map((part, index) => (index % 2 ? h("span", { class: "token" }, part) : part));
}

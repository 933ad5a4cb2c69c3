// Controls from the server's declaration of fields.

import { h } from "./dom.js";

/** "learning_rate" as people write it. */
export const humanName = (name) => (name.charAt(0).toUpperCase() + name.slice(1)).replaceAll("_", " ").replace(/^Lr /, "Learning rate ").replace(/\bLora\b/i, "LoRA").replace(/\bEma\b/i, "EMA");

/** A control for a field. `changed(value)`: undefined means the default. `automatic(value)` shows the
 * value that the server would fill in. */
export function control(about, value, changed) {
  const shown = (each) => (Array.isArray(each) ? each.join(about.separator === "\n" ? "\n" : ",") : String(each));
  const hint = (each) => (each === null || each === undefined || each === "" ? "" : shown(each));
  let node;
  if (about.type === "boolean" || about.choices?.length === 1 || (about.type === "choice" && about.choices)) {
    const choices = (about.type === "boolean" ? [["true", "on"], ["false", "off"]] : about.choices.map((each) => [each, each])).filter(([key]) => key !== "auto");
    const automatic = h("option", { value: "" }, "");
    const name = (each) => choices.find(([key]) => key === String(each))?.[1];
    const word = about.type === "list" ? "none" : about.optional || about.default === "auto" ? "automatic" : "default";
    const label = (each) => { automatic.textContent = name(each) ? `${word}: ${name(each)}` : word; };
    label(about.default);
    node = h("select", { onchange: () => changed(node.value === "" ? undefined : about.type === "boolean" ? node.value === "true" : node.value) }, automatic, choices.map(([key, text]) => h("option", { value: key }, text)));
    node.value = value === undefined || value === null ? "" : String(value);
    node.automatic = (each) => { if (node.value === "") label(each); };
    return node;
  }
  const number = about.type === "integer" || about.type === "number";
  const read = () => {
    const text = node.value;
    if (text.trim() === "") return undefined;
    return number && Number.isFinite(Number(text)) ? Number(text) : text;
  };
  if (about.separator === "\n") node = h("textarea", { rows: 3 });
  else node = h("input", number ? { inputmode: "decimal", autocomplete: "off" } : { autocomplete: "off" });
  if (about.max_length) node.maxLength = about.max_length;
  node.value = value === undefined || value === null ? "" : shown(value);
  const otherwise = about.default === "" ? "nothing" : "automatic";
  node.placeholder = hint(about.default) || otherwise;
  node.addEventListener("input", () => changed(read()));
  node.automatic = (each) => { node.placeholder = hint(each) || hint(about.default) || otherwise; };
  return node;
}

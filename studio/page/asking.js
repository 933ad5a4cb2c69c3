// A dialog with a form: what the server refuses is said in it, and it stays open.

import { button, fill, h, showErrors } from "./dom.js";

/** Asks; `submit()` does it. Resolves to its result, or to null if the dialog was closed. */
export function ask(title, content, action, submit, { wide = false, danger = false } = {}) {
  return new Promise((resolve) => {
    const id = `ask-${Math.random().toString(36).slice(2)}`;
    const general = h("p", { class: "error grow", role: "alert" });
    const go = h("button", { type: "submit", class: `button primary ${danger ? "danger" : ""}` }, h("span", null, action));
    let result = null;
    const form = h(
      "form", { onsubmit: async (event) => {
        event.preventDefault();
        go.disabled = true;
        general.textContent = "";
        showErrors(form, {});
        try {
          result = await submit();
          box.close();
        } catch (error) {
          const lost = error.field ? showErrors(form, { [error.field]: error.message }) : [""];
          if (lost.length) general.textContent = error.message;
          form.querySelector(".field.bad input")?.focus();
        }
        go.disabled = false;
      } },
      h("div", { class: "dialog-body stack" }, content),
      h("footer", null, general, button("Cancel", () => box.close()), go),
    );
    const box = h("dialog", { class: wide ? "wide" : "", "aria-labelledby": id });
    fill(box, h("header", null, h("h2", { id }, title), button("", () => box.close(), { kind: "quiet", iconName: "close", label: "Close" })), form);
    let pressed = null; // a text that is selected from inside to the backdrop does not close it
    box.addEventListener("pointerdown", (event) => { pressed = event.target; });
    box.addEventListener("click", (event) => { if (event.target === box && pressed === box) box.close(); });
    box.addEventListener("close", () => { box.remove(); resolve(result); });
    document.body.append(box);
    box.showModal();
    form.querySelector("input, textarea")?.select();
    form.querySelector("input, textarea")?.focus();
  });
}

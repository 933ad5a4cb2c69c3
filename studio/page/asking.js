// A dialog with a form: what is refused is shown in it, and it stays open.

import { button, h, showErrors, showModal, titled } from "./dom.js";

/** What is wrong with a field, found by the page itself. */
export const wrongField = (field, text) => Object.assign(new Error(text), { field });

/** Asks; `submit()` does it. Resolves to its result, or to null if the dialog was closed. */
export function ask(title, content, action, submit, { wide = false } = {}) {
  return new Promise((resolve) => {
    let result = null;
    const general = h("p", { class: "error grow", role: "alert" });
    const go = h("button", { type: "submit", class: "button primary" }, h("span", null, action));
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
          form.querySelector(".field.bad :is(input, textarea)")?.focus();
        }
        go.disabled = false;
      } },
      h("div", { class: "dialog-body stack" }, content),
      h("footer", null, general, button("Cancel", () => box.close()), go),
    );
    const box = titled(title, wide, form);
    showModal(box, () => resolve(result));
    const first = form.querySelector("input, textarea");
    first?.select();
    first?.focus();
  });
}

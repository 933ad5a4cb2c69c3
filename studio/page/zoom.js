// Zoom and pan of one image, or of several together: wheel, drag, pinch, double click, keys.

import { button, h } from "./dom.js";

const MOST = 16;
const within = (value, most) => Math.max(-most, Math.min(most, value));

/** Lets all plates in a dialog zoom and pan as one. Returns the buttons. */
export function zoomable(box) {
  let scale = 1, x = 0, y = 0; // the offset from the centre, in parts of a plate
  const fingers = new Map();
  const shown = h("output", { class: "zoom-text", "aria-label": "Zoom" });

  function apply() {
    const most = (scale - 1) / 2; // an edge of the image stays at the edge of its plate
    [x, y] = [within(x, most), within(y, most)];
    for (const [name, value] of Object.entries({ "--zoom": scale, "--x": `${100 * x}%`, "--y": `${100 * y}%` })) box.style.setProperty(name, value);
    box.classList.toggle("zoomed", scale > 1);
    shown.textContent = `${Math.round(100 * scale)} %`;
  }
  function pan(across, down) {
    x += across;
    y += down;
    apply();
  }
  /** Zooms around a place of the plate, in parts of it from its centre. */
  function zoom(factor, [atX, atY] = [0, 0]) {
    const next = Math.max(1, Math.min(MOST, scale * factor)), by = next / scale;
    [x, y, scale] = [atX - (atX - x) * by, atY - (atY - y) * by, next];
    apply();
  }
  const place = (plate, event) => {
    const { left, top, width, height } = plate.getBoundingClientRect();
    return [(event.clientX - left) / width - 0.5, (event.clientY - top) / height - 0.5];
  };
  const plateOf = (event) => event.target.closest?.(".plate");

  box.addEventListener("wheel", (event) => {
    const plate = plateOf(event);
    if (!plate) return;
    event.preventDefault();
    zoom(Math.exp(-within(event.deltaY * (event.deltaMode ? 20 : 1), 100) / 300), place(plate, event));
  }, { passive: false });
  box.addEventListener("dblclick", (event) => { const plate = plateOf(event); if (plate) zoom(scale > 1 ? 1 / scale : 3, place(plate, event)); });
  box.addEventListener("dragstart", (event) => event.preventDefault());
  box.addEventListener("pointerdown", (event) => {
    const plate = plateOf(event);
    if (!plate || event.button) return;
    fingers.set(event.pointerId, place(plate, event));
    plate.setPointerCapture(event.pointerId);
  });
  box.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId), plate = before && plateOf(event);
    if (!plate) return;
    const now = place(plate, event), other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    fingers.set(event.pointerId, now);
    if (other) zoom(Math.hypot(now[0] - other[0], now[1] - other[1]) / (Math.hypot(before[0] - other[0], before[1] - other[1]) || 1), other);
    else pan(now[0] - before[0], now[1] - before[1]);
  });
  for (const end of ["pointerup", "pointercancel"]) box.addEventListener(end, (event) => fingers.delete(event.pointerId));
  box.addEventListener("keydown", (event) => {
    const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 1 / MOST }[event.key];
    const by = event.shiftKey && { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
    if (!(factor || by) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    if (by) pan(...by);
    else zoom(factor);
  });
  box.classList.add("zoomable");
  apply();
  return h("span", { class: "row tight zoom-tools" }, button("", () => zoom(1 / 1.5), { kind: "quiet", iconName: "minus", label: "Smaller (−)" }), shown, button("", () => zoom(1.5), { kind: "quiet", iconName: "plus", label: "Larger (+)" }), button("Fit", () => zoom(1 / MOST), { kind: "quiet", title: "Whole image (0)" }));
}

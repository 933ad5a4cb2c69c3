import { heading } from "./dom.js";

/** Shows the screen. */
export async function show(root) {
  root.append(heading("train"));
}

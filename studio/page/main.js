// The frame: the bar, addresses (#/runs/ID), keys, light and dark.

import { bytes, duration, live, onStatus, schema, start, stored } from "./core.js";
import { button, dialog, fill, h, icon } from "./dom.js";

const SCREENS = {
  // All at once: each names the next one only when it is there.
  datasets: { title: "Datasets", key: "d", load: () => Promise.all([import("./datasets.js"), import("./dataset.js"), import("./captioning.js")]).then(([module]) => module) },
  train: { title: "Train", key: "t", load: () => import("./train.js") },
  runs: { title: "Runs", key: "r", load: () => import("./runs.js") },
  generate: { title: "Generate", key: "e", load: () => import("./generate.js") },
  weights: { title: "Weights", key: "w", load: () => import("./weights.js") },
};

/** Keys of the current screen for the list of keys: [key, text]; set by the screens. */
export const keys = { screen: [] };

let leaving = new AbortController();

/** Shows the screen of the address. A module's `show(root, parts, signal)` draws it; the signal ends it. */
async function route() {
  const [name, ...parts] = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decode);
  const screen = SCREENS[name] ? name : "datasets";
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  keys.screen = [];
  const root = h("div", { class: `screen ${screen}` });
  for (const link of document.querySelectorAll("#bar nav a")) {
    if (link.dataset.screen === screen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  title(SCREENS[screen].title);
  if (screen !== "runs") schema().catch(() => {}); // the others begin with it
  try {
    const module = await SCREENS[screen].load();
    if (signal.aborted) return;
    fill(document.getElementById("main"), root);
    await module.show(root, parts, signal);
  } catch (error) {
    if (signal.aborted) return;
    console.error(error);
    fill(document.getElementById("main"), h("div", { class: "empty" }, icon("warning"), h("h1", null, "This could not be shown"), h("p", null, error.message), button("Try again", route)));
  }
}

function decode(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

let screenTitle = "";
/** The title of the screen, and of the tab. */
export function title(text) {
  screenTitle = text;
  document.title = `${tabPrefix}${text} · Studio`;
}
let tabPrefix = "";

// ---- The bar -----------------------------------------------------------------------------------

function bar() {
  const job = h("a", { class: "job", hidden: true });
  const gpu = h("span", { class: "gpu" });
  const offline = h("span", { class: "offline", hidden: true }, icon("warning"), "No connection");
  fill(
    document.getElementById("bar"),
    h("a", { class: "logo", href: "#/datasets", "aria-label": "Studio" }, h("img", { src: "icon.svg", alt: "", width: 20, height: 20 })),
    h("nav", { "aria-label": "Screens" }, Object.entries(SCREENS).map(([name, each]) => h("a", { href: `#/${name}`, dataset: { screen: name } }, each.title))),
    h("div", { class: "bar-status" }, offline, job, gpu, button("", showKeys, { kind: "quiet", iconName: "more", label: "Keyboard shortcuts" }), themeButton()),
  );
  const before = new Map();
  onStatus((status) => {
    offline.hidden = live.connected || document.hidden;
    const run = status.runs.find((each) => ["running", "pausing", "stopping"].includes(each.state)) ?? status.runs.find((each) => each.state === "paused");
    job.hidden = !run;
    if (run) {
      job.href = `#/runs/${encodeURIComponent(run.id)}`;
      const left = run.seconds_left ? `, ${duration(run.seconds_left)}` : "";
      fill(job, h("span", { class: `dot ${run.state}` }), h("span", { class: "name" }, run.title || run.id), h("span", { class: "numbers" }, ` ${run.step}/${run.steps}${left}`));
    }
    gpu.textContent = status.gpu?.total ? `GPU ${bytes(status.gpu.total - status.gpu.free)} of ${bytes(status.gpu.total)}` : "";
    tabPrefix = run && run.state === "running" && run.steps ? `${Math.round((100 * run.step) / run.steps)} % ` : "";
    document.title = `${tabPrefix}${screenTitle} · Studio`;
    for (const each of status.runs) {
      if (before.get(each.id) === "running" && ["done", "failed"].includes(each.state) && document.hidden && globalThis.Notification?.permission === "granted") {
        new Notification(`${each.title || each.id} is ${each.state}`);
      }
      before.set(each.id, each.state);
    }
  });
}

function themeButton() {
  const apply = (theme) => { if (theme) document.documentElement.dataset.theme = theme; };
  apply(stored.get("theme"));
  const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  return button("", () => {
    const theme = isDark() ? "light" : "dark";
    stored.set("theme", theme);
    apply(theme);
    document.dispatchEvent(new Event("theme"));
  }, { kind: "quiet", iconName: "moon", label: "Light or dark" });
}

// ---- Keys --------------------------------------------------------------------------------------

let goPressed = 0;
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.target.closest("input, textarea, select, [contenteditable], dialog")) return;
  if (event.key === "?") { event.preventDefault(); showKeys(); }
  else if (event.key === "/") {
    const search = document.querySelector("#main input[type=search]");
    if (search) { event.preventDefault(); search.focus(); }
  } else if (event.key === "g") goPressed = Date.now();
  else if (Date.now() - goPressed < 1200) {
    const found = Object.entries(SCREENS).find(([, each]) => each.key === event.key);
    goPressed = 0;
    if (found) { event.preventDefault(); location.hash = `#/${found[0]}`; }
  }
});

function showKeys() {
  const rows = [...Object.values(SCREENS).map((each) => [`g ${each.key}`, each.title]), ["/", "Search"], ["?", "This list"], ["Esc", "Close"], ...keys.screen];
  dialog("Keyboard shortcuts", h("dl", { class: "keys" }, rows.map(([key, text]) => [h("dt", null, key.split(" ").map((each) => h("kbd", null, each))), h("dd", null, text)])));
}

document.querySelector(".skip").addEventListener("click", (event) => { // not an address of a screen
  event.preventDefault();
  document.getElementById("main").focus();
});
bar();
start();
addEventListener("hashchange", route);
route();

// Runs: the queue, what runs, what ran; the address of one run or of a comparison shows that.

import { ago, api, duration, live, onStatus, path, precise } from "./core.js";
import { act } from "./actions.js";
import { badge, spark } from "./parts.js";
import { button, empty, fill, h, heading, icon, linkButton, toast } from "./dom.js";
import { compare } from "./compare.js";
import { showRun } from "./run.js";

const ACTIVE = ["running", "pausing", "paused", "stopping"];

/** Shows the list, #/runs/ID, or #/runs/compare/A,B. */
export async function show(root, parts, signal) {
  if (parts[0] === "compare") await compare(root, (parts[1] ?? "").split(","), signal);
  else if (parts.length) await showRun(root, parts[0], signal);
  else await list(root, signal);
}

async function list(root, signal) {
  const chosen = new Set();
  let older = [], more = false, drawn = "", dragging = null;
  const area = h("div", { class: "stack wide-gap" });
  const compareButton = button("Compare", () => { location.hash = `#/runs/compare/${[...chosen].map(encodeURIComponent).join(",")}`; }, { disabled: true, title: "Tick two to four runs" });
  fill(root, heading("Runs", compareButton, linkButton("New training", "#/train", { kind: "primary", iconName: "plus" })), area);

  const preview = (run) => (run.preview ? h("img", { src: `${path("api/runs", run.id, "files")}/${run.preview.split("/").map(encodeURIComponent).join("/")}`, alt: "", loading: "lazy" }) : icon("image"));
  const name = (run) => h("a", { class: "run-name", href: `#/runs/${encodeURIComponent(run.id)}` }, run.title || run.id);
  const about = (run) => h("small", { class: "ellipsis" }, [run.base_model, run.tokens.join(" "), run.datasets.join(", ")].filter(Boolean).join(" · "));

  function active(run) {
    const share = run.steps ? (100 * run.step) / run.steps : 0;
    return h("article", { class: "card active-run" },
      h("div", { class: "plate run-thumb" }, preview(run)),
      h("div", { class: "stack tight grow" },
        h("div", { class: "row" }, name(run), badge(run)), about(run),
        h("div", { class: "progress", role: "progressbar", "aria-valuenow": Math.round(share), "aria-label": "steps" }, h("div", { style: { width: `${share}%` } })),
        h("small", null, [`${run.step} of ${run.steps} steps`, run.loss !== null && `loss ${precise(run.loss)}`, run.seconds_left && `${duration(run.seconds_left)} left`, run.phase && run.phase.name !== "training" && phase(run.phase)].filter(Boolean).join(" · "))));
  }

  function queued(run, order, index) {
    const node = h("li", { class: "queue-row", draggable: true, tabindex: 0, dataset: { id: run.id }, "aria-label": `${run.title || run.id}, place ${index + 1}; Alt and arrow keys move it` },
      icon("drag"), h("span", { class: "dim" }, index + 1), h("div", { class: "grow" }, name(run), " ", about(run)),
      run.allowed.includes("start") && button("Start now", () => act(run, "start")),
      button("", () => put(order.filter((each) => each !== run.id), run), { kind: "quiet", iconName: "close", label: `Take ${run.title || run.id} out of the queue` }));
    node.addEventListener("dragstart", (event) => { dragging = run.id; event.dataTransfer.effectAllowed = "move"; event.dataTransfer.setData("text/plain", run.id); });
    node.addEventListener("dragend", () => { dragging = null; });
    node.addEventListener("dragover", (event) => { if (dragging) event.preventDefault(); });
    node.addEventListener("drop", (event) => {
      if (!dragging || dragging === run.id) return;
      event.preventDefault();
      const without = order.filter((each) => each !== dragging);
      without.splice(order.indexOf(run.id), 0, dragging);
      reorder(without);
    });
    node.addEventListener("keydown", (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!event.altKey || !step) return;
      event.preventDefault();
      const to = Math.max(0, Math.min(order.length - 1, index + step));
      const moved = order.filter((each) => each !== run.id);
      moved.splice(to, 0, run.id);
      reorder(moved, run.id);
    });
    return node;
  }

  async function reorder(order, focus) {
    try { await api("PUT", "/api/queue", { order, held: live.status.queue.held }); } catch (error) { toast(error.message, { bad: true }); }
    if (focus) setTimeout(() => area.querySelector(`[data-id="${CSS.escape(focus)}"]`)?.focus(), 600);
  }

  async function put(order, run) {
    if (run.state === "queued") { await act(run, "delete"); return; }
    await reorder(order);
  }

  function earlier(run) {
    const tick = h("input", { type: "checkbox", "aria-label": `Compare ${run.title || run.id}`, checked: chosen.has(run.id), onchange: () => {
      if (tick.checked) chosen.add(run.id); else chosen.delete(run.id);
      compareButton.disabled = chosen.size < 2 || chosen.size > 4;
    } });
    return h("tr", null, h("td", { class: "tick" }, tick), h("td", null, h("div", { class: "row nowrap-row" }, h("div", { class: "plate tiny-thumb" }, preview(run)), h("div", { class: "run-cell" }, name(run), about(run)))),
      h("td", null, badge(run)), h("td", { class: "wide-only" }, spark(run.spark)), h("td", { class: "number" }, `${run.step}`, h("span", { class: "dim" }, ` / ${run.steps}`)), h("td", { class: "number wide-only" }, precise(run.loss)),
      h("td", { class: "number wide-only" }, run.started && run.ended ? duration(run.ended - run.started) : "–"), h("td", { class: "wide-only dim" }, ago(run.ended ?? run.created)));
  }

  function draw(status) {
    const all = [...status.runs, ...older.filter((each) => !status.runs.some((one) => one.id === each.id))];
    const text = JSON.stringify([all, status.queue, more]);
    if (text === drawn || dragging) return;
    drawn = text;
    if (!all.length) {
      fill(area, empty("play", "Nothing has been trained yet", "A training starts with a dataset of a few images. It goes on when you close this page, and is found here again.", linkButton("Set up a training", "#/train", { kind: "primary" }), linkButton("Prepare images", "#/datasets")));
      return;
    }
    const now = all.filter((run) => ACTIVE.includes(run.state));
    const order = status.queue.order;
    const waiting = order.map((id) => all.find((run) => run.id === id)).filter(Boolean);
    const rest = all.filter((run) => !ACTIVE.includes(run.state) && !order.includes(run.id));
    const focused = document.activeElement?.dataset?.id;
    fill(area,
      now.length > 0 && h("section", { class: "stack" }, h("h2", null, "Now"), now.map(active)),
      (waiting.length > 0 || status.queue.held) && h("section", { class: "stack" },
        h("div", { class: "row between" }, h("h2", null, "Queue ", h("span", { class: "dim" }, waiting.length)), button(status.queue.held ? "Let the queue go on" : "Hold the queue", () => api("PUT", "/api/queue", { order, held: !status.queue.held }).catch((error) => toast(error.message, { bad: true })), { iconName: status.queue.held ? "play" : "pause" })),
        status.queue.held && h("p", { class: "note warn" }, icon("pause"), "The queue is held: nothing starts by itself."),
        waiting.length > 0 && h("ol", { class: "queue card flush" }, waiting.map((run, index) => queued(run, order, index)))),
      rest.length > 0 && h("section", { class: "stack" }, h("h2", null, "Earlier"),
        h("div", { class: "card flush scroll" }, h("table", { class: "runs-table" }, h("thead", null, h("tr", null, ["", "Run", "State", "Loss", "Steps", "Last loss", "Time", "Ended"].map((each, index) => h("th", { class: [3, 5, 6, 7].includes(index) ? "wide-only" : "" }, each || h("span", { class: "visually-hidden" }, "Compare"))))), h("tbody", null, rest.map(earlier)))),
        more && h("div", null, button("Older runs", load))));
    if (focused) area.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  }

  async function load() {
    const last = older.at(-1)?.id;
    const found = await api("GET", `/api/runs?limit=50${last ? `&before=${encodeURIComponent(last)}` : ""}`, undefined, { signal });
    older = [...older, ...found.runs];
    more = found.more;
    if (live.status) draw(live.status);
  }
  await load();
  onStatus(draw, signal);
}

/** "loading 3 of 8" */
export const phase = (each) => `${each.name}${each.of > 1 ? ` ${each.done ?? 0} of ${each.of}` : ""}`;

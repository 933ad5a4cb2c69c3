// The runs: those that wait, the one that trains, and earlier ones.

import { ago, api, count, debounced, duration, live, onStatus, path, precise, refresh } from "./core.js";
import { button, empty, fill, h, icon, linkButton, menu, toast } from "./dom.js";
import { keys, title } from "./main.js";
import { LIVE, clock, command, keyed, lostSteps, phaseText, remove, sparkline, stateMark, took } from "./states.js";

const MOST = 4; // runs in a comparison

/** Shows the list, a run's page, or a comparison. */
export async function show(root, parts, signal) {
  if (parts[0] === "compare" && parts.length > 1) return (await import("./compare.js")).show(root, parts.slice(1), signal);
  if (parts.length) return (await import("./run.js")).show(root, parts[0], signal);
  return list(root, signal);
}

const address = (id) => `#/runs/${encodeURIComponent(id)}`;

function list(root, signal) {
  title("Runs");
  import("./run.js").catch(() => {}); // most likely the next one
  keys.screen = [["Alt ↑", "A waiting run: earlier"], ["Alt ↓", "A waiting run: later"]];
  const ticked = new Set(), more = [];
  let older = true;
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search the runs", class: "search", oninput: () => draw() });
  const compare = h("a", { class: "button", role: "link" }, icon("grid"), h("span", null, "Compare"));
  const hint = h("span", { class: "dim compare-hint" });
  const waiting = queue(signal);
  const now = h("div", { class: "stack" }), earlier = h("div", { class: "run-list", role: "list" });
  const nowTitle = h("h2"), nowPlace = h("section", { class: "stack tight" }, nowTitle, now);
  const moreButton = button("Show earlier runs", loadMore, { kind: "quiet" });
  const earlierPlace = h("section", { class: "stack tight" }, h("div", { class: "section-heading" }, h("h2", null, "Earlier"), hint, compare, search), earlier, h("div", { class: "row" }, moreButton));
  const body = h("div", { class: "stack wide-gap" }, nowPlace, waiting.node, earlierPlace);
  const nothing = empty("play", "No runs yet", "A run trains a LoRA on a dataset. While it trains you see its loss, previews and log here, and you can pause or stop it at any time.", linkButton("Train", "#/train", { kind: "primary", iconName: "play" }), linkButton("Datasets", "#/datasets"));
  fill(root, h("div", { class: "heading" }, h("h1", null, "Runs"), linkButton("New run", "#/train", { iconName: "plus" })), body, nothing);
  const showNow = keyed(now, runningCard), showEarlier = keyed(earlier, (run) => earlierRow(run, ticked, draw));

  async function loadMore() {
    moreButton.disabled = true;
    try {
      const last = more.at(-1)?.id ?? live.status.runs.slice(0, 50).at(-1)?.id;
      const answer = await api("GET", `/api/runs?limit=50&before=${encodeURIComponent(last)}`, undefined, { signal });
      more.push(...answer.runs);
      older = answer.more;
      draw();
    } catch (error) { if (!signal.aborted) toast(error.message, { bad: true }); }
    moreButton.disabled = false;
  }

  function draw(status = live.status) {
    if (!status) return;
    const known = new Set(status.runs.map((each) => each.id));
    const all = [...status.runs, ...more.filter((each) => !known.has(each.id))];
    const order = status.queue.order, words = search.value.trim().toLowerCase();
    const running = all.filter((each) => (LIVE.includes(each.state) || each.state === "paused") && !order.includes(each.id));
    const past = all.filter((each) => !running.includes(each) && !order.includes(each.id) && each.state !== "queued");
    const found = past.filter((each) => !words || [each.id, each.title, each.note, each.base_model, ...each.datasets, ...each.tokens].join(" ").toLowerCase().includes(words));
    body.hidden = all.length === 0;
    nothing.hidden = all.length > 0;
    nowPlace.hidden = running.length === 0;
    nowTitle.textContent = running.some((each) => each.state !== "paused") ? "Running" : "Paused";
    earlierPlace.hidden = past.length === 0;
    showNow(running);
    waiting.update(order.map((id) => all.find((each) => each.id === id)).filter(Boolean), status.queue.held, running.length > 0);
    showEarlier(found);
    moreButton.hidden = !(older && status.runs.length >= 50);
    for (const id of ticked) if (!past.some((each) => each.id === id)) ticked.delete(id);
    const enough = ticked.size >= 2 && ticked.size <= MOST;
    if (enough) compare.href = `#/runs/compare/${[...ticked].map(encodeURIComponent).join("/")}`;
    else compare.removeAttribute("href");
    compare.setAttribute("aria-disabled", String(!enough));
    compare.hidden = past.length < 2;
    hint.hidden = past.length < 2;
    hint.textContent = ticked.size ? `${ticked.size} ticked${ticked.size < 2 ? ", tick one more" : ticked.size > MOST ? `, at most ${MOST}` : ""}` : "Tick two to four to compare";
  }
  onStatus(draw, signal);
  const timer = setInterval(() => { for (const each of root.querySelectorAll("[data-sign]")) each.textContent = ago(Number(each.dataset.sign)); }, 1000);
  signal.addEventListener("abort", () => clearInterval(timer));
}

// ---- A run that is trained --------------------------------------------------------------------

function runningCard() {
  const head = h("div", { class: "row" }), facts = h("p", { class: "run-facts" }), bar = h("div"), spark = h("div", { class: "spark-place" }), plate = h("div", { class: "plate small-plate" });
  const warn = h("div");
  const link = h("a", { class: "card link running-card" }, plate, h("div", { class: "running-text" }, head, facts, h("div", { class: "progress" }, bar), warn), spark);
  let file = "", curve = "";
  return {
    node: link,
    update(run) {
      link.href = address(run.id);
      fill(head, h("b", { class: "run-title" }, run.title), stateMark(run));
      const training = !run.phase || run.phase.name === "training";
      fill(facts, [
        h("span", null, `step ${run.step.toLocaleString("en")} of ${run.steps.toLocaleString("en")}`),
        !training && run.phase.of && h("span", null, phaseText(run)),
        run.loss !== null && h("span", null, `loss ${precise(run.loss)}`),
        run.seconds_per_step !== null && h("span", null, `${duration(run.seconds_per_step)} a step`),
        run.seconds_left !== null && h("span", null, `${duration(run.seconds_left)} left, done ${clock(Date.now() / 1000 + run.seconds_left)}`),
        run.last_sign && h("span", null, "last sign of life ", h("span", { dataset: { sign: run.last_sign } }, ago(run.last_sign))),
      ].filter(Boolean));
      bar.style.width = `${run.steps ? (100 * run.step) / run.steps : 0}%`;
      fill(warn, run.stuck && h("p", { class: "warn-text" }, icon("warning"), `It does not answer: open it to ${lostSteps(run).toLowerCase()}`));
      if (run.preview !== file || !plate.firstChild) {
        file = run.preview;
        fill(plate, file ? h("img", { src: path("api/runs", run.id, "files", file), alt: "Newest preview" }) : icon("image"));
      }
      const next = String(run.spark);
      if (next !== curve) { curve = next; fill(spark, sparkline(run.spark, 200, 56)); }
    },
  };
}

// ---- The queue --------------------------------------------------------------------------------

function queue(signal) {
  let order = [], dragging = null, wanted = null;
  const rows = h("ol", { class: "queue" }), said = h("p", { class: "error", role: "alert" }), spoken = h("p", { class: "visually-hidden", "aria-live": "polite" });
  const hold = h("input", { type: "checkbox", role: "switch" });
  const text = h("p", { class: "dim" });
  const node = h("section", { class: "stack tight" }, h("div", { class: "section-heading" }, h("h2", null, "Queue"), h("label", { class: "row hold" }, hold, "Hold queue")), rows, text, said, spoken);
  const send = async (content) => {
    said.textContent = "";
    try { await api("PUT", "/api/queue", content); } catch (error) { said.textContent = error.message; }
    wanted = null;
    await refresh();
  };
  const sendOrder = debounced((next) => send({ order: next }), 250);
  hold.addEventListener("change", () => send({ held: hold.checked }));
  const render = keyed(rows, create);

  function move(id, by) {
    const index = order.findIndex((each) => each.id === id), to = index + by;
    if (to < 0 || to >= order.length) return;
    order.splice(to, 0, ...order.splice(index, 1));
    wanted = order.map((each) => each.id);
    const active = document.activeElement;
    render(order);
    active?.focus();
    spoken.textContent = `${order[to].title}: place ${to + 1} of ${order.length}`;
    sendOrder(wanted);
  }

  function create(first) {
    const { id } = first;
    const place = h("span", { class: "place dim" }), name = h("a", { class: "run-title", href: address(id) }), facts = h("span", { class: "dim run-detail" });
    const handle = button("", null, { kind: "quiet", iconName: "drag", label: `Move ${first.title}: drag, or Alt and the arrow keys` });
    handle.classList.add("handle");
    const start = button("Start now", async () => {
      start.disabled = true;
      said.textContent = "";
      try { await command(id, first.state === "queued" ? "start" : "resume"); await refresh(); } catch (error) { said.textContent = error.message; }
      start.disabled = false;
    }, { kind: "small" });
    const options = menu("", [
      { text: "Earlier", detail: "Alt ↑", onclick: () => move(id, -1) },
      { text: "Later", detail: "Alt ↓", onclick: () => move(id, 1) },
      { text: "Open", onclick: () => { location.hash = address(id); } },
      null,
      { text: "Remove from the queue", danger: true, onclick: async () => {
        try {
          if (order.find((each) => each.id === id)?.state === "queued") await remove(first, refresh);
          else await api("PUT", "/api/queue", { order: order.map((each) => each.id).filter((each) => each !== id) });
          await refresh();
        } catch (error) { said.textContent = error.message; }
      } },
    ], { kind: "quiet", iconName: "more", label: `More about ${first.title}` });
    const row = h("li", { class: "queue-row" }, handle, place, h("div", { class: "queue-text" }, name, facts), start, options);
    row.addEventListener("keydown", (event) => {
      const by = event.altKey && { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (by) { event.preventDefault(); move(id, by); }
    });
    handle.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      handle.focus();
      dragging = id;
      row.classList.add("dragged");
      // At the document: a row that changes its place loses what is captured for it.
      const ends = new AbortController();
      document.addEventListener("pointermove", drag, { signal: ends.signal });
      for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { ends.abort(); dragging = null; row.classList.remove("dragged"); }, { signal: ends.signal });
    });
    const drag = (event) => {
      const over = [...rows.children].findIndex((each) => { const box = each.getBoundingClientRect(); return event.clientY >= box.top && event.clientY < box.bottom; });
      const index = order.findIndex((each) => each.id === id);
      if (over >= 0 && over !== index) move(id, over - index);
    };
    return {
      node: row,
      update(run) {
        first = run;
        place.textContent = String(order.findIndex((each) => each.id === id) + 1);
        name.textContent = run.title;
        facts.textContent = [run.state === "queued" ? null : `goes on from step ${(run.checkpoint ?? run.step).toLocaleString("en")}`, run.datasets.join(", "), run.base_model, count(run.steps, "step")].filter(Boolean).join(" · ");
      },
    };
  }
  return {
    node,
    update(runs, held, busy) {
      if (dragging) return;
      order = wanted ? wanted.map((id) => runs.find((each) => each.id === id)).filter(Boolean) : runs;
      hold.checked = held;
      render(order);
      rows.hidden = order.length === 0;
      node.hidden = order.length === 0 && !held && !busy;
      text.textContent = order.length === 0 ? (held ? "The queue is held: runs that are added wait here." : "Nothing waits. Runs that are added start when this one is done.") : held ? "Held: nothing starts by itself." : "";
      text.hidden = !text.textContent;
    },
  };
}

// ---- Earlier runs -----------------------------------------------------------------------------

function earlierRow(first, ticked, changed) {
  const tick = h("input", { type: "checkbox", "aria-label": `Compare ${first.title}`, onchange: () => { tick.checked ? ticked.add(first.id) : ticked.delete(first.id); changed(); } });
  const link = h("a", { class: "run-row" });
  const plate = h("span", { class: "plate row-plate" });
  let shown = "", file;
  return {
    node: h("div", { class: "run-item", role: "listitem" }, h("label", { class: "tick" }, tick), link),
    update(run) {
      first = run;
      tick.checked = ticked.has(run.id);
      const next = JSON.stringify([run.title, run.state, run.freed, run.step, run.steps, run.loss, run.spark, run.why, run.preview, run.ended]);
      if (next === shown) return;
      shown = next;
      link.href = address(run.id);
      if (file !== run.preview) { file = run.preview; fill(plate, file ? h("img", { src: path("api/runs", run.id, "files", file), alt: "", loading: "lazy" }) : icon("image")); }
      fill(
        link, plate,
        h("span", { class: "run-name" }, h("b", { class: "run-title" }, run.title), h("small", null, [run.datasets.join(", "), run.base_model].filter(Boolean).join(" · "))),
        stateMark(run),
        h("span", { class: "spark-place" }, sparkline(run.spark)),
        h("span", { class: "run-number" }, h("b", null, run.step.toLocaleString("en")), h("small", null, run.step === run.steps || !run.steps ? "steps" : `of ${run.steps.toLocaleString("en")} steps`)),
        h("span", { class: "run-number" }, h("b", null, precise(run.loss)), h("small", null, "loss")),
        h("span", { class: "run-number when" }, h("b", null, took(run)), h("small", null, run.ended ? clock(run.ended) : "")),
      );
    },
  };
}

// Requests, the live status, the stream, formats.

export class ApiError extends Error {
  constructor(status, content) {
    super([content.error, content.what_to_do].filter(Boolean).join("; ") || `the server answered ${status}`);
    Object.assign(this, { status, content, field: content.field });
  }
}

/** A request; the answer's JSON. `body` is JSON, or a Blob or text that is sent as it is. */
export async function api(method, path, body, { headers = {}, signal, keepalive } = {}) {
  const raw = body instanceof Blob || typeof body === "string";
  let response;
  try {
    response = await fetch(path, {
      method, signal, keepalive,
      headers: { "X-Studio": "1", ...(raw || body === undefined ? {} : { "Content-Type": "application/json" }), ...headers },
      body: raw || body === undefined ? body : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { error: "the server does not answer", what_to_do: "see whether it still runs" });
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new ApiError(response.status, content);
  return content;
}

/** A path from parts that are escaped, for example path("api/datasets", name). */
export const path = (...parts) => "/" + parts.map((each) => String(each).split("/").map(encodeURIComponent).join("/")).join("/");
/** A new key for a request that must be done only once. */
export const newKey = () => crypto.getRandomValues(new Uint32Array(3)).join("-");

let known = null;
/** The server's /api/schema, read once. */
export async function schema() {
  known ??= api("GET", "/api/schema").catch((error) => { known = null; throw error; });
  return known;
}

// ---- The live status -------------------------------------------------------------------------

export const live = { status: null, connected: false };
const listeners = new Set();

/** Calls `listener(status)` now, if it is known, and after each change, until the signal. */
export function onStatus(listener, signal) {
  listeners.add(listener);
  signal?.addEventListener("abort", () => listeners.delete(listener));
  if (live.status) listener(live.status);
}

function publish(status) {
  live.status = status;
  for (const each of [...listeners]) each(status);
}

let source = null;
let watched = null; // {run, after, listener}
let polling = null;

/** Receives the events of one run from a byte offset on, until the signal; the tab's only stream. */
export function watchRun(run, after, listener, signal) {
  const mine = { run, after, listener };
  watched = mine;
  open();
  signal.addEventListener("abort", () => {
    if (watched === mine) { watched = null; open(); }
  });
}

function open() {
  source?.close();
  clearInterval(polling);
  if (document.hidden) { // a browser keeps only six connections to one server, for all tabs
    source = null;
    polling = setInterval(refresh, 10000);
    return;
  }
  const mine = watched;
  const query = mine ? `?run=${encodeURIComponent(mine.run)}&after=${mine.after}` : "";
  const stream = (source = new EventSource(`/api/events${query}`));
  const connected = (value) => {
    if (stream !== source || live.connected === value) return;
    live.connected = value;
    if (live.status) publish(live.status);
  };
  stream.addEventListener("open", () => connected(true));
  stream.addEventListener("error", () => {
    connected(false);
    if (stream === source && stream.readyState === EventSource.CLOSED) setTimeout(async () => {
      if (mine) await api("GET", path("api/runs", mine.run)).catch(({ status }) => { if (status === 404 && watched === mine) watched = null; }); // a run that is gone
      if (stream === source) open();
    }, 2000);
  });
  stream.addEventListener("status", (event) => { connected(true); publish(JSON.parse(event.data)); });
  stream.addEventListener("run", (event) => {
    if (mine && mine === watched) {
      mine.after = Number(event.lastEventId);
      mine.listener(JSON.parse(event.data));
    }
  });
}

/** Reads the status once. */
export async function refresh() {
  try { publish(await api("GET", "/api/status")); } catch { /* the stream reports it */ }
}

export function start() {
  document.addEventListener("visibilitychange", open);
  addEventListener("pagehide", () => source?.close());
  open();
}

// ---- Formats -----------------------------------------------------------------------------------

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  for (const unit of ["B", "kB", "MB"]) {
    if (count < 1000) return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1000;
  }
  return `${count < 100 ? count.toFixed(1) : Math.round(count)} GB`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds < 10 ? Math.round(seconds * 10) / 10 : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")}`;
}

export function ago(time) {
  if (!time) return "–";
  const seconds = Math.max(0, Date.now() / 1000 - time);
  if (seconds < 5) return "now";
  return seconds < 86400 ? `${duration(Math.round(seconds))} ago` : new Date(time * 1000).toLocaleDateString();
}

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
export const precise = (value) => (value === null || value === undefined ? "–" : Number(value).toPrecision(3));

/** A value that stays in this browser. */
export const stored = {
  get(name, otherwise) { try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; } },
  set(name, value) { try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* full or forbidden */ } },
};

/** Calls `call` once, `wait` ms after the last request. */
export function debounced(call, wait) {
  let timer;
  const later = (...given) => { clearTimeout(timer); timer = setTimeout(() => call(...given), wait); };
  later.cancel = () => clearTimeout(timer);
  return later;
}

// Panels without charts: the page map, tables, the requests' timelines. All text goes in as text, never as HTML.

import { colour, duration, number } from "./charts.js";

export const byId = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// parts: {name, colour, value}
export function drawLegend(list, parts) {
  list.replaceChildren(
    ...parts.map((part) => {
      const item = element("li", "", "");
      const swatch = element("i", "swatch");
      swatch.style.background = part.colour;
      item.append(swatch, part.name);
      if (part.value !== undefined) item.append(element("b", "", part.value));
      return item;
    }),
  );
}

const KINDS = { free: "free", cached: "cached prefixes", kv: "KV of running requests", adapter: "adapters" };

export function drawPages(engine) {
  const { num_pages, pages_per_cell, kinds, runs } = engine.pages;
  const canvas = byId("pages");
  const numCells = Math.ceil(num_pages / pages_per_cell);
  const width = Math.max(80, canvas.clientWidth), scale = window.devicePixelRatio || 1;
  const cell = Math.max(4, Math.min(18, Math.floor(Math.sqrt((width * 240) / numCells))));
  const columns = Math.max(1, Math.floor(width / cell));
  const height = Math.ceil(numCells / columns) * cell;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const gap = cell > 5 ? 1 : 0.5;
  let at = 0;
  for (let i = 0; i < runs.length; i += 2) {
    context.fillStyle = colour(kinds[runs[i]]);
    for (const end = at + runs[i + 1]; at < end; at++) {
      context.fillRect((at % columns) * cell, Math.floor(at / columns) * cell, cell - gap, cell - gap);
    }
  }
  const { stats } = engine;
  const counts = { kv: stats.num_kv_pages, adapter: stats.num_adapter_pages, cached: stats.num_cached_pages, free: stats.num_free_pages };
  const share = (count) => `${number.format(count)} (${Math.round((100 * count) / num_pages)} %)`;
  const parts = Object.entries(counts).map(([kind, count]) => ({ name: KINDS[kind], colour: colour(kind), value: share(count) }));
  drawLegend(byId("pages-legend"), parts);
  canvas.setAttribute("aria-label", `Page pool: ${parts.map((part) => `${part.name} ${part.value}`).join(", ")}`);
  byId("pages-note").textContent =
    `${number.format(num_pages)} pages of ${engine.page_size} tokens` +
    (pages_per_cell > 1 ? `; a square is ${pages_per_cell} neighbours and shows the busiest` : "");
}

// cells: names, numbers, and {text} of what stands with numbers.
function fillTable(id, rows) {
  byId(id).tBodies[0].replaceChildren(
    ...rows.map((cells) => {
      const row = element("tr");
      row.append(...cells.map((cell) => element("td", typeof cell === "string" ? "" : "number", typeof cell === "number" ? number.format(cell) : (cell.text ?? cell))));
      return row;
    }),
  );
}

export const BASE = "base model";
const MAX_ROWS = 12;

export function drawQueue(data) {
  const { running, waiting, requests, now, stats } = data.engine;
  const names = [...new Set([...Object.keys(waiting), ...Object.keys(running)])];
  names.sort((a, b) => (waiting[b] ?? 0) - (waiting[a] ?? 0) || (running[b] ?? 0) - (running[a] ?? 0));
  const oldest = requests.find((request) => request.status === "waiting");
  byId("queue-summary").textContent = stats.num_waiting
    ? `${number.format(stats.num_waiting)} wait` + (oldest ? `, the first for ${duration(now - oldest.arrival_at)}` : "")
    : "Nothing waits.";
  fillTable("queue", names.slice(0, MAX_ROWS).map((name) => [name || BASE, running[name] ?? 0, waiting[name] ?? 0]));
  byId("queue").hidden = names.length === 0;
}

const DEADLINES = { ttft: "first token", tpot: "pace of tokens", e2e: "last token" };

// Deadlines of requests that are over, and how many live ones have some.
export function drawDeadlines({ deadlines, requests, now }) {
  const kinds = Object.keys(DEADLINES).filter((kind) => deadlines[`${kind}_met`] + deadlines[`${kind}_missed`]);
  fillTable("deadlines", kinds.map((kind) => {
    const met = deadlines[`${kind}_met`], missed = deadlines[`${kind}_missed`];
    // Rounded down: only all is 100 %.
    return [DEADLINES[kind], met, missed, { text: `${Math.floor((1000 * met) / (met + missed)) / 10} %` }];
  }));
  byId("deadlines").hidden = kinds.length === 0;
  const next = requests.filter((request) => LIVE.includes(request.status)).map(nextDue).filter((due) => due !== null);
  const soonest = Math.min(...next) - now;
  byId("deadlines-summary").textContent = next.length
    ? `${number.format(next.length)} live with deadlines, the most urgent ` + (soonest >= 0 ? `due in ${duration(soonest)}` : `${duration(-soonest)} late`)
    : kinds.length ? "No live request has deadlines." : "No request had deadlines so far.";
}

function nextDue(request) {
  return (request.first_token_at === null ? request.first_due_at : null) ?? request.last_due_at;
}

export function drawAdapters(engine) {
  const { adapters, stats } = engine;
  const numHost = adapters.filter((adapter) => !adapter.is_resident).length;
  byId("adapters-summary").textContent = adapters.length
    ? `${number.format(stats.num_resident_adapters)} in the pool, ${number.format(numHost)} in host memory, ${number.format(stats.num_adapter_loads)} loads so far`
    : "No adapters are registered.";
  const where = (adapter) => (adapter.is_resident ? (adapter.running ? "pool, in use" : "pool, idle") : "host") + (adapter.is_pinned ? ", pinned" : "");
  fillTable("adapters", adapters.map((adapter) => [adapter.name, where(adapter), adapter.num_pages]));
  byId("adapters").hidden = adapters.length === 0;
}

const SHOWN = 24;
const LIVE = ["waiting", "running"];

export class Requests {
  constructor(list) {
    this.list = list;
    this.show = "all";
    this.rows = new Map();
  }

  update(engine) {
    const isLive = (request) => LIVE.includes(request.status);
    const chosen = engine.requests.filter((request) => this.show === "all" || isLive(request) === (this.show === "live"));
    // A long queue shall not push what runs out of sight.
    const rank = (request) => ["running", "waiting"].indexOf(request.status) >>> 0;
    chosen.sort((a, b) => rank(a) - rank(b) || b.arrival_at - a.arrival_at);
    chosen.length = Math.min(chosen.length, SHOWN);
    const longest = Math.max(...chosen.map((request) => (request.finished_at ?? engine.now) - request.arrival_at));
    const kept = new Map();
    for (const request of chosen) {
      const key = `${request.id} ${request.arrival_at}`;
      const row = this.rows.get(key) ?? newRow(request);
      fillRow(row, request, engine.now, longest);
      kept.set(key, row);
    }
    this.rows = kept;
    // Rows stay the same elements, so that a selection in them survives.
    [...kept.values()].forEach((row, i) => {
      if (this.list.children[i] !== row.item) this.list.insertBefore(row.item, this.list.children[i] ?? null);
    });
    while (this.list.children.length > kept.size) this.list.lastChild.remove();
    byId("requests-empty").hidden = kept.size > 0;
  }
}

function newRow(request) {
  const row = {
    item: element("li"),
    id: element("span", "id mono", request.id),
    adapter: element("span", "adapter", request.adapter ?? BASE),
    status: element("span", "pill"),
    track: element("span", "track"),
    fill: element("span", "fill"),
    total: element("span", "number"),
    story: element("span", "story"),
    spans: ["queued", "prefill", "decode"].map((name) => element("i", `span ${name}`)),
    marks: ["first", "last"].map(() => element("i", "mark")),
  };
  row.id.title = request.id;
  row.adapter.title = request.adapter ?? BASE;
  row.fill.append(...row.spans);
  row.track.append(row.fill, ...row.marks);
  row.track.setAttribute("aria-hidden", "true");
  row.item.append(row.id, row.adapter, row.status, row.track, row.total, row.story);
  return row;
}

// longest: duration that fills the track, in seconds.
function fillRow(row, request, now, longest) {
  const end = request.finished_at ?? now;
  const scheduled = request.scheduled_at ?? end, first = request.first_token_at ?? end;
  const total = Math.max(1e-6, end - request.arrival_at);
  row.fill.style.width = `${(100 * total) / Math.max(longest, total)}%`;
  [scheduled - request.arrival_at, first - scheduled, end - first].forEach((span, i) => {
    row.spans[i].style.width = `${(100 * Math.max(0, span)) / total}%`;
    row.spans[i].hidden = span <= 0;
  });
  const marks = [[request.first_due_at, request.first_token_at ?? end], [request.last_due_at, end]];
  marks.forEach(([due, came], i) => {
    const at = due === null ? Infinity : (due - request.arrival_at) / Math.max(longest, total);
    row.marks[i].hidden = at > 1;
    row.marks[i].style.left = `${100 * Math.min(at, 1)}%`;
    row.marks[i].className = came > due ? "mark missed" : "mark";
  });
  row.status.textContent = request.status;
  row.status.className = `pill ${request.status === "error" ? "bad" : request.status === "running" ? "good" : ""}`;
  row.total.textContent = duration(total);
  row.story.textContent = request.story;
}

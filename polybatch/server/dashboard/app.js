// The page asks for data, twice a second while it is looked at, and hands it to the panels.

import { Buckets, Lines, StackedBars, colour, duration, number, quantile } from "./charts.js";
import { BASE, Requests, byId, drawAdapters, drawDeadlines, drawLegend, drawPages, drawQueue } from "./panels.js";

const POLL_MS = 500, RETRY_MS = 2000;
const MAX_STEPS = 120, MAX_COLOURED = 7;
const RATE_WINDOW_S = 5, HISTOGRAM_WINDOW_S = 60;

let steps = [], samples = [], latest = null, hovered = null;
let numRestarts = null, isPaused = false, mode = "phase", period = "minute";

const requests = new Requests(byId("requests"));
const hover = (index) => {
  hovered = index;
  drawStepLegend();
};
const decodeChart = new StackedBars(byId("decode"), "steps", hover);
const prefillChart = new StackedBars(byId("prefill"), "steps", hover);
const timeChart = new Lines(byId("times"), "steps");
const ttftChart = new Buckets(byId("ttft")), itlChart = new Buckets(byId("itl"));
let shown = { decode: [], prefill: [], lines: [] };

async function poll() {
  if (!isPaused && !document.hidden) {
    try {
      const after = steps.length ? steps[steps.length - 1].index : -1;
      const response = await fetch(`dashboard/data?after=${after}`, { cache: "no-store" });
      if (!response.ok) throw new Error(`the server answered with status ${response.status}`);
      take(await response.json());
      byId("trouble").hidden = true;
    } catch (error) {
      byId("trouble").textContent = `No data: ${error.message}. Trying again.`;
      byId("trouble").hidden = false;
      setTimeout(poll, RETRY_MS);
      return;
    }
  }
  setTimeout(poll, POLL_MS);
}

function take(data) {
  if (data.num_restarts !== numRestarts) {
    // Steps that were asked for by a number of an earlier process mean nothing.
    const isFirst = numRestarts === null;
    numRestarts = data.num_restarts;
    steps = [];
    samples = [];
    if (!isFirst) return;
  }
  latest = data;
  steps = steps.concat(data.engine?.steps ?? []).slice(-MAX_STEPS);
  const at = performance.now() / 1000;
  samples.push({ at, stats: data.engine?.stats, ttft: data.ttft.counts, itl: data.itl.counts });
  // The oldest one kept lies just before the window, as what to count from.
  while (samples.length > 2 && at - samples[1].at > HISTOGRAM_WINDOW_S) samples.shift();
  draw();
}

function draw() {
  if (latest === null) return;
  drawHeader();
  drawLatency();
  if (latest.engine === null) return;
  drawTiles();
  drawSteps();
  drawPages(latest.engine);
  drawQueue(latest);
  drawDeadlines(latest.engine);
  drawAdapters(latest.engine);
  requests.update(latest.engine);
}

function drawHeader() {
  byId("model").textContent = latest.model;
  const state = byId("state");
  const text = latest.is_ready ? "ready" : latest.state === "ready" ? "no answer" : latest.state;
  if (state.textContent !== text) state.textContent = text;
  state.className = `pill ${latest.is_ready ? "good" : "bad"}`;
  state.title = latest.reason;
  const minutes = Math.floor(latest.uptime_s / 60), hours = Math.floor(minutes / 60);
  const restarts = latest.num_restarts ? `, engine restarted ${latest.num_restarts}×` : "";
  byId("uptime").textContent = `version ${latest.version}, up ${hours ? `${hours} h ` : ""}${minutes % 60} min${restarts}`;
}

function rate(field) {
  const newest = samples[samples.length - 1];
  const oldest = samples.find((sample) => sample.stats && newest.at - sample.at <= RATE_WINDOW_S);
  const span = newest.at - (oldest?.at ?? newest.at);
  return span > 0.3 && newest.stats ? (newest.stats[field] - oldest.stats[field]) / span : null;
}

function tile(id, value, unit) {
  byId(id).textContent = value;
  if (unit) {
    const small = document.createElement("small");
    small.textContent = unit;
    byId(id).append(small);
  }
}

function drawTiles() {
  const { stats, kv_usage } = latest.engine;
  const perSecond = (value) => (value === null ? "–" : number.format(Math.round(value)));
  const recent = steps.slice(-40).map((step) => step.duration_s).sort((a, b) => a - b);
  const median = recent.length ? recent[Math.floor(recent.length / 2)] : null;
  const queried = stats.num_prefix_query_tokens;
  tile("tile-running", number.format(stats.num_running), `of ${number.format(latest.engine.max_num_seqs)}`);
  tile("tile-waiting", number.format(stats.num_waiting));
  tile("tile-in", perSecond(rate("num_prefill_tokens")), "/s");
  tile("tile-out", perSecond(rate("num_output_tokens")), "/s");
  tile("tile-step", duration(median));
  tile("tile-kv", Math.round(100 * kv_usage), "%");
  tile("tile-hits", queried ? Math.round((100 * stats.num_prefix_hit_tokens) / queried) : "–", queried ? "%" : "");
  tile("tile-preempted", number.format(stats.num_preemptions));
}

// What a phase's tokens are made of: {name, colour, values}, by phase or by adapter.
function parts(phase, names) {
  const of = (name) => (step) => step[phase][name] ?? 0;
  const all = (step) => Object.values(step[phase]).reduce((total, count) => total + count, 0);
  if (mode === "phase") return [{ name: phase, colour: colour(phase), values: steps.map(all) }];
  const { base, coloured, others } = names;
  const found = coloured.map((name, i) => ({ name, colour: colour(`c${i + 1}`), values: steps.map(of(name)) }));
  if (base) found.unshift({ name: BASE, colour: colour("c0"), values: steps.map(of("")) });
  if (others.length) {
    const rest = (step) => others.reduce((total, name) => total + of(name)(step), 0);
    found.push({ name: others.length === 1 ? "1 other" : `${others.length} others`, colour: colour("c8"), values: steps.map(rest) });
  }
  return found;
}

// Adapters of the steps shown; those with most tokens have colours of their own.
function adapterNames() {
  const totals = new Map();
  for (const step of steps) {
    for (const counts of [step.decode, step.prefill]) {
      for (const [name, count] of Object.entries(counts)) totals.set(name, (totals.get(name) ?? 0) + count);
    }
  }
  const names = [...totals.keys()].filter(Boolean).sort((a, b) => totals.get(b) - totals.get(a) || a.localeCompare(b));
  // In alphabetical order a name keeps its colour as long as the set stays.
  return { base: totals.has(""), coloured: names.slice(0, MAX_COLOURED).sort(), others: names.slice(MAX_COLOURED) };
}

function drawSteps() {
  const indices = steps.map((step) => step.index);
  const lines = [{ name: "measured", colour: colour("time"), values: steps.map((step) => step.duration_s * 1000) }];
  if (steps.some((step) => step.predicted_s !== undefined)) {
    const values = steps.map((step) => (step.predicted_s === undefined ? null : step.predicted_s * 1000));
    lines.push({ name: "predicted", colour: colour("predicted"), values, dash: [6, 4] });
  }
  const names = adapterNames();
  shown = { decode: parts("decode", names), prefill: parts("prefill", names), lines };
  decodeChart.update(indices, shown.decode);
  prefillChart.update(indices, shown.prefill);
  timeChart.update(indices, lines);
  drawStepLegend();
}

// How far predictions of the last steps were off.
function predictionNote(costs) {
  if (!costs?.num_steps) return "";
  const percent = (share) => `${+(100 * share).toPrecision(2)} %`;
  const source = costs.is_calibrated ? "calibrated" : "learned";
  return `. Predictions (${source}) are off by ${percent(costs.median_error)}, 95 % of them by at most ${percent(costs.p95_error)}`;
}

// Numbers of the step under the pointer, else of the last.
function drawStepLegend() {
  const at = hovered ?? steps.length - 1;
  const step = steps[at];
  if (!step) return;
  const counted = (count, one, many) => (count ? `, ${number.format(count)} ${count === 1 ? one : many}` : "");
  byId("step-note").textContent =
    `Step ${number.format(step.index)}: ${number.format(step.num_seqs)} ${step.num_seqs === 1 ? "sequence" : "sequences"}, ` +
    shown.lines.map((line) => `${line.name} ${duration(line.values[at] === null ? null : line.values[at] / 1000)}`).join(", ") +
    counted(step.num_loads, "adapter loaded", "adapters loaded") +
    counted(step.num_preempted, "sequence preempted", "sequences preempted") +
    predictionNote(latest.engine.costs);
  const entries = mode === "phase" ? [...shown.decode, ...shown.prefill] : shown.decode;
  const value = (part, i) =>
    mode === "phase" ? part.values[at] : part.values[at] + shown.prefill[i].values[at];
  const legend = entries.map((part, i) => ({ name: part.name, colour: part.colour, value: number.format(value(part, i)) }));
  if (shown.lines.length > 1) legend.push(...shown.lines.map(({ name, colour }) => ({ name, colour })));
  drawLegend(byId("steps-legend"), legend);
}

function drawLatency() {
  for (const [name, chart, fill] of [["ttft", ttftChart, "prefill"], ["itl", itlChart, "decode"]]) {
    const { bounds, counts } = latest[name];
    const before = period === "minute" ? samples[0][name] : counts.map(() => 0);
    const histogram = { bounds, counts: counts.map((count, i) => count - before[i]) };
    chart.update(histogram, colour(fill));
    const total = histogram.counts.reduce((sum, count) => sum + count, 0);
    byId(`${name}-quantiles`).textContent = total
      ? [50, 95, 99].map((p) => `p${p} ${duration(quantile(histogram, p / 100))}`).join(", ") + ` of ${number.format(total)}`
      : "none in this period";
  }
}

// Buttons of which one is pressed. choices: button id -> what to do.
function choice(choices) {
  for (const [id, act] of Object.entries(choices)) {
    byId(id).addEventListener("click", () => {
      for (const other of Object.keys(choices)) byId(other).setAttribute("aria-pressed", String(other === id));
      act();
      draw();
    });
  }
}

choice({ "by-phase": () => (mode = "phase"), "by-adapter": () => (mode = "adapter") });
choice({ "last-minute": () => (period = "minute"), "since-start": () => (period = "start") });
choice({
  "show-all": () => (requests.show = "all"),
  "show-live": () => (requests.show = "live"),
  "show-finished": () => (requests.show = "finished"),
});
byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  byId("pause").textContent = isPaused ? "Resume" : "Pause";
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of [decodeChart, prefillChart, timeChart, ttftChart, itlChart]) chart.forget();
  draw();
});
poll();

// Charts over uPlot: stacked bars and lines per step, bars per bucket. Colours are CSS variables, so that light
// and dark come from one place.

/* global uPlot */

export const number = new Intl.NumberFormat("en");

// Room for half a bar at both ends, and the same edges in all charts over steps.
const STEP_SCALE = { time: false, range: (_, low, high) => [low - 0.6, high + 0.6] };
const PADDING = [8, 12, 8, 0];
const WHOLE = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function axes(options = {}) {
  const common = {
    stroke: colour("muted"),
    font: "12px system-ui, sans-serif",
    grid: { stroke: colour("line"), width: 1 },
    ticks: { show: false },
  };
  return [
    { ...common, grid: { show: false }, size: 26, ...options.x },
    { ...common, size: 52, values: (_, ticks) => ticks.map((tick) => number.format(tick)), ...options.y },
  ];
}

function size(element) {
  return { width: Math.max(80, element.clientWidth), height: Math.max(60, element.clientHeight) };
}

// A uPlot that fills its element and is made anew when its options change.
class Chart {
  constructor(element) {
    this.element = element;
    this.plot = null;
    this.key = null;
    new ResizeObserver(() => this.plot?.setSize(size(element))).observe(element);
  }

  draw(key, options, data) {
    if (key !== this.key) {
      this.plot?.destroy();
      this.plot = new uPlot({ ...size(this.element), legend: { show: false }, ...options() }, data, this.element);
      this.key = key;
    } else {
      this.plot.setData(data);
    }
  }

  forget() {
    this.key = null;
  }
}

// Bars of several parts on top of each other, one bar per step. A part is {name, colour, values}.
export class StackedBars extends Chart {
  constructor(element, syncKey, onHover) {
    super(element);
    this.syncKey = syncKey;
    this.onHover = onHover;
  }

  update(indices, parts) {
    // uPlot does not stack: every part is drawn from 0 up to the sum of those below and itself, the tallest first.
    let below = indices.map(() => 0);
    const sums = parts.map((part) => (below = below.map((value, i) => value + part.values[i])));
    const bars = uPlot.paths.bars({ size: [0.86, 24] });
    this.draw(
      parts.map((part) => part.name + part.colour).join("\n"),
      () => ({
        padding: PADDING,
        scales: { x: STEP_SCALE, y: { range: (_, low, high) => [0, Math.max(1, high * 1.05)] } },
        axes: axes({ x: { show: false }, y: { incrs: WHOLE } }),
        cursor: { sync: { key: this.syncKey }, y: false, points: { show: false }, drag: { x: false, y: false } },
        series: [
          {},
          ...[...parts].reverse().map((part) => ({ fill: part.colour, stroke: part.colour, width: 0, paths: bars, points: { show: false } })),
        ],
        hooks: { setCursor: [(plot) => this.onHover(plot.cursor.idx ?? null)] },
      }),
      [indices, ...sums.reverse()],
    );
  }
}

// Lines over steps; null values are gaps. A line is {name, colour, values, dash}.
export class Lines extends Chart {
  constructor(element, syncKey) {
    super(element);
    this.syncKey = syncKey;
  }

  update(indices, lines) {
    this.draw(
      lines.map((line) => line.name + line.colour).join("\n"),
      () => ({
        padding: PADDING,
        scales: { x: STEP_SCALE, y: { range: (_, low, high) => [0, Math.max(0.001, high * 1.1)] } },
        axes: axes(),
        cursor: { sync: { key: this.syncKey }, y: false, drag: { x: false, y: false } },
        series: [
          {},
          ...lines.map((line) => ({ stroke: line.colour, width: 1.5, dash: line.dash, points: { show: false } })),
        ],
      }),
      [indices, ...lines.map((line) => line.values)],
    );
  }
}

// One bar per bucket of a histogram, from the first that holds something to the last.
export class Buckets extends Chart {
  update(histogram, fill) {
    const { counts, labels } = trim(histogram);
    this.labels = labels;
    this.draw(
      fill,
      () => ({
        scales: {
          x: { time: false, range: (_, low, high) => [low - 0.6, high + 0.6] },
          y: { range: (_, low, high) => [0, Math.max(1, high * 1.08)] },
        },
        axes: axes({
          y: { incrs: WHOLE },
          x: {
            splits: () => this.labels.map((_, i) => i),
            values: (plot, splits) => {
              const every = Math.ceil(splits.length / Math.max(1, plot.width / 96));
              return splits.map((i) => (i % every ? "" : this.labels[i]));
            },
          },
        }),
        cursor: { show: false },
        series: [{}, { fill, stroke: fill, width: 0, paths: uPlot.paths.bars({ size: [0.86, 40] }), points: { show: false } }],
      }),
      [counts.map((_, i) => i), counts],
    );
  }
}

function trim({ bounds, counts }) {
  const first = Math.max(0, counts.findIndex((count) => count > 0) - 1);
  const last = Math.min(counts.length - 1, counts.findLastIndex((count) => count > 0) + 1);
  const end = last > first ? last + 1 : Math.min(counts.length, 12);
  const labels = [...bounds.map((bound) => `≤${duration(bound)}`), "more"];
  return { counts: counts.slice(first, end), labels: labels.slice(first, end) };
}

// The value below which a share q lies, straight between bounds; null before the first value.
export function quantile({ bounds, counts }, q) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return null;
  let below = 0;
  for (let i = 0; i < bounds.length; i++) {
    const low = i ? bounds[i - 1] : 0;
    if (counts[i] && below + counts[i] >= q * total) {
      return low + ((bounds[i] - low) * Math.max(0, q * total - below)) / counts[i];
    }
    below += counts[i];
  }
  return bounds[bounds.length - 1];
}

export function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds >= 1) return `${+seconds.toPrecision(3)} s`;
  return `${+(seconds * 1000).toPrecision(2)} ms`;
}

// ------------------------------------------------------------------ charts
const NS = "http://www.w3.org/2000/svg";
const make = (name, attributes, parent, text) => {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
};
const PAD = { left: 52, right: 12, top: 8, bottom: 22 };
const HEIGHT = 190;
const view = { range: null, smoothing: 0, log: false, at: null };
const charts = [];
let span = [0, 1];

function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) {
    found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  }
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) {
    for (const factor of high - low > 2.5 ? [1] : [1, 2, 5]) found.push(power + Math.log10(factor));
  }
  const inside = found.filter((value) => value >= low - 1e-9 && value <= high + 1e-9);
  return inside.length > 1 ? inside : [low, high];
}

class Chart {
  constructor(figure, spec, marks) {
    this.figure = figure;
    this.spec = spec;
    this.marks = marks;
    this.readout = figure.querySelector(".readout");
    this.box = figure.querySelector(".plot");
    this.steps = [...new Set(spec.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    this.box.addEventListener("pointermove", (event) => this.hover(event));
    this.box.addEventListener("pointerleave", () => this.started === undefined && point(null));
    this.box.addEventListener("pointerdown", (event) => this.press(event));
    this.box.addEventListener("pointerup", (event) => this.release(event));
    this.box.addEventListener("pointercancel", () => this.unselect());
    this.box.addEventListener("dblclick", () => zoom(null));
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("focus", () => point(view.at ?? this.steps[this.steps.length - 1]));
    this.box.addEventListener("blur", () => point(null));
  }

  range() {
    return view.range || span;
  }

  draw() {
    const width = this.box.clientWidth;
    this.drawn = width > 0;
    if (!this.drawn) return;
    const [left, right] = this.range();
    const lines = this.spec.series.map((series) => ({ ...series, smooth: smoothed(series.y, view.smoothing) }));
    const inside = (series, values) => values.filter((v, i) => v !== null && series.x[i] >= left && series.x[i] <= right);
    let shown = lines.flatMap((series) => [...inside(series, series.y), ...inside(series, series.smooth)]);
    const limits = this.spec.limits || [];
    const log = view.log && shown.some((value) => value > 0);
    const scale = (value) => (log ? (value > 0 ? Math.log10(value) : null) : value);
    shown = [...shown, ...limits.map((limit) => limit.value)].map(scale).filter((value) => value !== null);
    let low = Infinity;
    let high = -Infinity;
    for (const value of shown) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (!shown.length) [low, high] = [0, 1];
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
      const room = Math.abs(high) * 0.05 || 0.5;
      [low, high] = [low - room, high + room];
    }
    const margin = 0.06 * (high - low);
    [low, high] = [low - margin, high + margin];
    const x = (step) => PAD.left + ((step - left) / (right - left || 1)) * (width - PAD.left - PAD.right);
    const y = (value) => HEIGHT - PAD.bottom - ((value - low) / (high - low)) * (HEIGHT - PAD.top - PAD.bottom);
    Object.assign(this, { x, y, scale, width, lines, log });

    this.svg?.remove();
    const svg = make("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" }, this.box);
    this.svg = svg;
    const id = `clip-${charts.indexOf(this)}`;
    const clip = make("clipPath", { id }, make("defs", {}, svg));
    const area = { x: PAD.left, y: PAD.top, width: width - PAD.left - PAD.right, height: HEIGHT - PAD.top - PAD.bottom };
    make("rect", { ...area, x: area.x - 4, width: area.width + 8 }, clip);
    for (const value of log ? logTicks(low, high) : ticks(low, high, 4)) {
      make("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }, svg);
      make("text", { x: PAD.left - 6, y: y(value) + 4, "text-anchor": "end" }, svg, told(log ? 10 ** value : value));
    }
    for (const step of ticks(left, right, width > 500 ? 8 : 5).filter((value) => Number.isInteger(value) && value >= left)) {
      const anchor = x(step) > width - 30 ? "end" : "middle";
      make("text", { x: anchor === "end" ? width - PAD.right : x(step), y: HEIGHT - 6, "text-anchor": anchor }, svg, told(step));
      make("line", { class: "grid", x1: x(step), x2: x(step), y1: HEIGHT - PAD.bottom, y2: HEIGHT - PAD.bottom + 4 }, svg);
    }
    const plot = make("g", { "clip-path": `url(#${id})` }, svg);
    for (const mark of this.marks) {
      make("line", { class: `mark ${mark.kind}`, x1: x(mark.step), x2: x(mark.step), y1: PAD.top, y2: HEIGHT - PAD.bottom }, plot);
    }
    limits.forEach((limit, number) => {
      if (scale(limit.value) === null) return;
      const at = y(scale(limit.value));
      make("line", { class: "limit", x1: PAD.left, x2: width - PAD.right, y1: at, y2: at }, plot);
      const above = at > PAD.top + 16;
      const place = number % 2 ? { x: PAD.left + 2 } : { x: width - PAD.right - 2, "text-anchor": "end" };
      make("text", { class: "limit", ...place, y: above ? at - 4 : at + 12 }, plot, limit.label);
    });
    lines.forEach((series, number) => {
      const colour = `s${number % 8}`;
      if (view.smoothing) this.path(plot, series, series.y, `${colour} raw`);
      this.path(plot, series, series.smooth, colour);
    });
    if (lines.every((series) => series.y.every((value) => value === null))) {
      make("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, svg, "never finite");
    }
    this.cursor = make("g", { class: "cursor" }, plot);
    this.selection = make("rect", { class: "selection", y: PAD.top, height: area.height, x: 0, width: 0 }, plot);
    this.tell(view.at);
  }

  path(parent, series, values, kind) {
    let text = "";
    let pen = false;
    let last = -Infinity;
    const dots = [];
    values.forEach((value, index) => {
      const at = value === null ? null : this.scale(value);
      if (at === null || series.x[index] < last) pen = false;
      last = series.x[index];
      if (at === null) return;
      const place = `${this.x(series.x[index]).toFixed(1)} ${this.y(at).toFixed(1)}`;
      text += `${pen ? "L" : "M"}${place}`;
      pen = true;
      dots.push(place.split(" "));
    });
    if (text) make("path", { class: `line ${kind}`, d: text }, parent);
    if (dots.length <= 40 && !kind.includes("raw")) {
      for (const [cx, cy] of dots) make("circle", { class: `dot ${kind}`, cx, cy, r: 2.5 }, parent);
    }
  }

  tell(step) {
    if (!this.drawn) return;
    this.cursor.replaceChildren();
    this.readout.replaceChildren();
    const here = step === null ? null : nearest(this.steps, step);
    const head = document.createElement("span");
    head.className = "at";
    head.textContent = here === null ? "last" : `step ${told(here)}`;
    this.readout.append(head);
    if (here !== null) {
      make("line", { x1: this.x(here), x2: this.x(here), y1: PAD.top, y2: HEIGHT - PAD.bottom }, this.cursor);
    }
    this.lines.forEach((series, number) => {
      let index = series.x.length - 1;
      if (here === null) while (index > 0 && series.y[index] === null) index -= 1;
      else index = series.x.lastIndexOf(here);
      const value = index < 0 ? null : series.y[index];
      const item = document.createElement("span");
      item.className = `value s${number % 8}`;
      const smooth = view.smoothing && index >= 0 ? ` (${told(series.smooth[index])})` : "";
      item.textContent = `${series.name ? `${series.name} ` : ""}${told(value)}${smooth}`;
      this.readout.append(item);
      const shown = index < 0 || series.smooth[index] === null ? null : this.scale(series.smooth[index]);
      if (here !== null && shown !== null) {
        make("circle", { class: `dot s${number % 8}`, cx: this.x(here), cy: this.y(shown), r: 4 }, this.cursor);
      }
    });
  }

  stepAt(event) {
    const [left, right] = this.range();
    const place = event.clientX - this.box.getBoundingClientRect().left;
    const share = (place - PAD.left) / (this.width - PAD.left - PAD.right);
    return clamp(left + share * (right - left), left, right);
  }

  hover(event) {
    if (!this.drawn) return;
    const step = this.stepAt(event);
    point(step);
    if (this.started !== undefined) {
      const [from, to] = [this.x(this.started), this.x(step)].sort((a, b) => a - b);
      this.selection.setAttribute("x", from);
      this.selection.setAttribute("width", to - from);
    }
  }

  press(event) {
    if (event.pointerType === "touch" || event.button !== 0 || !this.drawn) return;
    this.started = this.stepAt(event);
    this.box.setPointerCapture(event.pointerId);
  }

  release(event) {
    if (this.started === undefined) return;
    const ends = [this.started, this.stepAt(event)].sort((a, b) => a - b);
    this.unselect();
    if (this.x(ends[1]) - this.x(ends[0]) > 6 && ends[1] - ends[0] >= 1) zoom(ends);
  }

  unselect() {
    this.started = undefined;
    this.selection?.setAttribute("width", 0);
  }

  key(event) {
    const [left, right] = this.range();
    const shown = this.steps.filter((step) => step >= left && step <= right);
    const index = shown.indexOf(nearest(shown, view.at ?? right));
    const far = event.shiftKey ? 10 : 1;
    if (event.key === "ArrowLeft") point(shown[clamp(index - far, 0, shown.length - 1)]);
    else if (event.key === "ArrowRight") point(shown[clamp(index + far, 0, shown.length - 1)]);
    else if (event.key === "Home") point(shown[0]);
    else if (event.key === "End") point(shown[shown.length - 1]);
    else if (event.key === "Escape" || event.key === "0") zoom(null);
    else if (event.key === "+" || event.key === "-") {
      const middle = view.at ?? (left + right) / 2;
      const half = ((right - left) / 2) * (event.key === "+" ? 0.5 : 2);
      const ends = [clamp(middle - half, ...span), clamp(middle + half, ...span)];
      if (ends[1] - ends[0] >= 1) zoom(ends[0] <= span[0] && ends[1] >= span[1] ? null : ends);
    } else return;
    event.preventDefault();
  }
}

function nearest(steps, wanted) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(steps[high] - wanted) < Math.abs(steps[low] - wanted) ? steps[high] : steps[low];
}

function point(step) {
  view.at = step ?? null;
  for (const chart of charts) chart.tell(view.at);
}

const resetButton = document.getElementById("reset");
function zoom(range) {
  view.range = range;
  resetButton.disabled = range === null;
  drawAll();
}
function drawAll() {
  for (const chart of charts) chart.draw();
}

const given = dataOf("chart-data");
if (given) {
  span = given.span;
  for (const figure of all("figure.chart")) {
    const spec = given.charts[Number(figure.dataset.chart)];
    charts.push(new Chart(figure, spec, given.marks));
  }
  const smoothing = document.getElementById("smoothing");
  const smoothingValue = document.getElementById("smoothing-value");
  smoothing.addEventListener("input", () => {
    view.smoothing = Number(smoothing.value);
    smoothingValue.textContent = smoothing.value;
    drawAll();
  });
  const log = document.getElementById("log");
  log.addEventListener("change", () => {
    view.log = log.checked;
    drawAll();
  });
  resetButton.addEventListener("click", () => zoom(null));
  drawAll();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) drawAll();
    width = window.innerWidth;
  });
}


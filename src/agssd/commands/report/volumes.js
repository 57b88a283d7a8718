// ------------------------------------------------------------------ pictures over steps
for (const box of all(".frames")) {
  const frames = all("img", box);
  const slider = box.querySelector("input[type=range]");
  const label = box.querySelector("output");
  const show = () => {
    frames.forEach((frame, index) => {
      frame.hidden = index !== Number(slider.value);
    });
    const step = Number(frames[slider.value].dataset.step);
    label.textContent = `step ${told(step)}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
  };
  slider.addEventListener("input", show);
  show();
}

// ------------------------------------------------------------------ volumes in three planes
// Axes are (D, H, W): superior, anterior and the patient's right increase. A mosaic holds axial slices in rows.
const PLANES = [
  { name: "axial", axis: 0, up: 1, across: 2, ends: ["A", "P", "L", "R"] },
  { name: "coronal", axis: 1, up: 0, across: 2, ends: ["S", "I", "L", "R"] },
  { name: "sagittal", axis: 2, up: 0, across: 1, ends: ["S", "I", "P", "A"] },
];

// Frames (T, H, W) are shown one at a time, the first row on top.
const FRAMES = [{ name: "frame", axis: 0, up: 1, across: 2, ends: ["", "", "", ""], down: true }];

const SIDE = 480;

async function decode(mosaic) {
  const image = new Image();
  image.src = mosaic.src;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const [depth, height, width] = mosaic.shape;
  const values = new Uint8Array(depth * height * width * 3);
  for (let d = 0; d < depth; d += 1) {
    const top = Math.floor(d / mosaic.columns) * height;
    const left = (d % mosaic.columns) * width;
    for (let h = 0; h < height; h += 1) {
      for (let w = 0; w < width; w += 1) {
        const from = 4 * ((top + h) * canvas.width + left + w);
        const to = 3 * ((d * height + h) * width + w);
        for (let c = 0; c < 3; c += 1) values[to + c] = pixels[from + c];
      }
    }
  }
  return { shape: mosaic.shape, values };
}

const HEAT = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];
const heat = (value) => {
  const place = (value / 255) * (HEAT.length - 1);
  const index = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[index].map((low, c) => low + (place - index) * (HEAT[index + 1][c] - low));
};

class Viewer {
  constructor(box, spec) {
    this.box = box;
    this.spec = spec;
    this.layers = new Map();
    this.at = [...spec.start];
    this.choice = box.querySelector("select");
    this.opacity = box.querySelector("input.opacity");
    this.smooth = box.querySelector("input.smooth");
    this.legend = box.querySelector(".legend");
    this.planes = all(".plane", box).map((figure, number) => {
      const plane = (spec.frames ? FRAMES : PLANES)[number];
      const slider = figure.querySelector("input");
      const canvas = figure.querySelector("canvas");
      slider.addEventListener("input", () => this.move(plane.axis, Number(slider.value)));
      canvas.addEventListener("click", (event) => this.click(plane, canvas, event));
      return { ...plane, slider, canvas, label: figure.querySelector("output") };
    });
    for (const control of [this.choice, this.opacity, this.smooth]) control?.addEventListener("input", () => this.load());
    this.ready = this.begin();
  }

  async begin() {
    this.base = await decode(this.spec.image);
    this.body = this.spec.body ? await decode(this.spec.body) : null;
    await this.load();
  }

  async load() {
    const layer = this.spec.layers[Number(this.choice.value)];
    if (layer.mosaic && !this.layers.has(layer)) this.layers.set(layer, await decode(layer.mosaic));
    this.draw();
  }

  move(axis, index) {
    this.at[axis] = clamp(index, 0, this.base.shape[axis] - 1);
    this.draw();
  }

  click(plane, canvas, event) {
    const box = canvas.getBoundingClientRect();
    const [rows, columns] = [this.base.shape[plane.up], this.base.shape[plane.across]];
    const [left, top, width, height] = plane.area;
    const x = ((event.clientX - box.left) / box.width) * SIDE - left;
    const y = ((event.clientY - box.top) / box.height) * SIDE - top;
    this.at[plane.across] = clamp(Math.floor((x / width) * columns), 0, columns - 1);
    const row = Math.floor((y / height) * rows);
    this.at[plane.up] = clamp(plane.down ? row : rows - 1 - row, 0, rows - 1);
    this.draw();
  }

  draw() {
    if (!this.base) return;
    const layer = this.spec.layers[Number(this.choice.value)];
    const volume = this.layers.get(layer);
    this.legend.textContent = "";
    for (const [text, colour] of layer.legend || []) {
      const item = document.createElement("span");
      if (colour) {
        const swatch = document.createElement("i");
        swatch.style.background = colour;
        item.append(swatch);
      }
      item.append(text);
      this.legend.append(item);
    }
    for (const plane of this.planes) this.drawPlane(plane, layer, volume);
  }

  drawPlane(plane, layer, volume) {
    const shape = this.base.shape;
    const [rows, columns] = [shape[plane.up], shape[plane.across]];
    const small = document.createElement("canvas");
    [small.width, small.height] = [columns, rows];
    const context = small.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    const place = [0, 0, 0];
    place[plane.axis] = this.at[plane.axis];
    const opacity = Number(this.opacity.value) / 100;
    for (let row = 0; row < rows; row += 1) {
      place[plane.up] = plane.down ? row : rows - 1 - row;
      for (let column = 0; column < columns; column += 1) {
        place[plane.across] = column;
        const from = 3 * ((place[0] * shape[1] + place[1]) * shape[2] + place[2]);
        const to = 4 * (row * columns + column);
        let colour = null;
        let alpha = opacity;
        if (volume && layer.kind === "labels") {
          colour = layer.colours[volume.values[from]] || null;
        } else if (volume && (!this.body || this.body.values[from])) {
          const found = this.sample(volume, layer, place);
          if (found && layer.kind === "heat") colour = heat(found[0]);
          else if (found) colour = found;
        }
        if (colour === null) alpha = 0;
        for (let c = 0; c < 3; c += 1) {
          const grey = this.base.values[from + c];
          pixels.data[to + c] = colour ? (1 - alpha) * grey + alpha * colour[c] : grey;
        }
        pixels.data[to + 3] = 255;
      }
    }
    context.putImageData(pixels, 0, 0);
    const { canvas } = plane;
    const [high, wide] = [rows * this.spec.spacing[plane.up], columns * this.spec.spacing[plane.across]];
    const extent = Math.max(...shape.map((count, axis) => count * this.spec.spacing[axis]));
    const [width, height] = [(wide / extent) * SIDE, (high / extent) * SIDE];
    plane.area = [(SIDE - width) / 2, (SIDE - height) / 2, width, height];
    [canvas.width, canvas.height] = [SIDE, SIDE];
    const target = canvas.getContext("2d");
    target.imageSmoothingEnabled = layer.kind !== "labels";
    target.drawImage(small, ...plane.area);
    this.crosshair(plane, target, rows, columns);
    plane.slider.value = this.at[plane.axis];
    const kind = plane.down ? plane.name : `${plane.name}, slice`;
    const words = `${kind} ${this.at[plane.axis] + 1} of ${shape[plane.axis]}`;
    plane.label.textContent = `${this.at[plane.axis] + 1} / ${shape[plane.axis]}`;
    canvas.setAttribute("aria-label", `${this.spec.name}: ${layer.name}, ${words}`);
  }

  // The colour of the cell of a coarse grid, or between the cells; null where no cell with content is near.
  sample(volume, layer, place) {
    const [depth, height, width] = volume.shape;
    const at = place.map((value, axis) => (value + 0.5) / layer.step[axis] - 0.5);
    const value = (d, h, w) => 3 * ((d * height + h) * width + w);
    const inside = volume.shape.map((size, axis) => clamp(Math.round(at[axis]), 0, size - 1));
    const own = layer.present && !layer.present[(inside[0] * height + inside[1]) * width + inside[2]];
    if (own) return null;
    if (!this.smooth.checked) {
      const from = value(...inside);
      return [0, 1, 2].map((c) => volume.values[from + c]);
    }
    const low = at.map((place_, axis) => clamp(Math.floor(place_), 0, volume.shape[axis] - 1));
    const high = low.map((index, axis) => Math.min(index + 1, [depth, height, width][axis] - 1));
    const part = at.map((place_, axis) => clamp(place_ - low[axis], 0, 1));
    const sum = [0, 0, 0];
    let total = 0;
    for (let corner = 0; corner < 8; corner += 1) {
      const bits = [corner & 4, corner & 2, corner & 1];
      const cell = bits.map((bit, axis) => (bit ? high[axis] : low[axis]));
      if (layer.present && !layer.present[(cell[0] * height + cell[1]) * width + cell[2]]) continue;
      const weight = bits.reduce((product, bit, axis) => product * (bit ? part[axis] : 1 - part[axis]), 1);
      const from = value(...cell);
      for (let c = 0; c < 3; c += 1) sum[c] += weight * volume.values[from + c];
      total += weight;
    }
    return total > 0 ? sum.map((v) => v / total) : null;
  }

  crosshair(plane, context, rows, columns) {
    const [left, top, width, height] = plane.area;
    const x = left + ((this.at[plane.across] + 0.5) / columns) * width;
    const part = (this.at[plane.up] + 0.5) / rows;
    const y = top + (plane.down ? part : 1 - part) * height;
    context.strokeStyle = "rgba(90, 220, 255, 0.55)";
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, top + height);
    context.moveTo(left, y);
    context.lineTo(left + width, y);
    context.stroke();
    context.font = "bold 15px system-ui, sans-serif";
    context.fillStyle = "#fff";
    context.strokeStyle = "#000";
    context.lineWidth = 3;
    const [up, down, near, far] = plane.ends;
    const write = (text, px, py, align, baseline) => {
      [context.textAlign, context.textBaseline] = [align, baseline];
      context.strokeText(text, px, py);
      context.fillText(text, px, py);
    };
    write(up, SIDE / 2, 5, "center", "top");
    write(down, SIDE / 2, SIDE - 4, "center", "bottom");
    write(near, 5, SIDE / 2, "left", "middle");
    write(far, SIDE - 5, SIDE / 2, "right", "middle");
  }
}

const viewers = all(".viewer").map((box) => new Viewer(box, dataOf(box.dataset.volume)));
const unfold = () => {
  for (const chart of charts) if (!chart.drawn) chart.draw();
  for (const viewer of viewers) viewer.draw();
};
for (const details of all("details")) details.addEventListener("toggle", unfold);
window.addEventListener("beforeprint", () => {
  for (const details of all("details")) details.open = true;
});
Promise.all(viewers.map((viewer) => viewer.ready)).then(() => {
  document.documentElement.dataset.drawn = "all";
});

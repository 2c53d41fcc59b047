// The heat map: a row for each MoE layer, a column for each logical expert, the experts of a rank side by side.
// A cell's colour is the expert's share of the layer's tokens. 1 is the even share: e.g. 4 is four times as much.

import { fitted, styleOf } from "./spark.js";

const LEFT = 34; // px, for the layers' numbers
const TOP = 22; // px, for the ranks' names
const GAP = 3; // px between ranks
const MIN_COLUMN = 1; // px; narrower screens scroll
const MOVE_MS = 600;

// 0 at no tokens, 1/2 at the even share, towards 1 without end: the same colour means the same load at any time.
const heat = (multiple) => multiple / (1 + multiple);

export class HeatMap {
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    this.data = null;
    this.shown = new Float32Array(0); // heat of each cell as it is drawn now
    this.wanted = new Float32Array(0);
    this.cursor = null; // {row, column} that the readout speaks of
    this.pixels = document.createElement("canvas"); // a pixel for each cell
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.moveTo(null));
    canvas.addEventListener("keydown", (event) => this.step(event));
    this.restyle();
  }

  // Read the colours anew: the scheme has changed.
  restyle() {
    this.ramp = makeRamp();
    this.draw();
  }

  show(load) {
    const { layers, rank_of_expert: rankOf, tokens } = load;
    const order = rankOf.map((_, expert) => expert).sort((a, b) => rankOf[a] - rankOf[b] || a - b);
    const totals = tokens.map((row) => row.reduce((sum, n) => sum + n, 0));
    this.data = { layers, rankOf, tokens, order, totals, shares: load.ranks.map((rank) => rank.share) };
    this.wanted = new Float32Array(layers.length * order.length);
    tokens.forEach((row, m) => {
      const even = totals[m] / order.length || 1;
      order.forEach((expert, c) => (this.wanted[m * order.length + c] = heat(row[expert] / even)));
    });
    if (this.shown.length !== this.wanted.length) this.shown = this.wanted.slice();
    this.animate();
    this.tell();
  }

  animate() {
    cancelAnimationFrame(this.frame);
    const from = this.shown.slice();
    const began = performance.now();
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const draw = (now) => {
      const done = still ? 1 : Math.min(1, Math.max(0, now - began) / MOVE_MS);
      for (let i = 0; i < from.length; i++) this.shown[i] = from[i] + (this.wanted[i] - from[i]) * done;
      this.draw();
      if (done < 1) this.frame = requestAnimationFrame(draw);
    };
    this.frame = requestAnimationFrame(draw);
  }

  // Groups of columns that one rank holds, with their places.
  layout() {
    const { order, rankOf, layers } = this.data;
    const groups = [];
    order.forEach((expert, column) => {
      const last = groups.at(-1);
      if (last?.rank === rankOf[expert]) last.count++;
      else groups.push({ rank: rankOf[expert], start: column, count: 1 });
    });
    const free = this.canvas.parentElement.clientWidth - LEFT - GAP * (groups.length - 1);
    const cell = Math.max(MIN_COLUMN, free / order.length);
    const row = Math.min(30, Math.max(8, 400 / layers.length));
    groups.forEach((group, i) => {
      group.x = LEFT + group.start * cell + i * GAP;
      group.width = group.count * cell;
    });
    const last = groups.at(-1);
    return { groups, cell, row, width: last ? last.x + last.width : LEFT, height: TOP + row * layers.length };
  }

  draw() {
    if (!this.data?.layers.length) return;
    this.place = this.layout();
    const { groups, width, height } = this.place;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const context = fitted(this.canvas, width, height);
    this.paintPixels();
    context.imageSmoothingEnabled = false;
    const rows = this.data.layers.length;
    for (const { start, count, x, width: wide } of groups)
      context.drawImage(this.pixels, start, 0, count, rows, x, TOP, wide, height - TOP);
    this.drawNames(context);
    this.drawCursor(context);
  }

  paintPixels() {
    this.pixels.width = this.data.order.length;
    this.pixels.height = this.data.layers.length;
    const context = this.pixels.getContext("2d");
    const image = context.createImageData(this.pixels.width, this.pixels.height);
    const words = new Uint32Array(image.data.buffer);
    for (let i = 0; i < words.length; i++) words[i] = this.ramp[Math.round(this.shown[i] * 255)];
    context.putImageData(image, 0, 0);
  }

  drawNames(context) {
    const { groups, row } = this.place;
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = styleOf("--faint");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(14 / row);
    this.data.layers.forEach((layer, m) => {
      if (m % every === 0) context.fillText(layer, LEFT - 7, TOP + (m + 0.5) * row);
    });
    context.textAlign = "left";
    for (const { rank, x, width } of groups) {
      const share = this.data.shares[rank];
      const long = rank < 0 ? "no rank" : `rank ${rank} · ${Math.round(100 * share)} %`;
      const name = context.measureText(long).width < width ? long : String(rank);
      context.fillText(name, x, TOP - 12);
      context.fillRect(x, TOP - 3, width, 1.5);
    }
  }

  drawCursor(context) {
    if (!this.cursor) return;
    const { groups, cell, row } = this.place;
    const { column, row: m } = this.cursor;
    const i = groups.findIndex(({ start, count }) => column < start + count);
    if (i < 0 || m >= this.data.layers.length) return;
    context.strokeStyle = styleOf("--text");
    context.lineWidth = 2;
    context.strokeRect(groups[i].x + (column - groups[i].start) * cell, TOP + m * row, Math.max(cell, 3), row);
  }

  point(event) {
    if (!this.place) return;
    const x = event.offsetX;
    const row = Math.floor((event.offsetY - TOP) / this.place.row);
    const group = this.place.groups.find((each) => x >= each.x && x < each.x + each.width);
    if (!group || row < 0 || row >= this.data.layers.length) return this.moveTo(null);
    const within = Math.min(group.count - 1, Math.floor((x - group.x) / this.place.cell));
    this.moveTo({ row, column: group.start + within });
  }

  step(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move || !this.data?.layers.length) return;
    event.preventDefault();
    const at = this.cursor ?? { row: -move[0], column: -move[1] };
    const within = (value, count) => Math.min(count - 1, Math.max(0, value));
    this.moveTo({
      row: within(at.row + move[0], this.data.layers.length),
      column: within(at.column + move[1], this.data.order.length),
    });
  }

  moveTo(cursor) {
    this.cursor = cursor;
    this.draw();
    this.tell();
  }

  tell() {
    const { row, column } = this.cursor ?? {};
    const expert = this.data?.order[column];
    if (!this.cursor || expert === undefined || row >= this.data.layers.length) return;
    const { layers, rankOf, tokens, totals, order } = this.data;
    const count = tokens[row][expert];
    const share = totals[row] ? count / totals[row] : 0;
    this.readout.textContent =
      `layer ${layers[row]} · expert ${expert} · rank ${rankOf[expert]}: ${count.toLocaleString()} tokens, ` +
      `${(100 * share).toFixed(2)} % of the layer's, ${(share * order.length).toFixed(2)} × the even share`;
  }

  // The scale under the map, with marks at multiples of the even share.
  drawScale(canvas) {
    const { clientWidth: width, clientHeight: height } = canvas;
    const context = fitted(canvas);
    for (let x = 0; x < width; x++) {
      context.fillStyle = cssColour(this.ramp[Math.round((x / (width - 1)) * 255)]);
      context.fillRect(x, 0, 1, 12);
    }
    context.fillStyle = styleOf("--faint");
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "bottom";
    for (const [multiple, name] of [[1 / 3, "⅓"], [1, "even"], [3, "3×"], [9, "9×"]])
      context.fillText(name, heat(multiple) * width, height);
  }
}

// 256 colours between the style's five, as pixels (little-endian RGBA).
function makeRamp() {
  const stops = [0, 1, 2, 3, 4].map((i) => {
    const digits = parseInt(styleOf(`--heat-${i}`).slice(1), 16);
    return [digits >> 16, (digits >> 8) & 255, digits & 255];
  });
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * 4;
    const k = Math.min(3, Math.floor(at));
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(stops[k][c] + (stops[k + 1][c] - stops[k][c]) * (at - k)));
    return (255 << 24) | (b << 16) | (g << 8) | r;
  });
}

const cssColour = (pixel) => `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;

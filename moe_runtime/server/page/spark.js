// Canvases: their size on this screen, and a sparkline.

const LENGTH = 120; // points: two minutes

// Fit a canvas's pixels to the screen's; its context in CSS pixels.
export function fitted(canvas, width = canvas.clientWidth, height = canvas.clientHeight) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

export function styleOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export class Sparkline {
  constructor(canvas, floor) {
    this.canvas = canvas;
    this.floor = floor; // the top of the scale is at least this
    this.values = [];
  }

  clear() {
    this.values = [];
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > LENGTH) this.values.shift();
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const context = fitted(this.canvas);
    const top = Math.max(this.floor, ...this.values);
    const x = (i) => width - 2 - ((this.values.length - 1 - i) * (width - 4)) / (LENGTH - 1);
    const y = (value) => height - 2 - (value / top) * (height - 5);
    context.strokeStyle = context.fillStyle = styleOf("--accent");
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.beginPath();
    this.values.forEach((value, i) => context.lineTo(x(i), y(value)));
    context.stroke();
    if (!this.values.length) return;
    context.lineTo(x(this.values.length - 1), height);
    context.lineTo(x(0), height);
    context.globalAlpha = 0.16;
    context.fill();
  }
}

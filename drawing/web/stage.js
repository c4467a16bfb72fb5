"use strict";
// The video with its tracks; pointers select tracks and move the view.

const CLICK_PX = 5;         // pixels that a pointer may move during a click
const NEAR_FRAMES = 12;     // frames of a short path, to either side
const MAX_ZOOM = 16;
const SHADOW = "rgba(0, 0, 0, .6)";

function fitToScreen(view) { // gives the canvas of a Stage or Timeline one pixel for each screen pixel
  const {canvas} = view, ratio = window.devicePixelRatio || 1;
  view.width = canvas.clientWidth;
  view.height = canvas.clientHeight;
  canvas.width = Math.round(view.width * ratio);
  canvas.height = Math.round(view.height * ratio);
  view.context.setTransform(ratio, 0, 0, ratio, 0, 0);
  view.events.redraw();
}

class Stage {
  constructor(canvas, state, events) {
    Object.assign(this, {canvas, state, events, context: canvas.getContext("2d"), zoom: 1, box: null, hover: null});
    this.latest = {}; // layer -> the image that was drawn last
    this.center = {x: meta.width / 2, y: meta.height / 2}; // of the view, in pixels from the video's upper left corner
    this.pointers = new Map();
    new ResizeObserver(() => fitToScreen(this)).observe(canvas);
    canvas.addEventListener("pointerdown", (e) => this.down(e));
    canvas.addEventListener("pointermove", (e) => this.move(e));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (e) => this.up(e));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      this.zoomAt(e.offsetX, e.offsetY, Math.exp(-e.deltaY * 0.002));
    }, {passive: false});
  }

  get scale() { // screen pixels in a pixel of the video
    return this.zoom * Math.min(this.width / meta.width, this.height / meta.height);
  }

  toScreen(x, y) { // centers of pixels are at whole numbers
    return [(x + 0.5 - this.center.x) * this.scale + this.width / 2,
      (y + 0.5 - this.center.y) * this.scale + this.height / 2];
  }

  toVideo(left, top) {
    return [(left - this.width / 2) / this.scale + this.center.x - 0.5,
      (top - this.height / 2) / this.scale + this.center.y - 0.5];
  }

  inside(x, y) {
    return x >= -0.5 && y >= -0.5 && x <= meta.width - 0.5 && y <= meta.height - 0.5;
  }

  zoomAt(left, top, factor) {
    const [x, y] = this.toVideo(left, top);
    this.zoom = Math.min(MAX_ZOOM, Math.max(1, this.zoom * factor));
    this.shift(left, top, x, y);
  }

  shift(left, top, x, y) { // moves the view so that (x, y) of the video is at (left, top)
    const limit = (value, side) => {
      const half = Math.min(side / 2, side / 2 / this.zoom);
      return Math.min(side - half, Math.max(half, value));
    };
    this.center.x = limit(x + 0.5 - (left - this.width / 2) / this.scale, meta.width);
    this.center.y = limit(y + 0.5 - (top - this.height / 2) / this.scale, meta.height);
    this.events.redraw();
  }

  reset() {
    this.zoom = 1;
    this.shift(this.width / 2, this.height / 2, meta.width / 2 - 0.5, meta.height / 2 - 0.5);
  }

  // Pointers: a click selects the nearest track, a drag the tracks in a box; two fingers, the middle button or alt move
  // and zoom the view.

  down(e) {
    if (e.button === 2) return; // the context menu
    this.canvas.setPointerCapture(e.pointerId);
    this.pointers.set(e.pointerId, {x: e.offsetX, y: e.offsetY});
    this.start = {x: e.offsetX, y: e.offsetY, pan: e.button === 1 || e.altKey || this.pointers.size > 1};
    this.box = null;
    if (e.button === 1) e.preventDefault();
  }

  move(e) {
    const here = {x: e.offsetX, y: e.offsetY}, before = this.pointers.get(e.pointerId);
    if (!before) {
      this.point(here);
      return;
    }
    const [x, y] = this.toVideo(before.x, before.y);
    if (this.pointers.size === 2) {
      this.pinch(e.pointerId, here);
    } else if (this.start.pan) {
      this.shift(here.x, here.y, x, y);
    } else if (this.box || Math.hypot(here.x - this.start.x, here.y - this.start.y) > CLICK_PX) {
      this.box = {from: this.start, to: here};
      this.events.redraw();
    }
    this.pointers.set(e.pointerId, here);
  }

  pinch(id, here) {
    const [other] = [...this.pointers].filter(([key]) => key !== id).map(([, value]) => value);
    const before = this.pointers.get(id);
    const span = (a) => Math.max(10, Math.hypot(a.x - other.x, a.y - other.y));
    const middle = (a) => [(a.x + other.x) / 2, (a.y + other.y) / 2];
    const [x, y] = this.toVideo(...middle(before));
    this.zoom = Math.min(MAX_ZOOM, Math.max(1, this.zoom * span(here) / span(before)));
    this.shift(...middle(here), x, y);
  }

  up(e) {
    const known = this.pointers.delete(e.pointerId), {start, box} = this;
    if (!known || start.pan || e.type === "pointercancel") {
      this.box = null;
    } else if (box) {
      const [left, top] = this.toVideo(Math.min(box.from.x, box.to.x), Math.min(box.from.y, box.to.y));
      const [right, bottom] = this.toVideo(Math.max(box.from.x, box.to.x), Math.max(box.from.y, box.to.y));
      this.box = null;
      this.events.selectBox({left, top, right, bottom});
    } else {
      const [x, y] = this.toVideo(e.offsetX, e.offsetY);
      if (this.inside(x, y)) this.events.selectPoint(x, y, e.shiftKey);
    }
    this.events.redraw();
  }

  point(here) {
    const [x, y] = here ? this.toVideo(here.x, here.y) : [NaN, NaN];
    this.hover = this.inside(x, y) ? {x, y} : null;
    this.events.hover(this.hover);
  }

  // Drawing

  draw() {
    const {context: c, state} = this;
    c.clearRect(0, 0, this.width, this.height);
    this.drawImage("video", 1, true);
    if (state.layer !== "video") this.drawImage(state.layer, state.mix, state.smooth);
    const many = state.selection.length > 12;
    for (const track of state.selection) this.path(track, many);
    if (state.preview) this.path({...state.preview, color: "#ffffff"}, true, 0.75);
    for (const track of state.selection) this.mark(track, many);
    if (this.box) this.drawBox();
  }

  drawImage(layer, alpha, smooth) { // the layer's image of an earlier frame while that of this frame is unpacked
    const id = `${layer}-${this.state.frame}`;
    const bitmap = images.ready(id) || this.latest[layer];
    if (!images.ready(id)) images.get(id).then(() => this.events.redraw());
    if (!bitmap?.width) return; // none yet, or the cache has closed it
    this.latest[layer] = bitmap;
    const [left, top] = this.toScreen(-0.5, -0.5), c = this.context;
    c.globalAlpha = alpha;
    c.imageSmoothingEnabled = smooth && this.scale < 6; // enlarged further, pixels are drawn as squares
    c.drawImage(bitmap, left, top, meta.width * this.scale, meta.height * this.scale);
    c.globalAlpha = 1;
  }

  span(many) { // the frames whose path is drawn
    const {trail, frame} = this.state;
    if (trail === "none") return [frame, frame];
    if (trail === "near" || (trail === "auto" && many)) {
      return [Math.max(0, frame - NEAR_FRAMES), Math.min(meta.count - 1, frame + NEAR_FRAMES)];
    }
    return [0, meta.count - 1];
  }

  path(track, thin, alpha = 1) {
    const c = this.context, [from, to] = this.span(thin && this.state.selection.length > 12), {frame} = this.state;
    const lines = [new Path2D(), new Path2D(), new Path2D(), new Path2D()]; // past, future; each solid, dashed
    let before = -1;
    for (let t = from; t < to; t++) {
      const kind = (t >= frame ? 2 : 0) + (track.visible[t] && track.visible[t + 1] ? 0 : 1);
      if (kind !== before) lines[kind].moveTo(...this.toScreen(track.x[t], track.y[t]));
      lines[kind].lineTo(...this.toScreen(track.x[t + 1], track.y[t + 1]));
      before = kind;
    }
    c.lineJoin = c.lineCap = "round";
    const width = thin ? 1.4 : 2.6;
    lines.forEach((line, kind) => {
      const dashed = kind % 2 === 1, future = kind >= 2;
      c.setLineDash(dashed ? [width * 1.6, width * 2.6] : []);
      c.globalAlpha = alpha * (future ? 0.8 : 1);
      if (!thin) {
        c.strokeStyle = SHADOW;
        c.lineWidth = (future ? width * 0.5 : width) + 2.4;
        c.stroke(line);
      }
      c.strokeStyle = track.color;
      c.lineWidth = future ? width * 0.5 : width;
      c.stroke(line);
    });
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  mark(track, many) { // a disc where the point is visible, a ring where it is not; a cross in its query frame
    const c = this.context, {frame} = this.state;
    const radius = many ? Math.min(3, Math.max(1.8, 0.28 * meta.interval * this.scale)) : 5.5;
    const [x, y] = this.toScreen(track.x[frame], track.y[frame]);
    c.beginPath();
    c.arc(x, y, radius, 0, 2 * Math.PI);
    c.lineWidth = many ? 1.4 : 3;
    if (track.visible[frame]) {
      c.strokeStyle = many ? SHADOW : "#000"; // half of it lies under the disc
      c.stroke();
      c.fillStyle = track.color;
      c.fill();
    } else {
      c.strokeStyle = SHADOW;
      c.lineWidth = many ? 2.4 : 4;
      c.stroke();
      c.strokeStyle = track.color;
      c.lineWidth = many ? 1 : 2;
      c.stroke();
    }
    if (track.query === frame && !many) {
      c.fillStyle = "#000";
      c.fillRect(x - 3.5, y - 0.75, 7, 1.5);
      c.fillRect(x - 0.75, y - 3.5, 1.5, 7);
    }
  }

  drawBox() {
    const {from, to} = this.box, c = this.context;
    c.fillStyle = "rgba(255, 176, 0, .14)";
    c.strokeStyle = "#ffb000";
    c.lineWidth = 1.5;
    c.beginPath();
    c.rect(from.x, from.y, to.x - from.x, to.y - from.y);
    c.fill();
    c.stroke();
  }
}

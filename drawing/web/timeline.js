"use strict";
// The time line: a ruler of frames, and below it the visibility, depth and occlusion score of the selected tracks.

const LEFT = 58, RIGHT = 16, RULER = 26, STRIP = 12, GAP = 10; // px: margins, and heights from top to bottom
const COLORS = {text: "#9ba4b2", line: "#2b3038", playhead: "#ffb000", bright: "#e7eaef"};

class Timeline {
  constructor(canvas, state, events) {
    Object.assign(this, {canvas, state, events, context: canvas.getContext("2d")});
    new ResizeObserver(() => fitToScreen(this)).observe(canvas);
    const scrub = (e) => {
      const share = (e.offsetX - LEFT) / (this.width - LEFT - RIGHT);
      events.seek(Math.round(share * (meta.count - 1)));
    };
    canvas.addEventListener("pointerdown", (e) => {
      if (e.button !== 0) return;
      canvas.setPointerCapture(e.pointerId);
      events.pause();
      scrub(e);
    });
    canvas.addEventListener("pointermove", (e) => {
      if (e.buttons & 1) scrub(e);
    });
  }

  at(t) { // screen position of frame t
    return LEFT + (this.width - LEFT - RIGHT) * (meta.count > 1 ? t / (meta.count - 1) : 0);
  }

  draw() {
    const c = this.context, {selection} = this.state;
    c.clearRect(0, 0, this.width, this.height);
    c.font = "11px system-ui, sans-serif";
    this.ruler();
    if (selection.length) {
      const top = RULER + STRIP + GAP, free = this.height - top - 2 * GAP - 4, depth = Math.round(free * 0.56);
      this.visibility(RULER);
      this.plot(top, depth, "depth", ["near", "far"], meta.depthRange, (v) => v.depth);
      this.plot(top + depth + 2 * GAP, free - depth, "occlusion", ["1", "0"], [1, 0], (v) => v.score, meta.threshold);
    } else {
      c.fillStyle = COLORS.text;
      c.textAlign = "center";
      c.fillText("Depth and occlusion score of the selected track", this.width / 2, this.height / 2 + 8);
    }
    this.playhead();
  }

  ruler() {
    const c = this.context, apart = Math.max(1, Math.ceil(44 / ((this.at(1) - this.at(0)) || 44)));
    const step = [1, 2, 5, 10, 20, 25, 50, 100].find((s) => s >= apart) || 200;
    c.textAlign = "center";
    c.textBaseline = "alphabetic";
    for (let t = 0; t < meta.count; t++) {
      const major = t % step === 0;
      c.fillStyle = major ? COLORS.text : COLORS.line;
      c.fillRect(this.at(t) - 0.5, major ? 16 : 19, 1, major ? 7 : 4);
      if (major) c.fillText(meta.frames[t], this.at(t), 12);
    }
    c.textAlign = "right";
    c.fillStyle = COLORS.text;
    c.fillText("frame", LEFT - 12, 12);
  }

  visibility(top) { // a strip whose opacity is the share of the selected tracks that are visible
    const c = this.context, {selection} = this.state, right = this.width - RIGHT;
    const share = (t) => selection.reduce((sum, track) => sum + track.visible[t], 0) / selection.length;
    const edge = (t) => Math.round(Math.min(right, Math.max(LEFT, this.at(t - 0.5))));
    c.fillStyle = COLORS.line;
    c.fillRect(LEFT, top + STRIP / 2 - 1, right - LEFT, 2);
    c.fillStyle = selection.length === 1 ? selection[0].color : COLORS.bright;
    for (let t = 0; t < meta.count; t++) {
      c.globalAlpha = share(t);
      c.fillRect(edge(t), top, (meta.count > 1 ? edge(t + 1) : right) - edge(t), STRIP);
    }
    c.globalAlpha = 1;
    c.fillStyle = COLORS.text;
    c.textAlign = "right";
    c.fillText("visible", LEFT - 6, top + STRIP - 2);
  }

  plot(top, height, name, [upper, lower], [high, low], values, threshold) {
    const c = this.context, {selection} = this.state, right = this.width - RIGHT;
    const y = (v) => top + height * Math.min(1, Math.max(0, (v - high) / (low - high || 1)));
    c.strokeStyle = COLORS.line;
    c.strokeRect(LEFT + 0.5, top + 0.5, right - LEFT - 1, height - 1);
    c.fillStyle = COLORS.text;
    c.textAlign = "right";
    c.fillText(upper, LEFT - 6, top + 9);
    c.fillText(lower, LEFT - 6, top + height - 1);
    c.fillStyle = COLORS.bright;
    c.fillText(name, LEFT - 6, top + height / 2 + 4);
    if (threshold !== undefined) {
      c.setLineDash([3, 3]);
      c.strokeStyle = COLORS.text;
      c.beginPath();
      c.moveTo(LEFT, y(threshold));
      c.lineTo(right, y(threshold));
      c.stroke();
      c.setLineDash([]);
      c.fillStyle = COLORS.text;
      c.fillText("the model's threshold", right - 6, y(threshold) + (threshold > 0.5 ? 13 : -5));
    }
    c.save();
    c.beginPath();
    c.rect(LEFT, top - 2, right - LEFT, height + 4);
    c.clip();
    c.globalAlpha = selection.length > 12 ? 0.35 : 1;
    c.lineWidth = selection.length > 12 ? 1 : 1.8;
    for (const track of selection) {
      c.strokeStyle = track.color;
      c.beginPath();
      values(track).forEach((v, t) => c.lineTo(this.at(t), y(v)));
      c.stroke();
    }
    c.restore();
  }

  playhead() {
    const c = this.context, x = this.at(this.state.frame);
    c.fillStyle = COLORS.playhead;
    c.fillRect(x - 0.75, 14, 1.5, this.state.selection.length ? this.height - 14 : RULER - 4);
    c.beginPath();
    c.moveTo(x - 6, 13);
    c.lineTo(x + 6, 13);
    c.lineTo(x, 22);
    c.fill();
  }
}

"use strict";
// The page's data: images and tracks, unpacked when they are first needed (pack.py says how tracks are packed).

const meta = JSON.parse(document.getElementById("meta").textContent);
const MAX_BLOCKS = 6;   // blocks of tracks that stay unpacked in memory
const MAX_PIXELS = 4e7; // pixels of images that stay unpacked in memory

function bytesOf(id) {
  const text = atob(document.getElementById(id).textContent);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// A grid of tracks of one query frame; entry (t, n) is at t * size + n.
class Block {
  constructor(bytes, info) {
    const T = meta.count, n = info.rows * info.columns, total = T * n;
    this.frame = info.frame;
    this.size = n;
    this.columns = info.columns;
    this.x = Block.positions(bytes.subarray(0, 2 * total), info, n);
    this.y = Block.positions(bytes.subarray(2 * total, 4 * total), info, n);
    const bits = Math.ceil(total / 8);
    this.bits = bytes.slice(4 * total, 4 * total + bits);
    this.depth = Block.levels(bytes.slice(4 * total + bits, 5 * total + bits), n);
    this.score = Block.levels(bytes.slice(5 * total + bits, 6 * total + bits), n);
  }

  static positions(bytes, info, n) {
    const total = meta.count * n, out = new Int16Array(total);
    for (let at = 0; at < total; at += info.columns) {
      let change = 0;
      for (let k = at; k < at + info.columns; k++) {
        const z = bytes[k] | (bytes[total + k] << 8);
        change += (z >>> 1) ^ -(z & 1);
        out[k] = (k >= n ? out[k - n] : 0) + change; // int16 wraps around, as in pack.py
      }
    }
    return out;
  }

  static levels(bytes, n) {
    for (let k = n; k < bytes.length; k++) bytes[k] += bytes[k - n];
    return bytes;
  }

  visible(k) {
    return (this.bits[k >> 3] >> (k & 7)) & 1;
  }

  track(n) {
    const T = meta.count, [near, far] = meta.depthRange;
    const at = (values, scale, start = 0) =>
      Float32Array.from({length: T}, (_, t) => start + values[t * this.size + n] * scale);
    return {
      id: `${this.frame}:${n}`, query: this.frame,
      x: at(this.x, meta.quantum), y: at(this.y, meta.quantum),
      visible: Uint8Array.from({length: T}, (_, t) => this.visible(t * this.size + n)),
      depth: at(this.depth, (far - near) / 255, near), score: at(this.score, 1 / 255),
    };
  }
}

// A least-recently-used cache of at most `most` promises of unpacked values.
class Cache {
  constructor(most, make, drop = () => {}) {
    Object.assign(this, {most, make, drop, entries: new Map(), done: new Map()});
  }

  get(key) {
    let entry = this.entries.get(key);
    if (!entry) {
      entry = this.make(key).then((value) => {
        this.done.set(key, value);
        return value;
      });
    }
    this.entries.delete(key);
    this.entries.set(key, entry);
    while (this.entries.size > this.most) {
      const oldest = this.entries.keys().next().value;
      if (!this.done.has(oldest)) break; // still being unpacked
      this.drop(this.done.get(oldest));
      this.entries.delete(oldest);
      this.done.delete(oldest);
    }
    return entry;
  }

  ready(key) { // the value if it is there already
    return this.done.get(key);
  }
}

const blocks = new Cache(MAX_BLOCKS, async (b) => new Block(await inflate(bytesOf(`tracks-${b}`)), meta.blocks[b]));
const images = new Cache(
  Math.max(12, Math.round(MAX_PIXELS / (meta.width * meta.height))),
  (id) => createImageBitmap(new Blob([bytesOf(id)], {type: "image/webp"})),
  (bitmap) => bitmap.close());

// Block numbers by the distance of their query frames from a frame, nearest first.
function blocksNear(frame) {
  const distance = (b) => Math.abs(meta.blocks[b].frame - frame);
  return meta.blocks.map((_, b) => b).sort((a, b) => distance(a) - distance(b));
}

function nearestIn(block, frame, x, y, best) {
  const q = meta.quantum, from = frame * block.size;
  for (let n = 0; n < block.size; n++) {
    const k = from + n, distance = Math.hypot(block.x[k] * q - x, block.y[k] * q - y);
    const seen = block.visible(k);
    if (seen && distance < best.distance) Object.assign(best, {block, n, distance, seen: true});
    if (!seen && !best.seen && distance < best.distance) Object.assign(best, {block, n, distance});
  }
}

// The stored track that is nearest to a point of a frame and visible there. Blocks of the nearest query frames are
// searched first, the others only if these have no visible track within the distance of grid points.
async function nearestTrack(frame, x, y) {
  const order = blocksNear(frame), first = meta.blocks[order[0]].frame === frame ? 1 : 2;
  const best = {distance: Infinity, seen: false};
  for (let k = 0; k < order.length; k++) {
    if (k >= first && best.seen && best.distance <= meta.interval) break;
    nearestIn(await blocks.get(order[k]), frame, x, y, best);
  }
  return {...best.block.track(best.n), distance: best.distance};
}

// The same among the blocks that are unpacked already, for the preview under the pointer; null if none is near.
function nearestReady(frame, x, y) {
  const best = {distance: 1.5 * meta.interval, seen: false};
  for (const b of blocksNear(frame).slice(0, 2)) {
    const block = blocks.ready(b);
    if (block) nearestIn(block, frame, x, y, best);
  }
  return best.seen ? best.block.track(best.n) : null;
}

// Tracks of one block that are visible inside a box of a frame. More than `most` are thinned to every k-th row and
// column.
async function tracksInBox(frame, box, most) {
  const q = meta.quantum;
  for (const b of blocksNear(frame)) {
    const block = await blocks.get(b), found = [];
    for (let n = 0; n < block.size; n++) {
      const k = frame * block.size + n, x = block.x[k] * q, y = block.y[k] * q;
      if (x >= box.left && x <= box.right && y >= box.top && y <= box.bottom && block.visible(k)) found.push(n);
    }
    if (found.length) {
      let kept = found;
      for (let k = 2; kept.length > most; k++) {
        kept = found.filter((n) => n % block.columns % k === 0 && Math.floor(n / block.columns) % k === 0);
      }
      return {total: found.length, tracks: kept.map((n) => block.track(n))};
    }
  }
  return {total: 0, tracks: []};
}

"use strict";
// State of the page, selection of tracks, buttons and keys.

const $ = (id) => document.getElementById(id);
const PALETTE = ["#ffb000", "#56b4e9", "#00c08b", "#f0e442", "#e8713a", "#d68fc0", "#4f8cff", "#ffffff"];
const MAX_STEP = 4;         // frames that playing advances at a time
const MAX_BOX_TRACKS = 300; // tracks of a box that are drawn
const LAYERS = ["video", ...Object.keys(meta.layers)];
const LAYER_NAMES = {video: "Video", depth: "Depth", flow: "Flow", error: "Errors"};
const SOURCE_DIFFERS = // its frames have another size or other numbers than those shown
  meta.saved.scale.some((s) => s !== 1) || meta.saved.frames.some((frame, t) => frame !== meta.frames[t]);
const NOTHING = $("empty").textContent; // what the panel says while no track is selected
const state = {frame: 0, playing: false, speed: 1, layer: "video", mix: 1, smooth: true, trail: "auto", selection: [],
  preview: null};

let scheduled = false;
function redraw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    stage.draw();
    timeline.draw();
    showCurrentFrame();
  });
}

// Time

function seek(frame) {
  state.frame = Math.min(meta.count - 1, Math.max(0, frame));
  state.preview = null;
  for (let k = 0; k <= MAX_STEP; k++) { // this frame and the next ones
    const t = (state.frame + k) % meta.count;
    images.get(`video-${t}`);
    if (state.layer !== "video") images.get(`${state.layer}-${t}`);
  }
  blocks.get(blocksNear(state.frame)[0]);
  redraw();
}

let clock = 0;
function play() {
  state.playing = true;
  clock = performance.now();
  showPlaying();
  requestAnimationFrame(tick);
}

function pause() {
  state.playing = false;
  showPlaying();
}

function tick(now) {
  if (!state.playing) return;
  const period = 1000 / (meta.fps * state.speed), due = Math.floor((now - clock) / period);
  const step = Math.min(MAX_STEP, Math.max(1, due)); // frames are skipped if the screen shows fewer a second
  const next = (state.frame + step) % meta.count;
  if (due > 0 && images.ready(`video-${next}`)) {
    clock = Math.max(clock + step * period, now - 100); // at most 100 ms of delay is caught up
    seek(next);
  } else {
    images.get(`video-${next}`);
  }
  requestAnimationFrame(tick);
}

function showPlaying() {
  $("play").setAttribute("aria-label", state.playing ? "Pause" : "Play");
  $("play-icon").setAttribute("d", state.playing ? "M6 4h4v16H6zM14 4h4v16h-4z" : "M7 4v16l13-8z");
}

// Selection

async function selectPoint(x, y, add) { // the track nearest to a point; add: to the selection
  const track = await nearestTrack(state.frame, x, y);
  const others = add ? state.selection.filter((other) => other.id !== track.id) : [];
  track.color = PALETTE[others.length % PALETTE.length];
  const frame = meta.frames[track.query];
  const distance = `The track is ${track.distance.toFixed(1)} px from the click.`;
  if (others.length) {
    select([...others, track], `${others.length + 1} tracks. ${track.distance > meta.interval ? distance : ""}`);
  } else {
    const start = `x ${track.x[track.query].toFixed(0)}, y ${track.y[track.query].toFixed(0)}`;
    select([track], `Query point: frame ${frame}, ${start}. ${distance}`);
  }
}

async function selectBox(box) {
  const {total, tracks} = await tracksInBox(state.frame, box, MAX_BOX_TRACKS);
  for (const track of tracks) {
    track.color = positionColor((track.x[state.frame] - box.left) / (box.right - box.left),
      (track.y[state.frame] - box.top) / (box.bottom - box.top));
  }
  const shown = tracks.length < total ? `${tracks.length} of ${total}` : total;
  select(tracks, total ? `${shown} ${total === 1 ? "track" : "tracks"} in the box.` :
    "No visible track in the box. Draw a larger one, or click a pixel.");
}

function positionColor(x, y) { // interpolates the 3x3 colors of drawing/colors.py at (x, y) in [0, 1]
  const grid = meta.positionColors;
  const u = Math.min(1.999, Math.max(0, 2 * x)), v = Math.min(1.999, Math.max(0, 2 * y));
  const i = Math.floor(u), j = Math.floor(v), a = u - i, b = v - j;
  const rgb = [0, 1, 2].map((k) => Math.round((1 - b) * ((1 - a) * grid[j][i][k] + a * grid[j][i + 1][k]) +
    b * ((1 - a) * grid[j + 1][i][k] + a * grid[j + 1][i + 1][k])));
  return `rgb(${rgb})`;
}

function select(tracks, note) {
  Object.assign(state, {selection: tracks, preview: null});
  $("hint").hidden = true;
  $("empty").hidden = tracks.length > 0;
  $("chosen").hidden = tracks.length === 0;
  $("what").textContent = note;
  $("empty").textContent = tracks.length || !note ? NOTHING : note;
  $("selection").querySelector("h2").textContent = tracks.length > 1 ? "Tracks" : "Track";
  redraw();
}

function showCurrentFrame() {
  const t = state.frame, {selection} = state;
  $("counter").querySelector("b").textContent = meta.frames[t];
  $("chart").setAttribute("aria-valuenow", t);
  $("chart").setAttribute("aria-valuetext", `frame ${meta.frames[t]}`);
  $("zoomed").hidden = stage.zoom < 1.01;
  if (!$("zoomed").hidden) $("hint").hidden = true; // they would overlap in a narrow window
  $("zoomed").querySelector("span").textContent = `${stage.zoom.toFixed(1)}×`;
  if (!selection.length) return;
  const rows = [];
  if (selection.length === 1) {
    const [track] = selection, seen = track.visible.reduce((sum, v) => sum + v, 0);
    rows.push(["Now", track.visible[t] ? "visible" : "occluded", `state ${track.visible[t] ? "visible" : ""}`],
      ["Position", `${track.x[t].toFixed(2)}, ${track.y[t].toFixed(2)}`]);
    if (SOURCE_DIFFERS) rows.push([`Source frame ${meta.saved.frames[t]}`, inSource(track, t, 1).join(", ")]);
    rows.push(["Depth", track.depth[t].toFixed(3)], ["Occlusion score", track.score[t].toFixed(2)],
      ["Visible in", `${seen} of ${meta.count} frames`]);
  } else {
    const seen = selection.reduce((sum, track) => sum + track.visible[t], 0);
    const mean = selection.reduce((sum, track) => sum + track.depth[t], 0) / selection.length;
    rows.push(["Visible now", `${seen} of ${selection.length}`], ["Mean depth", mean.toFixed(3)]);
    selection.slice(0, selection.length > PALETTE.length ? 0 : undefined).forEach((track) => {
      rows.push([`x ${track.x[t].toFixed(1)}, y ${track.y[t].toFixed(1)}`, `depth ${track.depth[t].toFixed(3)}`,
        `state ${track.visible[t] ? "visible" : ""}`, track.color]);
    });
  }
  $("now").replaceChildren(...rows.flatMap(([name, value, style, color]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    dd.className = style || "";
    dd.style.color = color || "";
    return [dt, dd];
  }));
}

function hover(here) {
  $("cursor").hidden = !here;
  if (here) $("cursor").textContent = `x ${here.x.toFixed(0)}  y ${here.y.toFixed(0)}`;
  state.preview = here && !state.playing ? nearestReady(state.frame, here.x, here.y) : null;
  redraw();
}

function csv() { // the same columns, pixels and frame numbers as eval.py writes
  const lines = ["track,frame,x,y,visible,occlusion_score,depth"];
  const {frames} = meta.saved;
  state.selection.forEach((track, n) => {
    for (let t = 0; t < meta.count; t++) {
      lines.push([n, frames[t], ...inSource(track, t, 4), track.visible[t],
        track.score[t].toFixed(4), track.depth[t].toFixed(4)].join(","));
    }
  });
  return lines.join("\n") + "\n";
}

function inSource(track, t, digits) { // x and y in the pixels of the source; pixel centers are at integers
  return [track.x[t], track.y[t]].map((v, k) => ((v + 0.5) * meta.saved.scale[k] - 0.5).toFixed(digits));
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  link.download = `${meta.title.replace(/[^\w-]+/g, "_")}_tracks.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function copy() {
  if (!state.selection.length) return;
  const area = document.createElement("textarea"); // navigator.clipboard may be missing on file:// pages
  const focused = document.activeElement;
  area.value = csv();
  area.style.position = "fixed"; // the page does not scroll to it
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus({preventScroll: true});
  $("copy").textContent = copied ? "Copied" : "Not copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1200);
}

// Layers and options

function setLayer(name) {
  const layer = meta.layers[name];
  Object.assign(state, {layer: name, smooth: !layer || layer.smooth !== false});
  for (const button of $("layers").children) {
    button.setAttribute("aria-checked", button.dataset.layer === name);
    button.tabIndex = button.dataset.layer === name ? 0 : -1;
  }
  $("mix-row").hidden = !layer;
  $("legend").hidden = !layer;
  if (layer) {
    const parts = [Object.assign(document.createElement("span"), {textContent: layer.low || ""})];
    if (layer.bar) {
      const bar = Object.assign(document.createElement("div"), {className: "bar"});
      bar.style.background = `linear-gradient(90deg, ${layer.bar.join(",")})`;
      parts.push(bar);
    } else {
      parts.push(Object.assign(new Image(), {src: layer.wheel, alt: "color wheel: hue is direction"}));
    }
    parts.push(Object.assign(document.createElement("span"), {textContent: layer.high}));
    $("legend").replaceChildren(...parts);
  }
  seek(state.frame);
}

function stepLayer(by) {
  const next = (LAYERS.indexOf(state.layer) + by + LAYERS.length) % LAYERS.length;
  setLayer(LAYERS[next]);
  $("layers").children[next].focus();
}

function chooseOption(id, by) {
  const list = $(id), next = list.selectedIndex + by;
  list.selectedIndex = id === "trail" ? next % list.length : Math.min(list.length - 1, Math.max(0, next));
  list.dispatchEvent(new Event("change"));
}

const KEYS = {
  " ": () => (state.playing ? pause() : play()),
  ArrowLeft: (e) => (pause(), seek(state.frame - (e.shiftKey ? 10 : 1))),
  ArrowRight: (e) => (pause(), seek(state.frame + (e.shiftKey ? 10 : 1))),
  Home: () => (pause(), seek(0)), End: () => (pause(), seek(meta.count - 1)),
  "[": () => chooseOption("speed", -1), "]": () => chooseOption("speed", 1),
  t: () => chooseOption("trail", 1), c: copy,
  0: () => stage.reset(), "+": () => stage.zoomAt(stage.width / 2, stage.height / 2, 1.5),
  "-": () => stage.zoomAt(stage.width / 2, stage.height / 2, 1 / 1.5),
  Escape: () => select([], ""), "?": () => $("help").showModal(),
};
LAYERS.forEach((name, k) => { KEYS[k + 1] = () => setLayer(name); });

const ARROWS = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1};

function onKey(e) { // a focused control keeps the keys that it uses itself
  const arrow = ARROWS[e.key], control = e.target;
  const own = (control.matches("select") && !["Escape", "?"].includes(e.key)) ||
    (control.matches("input") && (arrow || ["Home", "End"].includes(e.key))) ||
    (control.matches("button") && e.key === " ");
  const act = arrow && control.matches("[role=radio]") ? () => stepLayer(arrow) :
    KEYS[e.key.length === 1 ? e.key.toLowerCase() : e.key];
  if (!act || own || e.ctrlKey || e.metaKey || (e.altKey && arrow) || $("help").open) return;
  e.preventDefault();
  act(e);
}

// A control that was used with a mouse or a finger gives up the focus, so that space and arrows keep their meaning.
function releaseFocus() {
  document.addEventListener("click", (e) => { // the click of a key on a button has detail 0
    if (e.detail) e.target.closest("button")?.blur();
  }, {capture: true}); // before the button opens the dialog, which later gives the focus back
  for (const control of [$("speed"), $("trail"), $("mix")]) {
    let pointed = false;
    control.addEventListener("pointerdown", () => { pointed = true; });
    control.addEventListener("blur", () => { pointed = false; });
    control.addEventListener("change", () => pointed && control.blur());
  }
}

function connectControls() {
  for (const name of LAYERS) {
    const button = Object.assign(document.createElement("button"), {type: "button", textContent: LAYER_NAMES[name]});
    button.dataset.layer = name;
    button.setAttribute("role", "radio");
    button.addEventListener("click", () => setLayer(name));
    $("layers").append(button);
  }
  $("last-layer").textContent = LAYERS.length;
  const on = (id, act, event = "click") => $(id).addEventListener(event, act);
  on("play", () => (state.playing ? pause() : play()));
  on("back", () => (pause(), seek(state.frame - 1)));
  on("forward", () => (pause(), seek(state.frame + 1)));
  on("speed", (e) => { state.speed = Number(e.target.value); }, "change");
  on("trail", (e) => { state.trail = e.target.value; redraw(); }, "change");
  on("mix", (e) => {
    state.mix = e.target.value / 100;
    $("mix-value").textContent = `${e.target.value}%`;
    redraw();
  }, "input");
  on("save", save);
  on("copy", copy);
  on("clear", () => select([], ""));
  on("zoom-reset", () => stage.reset());
  on("help-open", () => $("help").showModal());
  on("help-close", () => $("help").close());
  document.addEventListener("keydown", onKey);
  releaseFocus();
}

function showFacts() {
  const tracks = meta.blocks.reduce((sum, block) => sum + block.rows * block.columns, 0);
  $("facts").textContent = `${meta.count} frames, ${meta.width}×${meta.height}, ${tracks.toLocaleString("en")} tracks`;
  const every = meta.blocks.length > 1 ? meta.frames[meta.blocks[1].frame] - meta.frames[meta.blocks[0].frame] : 0;
  const where = meta.interval === 1 ? "at every pixel" : `${meta.interval} px apart`;
  const when = every > 1 ? `once every ${every} frames` : every ? "in every frame" : "in the first frame";
  const notes = [`Tracks start ${where}, ${when}; positions are rounded to ${meta.quantum} px.`,
    ...meta.notices.map((n) => n[0].toUpperCase() + n.slice(1) + ".")];
  if (SOURCE_DIFFERS) {
    const size = [meta.width, meta.height].map((side, k) => Math.round(side * meta.saved.scale[k])).join("×");
    notes.push(`The frames shown are of a source of ${size}. Saved tracks are in its pixels and frame numbers.`);
  }
  $("notes").replaceChildren(...notes.map((n) => Object.assign(document.createElement("p"), {textContent: n})));
  document.documentElement.style.setProperty("--ratio", meta.height / meta.width);
  $("chart").setAttribute("aria-valuemax", meta.count - 1);
  $("counter").querySelector("span").textContent = `/ ${meta.frames[meta.count - 1]}`;
}

const events = {redraw, selectPoint, selectBox, hover, seek, pause};
const stage = new Stage($("view"), state, events);
const timeline = new Timeline($("chart"), state, events);
if (typeof DecompressionStream === "undefined") {
  $("message").textContent = "This page needs a browser of 2023 or later.";
  $("message").hidden = false;
} else {
  connectControls();
  showFacts();
  setLayer("video");
}

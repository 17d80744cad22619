"""A player of clips: one HTML file with a plain canvas, made to be looked at. No network.

Real beside generated, one camera and one clock for both: orbit, play, scrub. Touching joints are lit.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence

import numpy as np

from jaxmethods.errors import InputError
from jaxmethods.runtime.motion import Clip, Pair, Skeleton, checked, end_joint

_MILLIMETRES = 1000
_FARTHEST = np.iinfo(np.int16).max / _MILLIMETRES  # m
NEAR = 0.1  # m; joints of two persons touch below it
FAST = 0.95  # m/s; a foot on the floor is slower: InterHuman's 0.001 m^2 per frame^2 at 30 fps

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --page: #f4f6f8; --card: #ffffff;
  --line: #d7dee5; --sky: #e9eff4; --floor: #b4c1cd; --shade: #26323e;
  --first: #1f7a99; --second: #d1495b;
  --touch: #f2a900; --foot: #3f9d63; --thing: #6b5b95; --accent: #1f6f8b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #98a6b5; --page: #12171d;
  --card: #1a2129; --line: #2d3742; --sky: #161d25; --floor: #46545f; --shade: #000000; --first: #4db3d3;
  --second: #f0727f; --touch: #ffc53d; --foot: #5cc283; --thing: #a594d6; --accent: #4db3d3; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 82rem; padding: 1.2rem 1.4rem 2rem; }
h1 { font-size: 1.3rem; margin: 0; }
p.about { margin: .2rem 0 1rem; color: var(--soft); }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem 1rem; margin: .7rem 0; }
.bar label { color: var(--soft); font-size: .85rem; display: flex; align-items: center; gap: .4rem; }
button, select { font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: .45rem; padding: .3rem .7rem; cursor: pointer; }
button:hover, select:hover { border-color: var(--accent); }
button:focus-visible, select:focus-visible, input:focus-visible, canvas:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 1px; }
#play { min-width: 5.6rem; background: var(--accent); border-color: var(--accent); color: #fff;
  font-weight: 600; }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: .9rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  overflow: hidden; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .1rem 1rem;
  padding: .5rem .8rem; font-variant-numeric: tabular-nums; font-size: .85rem; color: var(--soft); }
figcaption b { color: var(--ink); font-size: .95rem; }
figcaption .state.lit { color: var(--touch); font-weight: 600; }
.views canvas { display: block; width: 100%; height: min(60vh, 34rem); touch-action: none; cursor: grab;
  border-top: 1px solid var(--line); }
.views canvas:active { cursor: grabbing; }
#scrub { width: 100%; margin: 0; accent-color: var(--accent); }
#strip { width: 100%; height: 2.1rem; display: block; }
.clock { min-width: 8.5rem; font-variant-numeric: tabular-nums; color: var(--soft); font-size: .85rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .4rem;
  vertical-align: -.08rem; background: var(--of); }
kbd { font: .78rem system-ui; border: 1px solid var(--line); border-radius: .3rem; padding: 0 .3rem; }
"""

# The drawing: a camera that orbits, bones as round strokes from the farthest to the nearest.
_DRAW = """
const LIFT = 0.85, FOCAL = 2.4, CELL = 0.5;
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
function mix(a, b, share) {
  const of = (c) => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16));
  const [x, y] = [of(a), of(b)];
  return 'rgb(' + x.map((v, i) => Math.round(v + share * (y[i] - v))).join(',') + ')';
}
function palette() {
  const style = getComputedStyle(document.documentElement), found = {};
  for (const n of ['ink', 'soft', 'sky', 'floor', 'shade', 'first', 'second', 'touch', 'foot', 'thing',
    'card', 'line', 'accent']) found[n] = style.getPropertyValue('--' + n).trim();
  return found;
}
function camera(view, centre, width, height) {
  const [cy, sy, cp, sp] = [Math.cos(view.yaw), Math.sin(view.yaw), Math.cos(view.pitch),
    Math.sin(view.pitch)];
  const right = [cy, 0, -sy], ahead = [-sy * cp, -sp, -cy * cp], up = [-sy * sp, cp, -cy * sp];
  const aim = [centre[0] + view.pan[0], LIFT + view.pan[1], centre[2] + view.pan[2]];
  const scale = FOCAL * Math.min(height, width * 0.95) / 2;
  return {
    right, up,
    place(p) {
      const d = [p[0] - aim[0], p[1] - aim[1], p[2] - aim[2]];
      const depth = view.far + dot(d, ahead);
      const size = scale / Math.max(depth, 0.05);
      return { x: width / 2 + dot(d, right) * size, y: height * 0.52 - dot(d, up) * size, depth, size };
    },
  };
}
function stroke(c, a, b, width, colour) {
  c.strokeStyle = colour; c.lineWidth = width; c.beginPath(); c.moveTo(a.x, a.y); c.lineTo(b.x, b.y);
  c.stroke();
}
function disc(c, p, radius, colour) {
  c.fillStyle = colour; c.beginPath(); c.arc(p.x, p.y, radius, 0, 7); c.fill();
}
function ground(c, cam, centre, reach, far, colour) {
  const low = (v) => Math.floor((v - reach) / CELL) * CELL, cells = Math.ceil(2 * reach / CELL) + 1;
  const [x0, z0] = [low(centre[0]), low(centre[2])];
  for (let i = 0; i <= cells; i++) for (let j = 0; j < cells; j++)
    for (const flip of [0, 1]) {
      const from = flip ? [x0 + j * CELL, 0, z0 + i * CELL] : [x0 + i * CELL, 0, z0 + j * CELL];
      const to = flip ? [from[0] + CELL, 0, from[2]] : [from[0], 0, from[2] + CELL];
      const away = Math.hypot(from[0] - centre[0], from[2] - centre[2]) / reach;
      const [a, b] = [cam.place(from), cam.place(to)];
      if (away > 1 || a.depth < 0.2 || b.depth < 0.2) continue;
      c.globalAlpha = Math.pow(1 - away, 0.7);
      stroke(c, a, b, 1, colour);
    }
  c.globalAlpha = 1;
}
function shadows(c, cam, bodies, colour) {
  const flat = (p) => cam.place([p[0], 0.002, p[2]]);
  c.globalAlpha = 0.15; c.strokeStyle = colour;
  for (const joints of bodies) {
    c.beginPath();  // one path a body: where bones cross, the shadow is no darker
    for (const [child, parent] of data.body.bones) {
      const [a, b] = [flat(joints[child]), flat(joints[parent])];
      c.lineWidth = 0.09 * a.size;
      if (a.depth > 0.2 && b.depth > 0.2) { c.moveTo(a.x, a.y); c.lineTo(b.x, b.y); }
    }
    c.stroke();
  }
  c.globalAlpha = 1;
}
function trails(c, cam, clip, colours) {
  c.globalAlpha = 0.5;
  for (let e = 0; e < clip.persons; e++) for (let t = 1; t < clip.frames; t++) {
    const at = (t) => {
      const p = joint(clip, t, e, data.body.root);
      return cam.place([p[0], 0.004, p[2]]);
    };
    stroke(c, at(t - 1), at(t), 2, colours[e]);
  }
  c.globalAlpha = 1;
}
function parts(cam, bodies, colours, view, sky) {
  const list = [];
  bodies.forEach((joints, e) => {
    const at = joints.map(p => cam.place(p));
    const fog = (depth, colour) =>
      mix(colour, sky, Math.min(0.5, Math.max(0, 0.16 * (depth - view.far + 0.6))));
    const tone = (side, colour) => side > 0 ? mix(hex(colour), '#ffffff', 0.28)
      : side < 0 ? mix(hex(colour), '#000000', 0.22) : colour;
    for (const [child, parent, radius, side] of data.body.bones) {
      const depth = (at[child].depth + at[parent].depth) / 2;
      list.push({ depth, draw(c) {
        const width = Math.max(2, 2 * radius * (at[child].size + at[parent].size) / 2);
        const colour = fog(depth, hex(tone(side, colours[e])));
        stroke(c, at[child], at[parent], width + 2, sky);
        stroke(c, at[child], at[parent], width, colour);
      } });
    }
    const chest = data.body.chest.map(i => at[i]);
    const middle = chest.reduce((sum, p) => sum + p.depth, 0) / chest.length;
    list.push({ depth: middle + 0.02, draw(c) {
      c.globalAlpha = 0.55; c.fillStyle = fog(middle, colours[e]); c.beginPath();
      chest.forEach((p, i) => i ? c.lineTo(p.x, p.y) : c.moveTo(p.x, p.y)); c.closePath(); c.fill();
      c.globalAlpha = 1;
    } });
    const head = at[data.body.head];
    list.push({ depth: head.depth - 0.05, draw(c) {
      disc(c, head, 0.105 * head.size + 1, sky);
      disc(c, head, 0.105 * head.size, fog(head.depth, colours[e]));
      nose(c, cam, joints, sky);
    } });
  });
  return list;
}
function hex(colour) {
  if (colour[0] == '#') return colour;
  return '#' + colour.match(/\\d+/g).map(v => Number(v).toString(16).padStart(2, '0')).join('');
}
function nose(c, cam, joints, colour) {
  const [l, r] = data.body.shoulders.map(i => joints[i]), h = joints[data.body.head];
  const side = [r[0] - l[0], 0, r[2] - l[2]], n = Math.hypot(side[0], side[2]) || 1;
  const ahead = [side[2] / n, 0, -side[0] / n];
  const tip = cam.place(h.map((v, i) => v + 0.1 * ahead[i])), head = cam.place(h);
  if (tip.depth < head.depth + 0.02) disc(c, tip, Math.max(1.5, 0.028 * tip.size), colour);
}
function cloud(cam, clip, time, colour) {
  return points(clip, time).map(p => {
    const at = cam.place(p);
    return { depth: at.depth, draw(c) { disc(c, at, Math.max(1.2, 0.012 * at.size), colour); } };
  });
}
function glow(c, cam, bodies, found, colours) {
  for (const [i, j] of found.pairs) {
    const [a, b] = [cam.place(bodies[0][i]), found.other ? cam.place(j) : cam.place(bodies[1][j])];
    for (const p of [a, b]) {
      const radius = 0.09 * p.size, shine = c.createRadialGradient(p.x, p.y, 0, p.x, p.y, radius);
      shine.addColorStop(0, colours.touch); shine.addColorStop(0.35, colours.touch + 'aa');
      shine.addColorStop(1, colours.touch + '00');
      disc(c, p, radius, shine);
    }
    stroke(c, a, b, 2, colours.touch);
  }
}
function footprints(c, cam, clip, time, colour) {
  for (const p of standing(clip, time)) {
    c.strokeStyle = colour; c.lineWidth = 2.5; c.beginPath();
    for (let k = 0; k <= 24; k++) {
      const turn = k * Math.PI / 12;
      const q = cam.place([p[0] + 0.09 * Math.cos(turn), 0.004, p[2] + 0.09 * Math.sin(turn)]);
      k ? c.lineTo(q.x, q.y) : c.moveTo(q.x, q.y);
    }
    c.stroke();
  }
}
"""

# Clips, the clock and what a hand does.
_PLAY = """
const data = JSON.parse(document.getElementById('data').textContent);
const $ = (id) => document.getElementById(id);
const unpack = (text) => new Int16Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const opened = new Map();
function open(i) {
  if (i < 0) return null;
  if (!opened.has(i)) opened.set(i, prepared({ ...data.clips[i] }));
  return opened.get(i);
}
function prepared(clip) {
  clip.at = unpack(clip.positions);
  clip.cloud = clip.points && unpack(clip.points);
  let [x, z] = [0, 0];
  const count = clip.frames * clip.persons, root = data.body.root;
  for (let t = 0; t < clip.frames; t++) for (let e = 0; e < clip.persons; e++) {
    const p = joint(clip, t, e, root); x += p[0] / count; z += p[2] / count;
  }
  clip.centre = [x, 0, z]; clip.wide = 0.8;
  for (let t = 0; t < clip.frames; t++) for (let e = 0; e < clip.persons; e++)
    for (const [child] of data.body.bones) {
      const p = joint(clip, t, e, child);
      clip.wide = Math.max(clip.wide, Math.hypot(p[0] - x, p[2] - z));
    }
  clip.touching = Array.from({ length: clip.frames },
    (_, t) => touches(clip, pose(clip, t), t).pairs.length > 0);
  return clip;
}
function joint(clip, t, e, j) {
  const o = 3 * ((t * clip.persons + e) * data.body.names.length + j);
  return [clip.at[o] / 1000, clip.at[o + 1] / 1000, clip.at[o + 2] / 1000];
}
function pose(clip, time) {
  const t = Math.min(clip.frames - 1, Math.max(0, time)), low = Math.floor(t), share = t - low;
  const high = Math.min(clip.frames - 1, low + 1);
  return Array.from({ length: clip.persons }, (_, e) => data.body.names.map((_, j) => {
    const [a, b] = [joint(clip, low, e, j), joint(clip, high, e, j)];
    return a.map((v, i) => v + share * (b[i] - v));
  }));
}
function points(clip, time) {
  if (!clip.cloud) return [];
  const many = clip.cloud.length / 3 / clip.cloud_frames;
  const t = Math.min(clip.cloud_frames - 1, Math.max(0, Math.round(time)));
  return Array.from({ length: many },
    (_, i) => [0, 1, 2].map(k => clip.cloud[3 * (t * many + i) + k] / 1000));
}
function touches(clip, bodies, time) {
  const apart = (p, q) => Math.hypot(p[0] - q[0], p[1] - q[1], p[2] - q[2]), pairs = [];
  let least = Infinity;
  const other = clip.persons == 1;
  const mine = other ? data.body.hands : bodies[0].keys();
  const theirs = other ? points(clip, time) : bodies[1];
  for (const i of mine) {
    let best = null, bound = data.near;
    theirs.forEach((q, j) => {
      const d = apart(bodies[0][i], q); least = Math.min(least, d);
      if (d < bound && other) { bound = d; best = q; } else if (d < bound) pairs.push([i, j]);
    });
    if (best) pairs.push([i, best]);
  }
  return { pairs, least, other };
}
function standing(clip, time) {
  const t = Math.min(clip.frames - 2, Math.max(0, Math.round(time))), found = [];
  if (clip.frames < 2) return found;
  for (let e = 0; e < clip.persons; e++) data.body.feet.forEach(([j, height]) => {
    const [p, q] = [joint(clip, t, e, j), joint(clip, t + 1, e, j)];
    const speed = Math.hypot(p[0] - q[0], p[1] - q[1], p[2] - q[2]) * clip.fps;
    if (p[1] < height && speed < data.fast) found.push(p);
  });
  return found;
}
const state = { pair: 0, time: 0, play: true, speed: 1, trails: false, contacts: true };
const view = { yaw: 0.7, pitch: 0.2, far: 4, pan: [0, 0, 0] };
const sides = ['real', 'made'];
const shown = () => sides.map(side => open(data.pairs[state.pair][side]));
const length = () => Math.max(...shown().filter(Boolean).map(c => (c.frames - 1) / c.fps), 1e-3);
function aside() {  // from where two people are seen beside each other, a little turned
  const clip = open(data.pairs[state.pair].made), root = data.body.root;
  if (clip.persons < 2) return 0.7;
  let [x, z] = [0, 0];
  for (let t = 0; t < clip.frames; t++) {
    const [p, q] = [joint(clip, t, 0, root), joint(clip, t, 1, root)];
    x += q[0] - p[0]; z += q[2] - p[2];
  }
  return Math.atan2(-z, x) + 0.35;
}
function reset() {
  const wide = Math.max(...shown().filter(Boolean).map(c => c.wide));
  Object.assign(view, { yaw: aside(), pitch: 0.22, far: 2.5 + 1.25 * wide, pan: [0, 0, 0] });
}
function fit(canvas) {
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const [w, h] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
  if (canvas.width != w || canvas.height != h) { canvas.width = w; canvas.height = h; }
  const c = canvas.getContext('2d');
  c.setTransform(ratio, 0, 0, ratio, 0, 0); c.lineCap = 'round'; c.lineJoin = 'round';
  return [c, box.width, box.height];
}
function paint(side, clip, colours) {
  const figure = $(side);
  figure.hidden = !clip;
  if (!clip) return;
  const [c, width, height] = fit(figure.querySelector('canvas'));
  const sky = c.createLinearGradient(0, 0, 0, height);
  sky.addColorStop(0, colours.card); sky.addColorStop(0.55, colours.sky);
  c.fillStyle = sky; c.fillRect(0, 0, width, height);
  const frame = state.time * clip.fps, bodies = pose(clip, frame);
  const cam = camera(view, clip.centre, width, height), people = [colours.first, colours.second];
  ground(c, cam, clip.centre, clip.wide + 2.2, view.far, colours.floor);
  shadows(c, cam, bodies, colours.shade);
  if (state.trails) trails(c, cam, clip, people);
  const found = touches(clip, bodies, frame);
  if (state.contacts) footprints(c, cam, clip, frame, colours.foot);
  const list = [...parts(cam, bodies, people, view, colours.sky),
    ...cloud(cam, clip, frame, colours.thing)];
  list.sort((a, b) => b.depth - a.depth).forEach(part => part.draw(c));
  if (state.contacts) glow(c, cam, bodies, found, colours);
  const at = Math.min(clip.frames, Math.round(frame) + 1), says = figure.querySelector('.state');
  says.textContent = (clip.persons == 2 || clip.cloud ? (found.pairs.length ? 'touching, ' : 'apart, ')
    + 'nearest ' + (found.least * 100).toFixed(0) + ' cm, ' : '') + 'frame ' + at + ' of ' + clip.frames;
  says.classList.toggle('lit', found.pairs.length > 0);
}
function strip(colours) {
  const [c, width] = fit($('strip')), inset = 8, wide = width - 2 * inset, end = length();
  c.clearRect(0, 0, width, 60);
  c.font = '10px system-ui'; c.textBaseline = 'middle';
  shown().forEach((clip, row) => {
    if (!clip) return;
    const y = 4 + 15 * row, cell = wide / end / clip.fps;
    c.fillStyle = colours.line; c.fillRect(inset, y, wide * (clip.frames - 1) / clip.fps / end, 10);
    c.fillStyle = colours.touch;
    clip.touching.forEach((lit, t) => {
      const from = Math.max(0, (t - 0.5) * cell);
      const to = Math.min((t + 0.5) * cell, (clip.frames - 1) * cell);
      if (lit) c.fillRect(inset + from, y, to - from + 0.5, 10);
    });
    c.fillStyle = colours.ink; c.fillText(data.sides[sides[row]], inset + 5, y + 5.5);
  });
  c.fillStyle = colours.accent; c.fillRect(inset + wide * state.time / end - 1, 0, 2, 34);
}
function draw() {
  const colours = palette();
  shown().forEach((clip, i) => paint(sides[i], clip, colours));
  strip(colours);
  $('scrub').value = Math.round(1000 * state.time / length());
  $('clock').textContent = state.time.toFixed(2) + ' s of ' + length().toFixed(2) + ' s';
  $('play').textContent = state.play ? 'Pause' : 'Play';
}
function choose(i) {
  state.pair = (i + data.pairs.length) % data.pairs.length; state.time = 0;
  const pair = data.pairs[state.pair];
  $('clip').value = state.pair;
  for (const side of sides) if (pair[side] >= 0) {
    const title = $(side).querySelector('b');
    title.textContent = data.sides[side] + ': ' + pair.label;
    title.title = data.clips[pair[side]].name;
    $(side).querySelector('.name').textContent = data.clips[pair[side]].name;
  }
  reset();
}
let last = null;
function tick(now) {
  if (state.play && last !== null) {
    state.time += state.speed * Math.min(0.1, (now - last) / 1000);
    if (state.time > length() + 0.35) state.time = 0;
  }
  last = now;
  const kept = state.time; state.time = Math.min(kept, length()); draw(); state.time = kept;
  requestAnimationFrame(tick);
}
function step(by) {
  const fps = open(data.pairs[state.pair].made).fps;
  state.play = false;
  const at = Math.round(Math.min(state.time, length()) * fps) + by;
  state.time = Math.min(length(), Math.max(0, at / fps));
}
function hands(canvas) {
  const held = new Map();
  let gap = 0;
  canvas.addEventListener('pointerdown', e => {
    held.set(e.pointerId, [e.clientX, e.clientY]); canvas.setPointerCapture(e.pointerId); gap = 0;
  });
  for (const end of ['pointerup', 'pointercancel'])
    canvas.addEventListener(end, e => { held.delete(e.pointerId); gap = 0; });
  canvas.addEventListener('pointermove', e => {
    if (!held.has(e.pointerId)) return;
    const [x, y] = held.get(e.pointerId), [dx, dy] = [e.clientX - x, e.clientY - y];
    held.set(e.pointerId, [e.clientX, e.clientY]);
    if (held.size == 2) {
      const [a, b] = [...held.values()], now = Math.hypot(a[0] - b[0], a[1] - b[1]);
      if (gap) zoom(gap / now);
      gap = now;
    } else if (e.shiftKey || e.buttons == 2) {
      const cam = camera(view, [0, 0, 0], 1, 1), share = view.far / canvas.clientHeight;
      view.pan = view.pan.map((v, i) => v - share * (dx * cam.right[i] - dy * cam.up[i]));
    } else {
      view.yaw -= dx * 0.008;
      view.pitch = Math.min(1.5, Math.max(-0.1, view.pitch + dy * 0.008));
    }
  });
  canvas.addEventListener('wheel', e => { e.preventDefault(); zoom(Math.exp(e.deltaY * 0.001)); },
    { passive: false });
  canvas.addEventListener('contextmenu', e => e.preventDefault());
  canvas.addEventListener('dblclick', reset);
}
const zoom = (by) => { view.far = Math.min(30, Math.max(1.2, view.far * by)); };
data.pairs.forEach((pair, i) => {
  const option = document.createElement('option');
  option.value = i; option.textContent = (i + 1) + ': ' + pair.label;
  $('clip').append(option);
});
for (const side of sides) hands($(side).querySelector('canvas'));
$('clip').addEventListener('input', e => choose(Number(e.target.value)));
$('before').addEventListener('click', () => choose(state.pair - 1));
$('after').addEventListener('click', () => choose(state.pair + 1));
$('play').addEventListener('click', () => {
  if (!state.play && state.time >= length()) state.time = 0;
  state.play = !state.play;
});
$('scrub').addEventListener('input', e => {
  state.play = false; state.time = e.target.value / 1000 * length();
});
$('speed').addEventListener('input', e => { state.speed = Number(e.target.value); });
$('reset').addEventListener('click', reset);
for (const name of ['trails', 'contacts'])
  $(name).addEventListener('input', e => { state[name] = e.target.checked; });
addEventListener('keydown', e => {
  if (['INPUT', 'SELECT'].includes(e.target.tagName)) return;
  const acts = { ' ': () => $('play').click(), ArrowRight: () => step(1), ArrowLeft: () => step(-1),
    n: () => choose(state.pair + 1), p: () => choose(state.pair - 1), r: reset };
  if (e.target.tagName == 'BUTTON' && e.key == ' ') return;
  if (acts[e.key]) { e.preventDefault(); acts[e.key](); }
});
const asked = new URLSearchParams(location.hash.slice(1));
const number = (key, otherwise) => asked.has(key) ? Number(asked.get(key)) : otherwise;
choose(number('clip', 1) - 1);
state.time = Math.min(length(), Math.max(0, number('time', 0)));
state.play = number('play', 1) != 0;
for (const name of ['trails', 'contacts'])
  state[name] = $(name).checked = number(name, name == 'contacts' ? 1 : 0) != 0;
view.yaw = number('yaw', view.yaw); view.pitch = number('pitch', view.pitch);
view.far = number('far', view.far);
draw();
requestAnimationFrame(tick);
document.body.dataset.ready = data.pairs.length;
"""

_BODY = """<h1>{title}</h1>
<p class="about">{about}</p>
<div class="bar">
  <button id="before" aria-label="clip before">&#8592;</button>
  <label>Clip <select id="clip"></select></label>
  <button id="after" aria-label="clip after">&#8594;</button>
  <button id="play">Pause</button>
  <label>Speed <select id="speed"><option>0.25</option><option>0.5</option><option selected>1</option>
    <option>2</option></select></label>
  <label><input type="checkbox" id="contacts" checked> contacts</label>
  <label><input type="checkbox" id="trails"> paths</label>
  <button id="reset">Reset view</button>
  <span class="clock" id="clock"></span>
</div>
<div class="views">
  <figure id="real"><figcaption><span><b></b> <span class="name"></span></span>
    <span class="state"></span></figcaption><canvas tabindex="0"></canvas></figure>
  <figure id="made"><figcaption><span><b></b> <span class="name"></span></span>
    <span class="state"></span></figcaption><canvas tabindex="0"></canvas></figure>
</div>
<div class="bar" style="display:block">
  <input id="scrub" type="range" min="0" max="1000" value="0" aria-label="time">
  <canvas id="strip"></canvas>
</div>
<div class="legend">{legend}</div>
<p class="about">Drag to orbit, wheel or pinch to zoom, shift and drag to pan, double click to reset.
<kbd>space</kbd> play, <kbd>&#8592;</kbd> <kbd>&#8594;</kbd> a frame,
<kbd>n</kbd> <kbd>p</kbd> a clip.</p>
"""


def render(
  pairs: Sequence[Pair],
  skeleton: Skeleton,
  *,
  title: str = "Motion",
  about: str = "",
  persons: tuple[str, str] = ("first person", "second person"),
  sides: tuple[str, str] = ("real", "generated"),
) -> str:
  """Writes the page.

  Args:
    pairs: what is shown side by side; at least one.
    skeleton: of all bodies.
    title: of the page.
    about: line below it: which data, which model.
    persons: names of the bodies.
    sides: names of the left and the right view.

  Raises:
    InputError: see `motion.checked`; no pairs; a joint farther than 32 m from the origin.
  """
  if not pairs:
    raise InputError("a motion page needs at least one clip, got none")
  clips: list[dict] = []

  def place(clip: Clip | None) -> int:
    if clip is None:
      return -1
    clips.append(_packed(checked(clip, skeleton)))
    return len(clips) - 1

  listed = [
    {"label": pair.label, "real": place(pair.real), "made": place(pair.made)} for pair in pairs
  ]
  data = {
    "near": NEAR, "fast": FAST, "body": _body(skeleton), "pairs": listed, "clips": clips,
    "sides": {"real": sides[0].capitalize(), "made": sides[1].capitalize()},
  }  # fmt: skip
  bodies = max(clip["persons"] for clip in clips)
  things = any(clip["points"] for clip in clips)
  body = _BODY.format(
    title=html.escape(title),
    about=html.escape(about),
    legend=_legend(persons[:bodies], things),
  )
  # In a script only "</" could end the text.
  text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
  return (
    f"<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
    f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
    f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n<body>\n{body}"
    f"<script id='data' type='application/json'>{text}</script>\n"
    f"<script>{_DRAW}{_PLAY}</script>\n</body></html>\n"
  )


def _legend(persons: Sequence[str], things: bool) -> str:
  colours = ("first", "second")
  items = [
    (colour, f"{name} (left limbs lighter, right darker)" if not i else name)
    for i, (colour, name) in enumerate(zip(colours, persons, strict=False))
  ]
  nearest = "a hand and the object" if len(persons) == 1 else "joints of the two"
  if len(persons) == 2 or things:
    items.append(("touch", f"{nearest} nearer than {100 * NEAR:.0f} cm"))
  items.append(("foot", "a foot rests on the floor"))
  if things:
    items.append(("thing", "object or scene"))
  items.append(("floor", "a square of the floor is 0.5 m wide"))
  return "".join(
    f'<span><i style="--of: var(--{colour})"></i>{html.escape(text)}</span>'
    for colour, text in items
  )


def _body(skeleton: Skeleton) -> dict:
  """What the page draws of a body: bones (child, parent, radius in m, side), trunk, head, feet."""
  side = lambda name: ("left" in name) - ("right" in name)
  thick = {
    child: 0.042 if child in skeleton.trunk else 0.034 for child in range(len(skeleton.names))
  }
  bones = [
    (child, parent, thick[child], side(skeleton.names[child]))
    for child, parent in enumerate(skeleton.parents)
    if parent >= 0
  ]
  (left_hip, right_hip), (left, right) = skeleton.hips, skeleton.shoulders
  return {
    "names": list(skeleton.names), "bones": bones, "root": list(skeleton.parents).index(-1),
    "chest": [left, right, right_hip, left_hip], "head": end_joint(skeleton),
    "shoulders": [left, right], "hands": list(skeleton.hands),
    "feet": list(zip(skeleton.feet, skeleton.foot_heights, strict=True)),
  }  # fmt: skip


def _packed(clip: Clip) -> dict:
  frames, persons = clip.positions.shape[:2]
  points = clip.points
  if points is not None and points.ndim == 2:
    points = points[None]
  return {
    "name": clip.name, "fps": clip.fps, "frames": frames, "persons": persons,
    "positions": _millimetres(clip.name, clip.positions),
    "points": None if points is None else _millimetres(clip.name, points),
    "cloud_frames": 0 if points is None else len(points),
  }  # fmt: skip


def _millimetres(name: str, values: np.ndarray) -> str:
  """Packs metres as little-endian 16-bit millimetres in base64."""
  if not np.abs(values).max() <= _FARTHEST:
    raise InputError(
      f"clip {name}: a joint {np.abs(values).max():.1f} m from the origin, expected at most 32 m"
    )
  packed = np.round(np.asarray(values) * _MILLIMETRES).astype("<i2")
  return base64.b64encode(packed.tobytes()).decode()

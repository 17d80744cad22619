"""InterGen's denoiser, loss and sampler in PyTorch, written from the spec's equations; run by its peer.

  python benchmarks/human_interaction_peer.py SETTINGS.json

The settings name the work: "forward" (weights and inputs in an npz), "step" or "sample". Timings are
printed as one line of JSON. Nothing of jaxmethods is imported: this file runs in the peer's environment.
"""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import torch
from torch import nn

BONES = [(j, p) for j, p in enumerate(
  (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)) if p >= 0]  # fmt: skip
FEET, HEIGHTS = [7, 10, 8, 11], (0.12, 0.05, 0.12, 0.05)


def sinusoids(place, width):
  frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
  angle = place[..., None] * frequency
  return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


class AdaLN(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
    self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
    nn.init.zeros_(self.emb_layers[1].weight)
    nn.init.zeros_(self.emb_layers[1].bias)

  def forward(self, h, e):
    scale, shift = self.emb_layers(e)[:, None].chunk(2, -1)
    return self.norm(h) * (1 + scale) + shift


class SelfAttention(nn.Module):
  def __init__(self, width, heads, dropout):
    super().__init__()
    self.norm = AdaLN(width)
    self.attention = nn.MultiheadAttention(
      width, heads, dropout=dropout, batch_first=True, add_zero_attn=True
    )

  def forward(self, h, e, padding):
    x = self.norm(h, e)
    return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class CrossAttention(SelfAttention):
  def __init__(self, width, heads, dropout):
    super().__init__(width, heads, dropout)
    self.xf_norm = AdaLN(width)

  def forward(self, h, other, e, padding):
    x, memory = self.norm(h, e), self.xf_norm(other, e)
    return self.attention(x, memory, memory, key_padding_mask=padding, need_weights=False)[0]


class FFN(nn.Module):
  def __init__(self, width, hidden, dropout):
    super().__init__()
    self.norm = AdaLN(width)
    self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
    self.dropout = nn.Dropout(dropout)
    nn.init.zeros_(self.linear2.weight)
    nn.init.zeros_(self.linear2.bias)

  def forward(self, h, e):
    return self.linear2(self.dropout(nn.functional.gelu(self.linear1(self.norm(h, e)))))


class Block(nn.Module):
  def __init__(self, width, heads, hidden, dropout):
    super().__init__()
    self.sa_block = SelfAttention(width, heads, dropout)
    self.ca_block = CrossAttention(width, heads, dropout)
    self.ffn = FFN(width, hidden, dropout)

  def forward(self, h, other, e, padding):
    h = h + self.sa_block(h, e, padding)
    h = h + self.ca_block(h, other, e, padding)
    return h + self.ffn(h, e)


class Denoiser(nn.Module):
  """As published: every layer runs on one person, then on the other."""

  def __init__(self, features, width, layers, heads, hidden, classes, dropout=0.0):
    super().__init__()
    self.width = width
    self.embed_timestep = nn.Module()
    self.embed_timestep.time_embed = nn.Sequential(
      nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
    )
    self.text_embed, self.motion_embed = nn.Linear(classes, width), nn.Linear(features, width)
    self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(layers))
    self.out = nn.Module()
    self.out.linear = nn.Linear(width, features)

  def forward(self, x, t, condition, mask):
    e = self.embed_timestep.time_embed(sinusoids(t, self.width)) + self.text_embed(condition)
    place = sinusoids(torch.arange(x.shape[1]), self.width)
    a, b = (self.motion_embed(x[:, :, i]) + place for i in range(2))
    for block in self.blocks:
      a, b = block(a, b, e, ~mask), block(b, a, e, ~mask)
    return torch.stack([self.out.linear(a), self.out.linear(b)], 2)


# --- loss -----------------------------------------------------------------------------------------


def mean(values, counted, axis):
  counted = counted.to(values.dtype)
  return (values * counted).sum(axis) / (counted.expand_as(values).sum(axis) + 1e-7)


def body_terms(p, q, mask, gate):
  """VEL, BL and FC of one person."""
  of = lambda x: x[:, 1:] - x[:, :-1]
  child, parent = zip(*BONES, strict=True)
  length = lambda x: torch.linalg.norm(x[:, :, child] - x[:, :, parent], dim=-1)
  feet = p[:, :, FEET]
  moved = of(feet)
  low = feet[:, :-1, :, 1] < torch.tensor(HEIGHTS)
  rests = ((moved**2).sum(-1) < 0.001) & low
  foot = mean((moved**2).mean(-1), rests, -1)
  terms = (
    30 * mean(((of(p) - of(q)) ** 2).mean((-1, -2)), mask[:, :-1], 1),
    10 * mean(((length(p) - length(q)) ** 2).mean(-1), mask, 1),
    30 * mean(foot, mask[:, :-1], 1),
  )
  return sum(mean(term, gate, 0) for term in terms)


def facing(p):
  unit = lambda x: x / torch.linalg.norm(x, dim=-1, keepdim=True)
  across = unit(p[..., 2, :] - p[..., 1, :])
  up = torch.tensor([0.0, 1, 0]).expand_as(across)
  return unit(torch.linalg.cross(up, across, dim=-1))


def turn(a, b):
  u, v = facing(a), facing(b)
  q = torch.cat([1 + (u * v).sum(-1, keepdim=True), torch.linalg.cross(u, v, dim=-1)], -1)
  return (q / torch.linalg.norm(q, dim=-1, keepdim=True))[..., [0, 2]]


def loss(pred, target, mask, gate):
  """InterGen's loss on normalised features whose mean is 0 and deviation 1."""
  simple = mean(((pred - target) ** 2).mean(-1), mask[..., None], (0, 1, 2))
  read = lambda x: x[..., :66].unflatten(-1, (22, 3))
  p, q = read(pred), read(target)
  total = simple + sum(body_terms(p[:, :, i], q[:, :, i], mask, gate) for i in range(2))
  d, d_true = (torch.cdist(x[:, :, 0], x[:, :, 1]) for x in (p, q))
  near = mean((d - d_true) ** 2, d < 1, (-1, -2))
  touch = mean(d**2, d_true < 0.1, (-1, -2))
  total = total + 3 * mean(mean(near, mask, 1), gate, 0) + 3 * mean(mean(touch, mask, 1), gate, 0)
  away = ((turn(p[:, :, 0], p[:, :, 1]) - turn(q[:, :, 0], q[:, :, 1])) ** 2).mean(-1)
  return total + 0.01 * mean(away, mask, (0, 1)) * gate.sum() / (gate.sum() + 1e-7)


# --- work -----------------------------------------------------------------------------------------


def betas_of(steps):
  bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def made(s, dropout):
  torch.manual_seed(0)
  return Denoiser(
    s["features"], s["width"], s["layers"], s["heads"], s["hidden"], s["classes"], dropout
  )


def forward(s):
  """Largest error of the recorded output, and our loss of recorded inputs."""
  data = np.load(s["arrays"])
  of = lambda name: torch.from_numpy(np.array(data[name]))
  net = made(s, 0.0).eval()
  net.load_state_dict({name[7:]: of(name) for name in data if name.startswith("params/")})
  with torch.no_grad():
    out = net(of("x"), of("t"), of("cond"), of("mask"))
  value = loss(of("pred"), of("target"), of("loss_mask"), of("gate"))
  return {"out": out.numpy().tolist(), "loss": float(value)}


def step(s):
  net = made(s, s["dropout"]).train()
  optimiser = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=2e-5)
  batch, frames, total = s["batch"], s["frames"], s["num_steps"]
  bar = torch.from_numpy(np.cumprod(1 - betas_of(total))).float()
  x0 = 0.3 * torch.randn(batch, frames, 2, s["features"])
  label = nn.functional.one_hot(torch.arange(batch) % s["classes"], s["classes"]).float()
  mask = torch.ones(batch, frames, dtype=torch.bool)

  def one():
    t = torch.randint(0, total, (batch,))
    noise = torch.randn_like(x0)
    share = bar[t][:, None, None, None]
    x = share.sqrt() * x0 + (1 - share).sqrt() * noise
    kept = (torch.rand(batch, 1) >= 0.1).float()
    value = loss(net(x, t, label * kept, mask), x0, mask, (t <= 0.7 * total).float())
    optimiser.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimiser.step()

  return timed(one, s["warm"], s["repeats"])


def sample(s):
  net = made(s, 0.0).eval()
  batch, total = s["batch"], s["num_steps"]
  bar = np.cumprod(1 - betas_of(total))
  visited = np.arange(0, total, total // s["steps"])
  label = nn.functional.one_hot(torch.arange(batch) % s["classes"], s["classes"]).float()
  both = torch.cat([label, torch.zeros_like(label)])
  mask = torch.ones(2 * batch, s["frames"], dtype=torch.bool)

  @torch.no_grad()
  def one():
    x = torch.randn(batch, s["frames"], 2, s["features"])
    for place in reversed(range(len(visited))):
      t = torch.full((2 * batch,), int(visited[place]))
      told, free = net(torch.cat([x, x]), t, both, mask).chunk(2)
      clean = s["scale"] * told + (1 - s["scale"]) * free
      now, before = bar[visited[place]], bar[visited[place - 1]] if place else 1.0
      noise = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
      x = math.sqrt(before) * clean + math.sqrt(1 - before) * noise

  return timed(one, s["warm"], s["repeats"])


def timed(function, warm, repeats):
  """Wall and CPU seconds of every call."""
  wall, processor = [], []
  for i in range(warm + repeats):
    begin, used = time.perf_counter(), time.process_time()
    function()
    if i >= warm:
      wall.append(time.perf_counter() - begin)
      processor.append(time.process_time() - used)
  return {"seconds": wall, "processor": processor}


if __name__ == "__main__":
  with open(sys.argv[1]) as file:
    settings = json.load(file)
  torch.set_num_threads(1)
  print(
    json.dumps({"forward": forward, "step": step, "sample": sample}[settings["work"]](settings))
  )

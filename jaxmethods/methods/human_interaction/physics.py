"""Physical metrics of single clips: errors, feet, contact, penetration. `jax.vmap` them over clips.

Joints (T, J, 3) in metres, y up unless `up` says otherwise; `mask` (T,) true at real frames, which come
first; None: all. Bounds that are per frame in the published code belong to its frame rate: resample, or
scale them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmethods.methods.human_interaction.rotations import length
from jaxmethods.methods.human_interaction.skeleton import SMPL22, Skeleton
from jaxmethods.stats import shapes

Y_UP, Z_UP = 1, 2
_MILLI = 1000.0


def _mean(values: Array, counted: Array | None) -> Array:
  """Mean over the leading axis of what counts; 0 if nothing does."""
  if counted is None:
    counted = jnp.ones(values.shape[:1], bool)
  counted = counted.reshape(-1, *(1,) * (values.ndim - 1))
  total = jnp.maximum(counted.sum(), 1)
  return jnp.where(counted, values, 0).sum() / (total * values[0].size)


def _nearest(a: Array, b: Array) -> Array:
  """Distances (T, I) of points a (T, I, 3) to the nearest of b (T, K, 3).

  The root of the smallest square. Frames are the last axis and coordinates apart: a CPU then takes
  several frames at once.
  """
  parts = [jnp.square(x[:, None] - y) for x, y in zip(a.T, b.T, strict=True)]
  square = sum(parts[1:], parts[0]).min(1)
  nothing = square == 0
  return jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, square))).T


def _frames(joints: Array, mask: Array | None) -> Array:
  return jnp.ones(len(joints), bool) if mask is None else mask.astype(bool)


def _at_least(frames: int, joints: Array, metric: str) -> None:
  if len(joints) < frames:
    raise ValueError(f"{metric}: needs at least {frames} frames, got {len(joints)}")


def _level(up: int) -> Array:
  return jnp.array([axis for axis in range(3) if axis != up])


# --- errors against the truth ---------------------------------------------------------------------


def mpjpe(
  pred: Float[Array, "T J 3"],
  true: Float[Array, "T J 3"],
  root: int = 0,
  mask: Bool[Array, " T"] | None = None,
) -> Float[Array, ""]:
  """Mean distance of joints after both roots are put at 0, mm. Of vertices: `point_error`."""
  shapes.same(true=true, pred=pred)
  local = lambda x: x - x[:, root : root + 1]
  return _MILLI * _mean(length(local(pred) - local(true)), mask)


def point_error(
  pred: Float[Array, "T ... 3"],
  true: Float[Array, "T ... 3"],
  mask: Bool[Array, " T"] | None = None,
) -> Float[Array, ""]:
  """Mean distance of points in the world, mm.

  Of the root, a hand, the vertices (after their roots are subtracted: MPVPE), the centre of an object;
  with a mask of chosen frames the error at the start, at the end, or at waypoints.
  """
  shapes.same(true=true, pred=pred)
  return _MILLI * _mean(length(pred - true), mask)


class PathErrors(NamedTuple):
  """Errors of a path, mm: over all frames, at the first, at the last, and at its waypoints."""

  all: Array
  start: Array
  end: Array
  waypoints: Array


def path_errors(
  pred: Float[Array, "T 3"],
  true: Float[Array, "T 3"],
  waypoints: Bool[Array, " T"] | None = None,
  mask: Bool[Array, " T"] | None = None,
) -> PathErrors:
  """Errors of a root or an object's centre.

  Args:
    pred: generated path, m.
    true: m.
    waypoints: frames that were asked for; None: all.
    mask: real frames.
  """
  real = _frames(pred, mask)
  at = jnp.arange(len(pred))
  error = lambda chosen: point_error(pred, true, real & chosen)
  chosen = real if waypoints is None else waypoints
  return PathErrors(error(real), error(at == 0), error(at == real.sum() - 1), error(chosen))


class HandErrors(NamedTuple):
  """Errors of the hands, mm: left, right, their mean; the roots are not aligned."""

  left: Array
  right: Array
  both: Array


def hand_errors(
  pred: Float[Array, "T J 3"],
  true: Float[Array, "T J 3"],
  skeleton: Skeleton = SMPL22,
  mask: Bool[Array, " T"] | None = None,
) -> HandErrors:
  """Distances of the hands in the world (OMOMO, code)."""
  left, right = (point_error(pred[:, hand], true[:, hand], mask) for hand in skeleton.hands)
  return HandErrors(left, right, (left + right) / 2)


def rotation_error(
  pred: Float[Array, "T 3 3"], true: Float[Array, "T 3 3"], mask: Bool[Array, " T"] | None = None
) -> Float[Array, ""]:
  """Mean Frobenius norm of R_pred R_true^-1 - I, of a root or an object; no unit."""
  shapes.check(pred=(pred, "T 3 3"), true=(true, "T 3 3"))
  apart = jnp.einsum("tij,tkj->tik", pred, true, precision="highest") - jnp.eye(3, dtype=pred.dtype)
  return _mean(length(apart.reshape(-1, 9)), mask)


# --- feet -----------------------------------------------------------------------------------------


def floor_height(
  joints: Float[Array, "T J 3"],
  skeleton: Skeleton = SMPL22,
  mask: Bool[Array, " T"] | None = None,
  *,
  up: int = Y_UP,
  still: float = 0.005,
  reach: float = 0.005,
  neighbours: int = 3,
) -> Float[Array, ""]:
  """Height of the floor by the resting toes (OMOMO after HuMoR, code), m.

  The lowest median among the clusters (DBSCAN) of the heights of resting toes; heights that are in no
  cluster count as one. 0 if no toe rests.

  Args:
    joints: positions, m.
    skeleton: names `toes`.
    mask: real frames.
    up: the axis that points up.
    still: a toe rests below this speed, m per frame (30 fps).
    reach: eps of DBSCAN, m.
    neighbours: min_samples of DBSCAN.
  """
  _at_least(2, joints, "floor_height")
  real = _frames(joints, mask)
  toes = joints[:, jnp.array(skeleton.toes)]
  speed = length(toes[1:] - toes[:-1])
  speed = jnp.concatenate([speed, speed[-1:]])
  # The last real frame has the speed of the one before.
  last = real & ~jnp.concatenate([real[1:], jnp.zeros(1, bool)])
  speed = jnp.where(last[:, None], jnp.roll(speed, 1, 0), speed)
  resting = (speed < still) & real[:, None]
  return lowest_median(toes[..., up].T.ravel(), resting.T.ravel(), reach, neighbours)


def lowest_median(
  heights: Float[Array, " n"], counted: Bool[Array, " n"], reach: float, neighbours: int
) -> Float[Array, ""]:
  """The smallest median of the clusters that DBSCAN finds on a line; noise is one of them.

  On a line a cluster is a run of core points at most `reach` apart, with the points that a core point
  reaches at its ends; one that two clusters reach belongs to that with the earlier core point in the
  given order, as in scikit-learn.

  Args:
    heights: values.
    counted: those that exist.
    reach: eps.
    neighbours: min_samples, the point itself included.

  Returns:
    A value's median; 0 if none is counted.
  """
  size = len(heights)
  order = jnp.argsort(jnp.where(counted, heights, jnp.inf))
  value, real = jnp.where(counted, heights, jnp.inf)[order], counted[order]
  # Differences, not sums: a distance that equals `reach` has to be seen as such.
  apart = jnp.abs(jnp.where(real[:, None] & real, value[:, None] - value, jnp.inf))
  core = real & ((apart <= reach).sum(1) >= neighbours)
  near = (apart <= reach) & core  # (point, core)
  place = jnp.arange(size)
  # Cluster of each core point: a new one where the core point before is out of reach.
  behind = jax.lax.cummax(jnp.where(core, value, -jnp.inf))
  before = jnp.concatenate([jnp.full(1, -jnp.inf, value.dtype), behind[:-1]])
  run = jnp.cumsum(core & ~(value - before <= reach)) - 1
  first = jnp.full(size, size).at[jnp.where(core, run, size)].min(order, mode="drop")
  # (order of the first core point, cluster) of the cores in reach; a core point has one cluster.
  rank = jnp.where(near, first[run], size)
  best = jnp.argmin(rank, axis=1)
  label = jnp.where(core, run, jnp.where(rank.min(1) < size, run[best], size - 1))
  noise = real & ~core & (rank.min(1) == size)
  label = jnp.where(noise, size, jnp.where(real, label, size + 1))
  # Medians: values are sorted, so is each cluster.
  same = (label[:, None] == label) & (place < place[:, None])
  within = same.sum(1)
  total = jnp.zeros(size + 2, int).at[label].add(1)[label]
  pick = lambda middle: (
    jnp.zeros(size + 2, value.dtype).at[label].add(jnp.where(real & (within == middle), value, 0))
  )
  median = (pick((total - 1) // 2) + pick(total // 2)) / 2
  exists = jnp.zeros(size + 2, bool).at[label].max(real)
  lowest = jnp.where(exists, median, jnp.inf).min()
  return jnp.where(counted.any(), lowest, 0)


def foot_sliding(
  joints: Float[Array, "T J 3"],
  skeleton: Skeleton = SMPL22,
  mask: Bool[Array, " T"] | None = None,
  *,
  floor: float | Array = 0.0,
  up: int = Y_UP,
) -> Float[Array, ""]:
  """Foot sliding of OMOMO (code), mm per frame.

  Mean over the feet of sum_{h < H} |level displacement (2 - 2^{h / H})| / T.

  Args:
    joints: positions, m.
    skeleton: names `feet` and `sliding_heights`, H.
    mask: real frames.
    floor: height of the floor, m, such as `floor_height`.
    up: the axis that points up.
  """
  shapes.check(joints=(joints, f"T {skeleton.num_joints} 3"))
  real = _frames(joints, mask)
  feet = joints[:, jnp.array(skeleton.feet)]
  height = feet[:-1, :, up] - floor
  limit = jnp.array(skeleton.sliding_heights, joints.dtype)
  moved = length((feet[1:] - feet[:-1])[..., _level(up)])
  slide = jnp.abs(moved * (2 - 2 ** (height / limit)))
  counted = (height < limit) & real[1:, None]
  return _MILLI * jnp.where(counted, slide, 0).sum(0).mean() / jnp.maximum(real.sum(), 1)


def sliding_share(
  points: Float[Array, "T V 3"],
  mask: Bool[Array, " T"] | None = None,
  *,
  up: int = Y_UP,
  bound: float = 0.01,
) -> Float[Array, ""]:
  """Foot sliding of CHOIS (code): share of the T frames whose lowest point moves, %.

  Its velocity is (v_{t+1} - v_{t-1}) / 2, all three axes; the first and the last frame have none.

  Args:
    points: vertices or joints, m.
    mask: real frames.
    up: the axis that points up.
    bound: the point moves above it, m per frame.
  """
  real = _frames(points, mask)
  low = points[1:-1, :, up].argmin(1)
  at = lambda x: jnp.take_along_axis(x, low[:, None, None], axis=1)[:, 0]
  speed = length(at(points[2:]) - at(points[:-2])) / 2
  return 100.0 * ((speed > bound) & real[2:]).sum() / jnp.maximum(real.sum(), 1)


def skating_ratio(
  joints: Float[Array, "T J 3"],
  skeleton: Skeleton = SMPL22,
  mask: Bool[Array, " T"] | None = None,
  *,
  fps: float | Array = 20.0,
  up: int = Y_UP,
  height: float = 0.05,
  speed: float = 0.5,
  window: int = 5,
) -> Float[Array, ""]:
  """Skating ratio of GMD (code): share of the T - 1 steps in which a foot slides, in [0, 1].

  A toe slides that stays below `height` while its level speed, and the mean speed of `window` steps
  round it (zeros beyond the ends), exceed `speed`.

  Args:
    joints: positions, m, floor at 0.
    skeleton: names `toes`.
    mask: real frames.
    fps: frames per second.
    up: the axis that points up.
    height: m.
    speed: m/s.
    window: steps, odd; 5 at 20 fps.
  """
  _at_least(2, joints, "skating_ratio")
  real = _frames(joints, mask)[1:, None]
  toes = joints[:, jnp.array(skeleton.toes)]
  own = jnp.where(real, length((toes[1:] - toes[:-1])[..., _level(up)]) * fps, 0)
  half = window // 2
  wide = jnp.pad(own, ((half, half), (0, 0)))
  running = sum(wide[i : i + len(own)] for i in range(window)) / window
  low = toes[..., up] < height
  slides = low[:-1] & low[1:] & (own > speed) & (running > speed) & real
  return slides.any(1).sum() / jnp.maximum(real.sum(), 1)


def pfc(
  joints: Float[Array, "T J 3"],
  skeleton: Skeleton = SMPL22,
  mask: Bool[Array, " T"] | None = None,
  *,
  up: int = Y_UP,
) -> Float[Array, ""]:
  """Physical foot contact score of EDGE (code), 1e4 m^2 per frame^2: smaller is more plausible.

  Mean over frames of min(ankle, toe left) min(ankle, toe right) a_t: level displacements from frame
  t + 1 to t + 2 and the root's acceleration, upward part at least 0, as a share of its maximum. 0 for
  a root that never accelerates, where the published formula divides by 0.

  Raises:
    ValueError: with fewer than 3 frames.
  """
  _at_least(3, joints, "pfc")
  real = _frames(joints, mask)[2:]
  root = joints[:, skeleton.root]
  change = root[2:] - 2 * root[1:-1] + root[:-2]
  change = change.at[:, up].max(0)
  size = jnp.where(real, length(change), 0)
  share = size / jnp.maximum(size.max(), jnp.finfo(size.dtype).tiny)
  feet = joints[:, jnp.array(skeleton.feet)]
  moved = length((feet[2:] - feet[1:-1])[..., _level(up)])
  left, right = jnp.split(moved, 2, axis=1)
  return 1e4 * _mean(left.min(1) * right.min(1) * share, real)


# --- contact --------------------------------------------------------------------------------------


class Scores(NamedTuple):
  """Precision, recall, accuracy and F1 over frames, in [0, 1]; 0 where undefined."""

  precision: Array
  recall: Array
  accuracy: Array
  f1: Array


def scores(
  pred: Bool[Array, " T"], true: Bool[Array, " T"], mask: Bool[Array, " T"] | None = None
) -> Scores:
  """Compares contacts frame by frame."""
  shapes.check(pred=(pred, "T"), true=(true, "T"))
  real = _frames(true, mask)
  count = lambda chosen: (chosen & real).sum().astype(jnp.result_type(float))
  ratio = lambda part, whole: jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)
  hit = count(pred & true)
  precision, recall = ratio(hit, count(pred)), ratio(hit, count(true))
  return Scores(
    precision, recall, ratio(count(pred == true), count(real)),
    ratio(2 * precision * recall, precision + recall),
  )  # fmt: skip


def hand_distances(
  joints: Float[Array, "T J 3"], points: Float[Array, "T V 3"], skeleton: Skeleton = SMPL22
) -> Float[Array, "T 2"]:
  """Distance of each hand to the nearest point of an object, m.

  OMOMO's published figures read it after its foot metric, which in place lowers the joints, not the
  object, by `floor_height`; for such figures lower them before.
  """
  hands = joints[:, jnp.array(skeleton.hands)]
  shapes.check(hands=(hands, "T H 3"), points=(points, "T V 3"))
  return _nearest(hands, points)


def touching(distances: Float[Array, "T ..."], bound: float = 0.1) -> Bool[Array, " T"]:
  """Frames with a distance below the bound, m: 0.05 with joints of the hand, 0.10 with wrists."""
  return (distances < bound).reshape(len(distances), -1).any(1)


def contact_distance(
  distances: Float[Array, "T H"], true: Bool[Array, " T"], mask: Bool[Array, " T"] | None = None
) -> Float[Array, ""]:
  """Mean distance of the nearer hand over the frames of true contact, m; 0 without such."""
  return _mean(distances.min(1), true & _frames(true, mask))


def share_of_frames(
  chosen: Bool[Array, " T"], mask: Bool[Array, " T"] | None = None
) -> Float[Array, ""]:
  """Share of the real frames, in [0, 1]: contact percentage, contact of PSI, ..."""
  return _mean(chosen.astype(jnp.result_type(float)), _frames(chosen, mask))


def joint_distance(a: Float[Array, "T J 3"], b: Float[Array, "T J 3"]) -> Float[Array, " T"]:
  """Smallest distance of a joint of one body to a joint of the other, m; contact below 0.1."""
  return _nearest(a, b).min(1)


# --- penetration ----------------------------------------------------------------------------------


class Penetration(NamedTuple):
  """Mean depth, m, and share of frames, in [0, 1]."""

  depth: Array
  share: Array


def penetration(
  signed: Float[Array, "T V"], mask: Bool[Array, " T"] | None = None, bound: float = 0.04
) -> Penetration:
  """Penetration of an object (OMOMO, code).

  Args:
    signed: distance of the body's vertices to the object, negative inside, m.
    mask: real frames.
    bound: vertices deeper than it count, m.

  Returns:
    Mean depth of these per frame, mean over the frames that have one (0 without), and their share.
  """
  shapes.check(signed=(signed, "T V"))
  deep = -signed > bound
  per_frame = jnp.where(deep, -signed, 0).sum(1) / jnp.maximum(deep.sum(1), 1)
  found = deep.any(1) & _frames(signed, mask)
  return Penetration(_mean(per_frame, found), share_of_frames(found, mask))


class SceneContact(NamedTuple):
  """Share of points that do not collide, and share of frames with contact, in [0, 1]."""

  non_collision: Array
  contact: Array


def body_in_scene(
  signed: Float[Array, "T V"], mask: Bool[Array, " T"] | None = None
) -> SceneContact:
  """PSI's scores: vertices of the body at the scene's distance >= 0; contact if one is <= 0.

  Args:
    signed: distance of the body's vertices to the scene, negative inside, m.
    mask: real frames.
  """
  shapes.check(signed=(signed, "T V"))
  free = (signed >= 0).astype(signed.dtype)
  return SceneContact(_mean(free, mask), share_of_frames((signed <= 0).any(1), mask))


def scene_in_body(
  inside: Float[Array, "T V"], mask: Bool[Array, " T"] | None = None, near: float = 0.05
) -> SceneContact:
  """AffordMotion's scores: scene points at the body's distance <= 0; contact if one is > -near.

  Args:
    inside: distance of the scene's points to the body, positive inside, m.
    mask: real frames.
    near: m.
  """
  shapes.check(inside=(inside, "T V"))
  free = (inside <= 0).astype(inside.dtype)
  return SceneContact(_mean(free, mask), share_of_frames((inside > -near).any(1), mask))


def goal_distance(inside: Float[Array, " V"]) -> Float[Array, ""]:
  """AffordMotion's distance to the target, m: max(0, -max).

  Args:
    inside: distance of the target's points to the body, positive inside, at the last frame (at the
      first for "stand up"), m.
  """
  shapes.check(inside=(inside, "V"))
  return jnp.maximum(0, -inside.max())


def segment_distances(
  a: tuple[Float[Array, "*n 3"], Float[Array, "*n 3"]],
  b: tuple[Float[Array, "*n 3"], Float[Array, "*n 3"]],
) -> Float[Array, "*n"]:
  """Distance of two segments given by their ends; leading axes broadcast.

  The nearest points are inside both segments, or one of them is an end.
  """

  def to_segment(point: Array, ends: tuple[Array, Array]) -> Array:
    along = ends[1] - ends[0]
    share = ((point - ends[0]) * along).sum(-1) / jnp.maximum(jnp.square(along).sum(-1), 1e-12)
    return length(point - ends[0] - jnp.clip(share, 0, 1)[..., None] * along)

  ends = [to_segment(point, b) for point in a] + [to_segment(point, a) for point in b]
  nearest = jnp.minimum(jnp.minimum(ends[0], ends[1]), jnp.minimum(ends[2], ends[3]))
  u, v, w = a[1] - a[0], b[1] - b[0], a[0] - b[0]
  dot = lambda x, y: (x * y).sum(-1)
  uu, uv, vv, uw, vw = dot(u, u), dot(u, v), dot(v, v), dot(u, w), dot(v, w)
  across = uu * vv - uv * uv
  skew = across > 1e-9 * uu * vv
  safe = jnp.where(skew, across, 1)
  s, t = (uv * vw - vv * uw) / safe, (uu * vw - uv * uw) / safe
  inside = skew & (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)
  between = length(w + s[..., None] * u - t[..., None] * v)
  return jnp.where(inside, jnp.minimum(between, nearest), nearest)


def capsule_depths(
  a: Float[Array, "T J 3"],
  b: Float[Array, "T J 3"],
  skeleton: Skeleton = SMPL22,
  limb: float = 0.05,
  trunk: float = 0.12,
) -> Float[Array, " T"]:
  """Depth of two bodies in each other, m: max relu(r_i + r_j - distance) over pairs of bones (inferred).

  Args:
    a: joints of one body, m.
    b: of the other.
    skeleton: of both; `trunk` names its thick bones.
    limb: radius of a thin bone, m.
    trunk: of a thick one, m.
  """
  shapes.check(a=(a, f"T {skeleton.num_joints} 3"), b=(b, f"T {skeleton.num_joints} 3"))
  child, parent = np.array(skeleton.bones).T
  radius = jnp.array([trunk if joint in skeleton.trunk else limb for joint, _ in skeleton.bones])
  ends = lambda x, axis: (jnp.expand_dims(x[:, child], axis), jnp.expand_dims(x[:, parent], axis))
  apart = segment_distances(ends(a, 2), ends(b, 1))
  return jnp.maximum(radius[:, None] + radius - apart, 0).max((1, 2))


def capsule_penetration(
  a: Float[Array, "T J 3"],
  b: Float[Array, "T J 3"],
  skeleton: Skeleton = SMPL22,
  mask: Bool[Array, " T"] | None = None,
  bound: float = 0.02,
) -> Penetration:
  """Mean of `capsule_depths`, and share of frames deeper than the bound, m (inferred)."""
  depth = capsule_depths(a, b, skeleton)
  return Penetration(_mean(depth, mask), share_of_frames(depth > bound, mask))

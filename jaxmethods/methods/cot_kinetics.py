"""CoT-Kinetics (reconstruction): how a chain of thought moves through the layers, as one confidence.

The hidden state of the reasoning tokens is a particle, layers are time: from the path of its mean come
momentum, turning angle and one scalar energy (Bi et al., 2025, arXiv 2505.13408). The energy equation
of the paper could not be read: this is a reconstruction from its abstract and from papers that cite it,
and `form` offers the readings that fit. The only derivatives are differences between layers.

Chain-of-Embedding (Wang et al., ICLR 2025, arXiv 2410.13640), the rival on the same path, is here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxmethods.models.probe import masked_mean
from jaxmethods.stats import shapes

Form = Literal["turning", "turning_sq", "quadratic", "quadratic_plus"]
FORMS: tuple[Form, ...] = get_args(Form)
GAMMA = 0.8  # (secondary: the setting of a later paper's baseline)

# Distances below this count as none: no division by less, and `Path.ok` says so.
_FLOOR = 1e-12


class Path(NamedTuple):
  """The path z_0, ..., z_L of a pooled state through the layers.

  Attributes:
    step_norm: (..., L), length of every step v_l = z_{l+1} - z_l.
    momentum: (..., L), M_l = |v_l| / D.
    turning: (..., L - 1), theta_l, angle between v_l and v_{l-1}; 0 where one of them is zero.
    accel_norm: (..., L - 1), |v_l - v_{l-1}|.
    total: (...), D = |z_L - z_0|.
    ok: (...), False where D or a step is zero: the energy is finite there and means nothing.
  """

  step_norm: Float[Array, "*batch L"]
  momentum: Float[Array, "*batch L"]
  turning: Float[Array, "*batch L-1"]
  accel_norm: Float[Array, "*batch L-1"]
  total: Float[Array, "*batch"]
  ok: Bool[Array, "*batch"]


class Terms(NamedTuple):
  """The terms of the energy, in every interior layer or averaged over them.

  Attributes:
    momentum: M_l.
    kinetic: K_l = M_l^2 / 2.
    turning: theta_l.
    turning_sq: theta_l^2.
    acceleration: |a_l|^2 / (2 D^2).
  """

  momentum: Float[Array, "*batch"]
  kinetic: Float[Array, "*batch"]
  turning: Float[Array, "*batch"]
  turning_sq: Float[Array, "*batch"]
  acceleration: Float[Array, "*batch"]


class Chain(NamedTuple):
  """Chain-of-Embedding of a path.

  Attributes:
    magnitude: (..., L), m_l.
    angle: (..., L), q_l.
    real: (...), CoE-R.
    complex: (...), CoE-C.
  """

  magnitude: Float[Array, "*batch L"]
  angle: Float[Array, "*batch L"]
  real: Float[Array, "*batch"]
  complex: Float[Array, "*batch"]


def pool(hidden: Float[Array, "B L+1 T D"], mask: Shaped[Array, "B T"]) -> Float[Array, "B L+1 D"]:
  """Averages hidden states over tokens: the path z.

  Args:
    hidden: (B, L + 1, T, D).
    mask: (B, T), nonnegative weights of the tokens.

  Returns:
    (B, L + 1, D), in float32 at least.

  Raises:
    ValueError: other shapes.
  """
  shapes.check(hidden=(hidden, "B states T D"), mask=(mask, "B T"))
  return jax.vmap(masked_mean(mask), in_axes=1, out_axes=1)(hidden)


def path(z: Float[Array, "*batch L+1 D"]) -> Path:
  """Takes steps, turns and accelerations of a path.

  Args:
    z: (..., L + 1, D); differences are taken in float32 at least.

  Returns:
    See `Path`.

  Raises:
    ValueError: fewer axes than two, or fewer than two layers: there is no turn.
  """
  shapes.check(z=(z, "... states D"))
  if z.shape[-2] < 3:
    raise ValueError(f"a path needs at least two layers, got {z.shape[-2] - 1}")
  z = _wide(z)
  v = z[..., 1:, :] - z[..., :-1, :]
  step_norm, total = _norm(v), _norm(z[..., -1, :] - z[..., 0, :])
  return Path(
    step_norm,
    step_norm / jnp.maximum(total, _FLOOR)[..., None],
    _angle(v[..., 1:, :], v[..., :-1, :]),
    _norm(v[..., 1:, :] - v[..., :-1, :]),
    total,
    (total > _FLOOR) & (step_norm > _FLOOR).all(-1),
  )


def terms(path: Path) -> Terms:
  """Takes the terms of every interior layer l = 1, ..., L - 1, (..., L - 1) each.

  Raises:
    ValueError: fields of different shapes.
  """
  shapes.check(turning=(path.turning, "... turns"), accel_norm=(path.accel_norm, "... turns"))
  momentum = path.momentum[..., 1:]
  relative = path.accel_norm / jnp.maximum(path.total, _FLOOR)[..., None]
  return Terms(momentum, momentum**2 / 2, path.turning, path.turning**2, relative**2 / 2)


def energy_of(terms: Terms, gamma: float = GAMMA, form: Form = "turning") -> Float[Array, "*batch"]:
  """Combines the terms into the energy: those of a layer to its energy, their means to E.

  Args:
    terms: of any one shape.
    gamma: weight of the curvature.
    form: M - gamma theta ("turning"), M - gamma theta^2 ("turning_sq"), K - gamma |a|^2 / (2 D^2)
      ("quadratic") or the same with a plus ("quadratic_plus").

  Returns:
    That shape; higher is more confident.

  Raises:
    ValueError: an unknown form, or terms of different shapes.
  """
  axes = " ".join(f"axis_{i}" for i in range(terms.momentum.ndim))
  shapes.check(**{name: (term, axes) for name, term in terms._asdict().items()})
  match form:
    case "turning":
      return terms.momentum - gamma * terms.turning
    case "turning_sq":
      return terms.momentum - gamma * terms.turning_sq
    case "quadratic":
      return terms.kinetic - gamma * terms.acceleration
    case "quadratic_plus":
      return terms.kinetic + gamma * terms.acceleration
  raise ValueError(f"form: {form!r} is none of {', '.join(FORMS)}")


def layer_energy(
  path: Path, gamma: float = GAMMA, form: Form = "turning"
) -> Float[Array, "*batch L-1"]:
  """Takes the energy of every interior layer, (..., L - 1); see `energy_of`."""
  return energy_of(terms(path), gamma, form)


def energy(path: Path, gamma: float = GAMMA, form: Form = "turning") -> Float[Array, "*batch"]:
  """Averages the energy over the interior layers: E, (...); see `energy_of`."""
  return layer_energy(path, gamma, form).mean(-1)


# --- a path for every token -----------------------------------------------------------------------


class TokenPaths(NamedTuple):
  """Sums along the paths of single tokens, carried from layer to layer.

  Attributes:
    first, state, velocity: (B, T, D): embedding, newest state, newest step.
    steps: () steps so far.
    sums: (B, T) each: |v|, |v|^2, theta, theta^2 and |a|^2 over the interior layers.
  """

  first: Float[Array, "B T D"]
  state: Float[Array, "B T D"]
  velocity: Float[Array, "B T D"]
  steps: Int[Array, ""]
  sums: tuple[Float[Array, "B T"], ...]


def follow_tokens(paths: TokenPaths | None, x: Float[Array, "B T D"]) -> TokenPaths:
  """Takes in the states of the next layer; a `Probe.fold`.

  Args:
    paths: of the layers before; None at the embedding.
    x: (B, T, D).

  Raises:
    ValueError: states of another shape than those before.
  """
  before = x if paths is None else paths.state
  shapes.check(before=(before, "B T D"), x=(x, "B T D"))
  x = _wide(x)
  if paths is None:
    zero = jnp.zeros(x.shape[:-1], x.dtype)
    return TokenPaths(x, x, jnp.zeros_like(x), jnp.int32(0), (zero,) * 5)
  v = x - paths.state
  length, turn = _norm(v), _angle(v, paths.velocity)
  new = length, length**2, turn, turn**2, jnp.square(v - paths.velocity).sum(-1)
  interior = paths.steps > 0
  sums = tuple(s + jnp.where(interior, n, 0) for s, n in zip(paths.sums, new, strict=True))
  return TokenPaths(paths.first, x, v, paths.steps + 1, sums)


def token_terms(paths: TokenPaths, mask: Shaped[Array, "B *masks T"]) -> Terms:
  """Averages terms over interior layers, then over tokens.

  Args:
    paths: of every token.
    mask: (B, T) or (B, M, T), nonnegative weights of the tokens.

  Returns:
    Terms (B,) or (B, M).

  Raises:
    ValueError: other shapes.
  """
  masks = "B T" if mask.ndim == 2 else "B M T"
  shapes.check(state=(paths.state, "B T D"), mask=(mask, masks))
  total = jnp.maximum(_norm(paths.state - paths.first), _FLOOR)
  length, square, turn, turn_sq, accel_sq = (s / (paths.steps - 1) for s in paths.sums)
  each = (length / total, square / (2 * total**2), turn, turn_sq, accel_sq / (2 * total**2))
  mean = masked_mean(mask)
  return Terms(*(mean(x[..., None])[..., 0] for x in each))


def flow_acceleration(
  update: Callable[[jax.Array], jax.Array], state: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Takes the acceleration of the flow dh/ds = f(h), the other reading of curvature: one JVP.

  Args:
    update: f, what a layer adds to its input.
    state: h, any shape.

  Returns:
    f'(h) f(h), the second derivative of the path at h.

  Raises:
    ValueError: an update of another shape than the state.
  """
  velocity = update(state)
  if velocity.shape != state.shape:
    raise ValueError(f"update: expected shape {state.shape}, got {velocity.shape}")
  return jax.jvp(update, (state,), (velocity,))[1]


# --- Chain-of-Embedding ---------------------------------------------------------------------------


def chain_of_embedding(z: Float[Array, "*batch L+1 D"]) -> Chain:
  """Compares magnitudes and angles of the steps of a path with those from its start to its end.

  Args:
    z: (..., L + 1, D), pooled over the output tokens as published.

  Returns:
    See `Chain`.

  Raises:
    ValueError: fewer axes than two, or a path without a step.
  """
  shapes.check(z=(z, "... states D"))
  if z.shape[-2] < 2:
    raise ValueError(f"z: a path needs at least 2 states, got {z.shape[-2]}")
  z = _wide(z)
  before, after = z[..., :-1, :], z[..., 1:, :]
  first, last = z[..., 0, :], z[..., -1, :]
  magnitude = _norm(after - before) / jnp.maximum(_norm(last - first), _FLOOR)[..., None]
  angle = _angle(after, before) / jnp.maximum(_angle(last, first), _FLOOR)[..., None]
  across, along = (magnitude * jnp.sin(angle)).mean(-1), (magnitude * jnp.cos(angle)).mean(-1)
  return Chain(
    magnitude, angle, magnitude.mean(-1) - angle.mean(-1), jnp.sqrt(across**2 + along**2)
  )


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(x: jax.Array) -> jax.Array:
  """Length along the last axis; its gradient at zero is zero."""
  square = jnp.square(x).sum(-1)
  zero = square == 0
  return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def _angle(p: jax.Array, q: jax.Array) -> jax.Array:
  """Angle of vectors along the last axis, accurate near 0 and pi; 0 where one of them is zero."""
  lengths = _norm(p), _norm(q)
  some = (lengths[0] > 0) & (lengths[1] > 0)
  p, q = (x / jnp.where(some, n, 1)[..., None] for x, n in zip((p, q), lengths, strict=True))
  apart, together = _norm(p - q), _norm(p + q)
  return jnp.where(some, 2 * jnp.arctan2(apart, jnp.where(some, together, 1)), 0)

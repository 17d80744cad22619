"""Networks of human interaction: the denoiser of each task, simpler ones, and the evaluator."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmethods.models.denoiser import Denoiser, sinusoids
from jaxmethods.models.transformer import Encoder, EncoderConfig
from jaxmethods.trees import PyTree

Task = Literal["hhi", "hoi", "hsi"]


class Condition(NamedTuple):
  """What a motion is made for; what is not given is None.

  Attributes:
    label: one-hot label or embedding of a text (B, C); zeros: dropped.
    first: clean motion of person 0 (B, T, F), which makes the task a reaction.
    entity: features of an object at each frame (B, T, G).
    scene: points of a scene (B, M, 3), m.
    scene_mask: real points (B, M).
    goal: where the root should end (B, 3), m.
    start: where the root starts (B, 3), m.
    points: surface of the object at each frame (B, T, V, 3), m; for losses and guidance only.
    solids: solids of the scene, see `scenes.Solids`, leaves (B, ...); for losses and guidance only.
  """

  label: jax.Array | None = None
  first: jax.Array | None = None
  entity: jax.Array | None = None
  scene: jax.Array | None = None
  scene_mask: jax.Array | None = None
  goal: jax.Array | None = None
  start: jax.Array | None = None
  points: jax.Array | None = None
  solids: PyTree = None


class InteractionDenoiser(nn.Module):
  """The denoiser whose other is a person (hhi), an object (hoi) or a scene (hsi).

  Attributes:
    task: see above; hoi and hsi are reduced from CHOIS and AffordMotion (inferred).
    width: D.
    num_layers: number of blocks.
    heads: of the attention.
    hidden: width of the MLPs.
    dropout: see `Denoiser`.
  """

  task: Task
  width: int
  num_layers: int
  heads: int
  hidden: int
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    condition: Condition,
    mask: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Predicts the clean motion.

    Args:
      x: noisy motion (B, T, E, F), two bodies for hhi, else one.
      t: step of training (B,).
      condition: what the task needs.
      mask: real frames (B, T).
      train: whether to drop; reads the rng stream "dropout".

    Raises:
      ValueError: if the condition lacks what the task needs.
    """
    size = (self.width, self.num_layers, self.heads, self.hidden)
    net = Denoiser(*size, ordered=self.task != "hsi", dropout=self.dropout, name="denoiser")
    if self.task == "hhi":
      return net(_given(x, condition), t, condition.label, mask, train=train)
    if self.task == "hoi":
      entity = _needed(condition, "entity", self.task)
      return net(x, t, condition.label, mask, entity, mask, train)
    tokens, real = self._scene(condition)
    return net(x, t, condition.label, mask, tokens, real, train)

  def _scene(self, condition: Condition) -> tuple[jax.Array, jax.Array | None]:
    """One token for each point of the scene, and one for the goal, in front."""
    scene, goal, start = (_needed(condition, name, "hsi") for name in ("scene", "goal", "start"))
    # The root of a squared distance of 0 has no gradient; nobody asks for one.
    apart = lambda place: jnp.linalg.norm(scene - place[:, None], axis=-1, keepdims=True)
    points = jnp.concatenate([scene, apart(goal), apart(start)], axis=-1)
    tokens = nn.silu(nn.Dense(self.width, name="point")(points))
    aim = nn.silu(nn.Dense(self.width, name="goal")(goal))[:, None]
    real = condition.scene_mask
    if real is not None:
      real = jnp.pad(real.astype(bool), ((0, 0), (1, 0)), constant_values=True)
    return jnp.concatenate([aim, tokens], axis=1), real


def _needed(condition: Condition, name: str, task: str) -> jax.Array:
  value = getattr(condition, name)
  if value is None:
    raise ValueError(f"condition: {task} needs {name}")
  return value


def _given(x: jax.Array, condition: Condition) -> jax.Array:
  """Replaces person 0 by what is given of it."""
  return x if condition.first is None else x.at[:, :, 0].set(condition.first)


class MotionTransformer(nn.Module):
  """MDM's network: a transformer over frames, with step and condition as a token in front.

  Attributes:
    width: D.
    num_layers: number of blocks.
    heads: of the attention.
    hidden: width of the MLPs.
    separate: whether every body has a network of its own, which sees no other; else all bodies of a
      frame are one token.
    dropout: rate in training.
  """

  width: int
  num_layers: int
  heads: int
  hidden: int
  separate: bool = False
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    condition: Condition,
    mask: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Predicts the clean motion, as `InteractionDenoiser`, from label and first of a condition."""
    x = _given(x, condition)
    if not self.separate:
      flat = self._run(x.reshape(*x.shape[:2], -1), t, condition, mask, train, "body")
      return flat.reshape(x.shape)
    bodies = [
      self._run(x[:, :, body], t, condition, mask, train, f"body_{body}")
      for body in range(x.shape[2])
    ]
    return jnp.stack(bodies, axis=2)

  def _run(self, x, t, condition, mask, train, name):
    config = _encoder(self, norm="post")
    step = nn.silu(nn.Dense(self.width, name=f"{name}_time_1")(sinusoids(t, self.width)))
    first = nn.Dense(self.width, name=f"{name}_time_2")(step)
    if condition.label is not None:
      first = first + nn.Dense(self.width, name=f"{name}_condition")(condition.label)
    h = nn.Dense(self.width, name=f"{name}_embed")(x)
    h = _tokens([first], h, self.width)
    h = Encoder(config, name=f"{name}_encoder")(h, _visible(mask, 1), train=train).hidden
    return nn.Dense(x.shape[-1], name=f"{name}_out")(h[:, 1:])


class MotionReader(nn.Module):
  """Encoder of `MotionVAE`: two tokens read a motion."""

  config: EncoderConfig

  @nn.compact
  def __call__(
    self, x: jax.Array, condition: Condition, mask: jax.Array | None, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Returns mean and logarithm of the variance of the latent, (B, D) each."""
    width = self.config.width
    h = nn.Dense(width, name="embed")(x.reshape(*x.shape[:2], -1))
    about = _label(condition, len(x), width)
    normal = nn.initializers.normal(0.02)
    own = [self.param(name, normal, (width,)) for name in ("mean_token", "variance_token")]
    h = _tokens([about + token for token in own], h, width)
    h = Encoder(self.config, name="encoder")(h, _visible(mask, 2), train=train).hidden
    return nn.Dense(width, name="mean")(h[:, 0]), nn.Dense(width, name="log_variance")(h[:, 1])


class MotionWriter(nn.Module):
  """Decoder of `MotionVAE`: frames that know their place read the latent."""

  config: EncoderConfig

  @nn.compact
  def __call__(
    self,
    latent: jax.Array,
    condition: Condition,
    shape: tuple[int, int, int, int],
    mask: jax.Array | None,
    train: bool,
  ) -> jax.Array:
    """Writes motions of a shape (B, T, E, F); in a reaction it is shown person 0."""
    batch, frames, bodies, features = shape
    width = self.config.width
    h = jnp.zeros((batch, frames, width))
    if condition.first is not None:
      h = nn.Dense(width, name="given")(condition.first)
    h = _tokens([latent + _label(condition, batch, width)], h, width)
    h = Encoder(self.config, name="decoder")(h, _visible(mask, 1), train=train).hidden
    return nn.Dense(bodies * features, name="out")(h[:, 1:]).reshape(shape)


class MotionVAE(nn.Module):
  """Conditional transformer VAE (inferred); its latent has the width of the network.

  Attributes:
    width: D.
    num_layers: number of blocks of reader and writer each.
    heads: of the attention.
    hidden: width of the MLPs.
    dropout: rate in training.
  """

  width: int
  num_layers: int
  heads: int
  hidden: int
  dropout: float = 0.0

  def setup(self) -> None:
    self.reader = MotionReader(_encoder(self))
    self.writer = MotionWriter(_encoder(self))

  def __call__(
    self,
    x: jax.Array,
    condition: Condition,
    noise: jax.Array,
    mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reconstructs.

    Args:
      x: motion (B, T, E, F).
      condition: its label and first are read.
      noise: standard normal (B, D).
      mask: real frames (B, T).
      train: whether to drop; reads the rng stream "dropout".

    Returns:
      Reconstruction (B, T, E, F), mean and logarithm of the variance of the latent (B, D).
    """
    mean, log_variance = self.reader(x, condition, mask, train)
    latent = mean + jnp.exp(log_variance / 2) * noise
    batch, frames, bodies, features = x.shape
    made = self.writer(latent, condition, (batch, frames, bodies, features), mask, train)
    return made, mean, log_variance

  def decode(
    self,
    latent: jax.Array,
    condition: Condition,
    shape: tuple[int, int, int, int],
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Writes motions (B, T, E, F) of latents (B, D)."""
    return self.writer(latent, condition, shape, mask, False)


class MotionEvaluator(nn.Module):
  """Classifies motions; its last hidden layer is the embedding of the metrics.

  Attributes:
    num_classes: K.
    width: of the encoder.
    num_layers: number of blocks.
    heads: of the attention.
    hidden: width of the MLPs.
    embedding: d, small: covariances of d x d numbers are estimated from few clips.
    dropout: rate in training.
  """

  num_classes: int
  width: int = 64
  num_layers: int = 2
  heads: int = 4
  hidden: int = 128
  embedding: int = 16
  dropout: float = 0.1

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """Maps motions (B, T, E, F), contacts left out, to logits (B, K) and embeddings (B, d)."""
    h = nn.Dense(self.width, name="embed")(x.reshape(*x.shape[:2], -1))
    own = self.param("token", nn.initializers.normal(0.02), (self.width,))
    h = _tokens([jnp.broadcast_to(own, (len(x), self.width))], h, self.width)
    h = Encoder(_encoder(self), name="encoder")(h, _visible(mask, 1), train=train).hidden
    z = nn.Dense(self.embedding, name="embedding")(nn.LayerNorm(name="norm")(h[:, 0]))
    return nn.Dense(self.num_classes, name="head")(z), z


def _label(condition: Condition, batch: int, width: int) -> jax.Array:
  """The embedded label (B, D), to be called in a compact module; zeros without."""
  if condition.label is None:
    return jnp.zeros((batch, width))
  return nn.Dense(width, name="condition")(condition.label)


def _encoder(net: nn.Module, norm: Literal["pre", "post"] = "pre") -> EncoderConfig:
  sizes = {name: getattr(net, name) for name in ("width", "num_layers", "heads", "hidden")}
  rate = net.dropout
  return EncoderConfig(**sizes, norm=norm, dropout=rate, attention_dropout=rate)


def _tokens(first: list[jax.Array], h: jax.Array, width: int) -> jax.Array:
  """Puts tokens (B, D) before frames (B, T, D), which get their place."""
  frames = h + sinusoids(jnp.arange(h.shape[1]), width)
  return jnp.concatenate([token[:, None] for token in first] + [frames], axis=1)


def _visible(mask: jax.Array | None, extra: int) -> jax.Array | None:
  """Visible keys (B, 1, extra + T) of a mask of frames."""
  if mask is None:
    return None
  return jnp.pad(mask.astype(bool), ((0, 0), (extra, 0)), constant_values=True)[:, None]

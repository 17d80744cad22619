"""Federated prompt learning: clients share a frozen CLIP and learn a few vectors of its inputs.

An Empirical Study of Federated Prompt Learning for Vision Language Model, Wang et al., IJCAI 2025,
arXiv 2505.23024. Prompts are nested dicts, of which a run has some:

  text         V (m, D), the same for all classes, or (K, m, D), one for each: CoOp, arXiv 2109.01134
  text_deep    (J - 1, m, D), in place of the outputs of V before text blocks 1 .. J - 1
  vision       U (J, p, W), behind the patches: VPT, arXiv 2203.12119; J = 1 is shallow

Sums over clients and local steps are those of `jaxmethods.federated`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.models.clip import CLIP
from jaxmethods.models.transformer import Edit, normalise
from jaxmethods.stats import losses, shapes
from jaxmethods.trees import Params, PyTree

Position = Literal["end", "middle", "front"]
POSITIONS: tuple[Position, ...] = get_args(Position)
Prompts: TypeAlias = Mapping[str, Array]

# (prompts, moments, one client) -> (prompts, moments, metrics).
Train: TypeAlias = Callable[[Prompts, PyTree, PyTree], tuple[Prompts, PyTree, PyTree]]

STDDEV = 0.02  # of random prompts (code)


class ClassTexts(NamedTuple):
  """Texts of K classes, to put prompts into; see `arrange`.

  Attributes:
    ids: [start, m placeholders, name, ".", end, padding], (K, T).
    order: from which token each place takes its embedding, (K, T).
    end: place of the end token, (K,).
  """

  ids: Int[Array, "K T"]
  order: Int[Array, "K T"]
  end: Int[Array, " K"]


class SharedTexts(NamedTuple):
  """All classes in one row of tokens: what they have in common once, then the rest of each.

  The mask is causal and the common tokens come first, so that nothing changes but the work: K classes
  with m prompts cost m + K n tokens in place of K (m + n).

  Attributes:
    ids: (1, T).
    order: from which token each place takes its embedding, (1, T).
    place: of every token in its own text, (T,).
    visible: which tokens a token sees, (1, T, T).
    end: places of the end tokens in the row, (K,).
  """

  ids: Int[Array, "1 T"]
  order: Int[Array, "1 T"]
  place: Int[Array, " T"]
  visible: Bool[Array, "1 T T"]
  end: Int[Array, " K"]


class LayerPrompts(NamedTuple):
  """Prompts of every block, and before which blocks they are put in.

  Attributes:
    vectors: (L, m, D), zero where there are none.
    active: (L,).
  """

  vectors: Float[Array, "L m D"]
  active: Bool[Array, " L"]


class Drift(NamedTuple):
  """How far apart the clients pull the prompts in a round (code).

  Attributes:
    to_global: mean over tokens of cos(client's change, change of the average), (C,).
    pairwise: the same of two clients' changes, diagonal 0, (C, C).
  """

  to_global: Float[Array, " C"]
  pairwise: Float[Array, "C C"]


# --- text prompts ---------------------------------------------------------------------------------


def arrange(
  num_prompts: int, name_lengths: Int[Array, " K"], length: int, position: Position = "end"
) -> Int[Array, "K T"]:
  """Arranges prompts and class name: "end" [V, name], "front" [name, V], "middle" [V/2, name, V/2].

  With an odd m the middle has the shorter half in front. "." and the rest keep their places.

  Args:
    num_prompts: m.
    name_lengths: tokens of every class name, (K,).
    length: T, tokens of a text [start, m placeholders, name, rest].
    position: of the class name.

  Returns:
    (K, T): i < m stands for prompt i, m + j for token j of the text.

  Raises:
    ValueError: an unknown position, m below 0.
  """
  if position not in POSITIONS:
    raise ValueError(f"position: {position!r} is none of {', '.join(POSITIONS)}")
  if num_prompts < 0:
    raise ValueError(f"num_prompts: must be at least 0, got {num_prompts}")
  shapes.check(name_lengths=(name_lengths, "K"))
  m = num_prompts
  before = {"end": m, "middle": m // 2, "front": 0}[position]
  place, name = jnp.arange(length), jnp.asarray(name_lengths)[:, None]
  behind = place - 1 - name  # the prompt here, if the name has passed
  order = jnp.where((behind >= before) & (behind < m), behind, m + place)
  order = jnp.where((place > before) & (place <= before + name), m + place + m - before, order)
  return jnp.where((place > 0) & (place <= before), place - 1, order).astype(jnp.int32)


def share_prefix(texts: ClassTexts, num_prompts: int) -> SharedTexts:
  """Writes the start token and the prompts once for all classes; for "end" and shared prompts alone.

  Args:
    texts: on the host, of position "end".
    num_prompts: m.
  """
  ids, end = np.asarray(texts.ids), np.asarray(texts.end)
  first = 1 + num_prompts
  kept = [np.arange(first)] + [np.arange(first, stop + 1) for stop in end]
  owner = np.concatenate([np.full(len(part), k - 1) for k, part in enumerate(kept)])
  place = np.concatenate(kept)
  row = ids[np.maximum(owner, 0), place][None]
  alike = (owner[:, None] == owner) | (owner == -1)
  visible = alike & (place[:, None] >= place)
  here = np.arange(len(place))
  order = np.where((here > 0) & (here < first), here - 1, num_prompts + here)
  return SharedTexts(
    jnp.asarray(row),
    jnp.asarray(order[None], jnp.int32),
    jnp.asarray(place, jnp.int32),
    jnp.asarray(visible[None]),
    jnp.asarray(np.cumsum([len(part) for part in kept])[1:] - 1, jnp.int32),
  )


def insert_context(
  context: Float[Array, "*K m D"], embedded: Float[Array, "K T D"], order: Int[Array, "K T"]
) -> Float[Array, "K T D"]:
  """Puts prompts in the places of the placeholders.

  Args:
    context: V, (m, D) for all classes or (K, m, D) for each.
    embedded: token embeddings of `ClassTexts.ids`, without positions.
    order: of `arrange`.
  """
  shapes.check(context=(context, "... m D"), embedded=(embedded, "K T D"), order=(order, "K T"))
  wide = jnp.broadcast_to(context, (len(embedded), *context.shape[-2:]))
  both = jnp.concatenate([wide.astype(embedded.dtype), embedded], 1)
  return jnp.take_along_axis(both, order[..., None], 1)


def replace_context(
  context: Float[Array, "m D"], hidden: Float[Array, "K T D"], order: Int[Array, "K T"]
) -> Float[Array, "K T D"]:
  """Replaces the hidden states at the places of the prompts, as deep prompts do before a block.

  With "front" and "middle" these are the places that the prompts have (inferred; the published code has
  "end" alone, places 1 .. m).
  """
  m = context.shape[0]
  stay = m + jnp.arange(hidden.shape[1])
  return insert_context(context, hidden, jnp.where(order < m, order, stay))


def text_features(
  model: CLIP, params: Params, prompts: Prompts, texts: ClassTexts
) -> Float[Array, "K E"]:
  """Computes g, the classes' embeddings of unit length, once for all images of a step.

  Args:
    model: CLIP.
    params: frozen.
    prompts: "text" and "text_deep", if any; without "text" the placeholders stay what they are.
    texts: of the classes; as short as the longest needs, for the mask is causal.
  """
  call = _caller(model, params)
  hidden = call("embed_text", texts.ids)
  if "text" in prompts:
    hidden = insert_context(prompts["text"], hidden, texts.order)
  hooks: dict[str, PyTree] = {}
  if "text_deep" in prompts:
    layers = per_layer(prompts["text_deep"], model.config.text.encoder.num_layers)
    hooks = {"edit": _text_edit(texts.order), "inputs": layers}
  return normalise(call("project_text", call("encode_text", hidden, **hooks).hidden, texts.end))


def shared_text_features(
  model: CLIP, params: Params, prompts: Prompts, texts: SharedTexts
) -> Float[Array, "K E"]:
  """Computes what `text_features` does, from one row of tokens.

  Args:
    model: CLIP.
    params: frozen.
    prompts: "text", (m, D), and "text_deep", if any.
    texts: of the classes.
  """
  call = _caller(model, params)
  hidden = insert_context(prompts["text"], call("embed_text", texts.ids), texts.order)
  hooks: dict[str, PyTree] = {}
  if "text_deep" in prompts:
    layers = per_layer(prompts["text_deep"], model.config.text.encoder.num_layers)
    hooks = {"edit": _text_edit(texts.order), "inputs": layers}

  def encode(clip: CLIP) -> Array:
    placed = hidden + clip.text.position[texts.place].astype(hidden.dtype)
    encoded = clip.text.encoder(placed, texts.visible, **hooks)
    return clip.text_projection(clip.text.norm(encoded.hidden)[0, texts.end])

  return normalise(call(encode))


# --- vision prompts -------------------------------------------------------------------------------


def append_prompts(
  tokens: Float[Array, "B T W"], vectors: Float[Array, "p W"]
) -> Float[Array, "B Tp W"]:
  """Appends the same prompts to the tokens of every image; they have no positions."""
  shapes.check(tokens=(tokens, "B T W"), vectors=(vectors, "p W"))
  wide = jnp.broadcast_to(vectors, (len(tokens), *vectors.shape)).astype(tokens.dtype)
  return jnp.concatenate([tokens, wide], 1)


def image_features(
  model: CLIP,
  params: Params,
  prompts: Prompts,
  pixels: Float[Array, "B h w c"],
  *,
  behind_norm: bool = False,
) -> Float[Array, "B E"]:
  """Computes f, the images' embeddings of unit length.

  Args:
    model: CLIP.
    params: frozen.
    prompts: "vision", (J, p, W), if any.
    pixels: (B, height, width, channels).
    behind_norm: put the first prompts in behind the tower's first norm; as published they pass through.
  """
  call = _caller(model, params)
  tokens = call("embed_image", pixels)
  if "vision" not in prompts:
    return normalise(call("project_image", call("encode_image", tokens).hidden))
  vision = prompts["vision"]
  shapes.check(vision=(vision, "J p W"))
  # Behind the norm: places are kept for the prompts, which then come before block 0 like the deep ones.
  first = jnp.zeros_like(vision[0]) if behind_norm else vision[0]
  tokens = append_prompts(tokens, first)
  hooks: dict[str, PyTree] = {}
  deep, start = (vision, 0) if behind_norm else (vision[1:], 1)
  if len(deep):
    layers = per_layer(deep, model.config.vision.encoder.num_layers, start)
    hooks = {"edit": _vision_edit, "inputs": layers}
  return normalise(call("project_image", call("encode_image", tokens, **hooks).hidden))


def per_layer(vectors: Float[Array, "J m D"], num_layers: int, first: int = 1) -> LayerPrompts:
  """Lays out the prompts of blocks `first`, `first` + 1, ... for a scan over all blocks.

  Raises:
    ValueError: more prompts than blocks.
  """
  shapes.check(vectors=(vectors, "J m D"))
  last = first + len(vectors)
  if last > num_layers:
    raise ValueError(f"depth: must be at most {num_layers}, the number of blocks, got {last}")
  place = jnp.arange(num_layers)
  laid = jnp.zeros((num_layers, *vectors.shape[1:]), vectors.dtype).at[first:last].set(vectors)
  return LayerPrompts(laid, (place >= first) & (place < last))


# --- loss and drift -------------------------------------------------------------------------------


def class_logits(
  image: Float[Array, "B E"], text: Float[Array, "K E"], scale: Float[Array, ""]
) -> Float[Array, "B K"]:
  """Computes tau f g^T.

  Args:
    image: f, unit length.
    text: g, unit length.
    scale: tau = exp(logit_scale), frozen.
  """
  shapes.check(image=(image, "B E"), text=(text, "K E"))
  return scale * image @ text.T


def prompt_loss(
  image: Float[Array, "B E"],
  text: Float[Array, "K E"],
  scale: Float[Array, ""],
  labels: Int[Array, " B"],
  mask: Bool[Array, " B"] | None = None,
) -> Float[Array, ""]:
  """Computes L = CE(tau f g^T, y), the mean over the real examples (figure 1: L_CLIP)."""
  return losses.cross_entropy(class_logits(image, text, scale), labels, mask)


def drift(updates: Float[Array, "C *n m D"], update: Float[Array, "*n m D"]) -> Drift:
  """Measures the angles between the clients' changes of the prompts; 0 for a prompt that did not move.

  Args:
    updates: P_k - P_old of every client.
    update: P_new - P_old.

  Raises:
    ValueError: the shapes differ.
  """
  shapes.same(update=update, updates=updates[0])
  own = normalise(updates.reshape(len(updates), -1, updates.shape[-1]))
  mean = normalise(update.reshape(-1, update.shape[-1]))
  count = max(mean.shape[0], 1)
  pairs = jnp.einsum("ctd,ktd->ck", own, own) / count
  return Drift(
    jnp.einsum("ctd,td->c", own, mean) / count, pairs * (1 - jnp.eye(len(pairs), dtype=pairs.dtype))
  )


def carried(train: Train, prompts: Prompts, moments: PyTree, clients: PyTree) -> tuple:
  """One round of the published code: every client starts with the momentum that the one before it left.

  The optimiser that steps is made once and for all, so its buffers survive clients and rounds.

  Args:
    train: (prompts, moments, one client) -> (prompts, moments, metrics), its local steps.
    prompts: of the server.
    moments: of the round before.
    clients: stacked on the leading axis, in the order in which they are trained.

  Returns:
    Prompts of every client, stacked; moments; metrics, stacked.
  """

  def one(moments: PyTree, client: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    new, moments, metrics = train(prompts, moments, client)
    return moments, (new, metrics)

  moments, (new, metrics) = jax.lax.scan(one, moments, clients)
  return new, moments, metrics


def _text_edit(order: Int[Array, "K T"]) -> Edit:
  def edit(hidden: Array, layer: PyTree) -> Array:
    return jnp.where(layer.active, replace_context(layer.vectors, hidden, order), hidden)

  return edit


def _vision_edit(hidden: Array, layer: PyTree) -> Array:
  kept = hidden[:, : hidden.shape[1] - layer.vectors.shape[0]]
  return jnp.where(layer.active, append_prompts(kept, layer.vectors), hidden)


def _caller(model: CLIP, params: Params) -> Callable:
  """Returns (method, *args, **hooks) -> that step of the model."""
  return lambda method, *args, **hooks: model.apply(
    {"params": params}, *args, method=method, **hooks
  )

"""Questions about images as arrays: encoding, batches, and the accuracy of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.data.multimodal import Vocabulary
from jaxmethods.data.records import QuestionData
from jaxmethods.errors import InputError
from jaxmethods.stats.losses import IGNORED
from jaxmethods.tuning.tuner import Run

Array = jax.Array | np.ndarray


class Split(NamedTuple):
  """Images with their questions, ready for the model.

  Attributes:
    features: (I, N, F) float32, of the frozen tower.
    ids: (I, K, T) int32: <bos> question <ans> answer without its last word, padded on the right.
    labels: (I, K, T) int32: the word to come where it belongs to the answer, else `IGNORED`.
    family: (I, K) int32, index of the question's family; -1: no question.
  """

  features: Array
  ids: Array
  labels: Array
  family: Array


def encode(
  vocabulary: Vocabulary, data: QuestionData, rows: np.ndarray, families: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Encodes questions by image, as arrays of one shape for the whole data set.

  Args:
    vocabulary: of the words.
    data: the questions.
    rows: (Q,) bool, which of them.
    families: names that `Split.family` counts.

  Returns:
    images (I,) int, ids (I, K, T), labels (I, K, T), family (I, K); see `Split`. K is the largest number
    of questions of an image, T the length of the longest text, in all of `data`.
  """
  most = int(np.bincount(data.image).max())
  longest = max(
    len(question.split()) + len(answer.split()) + 1
    for question, answer in {*zip(data.question.tolist(), data.answer.tolist(), strict=True)}
  )
  images, place = np.unique(data.image[rows], return_inverse=True)
  shape = (len(images), most, longest)
  ids = np.full(shape, vocabulary.pad, np.int32)
  labels = np.full(shape, IGNORED, np.int32)
  family = np.full(shape[:2], -1, np.int32)
  filled = np.zeros(len(images), int)
  for row, i in zip(np.flatnonzero(rows), place, strict=True):
    k = filled[i]
    prompt = vocabulary.prompt(data.question[row])
    answer = vocabulary.encode(data.answer[row])
    text = [*prompt, *answer[:-1]]
    ids[i, k, : len(text)] = text
    labels[i, k, len(prompt) - 1 : len(text)] = answer
    family[i, k] = families.index(data.family[row])
    filled[i] += 1
  return images, ids, labels, family


def draw(split: Split, key: jax.Array, step: jax.Array | int, size: int) -> dict[str, jax.Array]:
  """Draws batch `step` of a run that shuffles the images anew in every epoch, K questions each.

  Deterministic in its arguments; under jit `split` should be an argument, not a constant.

  Args:
    split: the examples.
    key: of the data order.
    step: counted from 0.
    size: images of a batch; the rest of an epoch that does not fill one is left out.

  Returns:
    features (size, N, F), ids (size, K, T), labels (size, K, T), family (size, K).
  """
  check_size(split, size)
  rows = shuffled_rows(key, step, len(split.ids), size)
  return {name: jnp.asarray(x)[rows] for name, x in split._asdict().items()}


def shuffled_rows(key: jax.Array, step: jax.Array | int, count: int, size: int) -> jax.Array:
  """Draws the rows (size,) of batch `step` over `count` examples; see `draw`."""
  each = count // size
  order = jax.random.permutation(jax.random.fold_in(key, step // each), count)
  return jax.lax.dynamic_slice_in_dim(order, (step % each) * size, size)


def check_size(split: Split, size: int) -> None:
  """Raises `InputError` if a batch is larger than the training part."""
  if size > len(split.ids):
    raise InputError(f"batch_size: {size} is more than the {len(split.ids)} training images")


def choose_questions(
  batch: dict[str, jax.Array], key: jax.Array, count: int
) -> dict[str, jax.Array]:
  """Chooses `count` questions of every image, all families alike, with repetition.

  Args:
    batch: see `draw`.
    key: random key.
    count: K of the result.
  """
  family = batch["family"]
  same = (family[:, :, None] == family[:, None, :]).sum(-1)
  logits = jnp.where(family >= 0, -jnp.log(same), -jnp.inf)
  chosen = jax.random.categorical(key, logits[:, None], shape=(len(family), count))
  take = lambda x: jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), 1)
  return batch | {name: take(batch[name]) for name in ("ids", "labels", "family")}


def accuracies(
  run: Run, split: Split, families: Sequence[str], chunk: int = 40
) -> dict[str, jax.Array]:
  """Measures the share of questions of every family that greedy decoding answers exactly right.

  One forward pass on the right answer decides it: the words decoded are the right ones exactly if each
  is the likeliest after the right ones before it.

  Args:
    run: the model: (ids, features=...) -> output.
    split: questions; arguments of the jitted program, not constants.
    families: names of the families.
    chunk: images that are answered at once.

  Returns:
    {family: share in [0, 100]}.
  """
  count = len(split.ids)
  chunk = min(chunk, count)
  pad = -count % chunk

  def chunks(x: jax.Array, value: int) -> jax.Array:
    x = jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1)), constant_values=value)
    return x.reshape(-1, chunk, *x.shape[1:])

  def right(part: Split) -> jax.Array:
    words = run(part.ids, features=part.features).logits.argmax(-1)
    return jnp.all((words == part.labels) | (part.labels == IGNORED), axis=-1)

  fills = (0, 0, IGNORED, -1)
  parts = Split(*(chunks(jnp.asarray(x), fill) for x, fill in zip(split, fills, strict=True)))
  correct = jax.lax.map(right, parts)
  result = {}
  for i, name in enumerate(families):
    chosen = parts.family == i
    result[name] = 100 * jnp.sum(correct & chosen) / jnp.maximum(jnp.sum(chosen), 1)
  return result

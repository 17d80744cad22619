"""What a trained network finds: ranked matches as pictures, neighbours and embeddings as files."""

from __future__ import annotations

import csv
import functools
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jaxmethods.experiments.adafreq import figures as drawn, ranked, training
from jaxmethods.experiments.adafreq.data import Search
from jaxmethods.experiments.adafreq.networks import as_inputs
from jaxmethods.experiments.adafreq.training import Parts, State
from jaxmethods.experiments.adafreq.views import centred, high_of, views
from jaxmethods.methods import adafreq
from jaxmethods.models.vit import ViT
from jaxmethods.runtime import compiler
from jaxmethods.stats import retrieval
from jaxmethods.trees import Params

_ROWS = 8  # queries that are drawn


class Show(NamedTuple):
  """What is shown.

  Attributes:
    parts: of the row.
    search: whose results are shown: the folders of the user, else the test.
    inputs: of the network, for each of its photographs.
    asked: whether the user asked for it.
    top: neighbours of each query.
    samples: training photographs whose views are drawn.
    model: the ViT whose patches are selected; None: none are.
    share: of the patches kept.
  """

  parts: Parts
  search: Search
  inputs: np.ndarray
  asked: bool
  top: int
  samples: np.ndarray
  model: ViT | None
  share: float


class _Found(NamedTuple):
  """Features of every photograph, and the neighbours of each query."""

  features: np.ndarray
  place: np.ndarray
  similarity: np.ndarray


def figures(show: Show, state: State) -> dict[str, Figure]:
  """Draws matches, and views of the training photographs if there is a second one."""
  pictures = {"matches": _matches(show, state)}
  if show.parts.recipe.mix is not None:
    draw = compiler.jit(functools.partial(views, show.parts.recipe))
    pair = jax.device_get(draw(jax.random.key(0), jnp.asarray(show.samples)))
    pictures["views"] = drawn.views(show.samples, pair.original, pair.high)
  return pictures


def files(show: Show, state: State) -> dict[str, str | bytes]:
  """Writes neighbours and embeddings of the folders that the user asked for."""
  if not show.asked:
    return {}
  found, search = _found(show, state), show.search
  text = io.StringIO()
  table = csv.writer(text, lineterminator="\n")
  table.writerow(("query", "rank", "file", "identity", "similarity"))
  gallery = search.gallery[found.place]
  for i, query in enumerate(search.query):
    for rank, (place, near) in enumerate(zip(gallery[i], found.similarity[i], strict=True), 1):
      table.writerow(
        (search.files[query], rank, search.files[place], _name(search, place), f"{near:.4f}")
      )
  archive = io.BytesIO()
  part = np.zeros(len(search.files), "U7")
  part[search.query], part[search.gallery] = "query", "gallery"
  identity = np.array([_name(search, place) for place in range(len(search.files))])
  np.savez(archive, features=found.features, files=search.files, part=part, identity=identity)
  return {
    "matches.html": ranked.page(search, found.place, found.similarity, _right(search, found)),
    "neighbours.csv": text.getvalue(),
    "embeddings.npz": archive.getvalue(),
  }


def _found(show: Show, state: State) -> _Found:
  search = show.search
  count = min(show.top, len(search.gallery) - int((search.itself >= 0).any()))

  @compiler.jit
  def run(
    state: State, inputs: Array, query: Array, gallery: Array, itself: Array
  ) -> tuple[Array, retrieval.Neighbours]:
    features = training.embed(show.parts, state, inputs)
    return features, retrieval.neighbours(features[query], features[gallery], count, itself=itself)

  places = (jnp.asarray(x) for x in (search.query, search.gallery, search.itself))
  features, near = jax.device_get(run(state, jnp.asarray(show.inputs), *places))
  return _Found(features, *near)


def _matches(show: Show, state: State) -> Figure:
  search, found = show.search, _found(show, state)
  there = np.isin(search.identity[search.query], search.identity[search.gallery])
  candidates = np.arange(len(search.query)) if show.asked else np.flatnonzero(there)
  chosen = candidates[np.linspace(0, len(candidates) - 1, min(_ROWS, len(candidates))).astype(int)]
  kept = _kept(show, state.params, search.query[chosen])
  high = _high(show, search.query[chosen])
  right = _right(search, found)
  answers = []
  for row, i in enumerate(chosen):
    query, near = search.query[i], search.gallery[found.place[i]]
    label = lambda place: drawn.shortened(_name(search, place) or "?", 11)
    answers.append(
      drawn.Answer(
        search.images[query],
        None if kept is None else kept[row],
        None if high is None else high[row],
        _name(search, query) or search.files[query],
        search.images[near],
        [f"{label(p)}  {s:.2f}" for p, s in zip(near, found.similarity[i], strict=True)],
        right[i],
      )
    )
  return drawn.matches(
    answers, f"{len(chosen)} of {len(search.query)} queries, nearest photograph first"
  )


def _right(search: Search, found: _Found) -> np.ndarray:
  """What is known of each neighbour, (q, k): a code of `figures`."""
  near = search.gallery[found.place]
  own, others = search.identity[search.query][:, None], search.identity[near]
  group, beside = search.group[search.query][:, None], search.group[near]
  right = np.where(own == others, drawn.RIGHT, drawn.WRONG)
  right = np.where((own == others) & (group == beside) & (group >= 0), drawn.OWN, right)
  return np.where((own < 0) | (others < 0), drawn.UNKNOWN, right)


def _high(show: Show, places: np.ndarray) -> np.ndarray | None:
  """The high frequencies of photographs, none put back."""
  if show.model is None:
    return None
  recipe = show.parts.recipe._replace(mix="none")
  draw = compiler.jit(jax.vmap(functools.partial(high_of, recipe, jax.random.key(0))))
  return np.asarray(draw(centred(jnp.asarray(show.search.images[places]))))


def _kept(show: Show, params: Params, places: np.ndarray) -> list[np.ndarray] | None:
  """For each photograph the share of kept patches over every pixel."""
  model = show.model
  if model is None:
    return None

  @compiler.jit
  def look(trunk: Params, inputs: Array) -> Array:
    scores = adafreq.original_view(model, trunk, inputs).scores
    assert scores is not None  # for the type checker
    return adafreq.selected(scores, show.share)

  inputs = as_inputs(jnp.asarray(show.inputs[places]))
  chosen = np.asarray(look(params["trunk"], inputs))[:, 1:] - 1
  form, size = model.config, show.search.images.shape[1:3]
  # A map's cell stands for a square of pixels.
  scale = size[0] // form.image_size[0]
  patch, stride = form.patch * scale, (form.stride or form.patch) * scale
  marks = [np.isin(np.arange(form.num_tokens - 1), row) for row in chosen]
  return [drawn.kept_pixels(mark, form.grid, patch, stride, size) for mark in marks]


def _name(search: Search, place: int) -> str:
  who = search.identity[place]
  return search.names[who] if who >= 0 else ""

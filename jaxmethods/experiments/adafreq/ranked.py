"""A page of every query and its nearest photographs, best first, to be looked through by a person."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image

from jaxmethods.experiments.adafreq import figures as drawn
from jaxmethods.experiments.adafreq.data import Search

_QUALITY = 85  # of the JPEGs in the page
_SIDE = 112  # pixels of a photograph on the page
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; }
section { display: flex; gap: .6rem; overflow-x: auto; padding: .7rem 0; border-top: 1px solid #ddd; }
figure { margin: 0; flex: none; width: SIDEpx; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
.p { display: block; width: SIDEpx; height: SIDEpx; background-size: cover; box-sizing: border-box; }
.query { margin-right: 1rem; }
.key span { display: inline-block; margin-right: 1.2rem; border-left: 1rem solid; padding-left: .4rem; }
"""


def page(search: Search, place: np.ndarray, similarity: np.ndarray, right: np.ndarray) -> str:
  """Writes the page; every photograph is in it once.

  Args:
    search: the photographs.
    place: of the neighbours in the gallery, (q, k).
    similarity: likewise, cosine.
    right: likewise, a code of `figures`.
  """
  near = search.gallery[place]
  used = np.unique(np.concatenate([search.query, near.reshape(-1)]))
  frames = "\n".join(
    f".f{kind} {{ border: 4px solid {colour}; }}" for kind, colour in drawn.FRAMES.items()
  )
  pixels = "\n".join(
    f".p{i} {{ background-image: url(data:image/jpeg;base64,{_jpeg(search.images[i])}); }}"
    for i in used
  )
  rows = (_row(search, *row) for row in zip(search.query, near, similarity, right, strict=True))
  sections = [f"<section>{row}</section>" for row in rows]
  title = f"{len(search.query)} queries in {len(search.gallery)} photographs"
  style = f"<style>{_STYLE.replace('SIDE', str(_SIDE))}{frames}{pixels}</style>"
  head = f'<meta charset="utf-8"><title>{title}</title>{style}'
  return "\n".join(
    ("<!doctype html>", f'<html lang="en"><head>{head}</head><body>', f"<h1>{title}</h1>", _key(right),
     *sections, "</body></html>")
  )  # fmt: skip


def _key(right: np.ndarray) -> str:
  """What the frames mean, of those that are there."""
  seen = set(np.unique(right).tolist())
  marks = (
    f'<span style="border-color:{drawn.FRAMES[kind]}">{text}</span>'
    for kind, text in drawn.MEANINGS.items()
    if kind in seen
  )
  return f'<p class="key">{"".join(marks)}</p>'


def _row(
  search: Search, query: int, near: np.ndarray, similarity: np.ndarray, right: np.ndarray
) -> str:
  each = zip(near, similarity, right, strict=True)
  found = [_photograph(search, place, value, int(kind)) for place, value, kind in each]
  return "".join([_photograph(search, query, None, None), *found])


def _photograph(search: Search, place: int, similarity: float | None, kind: int | None) -> str:
  who = search.identity[place]
  name = search.names[who] if who >= 0 else ""
  file = html.escape(str(search.files[place]))
  about = (
    html.escape(name) if similarity is None else f"{html.escape(name) or '?'} {similarity:.2f}"
  )
  meaning = "query" if kind is None else drawn.MEANINGS[kind]
  frame = "" if kind is None else f" f{kind}"
  own = ' class="query"' if kind is None else ""
  return (
    f'<figure{own}><span class="p p{place}{frame}" role="img" title="{file}" '
    f'aria-label="{file}: {meaning}"></span><figcaption><b>{about}</b><br>{file}</figcaption></figure>'
  )


def _jpeg(image: np.ndarray) -> str:
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, "JPEG", quality=_QUALITY)
  return base64.b64encode(stream.getvalue()).decode("ascii")

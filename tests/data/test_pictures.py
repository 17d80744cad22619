"""Pictures: every kind of file seen as it is meant, and the range of arrays told or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxmethods.data.pictures import as_pictures, open_picture
from jaxmethods.data.question_files import open_square
from jaxmethods.data.sources import load_arrays
from jaxmethods.errors import InputError

LEVELS = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3))


def made(x):
  return as_pictures({"x": x}, "npz:a")["x"]


@pytest.mark.parametrize(
  ("x", "tolerance"),
  [
    (LEVELS.astype(np.uint8), 0),
    (LEVELS, 0),
    (LEVELS.astype(np.int16), 0),
    (LEVELS.astype(np.uint16), 0),
    (LEVELS.astype(np.float64), 0),
    (LEVELS.astype(np.float16), 0),
    (LEVELS / 255, 1e-6),
    ((LEVELS / 255).astype(np.float32), 1e-6),
    (LEVELS / 127.5 - 1, 1e-6),
    ((LEVELS * 257).astype(np.uint16), 1e-6),
    (LEVELS * 257, 1e-6),
    (np.clip(LEVELS + 0.25, 0, 255), 0.25 / 255 + 1e-6),
  ],
  ids=str,
)
def test_ranges(x, tolerance):
  seen = made(x)
  unit = seen / 255 if seen.dtype == np.uint8 else seen
  assert seen.dtype in (np.uint8, np.float32)
  np.testing.assert_allclose(unit, LEVELS / 255, rtol=0, atol=tolerance)


def test_arrays_of_one_source_mean_the_same():
  dark = np.minimum(LEVELS // 4, 63)
  both = as_pictures({"a": LEVELS.astype(np.float32), "b": dark.astype(np.float32)}, "npz:a")
  np.testing.assert_array_equal(both["b"], dark)
  halves = as_pictures({"a": np.clip(LEVELS + 0.25, 0, 255), "b": LEVELS / 1.0}, "npz:a")
  np.testing.assert_allclose(halves["b"], LEVELS / 255, atol=1e-6)
  black = as_pictures({"a": LEVELS / 1.0, "b": 0.0 * LEVELS}, "npz:a")
  assert not black["b"].any()
  with pytest.raises(InputError, match=r"a: cannot tell .* from 0 to 1 .*beside others .* 255"):
    as_pictures({"a": LEVELS / 255, "b": LEVELS / 1.0}, "npz:a")
  apart = as_pictures({"a": (LEVELS / 255).astype(np.float32), "b": LEVELS}, "npz:a")
  np.testing.assert_allclose(apart["a"], apart["b"] / 255, atol=1e-6)


def test_masks_and_grey():
  mask = LEVELS[..., 0] > 127
  np.testing.assert_array_equal(made(mask), 255 * mask[..., None].astype(np.uint8))
  np.testing.assert_array_equal(made(LEVELS[..., 0].astype(np.uint8)), LEVELS[..., :1])


@pytest.mark.parametrize(
  ("x", "message"),
  [
    (LEVELS // 16, r"from 0 to 15 \(int64\)"),  # scikit-learn's digits
    ((LEVELS // 16).astype(np.float32), r"from 0 to 15 \(float32\)"),
    (LEVELS // 128, "from 0 to 1 "),
    ((LEVELS // 128).astype(np.uint8), "from 0 to 1 "),
    ((LEVELS - 128).astype(np.int8), "from -128 to 127"),
    (LEVELS / 100 - 1, "from -1 to 1.55"),  # standardised
    (LEVELS / 255 - 0.2, "from -0.2 to 0.8"),
    ((LEVELS * 16).astype(np.uint16), "from 0 to 4080"),  # 12 bits
    (LEVELS * 257.0 + 0.5, "from 0.5 to 65535.5"),
    (LEVELS.transpose(0, 3, 1, 2), r"shape \(40, 3, 6, 5\): channels must come last"),
    (LEVELS[:, :1, :, 0][..., None], "cannot tell which axis"),
    (LEVELS[..., [0, 1, 2, 0]], "expected pictures"),
  ],
  ids=str,
)
def test_what_is_ambiguous_is_refused(x, message):
  with pytest.raises(InputError, match=rf"^npz:a: x.* {message}"):
    made(x)


def test_arrays_of_one_source_are_judged_together():
  dark = np.minimum(LEVELS, 90)
  both = as_pictures({"train_x": LEVELS, "test_x": dark}, "npz:a")
  np.testing.assert_array_equal(both["test_x"], dark)
  with pytest.raises(InputError, match="test_x: cannot tell"):
    as_pictures({"test_x": dark}, "npz:a")


def save(path, pixels, **options):
  Image.fromarray(pixels).save(path, **options)
  return path


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits(tmp_path, suffix):
  grey = LEVELS[0, ..., 0]
  file = save(tmp_path / f"a.{suffix}", (grey * 257).astype(np.uint16))
  np.testing.assert_array_equal(open_picture(file)[..., 0], grey)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:4, :4] = 255  # a white corner, up left
  exif = Image.Exif()
  exif[274] = orientation
  seen = open_picture(save(tmp_path / "a.png", pixels, exif=exif))
  turned = {
    1: (0, 0),
    2: (0, -1),
    3: (-1, -1),
    4: (-1, 0),
    5: (0, 0),
    6: (0, -1),
    7: (-1, -1),
    8: (-1, 0),
  }
  assert seen.shape[:2] == ((8, 16) if orientation < 5 else (16, 8))
  assert (seen[turned[orientation]] == 255).all()
  assert seen[::7, ::7].any(-1).sum() >= 1


def test_transparent_and_palette(tmp_path):
  clear = np.zeros((4, 4, 4), np.uint8)
  clear[..., 0], clear[:2, :, 3] = 255, 255  # red; transparent below
  seen = open_picture(save(tmp_path / "a.png", clear))
  np.testing.assert_array_equal(seen[0, 0], [255, 0, 0])
  np.testing.assert_array_equal(seen[3, 0], [255, 255, 255])
  image = Image.fromarray(clear[..., :3]).quantize(2)
  image.save(tmp_path / "p.png")
  np.testing.assert_array_equal(open_picture(tmp_path / "p.png")[3, 3], [255, 0, 0])
  image.save(tmp_path / "t.png", transparency=image.getpixel((0, 0)))
  np.testing.assert_array_equal(open_picture(tmp_path / "t.png")[0, 0], [255, 255, 255])
  grey = np.full((4, 4, 2), 100, np.uint8)
  grey[..., 1] = 0
  assert open_picture(save(tmp_path / "g.png", grey)).tolist() == np.full((4, 4, 1), 255).tolist()


def oversized(side):
  """A PNG whose header promises much more than it holds."""

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + body


def test_bad_files(tmp_path):
  for side, message in (
    (9000, "9000 x 9000 pixels"),
    (2**31 - 1, "a.png: "),
    (50, "not a readable"),
  ):
    (tmp_path / "a.png").write_bytes(oversized(side))
    with pytest.raises(InputError, match=message):
      open_picture(tmp_path / "a.png")
  frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
  frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
  with pytest.raises(InputError, match="has 2 frames"):
    open_picture(tmp_path / "a.gif")
  save(tmp_path / "a.tif", LEVELS[0, ..., 0].astype(np.float32))
  with pytest.raises(InputError, match=r"32 bits, .* no stated range"):
    open_picture(tmp_path / "a.tif")
  with pytest.raises(InputError, match="not a readable image"):
    open_picture(io.BytesIO(b"GIF89a"), "x")


def test_one_loader_for_folders_and_questions(tmp_path):
  (tmp_path / "data" / "red").mkdir(parents=True)
  clear = np.zeros((4, 4, 4), np.uint8)
  file = save(tmp_path / "data" / "red" / "a.png", clear)
  x, _ = load_arrays(f"folder:{tmp_path / 'data'}").splits["all"]
  np.testing.assert_array_equal(x[0], np.full((4, 4, 3), 255))
  np.testing.assert_array_equal(open_square(file, (0, 0, 0)), np.full((4, 4, 3), 255))

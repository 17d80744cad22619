"""Image folders and npz archives of the user."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxmethods.data.records import describe
from jaxmethods.data.sources import load_arrays
from jaxmethods.errors import InputError


def _image(path, value, size=(4, 4), mode="L"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value).save(path)


def test_classes(tmp_path):
  _image(tmp_path / "dog" / "1.png", 10)
  _image(tmp_path / "cat" / "1.png", 20)
  _image(tmp_path / "cat" / "2.PNG", 30)
  (tmp_path / "cat" / "notes.txt").write_text("no image")
  data = load_arrays(f"folder:{tmp_path}")
  x, y = data.splits["all"]
  assert x.shape == (3, 4, 4, 1) and x.dtype == np.uint8 and data.num_classes == 2
  np.testing.assert_array_equal(x[:, 0, 0, 0], [20, 30, 10])
  np.testing.assert_array_equal(y, [0, 0, 1])


def test_domains_grey_beside_colour_and_sizes(tmp_path):
  _image(tmp_path / "photo" / "cat" / "1.png", (1, 2, 3), mode="RGB")
  _image(tmp_path / "photo" / "dog" / "1.png", (4, 5, 6), mode="RGB")
  _image(tmp_path / "sketch" / "dog" / "1.png", 9)
  data = load_arrays(f"folder:{tmp_path}")
  assert list(data.splits) == ["photo", "sketch"]
  x, y = data.splits["sketch"]
  np.testing.assert_array_equal(x[0, 0, 0], [9, 9, 9])
  np.testing.assert_array_equal(y, [1])  # classes are numbered over all domains
  _image(tmp_path / "sketch" / "dog" / "2.png", 9, size=(6, 5))
  with pytest.raises(InputError, match=r"2\.png: 6x5 pixels, the others 4x4"):
    load_arrays(f"folder:{tmp_path}")
  assert load_arrays(f"folder:{tmp_path}", image_size=3).splits["sketch"][0].shape == (2, 3, 3, 3)


def test_files_of_a_folder_are_read_or_named_or_refused(tmp_path):
  for place in ("a/1.png", "a/2.PNG", "b/1.png"):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / place, format="png")
  for place in ("a/._1.png", ".hidden.png"):
    (tmp_path / place).write_bytes(b"no picture")
  data = load_arrays(f"folder:{tmp_path}")
  assert data.splits["all"][1].tolist() == [0, 0, 1]
  assert data.source.origin == str(tmp_path)
  (tmp_path / "b" / "2.heic").write_bytes(b"a picture of another kind")
  (tmp_path / "list.csv").write_text("a")
  assert (
    "(2 files not read, such as 2.heic, list.csv)"
    in load_arrays(f"folder:{tmp_path}").source.origin
  )
  (tmp_path / "c").mkdir()
  with pytest.raises(InputError, match="/c: a class without images"):
    load_arrays(f"folder:{tmp_path}")
  (tmp_path / "c" / "more").mkdir()
  Image.new("RGB", (4, 4)).save(tmp_path / "c" / "more" / "1.png")
  with pytest.raises(InputError, match="/c/more: images are deeper"):
    load_arrays(f"folder:{tmp_path}")


def test_bad_folders(tmp_path):
  with pytest.raises(InputError, match="no such folder"):
    load_arrays(f"folder:{tmp_path}/none")
  with pytest.raises(InputError, match="expected folders class/image"):
    load_arrays(f"folder:{tmp_path}")
  (tmp_path / "a" / "b").mkdir(parents=True)
  with pytest.raises(InputError, match="no images"):
    load_arrays(f"folder:{tmp_path}")
  (tmp_path / "a" / "b" / "1.png").write_bytes(b"\x89PNG broken")
  with pytest.raises(InputError, match=r"1\.png: not a readable image"):
    load_arrays(f"folder:{tmp_path}")


def test_npz_spellings(tmp_path):
  x, y = np.arange(12, dtype=np.uint8).reshape(4, 3), np.array([0, 1, 2, 1])
  for keys in (("x", "y"), ("train_x", "train_y"), ("x_train", "y_train")):
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (x, y), strict=True)))
    data = load_arrays(f"npz:{tmp_path}/a.npz")
    (split,) = data.splits
    assert split == ("all" if keys[0] == "x" else "train") and data.num_classes == 3
    np.testing.assert_array_equal(data.splits[split][0], x)
    assert data.splits[split][1].dtype == np.int32
  np.savez(
    tmp_path / "a.npz", x=x, y=y, domain=[0, 1, 1, 0], domains=["p", "q"], classes=list("abcd")
  )
  data = load_arrays(f"npz:{tmp_path}/a.npz")
  np.testing.assert_array_equal(data.splits["q"][0], x[1:3])
  assert data.num_classes == 4


def test_a_relative_path_is_looked_for_here_and_then_in_the_data_folder(tmp_path, monkeypatch):
  here, data = tmp_path / "here", tmp_path / "data"
  for folder, rows in ((here, 3), (data, 5)):
    folder.mkdir()
    np.savez(folder / "a.npz", x=np.zeros((rows, 2), np.float32), y=np.zeros(rows, np.int32))
  monkeypatch.setenv("JAXMETHODS_DATA", str(data))
  monkeypatch.chdir(here)
  rows = lambda: sum(len(x) for x, _ in load_arrays("npz:a.npz").splits.values())
  assert rows() == 3
  (here / "a.npz").unlink()
  assert rows() == 5
  with pytest.raises(InputError, match=r"npz:b\.npz: no such file"):
    load_arrays("npz:b.npz")


def test_npz_of_encoded_images(tmp_path):
  encoded = []
  for value in (10, 200):
    png = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(png, "PNG")
    encoded.append(png.getvalue())
  arrays = {
    "test_jpeg": np.frombuffer(b"".join(encoded), np.uint8),
    "test_offset": np.cumsum([0, *map(len, encoded)]),
    "test_y": np.array([1, 0], np.uint8),
  }
  np.savez(tmp_path / "a.npz", **arrays)
  x, _ = load_arrays(f"npz:{tmp_path}/a.npz").splits["test"]
  assert x.shape == (2, 4, 5, 3)
  np.testing.assert_array_equal(x[:, 0, 0, 0], [10, 200])
  del arrays["test_offset"]
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(InputError, match="without test_offset"):
    load_arrays(f"npz:{tmp_path}/a.npz")


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"z": [1]}, "expected x and y.*it has z"),
    ({"x": [[1.0]]}, "x without y"),
    ({"x": [[1.0]], "y": [0, 1]}, "x has 1 rows, y 2"),
    ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "x has 0 rows"),
    ({"x": [[1.0]], "y": [0.5]}, "y: expected class numbers"),
    ({"x": [[1.0]], "y": [-1]}, "y: expected class numbers"),
    ({"x": [[1.0], [np.nan]], "y": [0, 1]}, "x: row 1 is not finite"),
    ({"x": [[1.0]], "y": [3], "classes": ["a"]}, "label 3, but 1 classes"),
    ({"x": [[1.0]], "y": [0], "domain": [2], "domains": ["a"]}, "domain outside"),
    (
      {"x": [[1.0]], "y": [0], "domain": [0], "client": [0]},
      "client: expected beside x and y alone",
    ),
    ({"x": [[1.0]], "y": [0], "client": [1]}, "client 'client 0' has no example"),
    ({"x": [[1.0]], "y": [0], "client": [0.5]}, "client: expected numbers"),
    ({"x": [["a"]], "y": [0]}, "x: expected numbers, features"),
    ({"x": [1.0], "y": [0]}, "x: expected numbers, features"),
    ({"x": [[1e300]], "y": [0]}, "x: row 0 is not finite"),
    ({"x": [[1.0]], "y": [0], "domain": [0, 0]}, "domain has 2 rows"),
    ({"x": np.array([[None]]), "y": [0]}, "not a readable npz"),
  ],
)
def test_bad_archives(tmp_path, arrays, message):
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(InputError, match=message):
    load_arrays(f"npz:{tmp_path}/a.npz")


def test_files_that_are_no_archive(tmp_path):
  with pytest.raises(InputError, match="no such file"):
    load_arrays(f"npz:{tmp_path}/a.npz")
  np.savez(tmp_path / "a.npz", x=np.zeros((9, 9)), y=np.zeros(9, int))
  whole = (tmp_path / "a.npz").read_bytes()
  for content in (b"", b"rubbish", whole[: len(whole) // 2]):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match="not a readable npz"):
      load_arrays(f"npz:{tmp_path}/a.npz")


def test_clients_and_unread_arrays(tmp_path):
  x, y = np.arange(12, dtype=np.float32).reshape(4, 3), np.array([0, 1, 2, 1])
  np.savez(tmp_path / "a.npz", x=x, y=y, client=[0, 1, 1, 0], names=list("abcd"))
  data = load_arrays(f"npz:{tmp_path}/a.npz")
  assert list(data.splits) == ["client 0", "client 1"]
  np.testing.assert_array_equal(data.splits["client 1"][0], x[1:3])
  line = describe([data])
  assert "arrays not read: names" in line
  assert "data of yours" in line and "real data" not in line
  assert f"sha256 {data.source.digest[:12]}" in line


def test_the_digest_is_that_of_the_values(tmp_path):
  def digest(x, y):
    np.savez(tmp_path / "a.npz", x=x, y=y)
    return load_arrays(f"npz:{tmp_path}/a.npz").source.digest

  x, y = np.random.default_rng(0).normal(size=(6, 3)), np.arange(6) % 2
  first = digest(x, y)
  assert digest(x, y) == first
  assert digest(x + 1, y) != first
  assert digest(x, 1 - y) != first
  assert digest(x[:4], y[:4]) != first

"""Wheels by digest, downloads that resume, offline messages: no request leaves this machine."""

import functools
import hashlib
import http.server
import io
import threading
import urllib.error
import zipfile

import numpy as np
import pytest

from jaxmethods.data import embedded, files, tu
from jaxmethods.data.sources import load_graphs
from jaxmethods.errors import InputError


def test_wheel_with_other_bytes(monkeypatch):
  wrong = {**embedded.GRAKEL_SETS["MUTAG"], "A": "0" * 64}
  monkeypatch.setitem(embedded.GRAKEL_SETS, "MUTAG", wrong)
  found = hashlib.sha256(
    files.wheel_file(
      "grakel",
      "grakel/tests/data/MUTAG/MUTAG_A.txt",
      "d9656ca7493f3445d737c711710bb36fd432dddd1c0ea32e1d4713c86ebd28e2",
    )[0]
  ).hexdigest()
  with pytest.raises(InputError, match=f"MUTAG_A.txt has sha256 {found}, expected {'0' * 64}"):
    load_graphs("embedded:graphs")


@pytest.mark.parametrize("package", ["grakel", "no-such-package"])
def test_missing_wheel_names_the_install(package):
  with pytest.raises(InputError, match=r"pip install 'jaxmethods\[data\]'"):
    files.wheel_file(package, "grakel/no/such/file", "0" * 64)


def test_offline(data_folder, monkeypatch):
  def unreachable(request, timeout):
    raise urllib.error.URLError("no route to host")

  monkeypatch.setattr(files.urllib.request, "urlopen", unreachable)
  with pytest.raises(InputError) as caught:
    load_graphs("tu:NCI1")
  message = str(caught.value)
  assert "\n" not in message
  assert str(data_folder / "tudataset" / "NCI1") in message
  assert "https://www.chrsmrrs.com/graphkerneldatasets/NCI1.zip" in message
  assert "no route to host" in message
  assert [path for path in data_folder.rglob("*") if path.is_file()] == []


class _Handler(http.server.BaseHTTPRequestHandler):
  """Serves `server.content`, breaking off after `server.limit` bytes; may know ranges."""

  def do_GET(self):
    content, start = self.server.content, 0
    self.server.ranges.append(self.headers.get("Range"))
    if content is None:
      self.send_error(404)
      return
    if self.server.knows_ranges and (wanted := self.headers.get("Range")):
      start = int(wanted.removeprefix("bytes=").removesuffix("-"))
      if start >= len(content):
        self.send_error(416)
        return
      self.send_response(206)
    else:
      self.send_response(200)
    self.send_header("Content-Length", str(len(content) - start))
    self.end_headers()
    self.wfile.write(content[start:][: self.server.limit])

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
    running.content, running.limit, running.knows_ranges, running.ranges = b"", None, True, []
    thread = threading.Thread(target=functools.partial(running.serve_forever, 0.01))
    thread.start()
    running.url = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(tu, "URL", running.url + "/{name}.zip")
    yield running
    running.shutdown()
    thread.join()


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_download_resumes(server, tmp_path, knows_ranges):
  server.content = np.random.default_rng(0).bytes(1_000_000)
  server.limit, server.knows_ranges = 300_000, knows_ranges
  target = tmp_path / "folder" / "set.zip"
  with pytest.raises(InputError, match="connection lost after 300000 of 1000000 bytes"):
    files.download(server.url, target)
  assert not target.exists() and (tmp_path / "folder" / "set.zip.part").exists()
  server.limit = None
  assert files.download(server.url, target).read_bytes() == server.content
  assert server.ranges == [None, "bytes=300000-"]
  assert sorted(path.name for path in target.parent.iterdir()) == ["set.zip", "set.zip.sha256"]
  files.verify_download(target)
  target.write_bytes(server.content[:-1])
  with pytest.raises(InputError, match=r"set\.zip: sha256 .* delete it"):
    files.verify_download(target)


def test_overlong_part_starts_over(server, tmp_path):
  server.content = b"x" * 1000
  (tmp_path / "set.zip.part").write_bytes(b"y" * 2000)
  assert files.download(server.url, tmp_path / "set.zip").read_bytes() == server.content
  assert server.ranges == ["bytes=2000-", None]


def test_server_error(server, tmp_path):
  server.content = None
  with pytest.raises(InputError, match="answered 404"):
    files.download(server.url, tmp_path / "set.zip")
  assert list(tmp_path.iterdir()) == []


def _archive(name: str, texts: dict[str, bytes]) -> bytes:
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
    for part, text in texts.items():
      archive.writestr(f"{name}/{name}_{part}.txt", text)
  return packed.getvalue()


@pytest.fixture
def mutag_texts(monkeypatch):
  """MUTAG's texts; from now on they are not found in the wheel."""
  texts = {part: text for part, (_, text) in embedded.grakel_files("MUTAG").parts.items()}
  monkeypatch.setattr(tu, "_find_in_wheel", lambda name: None)
  return texts


def test_set_is_downloaded_once(server, data_folder, mutag_texts):
  server.content = _archive("MUTAG", mutag_texts)
  (data,) = load_graphs("tu:MUTAG")
  assert len(data.labels) == 188
  server.content = None
  (again,) = load_graphs("tu:MUTAG")
  np.testing.assert_array_equal(again.graphs.nodes, data.graphs.nodes)
  assert again.source.origin == str(data_folder / "tudataset" / "MUTAG.zip")
  assert len(server.ranges) == 1


def test_downloaded_set_with_other_bytes(server, data_folder, mutag_texts):
  server.content = _archive("MUTAG", {**mutag_texts, "graph_labels": b"1\n" * 188})
  with pytest.raises(InputError, match=f"expected {tu.PUBLISHED_SHA256['MUTAG']}"):
    load_graphs("tu:MUTAG")
  assert list((data_folder / "tudataset").iterdir()) == []


def test_downloaded_rubbish(server, data_folder, mutag_texts):
  server.content = b"<html>moved</html>"
  with pytest.raises(InputError, match="damaged zip"):
    load_graphs("tu:MUTAG")
  assert list((data_folder / "tudataset").iterdir()) == []


def test_folder_that_cannot_be_made(server, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("JAXMETHODS_DATA", str(tmp_path / "file"))
  with pytest.raises(InputError, match="NCI1"):
    load_graphs("tu:NCI1")


def test_the_digest_of_files_is_that_of_names_and_contents(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "b").write_bytes(b"2")
  (tmp_path / "a").write_bytes(b"1")
  first = files.digest(tmp_path)
  (tmp_path / ".cache").write_bytes(b"hidden")
  assert files.digest(tmp_path) == first != files.digest(tmp_path / "in")
  (tmp_path / "in" / "b").write_bytes(b"33")
  assert files.digest(tmp_path) != first
  with pytest.raises(InputError, match="c: cannot be read"):
    files.digest(tmp_path / "c")

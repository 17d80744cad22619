"""The player of motion: what it holds, what it refuses, and that it draws, in a browser."""

import re

import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.methods.human_interaction.skeleton import SBU15, SMPL22
from jaxmethods.runtime import motion_page
from jaxmethods.runtime.motion import Clip, Pair, end_joint
from tests import browser

_HEIGHTS = (1.65, 1.45, 1.1, 1.42, 1.15, 0.9, 1.42, 1.15, 0.9, 0.95, 0.5, 0.06, 0.95, 0.5, 0.06)
_ASIDE = (0, 0, 0, -0.2, -0.25, -0.25, 0.2, 0.25, 0.25, -0.1, -0.1, -0.1, 0.1, 0.1, 0.1)


def people(frames=12, apart=1.0, persons=2):
  """Standing bodies; the second comes to meet the first: (T, persons, 15, 3)."""
  still = np.stack([_ASIDE, _HEIGHTS, np.zeros(15)], axis=1)
  made = np.tile(still, (frames, persons, 1, 1))
  if persons == 2:
    made[:, 1, :, 2] += np.linspace(apart, 0.05, frames)[:, None]
  return made


def clip(name="made", **options):
  return Clip(people(**options), 15.0, name)


def test_heads():
  assert SBU15.names[end_joint(SBU15)] == "head" == SMPL22.names[end_joint(SMPL22)]


def test_one_file_without_network():
  page = motion_page.render([Pair("push", clip(), clip("real"))], SBU15, about="a < b")
  assert "a &lt; b" in page
  assert not re.search(r"https?://|src=|@import|href=", page)


def test_hostile_words_cannot_break_the_page():
  hostile = "</script><img src=x onerror=alert(1)>"
  page = motion_page.render(
    [Pair(hostile, clip(hostile))], SBU15, title=hostile, about=hostile, persons=(hostile, hostile)
  )
  assert page.count("</script>") == 2 and "<img" not in page.replace("<\\/script><img", "")


@pytest.mark.parametrize(
  "change, says",
  [
    (lambda x: x[:, :, :14], r"clip bad: positions of shape \(12, 2, 14, 3\), expected"),
    (lambda x: x[:0], r"clip bad: positions of shape \(0, 2, 15, 3\)"),
    (lambda x: np.where(np.arange(12)[:, None, None, None] == 7, np.nan, x), "clip bad, frame 7"),
    (lambda x: 50 * x, "clip bad: a joint .* m from the origin, expected at most 32 m"),
  ],
)
def test_bad_clips(change, says):
  with pytest.raises(InputError, match=says):
    motion_page.render([Pair("push", Clip(change(people()), 15.0, "bad"))], SBU15)


def test_no_clips():
  with pytest.raises(InputError, match="at least one clip, got none"):
    motion_page.render([], SBU15)


@pytest.fixture
def look(tmp_path):
  """Opens a page in a headless browser: (page, hash, picture or None) -> its document."""

  def run(page, query, picture=None):
    file = tmp_path / "player.html"
    file.write_text(page)
    return browser.document(file, query, picture)

  return run


def test_player_in_a_browser(look, tmp_path):
  pairs = [Pair("wave", clip("first")), Pair("push", clip("sample 3"), clip("s01s02/1", frames=20))]
  page = motion_page.render(pairs, SBU15, sides=("real", "generated"))
  found = look(page, "clip=2&play=0&time=0.2")
  assert 'data-ready="2"' in found
  assert "Real: push" in found and "Generated: push" in found and "s01s02/1" in found
  assert "frame 4 of 12" in found and "frame 4 of 20" in found and "apart, nearest" in found
  assert "touching, nearest 5 cm, frame 12 of 12" in look(page, "clip=2&play=0&time=9")
  # The first clip has no real one beside it.
  alone = look(page, "clip=1&play=0")
  assert re.search(r'<figure id="real" hidden', alone) and "Generated: wave" in alone

  image = pytest.importorskip("PIL.Image")
  shown = {}
  for lit in (0, 1):
    look(page, f"clip=2&play=0&time=9&contacts={lit}", tmp_path / "page.png")
    shown[lit] = np.asarray(image.open(tmp_path / "page.png").convert("RGB")).astype(int)[100:600]
  red, green, blue = np.moveaxis(shown[1][50:], -1, 0)
  # Both persons are on the screen, and what touches is lit if it is asked for.
  assert (blue - red > 40).sum() > 100 and ((red - blue > 40) & (red - green > 60)).sum() > 100
  lit = [(np.abs(shown[i] - (242, 169, 0)).sum(-1) < 40).sum() for i in (0, 1)]
  assert lit[1] > lit[0] + 100


def test_an_object_in_a_browser(look):
  ball = np.array([0.25, 0.9, 0]) + 0.05 * np.random.default_rng(0).normal(size=(12, 30, 3))
  page = motion_page.render([Pair("lift", Clip(people(persons=1), 15.0, "one", ball))], SBU15)
  found = look(page, "play=0")
  assert 'data-ready="1"' in found and "touching, nearest" in found and "object or scene" in found

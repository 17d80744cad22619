"""The moving picture of clips."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxmethods.errors import InputError
from jaxmethods.methods.human_interaction.skeleton import SBU15
from jaxmethods.runtime import motion_pictures
from jaxmethods.runtime.motion import Pair
from tests.runtime.test_motion_page import clip


def test_real_above_generated():
  pairs = [Pair("push", clip(), clip(frames=5)), Pair("kick", clip(), clip())]
  picture = Image.open(io.BytesIO(motion_pictures.gif(pairs, SBU15, size=100, fps=5)))
  assert picture.size == (226, 226) and picture.n_frames > 3
  first, last = (
    np.asarray((picture.seek(i), picture.convert("RGB"))[1]).astype(int)
    for i in (0, picture.n_frames - 1)
  )
  red, blue = first[..., 0], first[..., 2]
  assert (blue - red > 40).sum() > 50 and (red - blue > 40).sum() > 50
  lit = [(np.abs(x - (242, 169, 0)).sum(-1) < 60).sum() for x in (first, last)]
  assert lit[1] > lit[0] == 0


def test_without_real_clips():
  ball = clip(persons=1)._replace(points=np.array([[0.4, 1, 0]] * 3) + 0.05 * np.eye(3))
  picture = Image.open(io.BytesIO(motion_pictures.gif([Pair("lift", ball)], SBU15, size=100)))
  seen = np.asarray(picture.convert("RGB")).astype(int)
  assert (np.abs(seen - (107, 91, 149)).sum(-1) < 60).any()
  made = motion_pictures.gif([Pair("push", clip(persons=1))], SBU15, size=100, fps=5)
  assert Image.open(io.BytesIO(made)).size == (100, 126)
  with pytest.raises(InputError, match="at least one clip"):
    motion_pictures.gif([], SBU15)

"""Files of motion that others read: what is written is read again."""

import io

import numpy as np
import pytest

from jaxmethods.data import bvh
from jaxmethods.errors import InputError
from jaxmethods.methods.human_interaction.skeleton import SBU15, SMPL22
from jaxmethods.runtime import motion_files
from jaxmethods.runtime.motion import Clip
from tests.runtime.test_motion_page import people


def walk(skeleton, stretch=0.0, frames=9, seed=0):
  """A clip whose bones turn at random, and stretch by a share: (T, 1, J, 3), upright on average."""
  rng = np.random.default_rng(seed)
  count = skeleton.num_joints
  up = np.array([0, 1.0, 0])
  rest = 0.2 * rng.normal(size=(count, 3)) + 0.2 * up
  made = np.zeros((frames, 1, count, 3))
  for joint in motion_files._order(skeleton.parents):
    parent = skeleton.parents[joint]
    bone = rest[joint] + 0.1 * rng.normal(size=(frames, 3)).cumsum(0)
    bone *= np.linalg.norm(rest[joint]) / np.linalg.norm(bone, axis=1, keepdims=True)
    bone *= 1 + stretch * rng.uniform(-1, 1, (frames, 1))
    made[:, 0, joint] = bone if parent < 0 else made[:, 0, parent] + bone
  return Clip(made, 15.0, "walk")


def read_again(tmp_path, text):
  file = tmp_path / "clip.bvh"
  file.write_text(text)
  return bvh.read(file)


@pytest.mark.parametrize("skeleton", [SBU15, SMPL22], ids=["sbu", "smpl"])
def test_exact_bvh(tmp_path, skeleton):
  clip = walk(skeleton, stretch=0.2)
  found = read_again(tmp_path, motion_files.bvh(clip, skeleton))
  assert found.unit == "cm" and found.fps == pytest.approx(15)
  place = [found.names.index(name) for name in skeleton.names]
  np.testing.assert_allclose(found.positions[:, place], clip.positions[:, 0], atol=1e-5)
  parents = [found.names[found.parents[i]] for i in place if found.parents[i] >= 0]
  assert parents == [skeleton.names[i] for i in skeleton.parents if i >= 0]


def test_bvh_for_rigs(tmp_path):
  # A chain of single bones needs no stretching.
  class Chain:
    names, parents = ("a", "b", "c", "d"), (-1, 0, 1, 2)
    num_joints = 4

  clip = walk(Chain)
  found = read_again(tmp_path, motion_files.bvh(clip, Chain, exact=False))
  assert found.names == ("a", "b", "c", "d", "d_end")
  np.testing.assert_allclose(found.positions[:, :4], clip.positions[:, 0], atol=1e-5)
  stretched = read_again(tmp_path, motion_files.bvh(walk(SBU15, 0.2), SBU15, exact=False))
  length = np.linalg.norm(
    np.diff(stretched.positions[:, [stretched.names.index(n) for n in SBU15.names[4:6]]], axis=1),
    axis=-1,
  )
  np.testing.assert_allclose(length, length[0, 0], rtol=1e-4)


def test_turns_are_rotations():
  clip = walk(SBU15, frames=30)
  rest = motion_files._rest("walk", clip.positions[:, 0], SBU15)
  order = motion_files._order(SBU15.parents)
  turns = motion_files._turns(clip.positions[:, 0], rest, SBU15.parents, order)
  np.testing.assert_allclose(np.linalg.det(turns), 1, atol=1e-9)
  half = motion_files._between(np.array([[0, 0, 1.0]]), np.array([[0, 0, -1.0]]))[0]
  np.testing.assert_allclose(half @ [0, 0, 1], [0, 0, -1], atol=1e-12)
  locked = motion_files._euler(np.array([[[0, 1.0, 0], [0, 0, -1], [-1, 0, 0]]]))
  assert np.isfinite(locked).all()


def test_bones_of_length_zero():
  positions = walk(SBU15).positions
  positions[3, 0, 5] = positions[3, 0, 4]
  with pytest.raises(InputError, match="clip walk, frame 3: the bone left_elbow - left_hand"):
    motion_files.bvh(Clip(positions, 15.0, "walk"), SBU15)


def test_npz():
  clips = [Clip(people(frames=n), 15.0, f"clip {n}") for n in (3, 5)]
  found = np.load(io.BytesIO(motion_files.npz(clips, ["push", "kick"], SBU15)))
  assert found["offsets"].tolist() == [0, 3, 8] and found["positions"].shape == (8, 2, 15, 3)
  assert found["label_names"][found["label"]].tolist() == ["push", "kick"]
  with pytest.raises(InputError, match="one frame rate"):
    motion_files.npz([clips[0], clips[1]._replace(fps=30.0)], ["a", "b"], SBU15)

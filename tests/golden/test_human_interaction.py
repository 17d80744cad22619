"""Human interaction against vectors from the published functions; the denoiser has its own file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods.human_interaction import diffusion, losses, metrics, physics, representation
from jaxmethods.methods.human_interaction.representation import Scaling
from tests.tensors import below


@pytest.fixture
def golden(golden_file):
  return golden_file("human_interaction")


@pytest.fixture
def exact():
  with jax.enable_x64(True):
    yield


def near(found, expected, rtol=1e-6, atol=1e-9):
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


# --- distributions --------------------------------------------------------------------------------


def test_distributions(golden, exact):
  of = below(golden, "metrics/")
  text, motion, real = (jnp.asarray(of[name]) for name in ("text_emb", "motion_emb", "gt_emb"))
  near(metrics.distance_matrix(text, motion), of["dist_matrix"])
  found = metrics.retrieval(text, motion)
  near(found.precision, of["r_precision_top3"])
  near(found.distance, of["mm_dist"])
  near(metrics.fid(real, motion), of["fid"], 1e-5)
  near(metrics.fid(6 * real, 6 * motion), of["fid_intergen"], 1e-5)


def test_spread(golden, exact):
  of = below(golden, "metrics/")
  pairs = of["div_first"], of["div_second"]
  # The recorded pairs are of generated motions or of real ones, by their number.
  few = max(map(np.max, pairs)) < len(of["motion_emb"])
  z = jnp.asarray(of["motion_emb" if few else "gt_emb"])
  near(metrics.diversity(z, *pairs), of["diversity"])
  near(metrics.diversity(6 * z, *pairs) / 2, of["diversity_intergen"])
  found = metrics.multimodality(jnp.asarray(of["mm_emb"]), of["mm_first"], of["mm_second"])
  near(found, of["multimodality"])
  near(metrics.apd(jnp.asarray(golden["apd/samples"])), golden["apd/value"])


# --- physics --------------------------------------------------------------------------------------


@pytest.fixture
def hoi(golden, exact):
  arrays = below(golden, "hoi/")
  return {k: jnp.asarray(v, float) if v.ndim else float(v) for k, v in arrays.items()}


def test_errors_against_the_truth(hoi):
  pred, true = hoi["pred_joints"], hoi["gt_joints"]
  close = lambda found, name: near(found, hoi[f"out/{name}"], 1e-4)
  close(physics.mpjpe(pred, true), "mpjpe")
  close(physics.point_error(pred[:, 0], true[:, 0]), "root_trans_err")
  local = lambda verts, joints: verts - joints[:, :1]
  close(physics.point_error(local(hoi["pred_verts"], pred), local(hoi["gt_verts"], true)), "mpvpe")
  close(physics.rotation_error(hoi["pred_root_rot"], hoi["gt_root_rot"]), "root_rot_err")
  hands = physics.hand_errors(pred, true)
  for name, value in zip(("lhand_jpe", "rhand_jpe", "hand_jpe"), hands, strict=True):
    close(value, name)


def test_contact_with_an_object(hoi):
  close = lambda found, name: near(found, hoi[f"out/{name}"], 1e-4)
  # The published foot metric has moved the joints to their own floor, in place, before contact is read.
  apart = []
  for joints in (hoi["pred_joints"], hoi["gt_joints"]):
    floor = physics.floor_height(joints, up=physics.Z_UP)
    apart.append(physics.hand_distances(joints.at[..., 2].add(-floor), hoi["object_points"]))
  pred, true = (physics.touching(each) for each in apart)
  found = physics.scores(pred, true)
  for name, value in zip(("precision", "recall", "acc", "f1"), found, strict=True):
    close(value, f"contact_{name}")
  close(physics.contact_distance(apart[0], true), "contact_dist")
  close(physics.contact_distance(apart[1], true), "gt_contact_dist")


def test_feet(hoi, golden):
  up = physics.Z_UP
  floors = {who: physics.floor_height(hoi[f"{who}_joints"], up=up) for who in ("pred", "gt")}
  near(floors["pred"], hoi["floor_height_pred"], 1e-4)
  slide = lambda who, floor: physics.foot_sliding(hoi[f"{who}_joints"], floor=floor, up=up)
  near(slide("pred", floors["pred"]), hoi["out/foot_sliding"], 1e-4)
  near(slide("gt", floors["gt"]), hoi["out/gt_foot_sliding"], 1e-4)
  near(slide("pred", 0.0), hoi["foot_sliding_floor0"], 1e-4)
  found = physics.sliding_share(hoi["pred_joints"], up=up)
  near(found, hoi["chois_foot_sliding_percent"], 1e-4)
  near(physics.pfc(hoi["pred_joints"], up=up), hoi["pfc_x1e4"], 1e-4)
  joints = jnp.asarray(golden["skate/joints_yup"], float)
  near(jax.vmap(physics.skating_ratio)(joints), golden["skate/ratio"], 1e-4)


def test_penetration(golden, exact):
  of = below(golden, "sdf/")
  body, scene = (
    jnp.asarray(of[name])
    for name in ("body_points_signed_distance", "scene_points_inside_positive")
  )
  psi, afford, omomo = (
    physics.body_in_scene(body), physics.scene_in_body(scene), physics.penetration(body)
  )  # fmt: skip
  near(psi.non_collision, of["noncollision_psi"])
  near(psi.contact, of["contact_psi"])
  near(omomo.depth, of["penetration_depth_omomo"])
  near(omomo.share, of["penetration_percent_omomo"])
  near(afford.non_collision, of["noncollision_afford"])
  near(afford.contact, of["contact_afford"])


# --- representations ------------------------------------------------------------------------------


def test_interhuman(golden):
  of = below(golden, "interhuman/")
  raw = np.stack([of["raw1"], of["raw2"]], axis=1)
  joints = representation.y_up(jnp.asarray(raw[..., :66]).reshape(-1, 2, 22, 3))
  six = jnp.asarray(raw[..., 66:]).reshape(-1, 2, 21, 6)
  found = representation.interhuman_pair(joints, six)
  near(found[:, 0], of["rep1"], 1e-4, 1e-5)
  near(found[:, 1], of["rep2"], 1e-4, 1e-5)
  frames = [representation.canonical_frame(joints[:, body]) for body in range(2)]
  near(representation.relative_pose(*frames), of["relative"], 1e-4, 1e-5)
  own = representation.to_frame(joints[:, 1], frames[1])
  near(representation.encode_interhuman(own, six[:, 1]), of["rep2_own_frame"], 1e-4, 1e-5)
  # The same by moving both bodies at once.
  pair = representation.canonical_pair(joints, floor="each")[:-1]
  near(representation.joints_of(found), pair, 1e-4, 1e-5)


def test_humanml3d(golden):
  vectors, joints = (jnp.asarray(golden[f"humanml3d/{name}"]) for name in ("vecs", "joints"))
  found = representation.decode_humanml3d(vectors)
  near(found.joints, joints, 1e-4, 1e-5)
  again = representation.encode_humanml3d(joints, found.six, found.half)
  near(again, vectors[:-1], 1e-4, 1e-5)


# --- losses ---------------------------------------------------------------------------------------

NAMES = {
  "simple": "simple", "distance": "DM", "affinity": "JA", "orientation": "RO", "total": "total",
  **{f"{ours}_{body.lower()}": f"{theirs}_{body}" for body in "AB"
     for ours, theirs in (("velocity", "VEL"), ("bone", "BL"), ("foot", "FC"))},
}  # fmt: skip


def test_losses_and_gradient(golden):
  of = below(golden, "iloss/")
  scaling = Scaling(of["mean"], of["std"])
  mask = of["mask"][..., 0] != 0

  def loss(pred):
    terms = losses.interaction_loss(pred, of["target"], mask, of["timestep_mask"], scaling)
    return terms["total"], terms

  (_, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(of["pred"])
  expected = {**below(golden, "iloss/term/"), "total": of["total"]}
  assert set(NAMES) == set(terms)
  for ours, theirs in NAMES.items():
    np.testing.assert_allclose(terms[ours], expected[theirs], rtol=1e-4, err_msg=ours)
  size = np.abs(of["grad_pred"]).max()
  near(gradient, of["grad_pred"], 1e-4, 1e-4 * size)


# --- diffusion ------------------------------------------------------------------------------------


def test_schedules(golden):
  of = below(golden, "diffusion/")
  for size in (50, 8):
    near(diffusion.cosine_betas(size), of[f"cosine_betas_{size}"], 1e-5)
  near(diffusion.cosine_betas(1000)[::20], of["cosine_betas_1000"], 1e-5)
  whole = diffusion.make_schedule(1000)
  near(whole.abar[::20], of["alphas_cumprod_1000_stride20"], 1e-5)
  np.testing.assert_array_equal(diffusion.ddim_steps(1000, 50), of["space_ddim50"])
  np.testing.assert_array_equal(diffusion.even_steps(100, 10), of["space_10_of_100"])


def test_steps(golden):
  of = below(golden, "diffusion/")
  schedule, t = diffusion.make_schedule(int(of["N"])), jnp.asarray(of["t"])
  x_t, clean, noise = of["x_t"], of["pred_x0"], of["noise"]
  near(diffusion.noised(schedule, of["x0"], t, of["eps"]), x_t, 1e-5, 1e-6)
  near(diffusion.posterior_mean(schedule, clean, x_t, t), of["posterior_mean"], 1e-5, 1e-6)
  near(schedule.variance[t], of["posterior_variance"], 1e-5)
  near(diffusion.ddpm_step(schedule, clean, x_t, t, noise), of["ddpm_sample"], 1e-5, 1e-5)
  for eta in (0, 0.7):
    found = diffusion.ddim_step(schedule, clean, x_t, t, noise, eta)
    near(found, of[f"ddim_eta{eta}"], 5e-5, 5e-5)
  found = diffusion.guided(of["cfg_cond"], of["cfg_uncond"], float(of["cfg_scale"]))
  near(found, of["cfg_out"], 1e-5, 1e-6)

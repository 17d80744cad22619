"""What the checks at the door let in, and what they say of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.stats import shapes


def test_good_shapes_pass():
  shapes.check(
    logits=(jnp.ones((4, 3)), "B C"),
    labels=(np.ones(4, int), "B"),
    similarity=(jnp.ones((3, 3)), "C C"),
    images=(jnp.ones((2, 7, 28, 28)), "... 28 28"),
    scalar=(1.0, ""),
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"x": (jnp.ones(3), "B C")}, "x: expected shape (B, C), got (3,)"),
    (
      {"logits": (jnp.ones((4, 3)), "B C"), "labels": (jnp.ones(3), "B")},
      "labels: expected shape (B=4,), got (3,)",
    ),
    ({"square": (jnp.ones((2, 3)), "n n")}, "square: expected shape (n, n), got (2, 3)"),
    ({"images": (jnp.ones((2, 28)), "... 28 28")}, "images: expected shape (..., 28, 28), got (2, 28)"),
    ({"scalar": (jnp.ones(1), "")}, "scalar: expected shape (), got (1,)"),
  ],
)  # fmt: skip
def test_a_wrong_shape_is_one_line_with_the_name(arguments, message):
  with pytest.raises(ValueError) as error:
    shapes.check(**arguments)
  assert str(error.value) == message


def test_under_vmap_the_shape_is_that_of_one():
  def one(x):
    shapes.check(x=(x, "3"))
    return x.sum()

  assert jax.jit(jax.vmap(one))(jnp.ones((2, 3))).shape == (2,)


def test_all_have_the_shape_of_the_first():
  shapes.same(weight=np.zeros((4, 3)), mask=np.ones((4, 3)))
  with pytest.raises(
    ValueError, match=r"^mask: expected the shape \(4, 3\) of weight, got \(3,\)$"
  ):
    shapes.same(weight=np.zeros((4, 3)), mask=np.ones(3))

"""Checks of config fields: what passes, and the one line of what does not."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.runtime import checks
from jaxmethods.testbeds.federated_images import clients
from jaxmethods.testbeds.federated_images.settings import ClientSettings


@dataclasses.dataclass(frozen=True)
class Settings:
  rounds: int = 3
  rate: float = 0.5
  share: float = 1.0
  broken: float = math.nan
  endless: float = math.inf


def message(check, *arguments, **options) -> str:
  with pytest.raises(ValueError) as error:
    check(Settings(), *arguments, **options)
  return str(error.value)


def test_good_fields_pass():
  checks.at_least(Settings(), 3, "rounds")
  checks.positive(Settings(), "rounds", "rate", "share")
  checks.within(Settings(), "(0, 1]", "rate", "share")
  checks.within(Settings(), "[0.5, 2)", "rate")
  checks.require(True, "rate", "is never wrong")
  checks.no_mesh("tiny", None)


def test_a_bad_field_is_named_with_rule_and_value():
  assert message(checks.at_least, 4, "rounds") == "rounds: must be at least 4, got 3"
  assert message(checks.positive, "rate", "broken") == "broken: must be positive, got nan"
  assert message(checks.within, "[0, 1)", "share") == "share: must be in [0, 1), got 1.0"
  assert message(checks.within, "(0.5, 1]", "rate") == "rate: must be in (0.5, 1], got 0.5"
  assert message(checks.at_least, 0, "rounds", "endless", prefix="desk.") == (
    "desk.endless: must be at least 0, got inf"
  )
  with pytest.raises(ValueError, match=r"^rate: must not exceed share$"):
    checks.require(False, "rate", "must not exceed share")


def test_a_mesh_is_refused_not_dropped():
  with pytest.raises(InputError, match="--mesh: tiny runs on one device"):
    checks.no_mesh("tiny", jax.make_mesh((1,), ("clients",)))


def test_a_federation_of_one_is_warned_of(capsys):
  checks.warn_alone(2)
  assert not capsys.readouterr().err
  checks.warn_alone(1)
  assert "one client only" in capsys.readouterr().err
  settings = ClientSettings(skew="labels", clients=1, min_per_class=0)
  clients.check(settings, np.zeros((1, 4), np.int32), 1)
  assert "one client only" in capsys.readouterr().err

"""Profiles of users: read from a file, or generated from a seed in the same schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from jaxmethods.data.files import digest, local_path
from jaxmethods.data.records import sealed
from jaxmethods.errors import InputError
from jaxmethods.methods.epeagent import policy
from jaxmethods.methods.epeagent.minimise import Value

DOMAINS = {"finance": (1, 2, 3), "medicine": (4, 5, 6), "combined": (1, 2, 3, 4, 5, 6)}
_KEYS = ("value", "description", "label")
_MOST_SHOWN = 3

# Responsibilities of the agents, in our words.
ROLES = {
  1: "Market data: gathers and filters market data for the user's name, age, gender, investment goals, "
  "preferred asset classes and market monitoring frequency",
  2: "Risk assessment: judges investment risk from annual income, risk tolerance, time horizon, goals, "
  "asset classes and transaction history",
  3: "Transaction execution: gives the final decision and places the preferred order type, with the "
  "transaction history at hand",
  4: "Diagnosis: reads chronic conditions, recent lab results, family history, age and gender",
  5: "Treatment recommendation: weighs recommended treatments against chronic conditions, allergies, "
  "current medications and family history",
  6: "Medication management: gives the final plan from current medications, allergies, medication "
  "adherence and the next checkup schedule",
}


class Entry(NamedTuple):
  """One field of a user."""

  value: Value
  description: str
  label: tuple[int, ...]


class Profiles(NamedTuple):
  """Users and rights.

  Attributes:
    users: field -> entry, for each user.
    fields: of all users, in the order of their first appearance.
    agents: numbers.
    access: (U, F, N), labels; a field that a user lacks is seen by nobody.
    domain: of the labels.
    origin: where they are from, for the report.
    real: whether they are from a file.
  """

  users: list[dict[str, Entry]]
  fields: tuple[str, ...]
  agents: tuple[int, ...]
  access: np.ndarray
  domain: str
  origin: str
  real: bool


def text_of(value: Value) -> str:
  """Writes a value as people do: items with semicolons, keys before their values."""
  if isinstance(value, list):
    return "; ".join(text_of(item) for item in value)
  if isinstance(value, dict):
    return ", ".join(f"{key} {text_of(item)}" for key, item in value.items())
  return str(value)


def read(name: str, most: int) -> Profiles:
  """Reads profiles: a JSON list of users, each {field: {value, description, label}}.

  Args:
    name: the file.
    most: users to keep, from the first.

  Raises:
    InputError: the file cannot be read, or an entry is malformed (named by user and field, no value).
  """
  path = local_path(name)
  try:
    raw = json.loads(path.read_text(encoding="utf-8-sig"))
  except OSError as error:
    raise InputError(f"profiles: {path}: cannot be read: {error.strerror}") from None
  except (ValueError, RecursionError):
    raise InputError(f"profiles: {path}: is not JSON") from None
  if not isinstance(raw, list) or not raw:
    raise InputError(f"profiles: {path}: must be a list of users, with at least one")
  users = [_user(entry, i, path) for i, entry in enumerate(raw)]
  _check_names(users, path)
  users = users[:most]
  return collect(users, sealed(str(path), digest(path)), real=True)


def _user(raw: object, number: int, path: Path) -> dict[str, Entry]:
  where = f"profiles: {path}: user {number}"
  if not isinstance(raw, dict) or not raw:
    raise InputError(f"{where}: the profile is empty or no object of fields")
  user = {}
  for field, entry in raw.items():
    if not isinstance(entry, dict) or "value" not in entry:
      raise InputError(f"{where}, field {field!r}: must be an object with {', '.join(_KEYS)}")
    if unknown := sorted(set(entry) - set(_KEYS)):
      raise InputError(f"{where}, field {field!r}: unknown key {unknown[0]!r}")
    label = entry.get("label", [])
    if not isinstance(label, list) or not all(type(agent) is int for agent in label):
      raise InputError(f"{where}, field {field!r}: label must be a list of agent numbers")
    if stranger := sorted(set(label) - set(ROLES)):
      raise InputError(
        f"{where}, field {field!r}: label {stranger[0]} is no agent, agents are 1 to {max(ROLES)}"
      )
    if not _readable(entry["value"]):
      raise InputError(f"{where}, field {field!r}: value is missing (null), or nested too deeply")
    user[field] = Entry(entry["value"], str(entry.get("description", "")), tuple(label))
  return user


def _readable(value: object, depth: int = 0) -> bool:
  if isinstance(value, list):
    return depth < 20 and all(_readable(item, depth + 1) for item in value)
  if isinstance(value, dict):
    return depth < 20 and all(_readable(item, depth + 1) for item in value.values())
  return isinstance(value, str | int | float)


def _check_names(users: Sequence[dict[str, Entry]], path: Path) -> None:
  seen: dict[str, int] = {}
  for number, user in enumerate(users):
    mark = text_of(user["name"].value) if "name" in user else json.dumps(user, sort_keys=True)
    if mark in seen:
      raise InputError(f"profiles: {path}: users {seen[mark]} and {number} are the same person")
    seen[mark] = number


def collect(users: list[dict[str, Entry]], origin: str, *, real: bool) -> Profiles:
  """Joins users: the fields there are, the domain that the labels speak of, the access matrix."""
  fields = tuple(dict.fromkeys(field for user in users for field in user))
  used = {agent for user in users for entry in user.values() for agent in entry.label}
  domain = next(name for name, agents in DOMAINS.items() if used <= set(agents))
  agents = DOMAINS[domain]
  labels = [[user[f].label if f in user else () for f in fields] for user in users]
  access = np.stack([policy.access_matrix(label, agents) for label in labels])
  return Profiles(users, fields, agents, access, domain, origin, real)


def unseen(profiles: Profiles) -> str:
  """Says which fields nobody may see, for the report; empty if there are none."""
  hidden = [
    f
    for f, seen in zip(profiles.fields, np.any(profiles.access, (0, 2)).tolist(), strict=True)
    if not seen
  ]
  if not hidden:
    return ""
  more = ", ..." if len(hidden) > _MOST_SHOWN else ""
  return f"; nobody may see {', '.join(hidden[:_MOST_SHOWN])}{more} ({len(hidden)} fields)"


# --- generated ------------------------------------------------------------------------------------

_FIRST = (
  "Ada", "Ben", "Cleo", "Dario", "Edda", "Finn", "Greta", "Hugo", "Ines", "Jonas", "Kaya", "Liam",
  "Mira", "Nils", "Olga", "Paul", "Quirin", "Rosa",
)  # fmt: skip
_LAST = (
  "Abel", "Brandt", "Costa", "Duran", "Eklund", "Falk", "Grosz", "Hansen", "Ibsen", "Jansen",
  "Keller", "Lopez", "Marsh", "Novak",
)  # fmt: skip
_VOCABULARY: dict[str, tuple[object, ...]] = {
  "gender": ("Female", "Male", "Nonbinary"),
  "annual_income": tuple(range(31_500, 240_000, 8_500)),
  "investment_goals": ("Retirement", "House Purchase", "Education Fund", "Steady Income", "Fast Growth"),
  "risk_tolerance": ("Very Low", "Low", "Moderate", "High", "Very High"),
  "preferred_asset_classes": ("Bonds", "Index Funds", "Gold", "Real Estate", "Small Caps", "Cash"),
  "time_horizon": ("2 years", "5 years", "8 years", "13 years", "21 years", "34 years"),
  "market_monitoring_frequency": ("Hourly", "Daily", "Weekly", "Monthly", "Quarterly"),
  "preferred_order_type": ("Market Order", "Limit Order", "Stop Order", "Trailing Stop", "Iceberg"),
  "instrument": ("ACME", "BOREAL", "CORVUS", "DELTA 50", "EQUINOX"),
  "chronic_conditions": ("Asthma", "Hypertension", "Diabetes", "Migraine", "Arthritis", "Psoriasis"),
  "allergies": ("Penicillin", "Latex", "Peanuts", "Pollen", "Shellfish"),
  "drug": ("Lisinopril", "Metformin", "Salbutamol", "Naproxen", "Sertraline", "Omeprazole"),
  "medication_adherence": ("Always on time", "Mostly on time", "Often late", "Rarely taken"),
  "recommended_treatments": ("Physiotherapy", "Diet plan", "Sleep training", "Inhaler", "Surgery"),
  "relative": ("Mother had a stroke", "Father had gout", "Sister has asthma", "Uncle had glaucoma"),
  "next_checkup_schedule": ("In 3 weeks", "In 2 months", "In 6 months", "Next year"),
}  # fmt: skip
_DESCRIPTIONS = {
  "name": "How the user is addressed.",
  "age": "Age, which bears on plans and on risk.",
  "gender": "Gender as the user states it.",
  "annual_income": "Income of a year, which bears on what can be invested.",
  "transaction_history": "Trades of late.",
}
# Field -> agents, as in the authors' files.
_LABELS = {
  "finance": {
    "name": (1, 2), "age": (1, 2), "gender": (1, 2), "annual_income": (2,),
    "investment_goals": (1, 2), "risk_tolerance": (2,), "preferred_asset_classes": (1, 2),
    "time_horizon": (2,), "market_monitoring_frequency": (1,), "preferred_order_type": (3,),
    "transaction_history": (2, 3),
  },
  "medicine": {
    "name": (4, 5, 6), "age": (4, 5), "gender": (4, 5), "chronic_conditions": (4, 5),
    "allergies": (5, 6), "current_medications": (5, 6), "recent_lab_results": (4,),
    "medication_adherence": (6,), "recommended_treatments": (5,), "family_history": (4, 5),
    "next_checkup_schedule": (4, 6),
  },
}  # fmt: skip


def labels_of(domain: str) -> dict[str, tuple[int, ...]]:
  """Rights of the generated profiles; combined: of both domains, and what both know is known to all."""
  if domain != "combined":
    return _LABELS[domain]
  one, two = _LABELS["finance"], _LABELS["medicine"]
  both = {field: DOMAINS[domain] for field in one.keys() & two.keys()}
  return {field: both.get(field, label) for field, label in (one | two).items()}


def generate(seed: int, count: int, domain: str) -> Profiles:
  """Draws profiles from small vocabularies; nobody in them exists.

  Args:
    seed: of the draw.
    count: number of users; names are unique.
    domain: finance, medicine or combined.
  """
  random = np.random.default_rng([seed, 29])
  chosen = random.permutation(len(_FIRST) * len(_LAST))
  users = []
  for i in range(count):
    again, place = divmod(i, len(chosen))
    first, last = divmod(int(chosen[place]), len(_LAST))
    name = f"{_FIRST[first]} {_LAST[last]}" + (f" {again + 1}" if again else "")
    users.append(
      {
        field: Entry(
          name if field == "name" else _draw(field, random),
          _DESCRIPTIONS.get(field, f"The user's {field.replace('_', ' ')}."),
          label,
        )
        for field, label in labels_of(domain).items()
      }
    )
  return collect(users, f"generated from seed {seed}", real=False)


def _draw(field: str, random: np.random.Generator) -> Value:
  """Draws the value of a field, of the type that the authors' files have."""
  one = lambda name: random.choice(np.array(_VOCABULARY[name], object))
  some = lambda name: [
    str(x) for x in random.choice(np.array(_VOCABULARY[name], object), 2, replace=False)
  ]
  match field:
    case "age":
      return int(random.integers(19, 88))
    case "annual_income":
      return int(one(field))
    case "transaction_history":
      return [
        {
          "date": f"2025-{random.integers(1, 13):02d}-{random.integers(1, 29):02d}",
          "instrument": str(one("instrument")), "trade_type": str(random.choice(["Buy", "Sell"])),
          "amount": int(random.integers(100, 999)),
        }
      ]  # fmt: skip
    case "current_medications":
      return [{"name": str(one("drug")), "dosage": f"{random.integers(1, 5)} times a day"}]
    case "recent_lab_results":
      return {
        "blood_pressure": f"{random.integers(100, 180)}/{random.integers(60, 110)}",
        "cholesterol": f"{random.integers(120, 300)} mg/dL",
      }
    case "family_history":
      return {"relative": str(one("relative"))}
    case (
      "investment_goals"
      | "preferred_asset_classes"
      | "chronic_conditions"
      | "allergies"
      | ("recommended_treatments")
    ):
      return cast(Value, some(field))
  return str(one(field))

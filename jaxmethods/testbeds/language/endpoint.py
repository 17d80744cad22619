"""OpenAI-compatible chat completions: patient with a busy server, suspicious of what it sends.

A reply that is cut off, malformed or too long is no answer. The key goes into the header of the request
and nowhere else: no message of an error holds a header, an address with a password, or a body.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlsplit

import requests

from jaxmethods.errors import InputError
from jaxmethods.testbeds.language.journal import Journal
from jaxmethods.testbeds.language.settings import ChatSettings
from jaxmethods.testbeds.language.turns import Turn, user_prompt

_CHUNK = 1 << 14
_BUSY = {408, 409, 425, 429}
NO_ANSWER = ""


class _Fault(Exception):
  """A try that failed: worth another one, or not; after a wait that the server asked for, or ours."""

  def __init__(self, reason: str, *, again: bool = True, wait: float | None = None) -> None:
    super().__init__(reason)
    self.again, self.wait = again, wait


class _Key(requests.auth.AuthBase):
  """Sends the key of the environment; given as `auth`, it keeps `requests` from reading ~/.netrc."""

  def __init__(self, variable: str) -> None:
    self.variable = variable

  def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
    if key := os.environ.get(self.variable, "").strip():
      request.headers["Authorization"] = f"Bearer {key}"
    return request


class Endpoint(NamedTuple):
  """An endpoint as a back end.

  Attributes:
    address: base address, such as http://127.0.0.1:8000/v1.
    settings: model, limits, patience.
    refusal: the standard sentence.
    journal: of answers.
    say: called with a line when a request has failed for good.
    sleep: waits; seconds.
  """

  address: str
  settings: ChatSettings
  refusal: str
  journal: Journal
  say: Callable[[str], None] = print
  sleep: Callable[[float], None] = time.sleep

  def __call__(self, turns: Sequence[Turn], /) -> list[str]:
    """Answers turns, several requests at a time; the same request is made once.

    Raises:
      InputError: the endpoint cannot be reached, or refuses the request itself (key, model, address).
    """
    bodies = [_body(turn, self.settings, self.refusal) for turn in turns]
    with ThreadPoolExecutor(self.settings.concurrency) as pool:
      asked = {body: pool.submit(self._ask, body) for body in dict.fromkeys(bodies)}
      try:
        return [asked[body].result() for body in bodies]
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise

  def _ask(self, body: str) -> str:
    request = f"{self.address}\n{body}"
    if (known := self.journal.get(request)) is not None:
      return known
    fault: _Fault | None = None
    for attempt in range(self.settings.tries):
      try:
        return self.journal.put(request, _try(self.address, body, self.settings))
      except _Fault as failed:
        fault = failed
        if not fault.again:
          break
        if attempt + 1 < self.settings.tries:
          self.sleep(_wait(attempt, fault.wait, self.settings.longest_wait))
    if isinstance(fault and fault.__cause__, requests.ConnectionError) and not len(self.journal):
      raise InputError(f"backend: {_host(self.address)} cannot be reached: {fault}")
    self.say(f"backend: no answer to one request: {fault}")
    return NO_ANSWER


def _body(turn: Turn, settings: ChatSettings, refusal: str) -> str:
  messages = [
    {"role": "system", "content": turn.system},
    {"role": "user", "content": user_prompt(turn, refusal)},
  ]
  return json.dumps(
    {
      "model": settings.model, "messages": messages, "temperature": settings.temperature,
      "max_tokens": settings.max_tokens,
    }
  )  # fmt: skip


def _wait(attempt: int, asked: float | None, longest: float) -> float:
  """Seconds before the next try: what the server asks for, else 1, 2, 4, ...; with jitter on top.

  Jitter never shortens a wait that the server asked for, and nothing waits longer than `longest`.
  """
  if asked is not None:
    return min(asked + random.uniform(0, 0.1 * asked), longest)
  return min(2.0**attempt, longest) * random.uniform(0.5, 1)


def _try(address: str, body: str, settings: ChatSettings) -> str:
  """Makes one request.

  Raises:
    _Fault: no usable reply came in time.
    InputError: another try cannot help.
  """
  deadline = time.monotonic() + settings.timeout
  try:
    with requests.post(
      f"{address.rstrip('/')}/chat/completions",
      data=body.encode(),
      headers={"Content-Type": "application/json"},
      auth=_Key(settings.key_variable),
      timeout=settings.timeout,
      stream=True,
      # Another host must get neither the key nor the profile.
      allow_redirects=False,
    ) as response:
      _check_status(response, address)
      return _content(_read(response, deadline, settings.max_reply_bytes))
  except requests.Timeout as error:
    raise _Fault("time is up") from error
  except requests.exceptions.ChunkedEncodingError as error:
    raise _Fault("the reply was cut off") from error
  except requests.ConnectionError as error:
    raise _Fault("the connection failed") from error
  except requests.RequestException as error:
    raise InputError(f"backend: {_host(address)}: {type(error).__name__}") from None


def _check_status(response: requests.Response, address: str) -> None:
  status = response.status_code
  if status == 200:
    return
  if status in _BUSY or status >= 500:
    wait = _seconds(response.headers.get("Retry-After"))
    raise _Fault(f"the server is busy or failing ({status})", wait=wait)
  raise InputError(f"backend: {_host(address)} refuses requests: HTTP status {status}")


def _seconds(retry_after: str | None) -> float | None:
  """Reads Retry-After, seconds or a date; None if there is none that can be understood."""
  if retry_after is None:
    return None
  if retry_after.strip().isdigit():
    return float(retry_after)
  try:
    return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
  except (ValueError, TypeError, OverflowError):
    return None


def _read(response: requests.Response, deadline: float, limit: int) -> bytes:
  """Reads a body that may be endless or slow."""
  parts, size = [], 0
  for part in response.iter_content(_CHUNK):
    parts.append(part)
    size += len(part)
    if size > limit:
      raise _Fault(f"the reply is longer than {limit} bytes", again=False)
    if time.monotonic() > deadline:
      raise _Fault("time is up")
  return b"".join(parts)


def _content(body: bytes) -> str:
  """The text of a reply; whatever else it holds is left alone."""
  try:
    text = json.loads(body)["choices"][0]["message"]["content"]
  except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
    raise _Fault("the reply is no chat completion") from error
  if not isinstance(text, str) or not text.strip():
    raise _Fault("the reply holds no text")
  # Unpaired surrogates cannot be written to a file.
  return text.encode("utf-8", "replace").decode().strip()


def _host(address: str) -> str:
  parts = urlsplit(address)
  return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")

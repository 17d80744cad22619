"""An OpenAI-compatible server on 127.0.0.1 that can misbehave in every way a test asks for."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text):
  return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def sensible(prompt):
  """Answers like an agent: the first option, or what the profile says."""
  if "(a)" in prompt:
    return "(a)"
  found = re.search(r"- (\w+): (.*)", prompt)
  return found[2] if found else "nothing"


class ChatServer:
  """Serves until closed.

  Attributes:
    script: behaviours of the first requests, one each; then `otherwise`.
    asked: bodies in order of arrival; `done`: of those that were answered in full.
    keys: Authorization headers.
  """

  def __init__(self, script=(), otherwise="good", delay=0.0, answer=sensible):
    self.script, self.otherwise, self.delay, self.answer = list(script), otherwise, delay, answer
    self.asked, self.done, self.keys, self.lock = [], [], [], threading.Lock()
    outer = self

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with outer.lock:
          outer.asked.append(body)
          outer.keys.append(self.headers.get("Authorization"))
          how = outer.script.pop(0) if outer.script else outer.otherwise
        try:
          outer.behave(self, how, body)
        except OSError:
          self.close_connection = True

      def log_message(self, *_):
        pass

    self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.http.daemon_threads = True
    threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
    self.address = f"http://127.0.0.1:{self.http.server_port}/v1"

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.http.shutdown()
    self.http.server_close()

  def send(self, to, status, body, headers=(), length=None):
    to.send_response(status)
    for name, value in headers:
      to.send_header(name, value)
    to.send_header("Content-Length", str(len(body) if length is None else length))
    to.end_headers()
    to.wfile.write(body)
    to.wfile.flush()

  def behave(self, to, how, body):
    time.sleep(self.delay)
    prompt = json.loads(body)["messages"][1]["content"]
    text = completion(self.answer(prompt))
    match how:
      case "good":
        self.send(to, 200, text)
        with self.lock:
          self.done.append(body)
      case "busy":
        self.send(to, 429, b"slow down", [("Retry-After", "3")])
      case "until":
        self.send(to, 429, b"", [("Retry-After", "Fri, 01 Jan 2100 00:00:00 GMT")])
      case "failing":
        self.send(to, 500, b"secret-key-of-the-server")
      case "slow":
        time.sleep(1.5)
        self.send(to, 200, text)
      case "drip":  # a byte at a time: each read is in time, the whole is not
        to.send_response(200)
        to.send_header("Content-Length", "1000")
        to.end_headers()
        for _ in range(40):
          to.wfile.write(b" ")
          to.wfile.flush()
          time.sleep(0.05)
      case "cut":
        self.send(to, 200, text[: len(text) // 2], length=len(text))
        to.close_connection = True
        to.connection.close()
      case "malformed":
        self.send(to, 200, text[:-5])
      case "deep":
        self.send(to, 200, b"[" * 200_000)
      case "null":
        self.send(to, 200, completion(None))
      case "huge":
        self.send(to, 200, completion("x" * 10_000_000))
      case "elsewhere":
        self.send(to, 307, b"", [("Location", "http://127.0.0.1:1/v1/chat/completions")])
      case "forbidden":
        self.send(to, 401, b"bad key sk-secret")
      case _:
        self.send(to, 200, completion(how))

"""An HTTP server that speaks OpenAI's chat completions and answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[int, dict[str, str], str]
"""What the judge says, or (status, headers, body)."""


@dataclass
class JudgeServer:
    """Where it is, how it answers, and what it was asked."""

    url: str
    answer: Callable[[dict[str, Any]], Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def material(request: dict[str, Any]) -> dict[str, Any]:
    """What is to be judged, of a request."""
    found: dict[str, Any] = json.loads(request["messages"][1]["content"])
    return found


def scores(*values: object) -> str:
    """An answer with these scores."""
    return json.dumps({"scores": [{"id": i, "score": v, "reason": f"r{i}"} for i, v in enumerate(values, start=1)]})


@contextmanager
def judge_server(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[JudgeServer]:
    """Serves on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with judge.lock:
                judge.requests.append(request)
                judge.keys.append(self.headers.get("authorization"))
                judge.at_once += 1
                judge.most_at_once = max(judge.at_once, judge.most_at_once)
            said = judge.answer(request)
            with judge.lock:
                judge.at_once -= 1
            status, headers, body = said if isinstance(said, tuple) else (200, {}, completion(said))
            if self.path != "/v1/chat/completions":
                status, body = 404, f"no {self.path} here"
            self.send_response(status)
            for name, value in {"content-length": str(len(body.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_args: Any) -> None:
            """Nothing: pytest's output is for the tests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge = JudgeServer(f"http://127.0.0.1:{server.server_port}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str) -> str:
    """The body of a chat completion of 100 tokens for a question of 1000."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}})

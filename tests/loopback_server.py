"""A chat-completions server on the loopback address, with a thread for each connection, that misbehaves as it is told.

`answer` gets the body of a request and the number of requests so far, and gives a text, a `Said`, or raw bytes.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """One response: a completion's text with the first token's likeliest tokens, or any body under any status."""

    text: Any = ""
    top: dict[str, float] | None = None
    ended: str = "stop"
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    cut: int = 0
    drip: float = 0.0

    def written(self) -> bytes:
        if self.body is not None:
            return self.body
        entries = [{"token": token, "logprob": value} for token, value in (self.top or {}).items()]
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}, "finish_reason": self.ended}
        if self.top is not None:
            choice["logprobs"] = {"content": [{"token": "", "logprob": 0.0, "top_logprobs": entries}]}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        found = {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
        return json.dumps(found).encode()


def error(status: int, message: str, code: str | None = None, **headers: str) -> Said:
    body = json.dumps({"error": {"message": message, "code": code, "type": "x"}}).encode()
    return Said(status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Server:
    """Where it is, and what it saw."""

    url: str
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    now: int = 0
    peak: int = 0
    lock: Any = field(default_factory=threading.Lock)

    @property
    def calls(self) -> int:
        return len(self.seen)


Answer = Callable[[dict[str, Any], int], "Said | str"]


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests hang up."""


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes
        wbufsize = 1 << 16

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = server.calls
                server.seen.append(body)
                server.keys.append(self.headers.get("Authorization", ""))
                server.now += 1
                server.peak = max(server.peak, server.now)
            try:
                said = answer(body, number)
                self.reply(Said(said) if isinstance(said, str) else said)
            finally:
                with server.lock:
                    server.now -= 1

        def reply(self, said: Said) -> None:
            time.sleep(said.wait)
            data = said.written()
            self.send_response(said.status)
            for name, value in {"Content-Type": "application/json", **said.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for byte in data if said.drip else ():
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(said.drip)
            self.wfile.write(b"" if said.drip else data[: len(data) - said.cut])
            self.wfile.flush()
            if said.cut:
                self.close_connection = True

    http = _Quiet(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def asked(body: dict[str, Any]) -> str:
    """The last user message of a request."""
    return str(body["messages"][-1]["content"])

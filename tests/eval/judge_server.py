"""A judge for tests: a local HTTP server that speaks the OpenAI chat protocol and can misbehave on purpose."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "judge-2024-01-25"  # what the server calls itself, whatever it is asked for


class Fault:
    """A way to misbehave. kind: status (with `status` and `retry_after`), drop (the connection, in the middle of the
    body), malformed (not JSON), hollow (JSON of another shape)."""

    def __init__(self, kind: str, status: int = 500, retry_after: str | None = None, body: str = "{}") -> None:
        self.kind, self.status, self.retry_after, self.body = kind, status, retry_after, body


class JudgeServer:
    """`say(body, n)` gives, for the n-th call (from 0) with these messages, a reply's text, the fields of a
    completion's choice, or a Fault.

    calls: every body received. paid: for each prompt (its last message) how often a completion went out whole.
    """

    def __init__(self, say: Callable[[dict[str, Any], int], str | dict[str, Any] | Fault], delay: float = 0.0) -> None:
        self.say, self.delay = say, delay
        self.calls: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.paid: dict[str, int] = {}
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner.answer(self)

            def log_message(self, *words: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *words: Any) -> None:  # a killed client is part of the game
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop listening: the endpoint is dead from here on."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Serve one call."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            before = sum(call["messages"] == body["messages"] for call in self.calls)
            self.calls.append(body)
            self.times.append(time.monotonic())
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            self._respond(handler, body, self.say(body, before))
        finally:
            with self._lock:
                self._at_once -= 1

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], said: Any) -> None:
        status, headers, text = 200, {}, ""
        if isinstance(said, Fault):
            if said.kind == "drop":
                handler.wfile.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
                )
                handler.wfile.flush()
                linger = struct.pack("ii", 1, 0)  # close with a reset
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                handler.close_connection = True
                handler.connection.close()
                return
            text = {"malformed": '{"choices": [', "hollow": said.body}.get(said.kind, "")
            if said.kind == "status":
                status, text = said.status, json.dumps({"error": {"message": said.body, "code": None}})
                headers = {"Retry-After": said.retry_after} if said.retry_after is not None else {}
        else:
            choice = said if isinstance(said, dict) else {"message": {"role": "assistant", "content": said}}
            spoken = choice["message"]["content"] or ""
            words = sum(len(message["content"].split()) for message in body["messages"])
            text = json.dumps({
                "id": "x", "object": "chat.completion", "created": 1, "model": MODEL,
                "choices": [{"index": 0, "finish_reason": "stop", **choice}],
                "usage": {"prompt_tokens": words, "completion_tokens": len(spoken.split()), "total_tokens": 0},
            })  # fmt: skip
            with self._lock:
                prompt = body["messages"][-1]["content"]
                self.paid[prompt] = self.paid.get(prompt, 0) + 1
        handler.send_response(status)
        for name, value in {
            **headers,
            "Content-Type": "application/json",
            "Content-Length": str(len(text.encode())),
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())

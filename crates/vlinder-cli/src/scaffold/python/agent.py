#!/usr/bin/env python3
"""@NAME@: an agent of Vlinder. Python's standard library only.

An agent is an HTTP server: `GET /health` answers 200, `POST /invoke` answers one turn. What it must
remember goes through the node, never into a variable: it may be killed and replaced at any time.
"""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

# Seconds for one call to the node. The turn's own deadline is the manifest's `timeout`.
CALL_S = 110

# Where the node answers a process; a container finds it under names such as sqlite-kv.vlinder.local.
BRIDGE = os.environ.get("VLINDER_BRIDGE_URL")


def answer(turn, call):
    """The reply to one turn. Put your agent here.

    turn: {"input": "…", "history": [{"role": "user" | "agent", "content": "…"}], "session", "branch", "submission"}
    call: call("sqlite-kv/get", {"path": "…"}) asks the node; so do sqlite-kv/put, /list and /delete.
    """
    count = int(call("sqlite-kv/get", {"path": "count"}) or 0) + 1
    call("sqlite-kv/put", {"path": "count", "content": str(count)})
    said = [message["content"] for message in turn["history"] if message["role"] == "user"]
    before = f" Before that you said: {said[-1]}" if said else ""
    return f"You said: {turn['input']} (number {count} in this session).{before}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet

    def do_GET(self):
        self.reply(*((200, "ok") if self.path == "/health" else (404, "not here")))

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/invoke":
            return self.reply(404, "not here")
        invocation = self.headers.get("X-Vlinder-Invocation", "")

        def call(what, arguments):
            service, _, path = what.partition("/")
            url = f"{BRIDGE}/{what}" if BRIDGE else f"http://{service}.vlinder.local:3544/{path}"
            headers = {"Content-Type": "application/json", "X-Vlinder-Invocation": invocation}
            try:
                with urlopen(Request(url, json.dumps(arguments).encode(), headers), timeout=CALL_S) as response:
                    return response.read().decode()
            except HTTPError as error:
                said = error.read(500).decode(errors="replace")
                raise RuntimeError(f"{what} answered {error.code}: {said}") from error

        try:
            self.reply(200, answer(json.loads(body), call))
        except Exception as error:  # any other status than 200 fails the turn, with this text on record
            self.reply(500, f"{type(error).__name__}: {error}")

    def reply(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Vlinder-Input", "json")  # on /health: we want the conversation as JSON
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Requests are on the node's record already. What you print shows in `vlinder agent logs @NAME@`."""


if __name__ == "__main__":
    host = "127.0.0.1" if BRIDGE else "0.0.0.0"  # in a container the node comes from outside
    server = ThreadingHTTPServer((host, int(os.environ.get("PORT", "8080"))), Handler)
    server.daemon_threads = True
    server.serve_forever()

#!/usr/bin/env python3
"""The smallest agent with a memory: reads a number, adds one, writes it, answers it.

If any turn were run twice in effect, lost, or run beside another one of its session, the numbers that a
session answers would not be 1, 2, 3, … That makes it the agent of the kill test.
"""

import http.client
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# Seconds for one call to the node.
CALL_S = 110

NODE = urlsplit(os.environ["VLINDER_BRIDGE_URL"])


class Handler(BaseHTTPRequestHandler):
    """`GET /health` and `POST /invoke`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet, when the request is done

    def do_GET(self):
        self.reply(*((200, "ok") if self.path == "/health" else (404, "not here")))

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/invoke":
            return self.reply(404, "not here")
        node = http.client.HTTPConnection(NODE.hostname, NODE.port, timeout=CALL_S)
        try:
            number = int(self.kv(node, "get", {"path": "count"}) or 0) + 1
            self.kv(node, "put", {"path": "count", "content": str(number)})
            self.reply(200, str(number))
        except (OSError, http.client.HTTPException) as error:
            self.reply(502, f"the node failed: {error!r}")
        finally:
            node.close()

    def kv(self, node, verb, body):
        headers = {"Content-Type": "application/json",
                   "X-Vlinder-Invocation": self.headers.get("X-Vlinder-Invocation", "")}
        node.request("POST", f"{NODE.path.rstrip('/')}/sqlite-kv/{verb}", json.dumps(body), headers)
        response = node.getresponse()
        content = response.read()
        if response.status != 200:
            raise http.client.HTTPException(f"{verb} answered {response.status}: {content[:500]!r}")
        return content

    def reply(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Requests are on the node's record already."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler)
    server.daemon_threads = True
    server.serve_forever()

"""A bridge in a dictionary, with the contract of agents (interfaces.md §5): what an example needs to run alone.

It is strict where the real one is: a wrong secret gets 403, a service that is not declared 403, a call outside
of an invocation 409. Model calls go on to a real model server.
"""

import base64
import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SECRET = "s3cr3t-of-the-replica"
INVOCATION = "invocation-1"


class FakeBridge(ThreadingHTTPServer):
    """`store` is the kv content, `calls` what came in, `services` what the manifest declares."""

    daemon_threads = True

    def __init__(self, services=("sqlite-kv",), upstream=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.services, self.upstream = set(services), upstream
        self.store, self.calls = {}, []
        self.open = True
        self.failing = None  # (status, code, message) for every call
        self.drop_kept = False  # close each connection after its answer without saying so
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/{SECRET}"

    def stop(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self):
        self.route(None)

    def do_POST(self):
        self.route(self.rfile.read(int(self.headers["Content-Length"])))

    def route(self, body):
        bridge = self.server
        _, secret, service, path = self.path.split("/", 3)
        bridge.calls.append((service, path, self.headers.get("X-Vlinder-Invocation")))
        if secret != SECRET:
            return self.error(403, "forbidden", "unknown replica")
        if bridge.failing:
            return self.error(*bridge.failing)
        if not bridge.open:
            return self.error(409, "no_invocation", "no invocation is open")
        if service not in bridge.services:
            return self.error(403, "undeclared", f"the manifest does not declare {service}")
        if service == "ollama":
            return self.forward(path, body)
        self.kv(path, json.loads(body))

    def kv(self, verb, body):
        store, path = self.server.store, body["path"]
        if verb == "get":
            found = path in store
            self.answer(store.get(path, b""), "application/octet-stream", {} if found else {"Vlinder-Found": "false"})
        elif verb == "put":
            store[path] = base64.b64decode(body["content_base64"]) if "content_base64" in body \
                else body["content"].encode()
            self.answer(json.dumps({"state": "0" * 64}).encode())
        elif verb == "list":
            self.answer(json.dumps(sorted(key for key in store if key.startswith(path))).encode())
        elif verb == "delete":
            store.pop(path, None)
            self.answer(json.dumps({"state": "0" * 64}).encode())
        else:
            self.error(404, "not_found", f"no {verb} here")

    def forward(self, path, body):
        """Hands a model call on, answer piece by piece, and breaks off where the upstream does."""
        upstream = urlsplit(self.server.upstream)
        connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=120)
        try:
            connection.request(self.command, f"/{path}", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers["Content-Type"])
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while data := response.read1(65536):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except (http.client.HTTPException, OSError):
            self.close_connection = True
        finally:
            connection.close()

    def error(self, status, code, message):
        self.answer(json.dumps({"error": {"code": code, "message": message}}).encode(), status=status)

    def answer(self, body, content_type="application/json", headers=None, status=200):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or self.server.drop_kept

    def log_message(self, *args):
        """Quiet: `calls` tells."""

//! The agents of the tests, in Python.

/// What they share: a server whose `turn(text, call, headers)` gives the answer, and calls to the bridge
/// on a kept connection, as a standard-library client makes them.
const COMMON: &str = r#"
import http.client, json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BRIDGE = urlsplit(os.environ["VLINDER_BRIDGE_URL"])

def call(service, path, body=None, invocation=None, method=None, host=None, secret=None, headers=None):
    "One call to the bridge: status, headers, body."
    connection = http.client.HTTPConnection(BRIDGE.hostname, BRIDGE.port, timeout=30)
    try:
        head = dict(headers or {})
        if invocation: head["X-Vlinder-Invocation"] = invocation
        if host: head["Host"] = host
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        prefix = BRIDGE.path if secret is None else "/" + secret
        url = f"{prefix}/{service}/{path}" if service else f"{prefix}/{path}"
        connection.request(method or ("GET" if data is None else "POST"), url, data, head)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()

def get(path, invocation=None):
    status, headers, body = call("sqlite-kv", "get", {"path": path}, invocation)
    assert status == 200, (status, body)
    return None if headers.get("Vlinder-Found") == "false" else body.decode()

def put(path, content, invocation=None):
    status, _, body = call("sqlite-kv", "put", {"path": path, "content": content}, invocation)
    assert status == 200, (status, body)
    return json.loads(body)["state"]

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    json_input = False
    def do_GET(self):
        self.reply(200, b"ok", {"Vlinder-Input": "json"} if self.json_input else {})
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = turn(body, self)
        if answer is not None:
            self.reply(200, answer if isinstance(answer, bytes) else answer.encode())
    @property
    def invocation(self):
        return self.headers["X-Vlinder-Invocation"]
    def reply(self, status, data, headers={}):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args):
        pass

def serve():
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
    server.daemon_threads = True
    server.serve_forever()
"#;

/// An agent whose `turn(body, request)` is given.
pub fn agent(turn: &str) -> String {
    format!("{COMMON}\n{turn}\nserve()\n")
}

pub const ECHO: &str = "def turn(body, request):\n    return body\n";

/// Counts its turns in kv.
pub const COUNTER: &str = r#"
def turn(body, request):
    count = int(get("count", request.invocation) or 0) + 1
    put("count", str(count), request.invocation)
    return str(count)
"#;

pub const KV: &str = "object_storage = 'sqlite://test'\n";

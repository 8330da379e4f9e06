"""What the Python tests share: starting a child that says on stdout where it listens, and plain HTTP to it."""

import http.client
import json
import os
import subprocess
import sys
import threading
from urllib.parse import urlsplit

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MODEL_PYTHON = os.path.join(ROOT, ".tools", "venv", "bin", "python")

# Seconds until a child must have said that it is ready: loading the weights on a busy machine takes some.
START_S = 60
# Seconds for one HTTP call: a long answer of the model on a busy machine.
CALL_S = 120


class Child:
    """A process that prints one JSON line when it is ready, and that ends with the test."""

    def __init__(self, command, env=None, cwd=None):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **(env or {})}, cwd=cwd)
        watchdog = threading.Timer(START_S, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise AssertionError(f"{command} ended with {self.process.wait()} before it was ready")
        self.ready = json.loads(line)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def model_server(*arguments):
    """The real model behind both wire formats; see model_server.py."""
    if not os.path.exists(MODEL_PYTHON):
        raise AssertionError("the model is not installed: run scripts/tools model")
    script = os.path.join(ROOT, "tests", "tools", "model_server.py")
    return Child([MODEL_PYTHON, script, "--port", "0", "--until-stdin-closes", *arguments])


def call(base_url, method, path, body=None, headers=None):
    """One HTTP call on a connection of its own: (status, headers, body as bytes)."""
    url = urlsplit(base_url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=CALL_S)
    try:
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        connection.request(method, url.path.rstrip("/") + path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def call_json(base_url, method, path, body=None, headers=None):
    status, _, data = call(base_url, method, path, body, headers)
    return status, json.loads(data)


PYTHON = sys.executable

#!/usr/bin/env python3
"""A chat with a language model. The history comes with every turn, so the agent keeps nothing itself.

It asks for its input as JSON (the header on /health), calls Ollama's chat through the node, and passes the
tokens on as they come, so that `vlinder agent run --stream` shows them live.
"""

import http.client
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# The model; agent.toml must name it too.
MODEL = "smollm2:135m"
SYSTEM = "You are a helpful assistant. Answer in a few sentences."
# The last messages of a session that the model is shown: what a small context holds.
HISTORY_MESSAGES_MAX = 12
# Longest answer, in tokens.
ANSWER_TOKENS_MAX = 200
# Seconds without a byte from the node: a model may have to be loaded first.
CALL_S = 240

NODE = urlsplit(os.environ["VLINDER_BRIDGE_URL"])


class NodeError(Exception):
    """The node or the model failed; the message says how."""


def messages(turn):
    """The conversation in the words of a model: `agent` is called `assistant` there."""
    history = [{"role": "user" if message["role"] == "user" else "assistant", "content": message["content"]}
               for message in turn.get("history", [])][-HISTORY_MESSAGES_MAX:]
    return [{"role": "system", "content": SYSTEM}, *history, {"role": "user", "content": turn["input"]}]


def tokens(turn, invocation):
    """The model's answer, piece by piece."""
    node = http.client.HTTPConnection(NODE.hostname, NODE.port, timeout=CALL_S)
    try:
        body = {"model": MODEL, "messages": messages(turn), "stream": True,
                "options": {"num_predict": ANSWER_TOKENS_MAX}}
        node.request("POST", f"{NODE.path.rstrip('/')}/ollama/api/chat", json.dumps(body),
                     {"Content-Type": "application/json", "X-Vlinder-Invocation": invocation})
        response = node.getresponse()
        if response.status != 200:
            raise NodeError(f"the model answered {response.status}: {response.read()[:500].decode(errors='replace')}")
        while line := response.readline():
            part = json.loads(line)
            if part.get("error"):
                raise NodeError(f"the model failed: {part['error']}")
            if part["message"]["content"]:
                yield part["message"]["content"]
            if part["done"]:
                return
        raise NodeError("the model's answer broke off")
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise NodeError(f"the call to the model failed: {error!r}") from error
    finally:
        node.close()


class Handler(BaseHTTPRequestHandler):
    """`GET /health` and `POST /invoke`; the answer to /invoke is streamed."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # what belongs together leaves in one packet, at each flush

    def do_GET(self):
        self.reply(*((200, "ok") if self.path == "/health" else (404, "not here")))

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/invoke":
            return self.reply(404, "not here")
        answer = tokens(json.loads(body), self.headers.get("X-Vlinder-Invocation", ""))
        try:
            first = next(answer, "")  # until here a failure still gets a status of its own
        except NodeError as error:
            return self.reply(502, str(error))
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.piece(first)
            for text in answer:
                self.piece(text)
            self.wfile.write(b"0\r\n\r\n")
        except NodeError as error:
            # Half an answer must not pass for a whole one: break off, which fails the turn.
            print(error, flush=True)
            self.close_connection = True

    def piece(self, text):
        data = text.encode()
        if data:  # an empty chunk would end the answer
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    def reply(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Vlinder-Input", "json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Requests are on the node's record already."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler)
    server.daemon_threads = True
    server.serve_forever()

#!/usr/bin/env python3
"""An agent that remembers notes. Python's standard library only.

All that it knows between two turns lies in the key-value store of its node, never in this process: it may
be killed and replaced at any time, and a session that is forked in the past sees the notes of then.

Keys: `notes/000001` … the notes; `meta/last` the highest number given; `meta/turns` the turns so far.
"""

import http.client
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# Longest note, in characters, and most notes that one answer shows or one question takes along.
NOTE_CHARS_MAX = 4000
NOTES_SHOWN_MAX = 50
# Seconds for one call to the node. The turn's own deadline is the manifest's `timeout`.
CALL_S = 110
# Longest answer to a free question, in tokens.
ANSWER_TOKENS_MAX = 120

HELP = (
    "I keep notes. Say 'remember TEXT', 'recall WORD', 'list', 'forget NUMBER' or 'forget WORD', or 'count'."
)


class NodeError(Exception):
    """The node refused a call or could not do it. `status` is the HTTP status."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Node:
    """Calls to the node, on one connection that is kept open."""

    def __init__(self, url):
        url = urlsplit(url)
        self.address, self.prefix = (url.hostname, url.port), url.path.rstrip("/")
        self.connection = None
        self.lock = threading.Lock()

    def call(self, path, body=None, invocation=""):
        """One call: (headers, body). A kept connection that the node has closed is opened once more."""
        headers = {"Content-Type": "application/json", "X-Vlinder-Invocation": invocation}
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        with self.lock:
            for kept in (self.connection is not None, False):
                self.connection = self.connection or http.client.HTTPConnection(*self.address, timeout=CALL_S)
                try:
                    self.connection.request(method, f"{self.prefix}{path}", data, headers)
                    response = self.connection.getresponse()
                    content = response.read()
                    break
                except (OSError, http.client.HTTPException) as error:
                    self.connection.close()
                    self.connection = None
                    if not kept or isinstance(error, TimeoutError):
                        raise NodeError(502, f"the node does not answer: {error}") from error
        if response.status != 200:
            raise NodeError(response.status, reason(content) or f"the node answered {response.status}")
        return response.headers, content

    def get(self, key, invocation):
        """The text under a key, or None."""
        headers, content = self.call("/sqlite-kv/get", {"path": key}, invocation)
        return None if headers.get("Vlinder-Found") == "false" else content.decode()

    def put(self, key, text, invocation):
        self.call("/sqlite-kv/put", {"path": key, "content": text}, invocation)

    def delete(self, key, invocation):
        self.call("/sqlite-kv/delete", {"path": key}, invocation)

    def keys(self, prefix, invocation):
        return json.loads(self.call("/sqlite-kv/list", {"path": prefix}, invocation)[1])


def reason(content):
    """The message within the JSON body of an error."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:500]


class Turn:
    """One turn: what was said, and the notes as this session knows them."""

    def __init__(self, node, invocation):
        self.node, self.invocation = node, invocation

    def answer(self, text):
        turns = self.number("meta/turns") + 1
        self.node.put("meta/turns", str(turns), self.invocation)
        verb, _, rest = text.strip().partition(" ")
        verb, rest = verb.lower().rstrip(":"), rest.strip()
        if verb == "remember" and rest:
            return self.remember(rest)
        if verb == "recall" and rest:
            return self.show(self.matching(rest), f"I have no note with '{rest}'.")
        if verb == "list" and not rest:
            return self.show(self.notes(), "I have no notes yet.")
        if verb == "forget" and rest:
            return self.forget(rest)
        if verb == "count" and not rest:
            return f"You have {plural(len(self.note_keys()), 'note')} after {plural(turns, 'turn')}."
        if verb == "help" or not text.strip():
            return HELP
        return self.ask(text)

    def remember(self, note):
        if len(note) > NOTE_CHARS_MAX:
            return f"That is too long for a note: I take {NOTE_CHARS_MAX} characters, you gave {len(note)}."
        number = self.number("meta/last") + 1
        self.node.put(f"notes/{number:06}", note, self.invocation)
        self.node.put("meta/last", str(number), self.invocation)
        return f"Noted as number {number}: {note}"

    def forget(self, what):
        notes = self.notes()
        wanted = [note for note in notes if what.isdecimal() and note[0] == int(what)] or self.matching(what, notes)
        for number, _ in wanted:
            self.node.delete(f"notes/{number:06}", self.invocation)
        return f"Forgot {plural(len(wanted), 'note')}." if wanted else f"I have no note with '{what}'."

    def ask(self, question):
        """A free question goes to a model, with the notes, if the manifest and the node have one."""
        model = self.model()
        if model is None:
            return HELP
        notes = "\n".join(f"- {text}" for _, text in self.notes()[:NOTES_SHOWN_MAX]) or "(none)"
        messages = [
            {"role": "system", "content": f"Answer in one or two sentences. The user's notes:\n{notes}"},
            {"role": "user", "content": question},
        ]
        body = {"model": model, "messages": messages, "stream": False, "options": {"num_predict": ANSWER_TOKENS_MAX}}
        _, content = self.node.call("/ollama/api/chat", body, self.invocation)
        return json.loads(content)["message"]["content"].strip() or "The model had nothing to say."

    def model(self):
        """The first model on offer; None where the manifest declares none or none can be had."""
        try:
            models = json.loads(self.node.call("/ollama/api/tags", None, self.invocation)[1])["models"]
        except NodeError as error:
            if error.status == 409:  # this invocation is over: nothing may be done any more
                raise
            return None
        return models[0]["name"] if models else None

    def number(self, key):
        return int(self.node.get(key, self.invocation) or 0)

    def note_keys(self):
        return sorted(self.node.keys("notes/", self.invocation))

    def notes(self):
        """(number, text) of every note, oldest first."""
        found = []
        for key in self.note_keys():
            text = self.node.get(key, self.invocation)
            if text is not None:
                found.append((int(key.rpartition("/")[2]), text))
        return found

    def matching(self, word, notes=None):
        word = word.lower()
        return [note for note in (self.notes() if notes is None else notes) if word in note[1].lower()]

    @staticmethod
    def show(notes, otherwise):
        lines = [f"{number}. {text}" for number, text in notes[:NOTES_SHOWN_MAX]]
        if len(notes) > NOTES_SHOWN_MAX:
            lines.append(f"… and {len(notes) - NOTES_SHOWN_MAX} more")
        return "\n".join(lines) or otherwise


def plural(number, word):
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def last_input(conversation):
    """The last message of the user in a text of lines `User: …` and `Agent: …`.

    A bare text is the message itself. A further line of a message that begins with a label was escaped by
    one leading space, which is taken off again.
    """
    if not re.match("(User|Agent): ?", conversation):
        return conversation
    message = []
    for line in conversation.splitlines(keepends=True):
        if line.startswith("User:"):
            message = [line.removeprefix("User:").removeprefix(" ")]
        elif line.startswith("Agent:"):
            message = []
        else:
            message.append(line[1:] if line.startswith((" User:", " Agent:")) else line)
    return "".join(message)


class Handler(BaseHTTPRequestHandler):
    """`GET /health` and `POST /invoke`, on connections that stay open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet, when the request is done
    node = None

    def do_GET(self):
        if self.path == "/health":
            self.reply(200, "ok")
        else:
            self.reply(404, "not here")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/invoke":
            return self.reply(404, "not here")
        try:
            turn = Turn(self.node, self.headers.get("X-Vlinder-Invocation", ""))
            self.reply(200, turn.answer(last_input(body.decode(errors="replace"))))
        except NodeError as error:
            print(f"a call to the node failed: {error}", file=sys.stderr, flush=True)
            self.reply(502, str(error))

    def reply(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Requests are on the node's record already."""


def main():
    Handler.node = Node(os.environ["VLINDER_BRIDGE_URL"])
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""A real language model behind the Ollama and the OpenAI wire formats, on a loopback port.

For tests and for the tour. The answers are always the model's own (SmolLM2-135M-Instruct through
llama.cpp); only faults are made up, and only when asked for on `/__control`.

What it guarantees
- One generation at a time, without a prompt cache between requests, so that the same request with the same
  seed gives the same answer whatever else goes on. Temperature is 0 unless a request says otherwise.
- A client that goes away ends its generation at the next token; the log says `cancelled`.
- Every request to a model route is in the log from the moment its head has been read.

What it does not do: TLS, several models at once (all names mean the same weights), speed.

Start it with the Python that `scripts/tools model` installs (`scripts/model-server` does):

    .tools/venv/bin/python tests/tools/model_server.py --port 0

It prints one JSON line on stdout when it can answer: {"port", "base_url", "models", "pid"}.

Control, by plain HTTP on the same port, JSON in and out:

    GET  /__control                      {"faults": [...], "settings": {...}}
    POST /__control {"faults": [...]}    appends; each entry is used up by `times` calls (default 1), in order:
           {"kind": "status", "status": 429, "retry_after": "1"}   an error instead of an answer
           {"kind": "delay",  "delay_ms": 2000}                    the answer, later
           {"kind": "tokens", "token_delay_ms": 50}                the answer, slowly
           {"kind": "cut",    "after_chunks": 3}                   the connection breaks in the answer
           {"kind": "hang"}                                        no answer until the client leaves
           {"kind": "garbage"}                                     200 and something that is no JSON
         with "path": "/api/chat" an entry waits for a call whose path begins so
    POST /__control {"settings": {"token_delay_ms": 20}}           for every call from now on
    POST /__control {"reset": true}                                no faults, default settings, empty log
    GET  /__control/log?started=N&finished=M&wait_ms=W             the log, once so many calls started and
         finished or W ms are over: {"started", "finished", "calls": [{n, method, path, model, stream, input,
         headers, status, fault, tokens_in, tokens_out, cancelled, at_ms, duration_ms}]}

`--fail-next N:STATUS[:RETRY_AFTER]` on the command line is the first of these for N calls.
"""

import argparse
import collections
import datetime
import hashlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

# Prompt and answer together, in tokens: enough for a test's conversation, 94 MB of cache.
CONTEXT_TOKENS = 4096
# Tokens of one answer when the request names no limit: a small model may ramble without end.
ANSWER_TOKENS_DEFAULT = 128
# Bytes of one request: far above any conversation that fits the context.
REQUEST_BYTES_MAX = 64 * 1024 * 1024
# Requests waiting for the model, as Ollama's OLLAMA_MAX_QUEUE: more get 503.
WAITING_MAX = 512
# Calls kept in the log; a test that makes more is told by "started".
LOG_CALLS_MAX = 10_000
# Seconds a `hang` lasts at most, and a wait for the log: no test waits longer.
WAIT_S_MAX = 600
# Seconds between looks at whether a waiting client is still there.
LEFT_CHECK_S = 0.05
# What the model is told when the request has no system message, as an Ollama model file does.
SYSTEM_PROMPT = "You are a helpful assistant."
# The version of the Ollama API whose shapes are spoken here.
OLLAMA_API_VERSION = "0.12.0"


class Refused(Exception):
    """A request that gets an error: status, machine-readable code, message for people."""

    def __init__(self, status, code, message, headers=None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class ClientLeft(Exception):
    """The client closed its connection before its answer was complete."""


class Model:
    """The weights, and the one generation at a time that may use them."""

    def __init__(self, path, threads):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx = CONTEXT_TOKENS
        params.n_parallel = 1
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        params.verbosity = -1
        self.path = path
        self.server = xllamacpp.Server(params)
        self.turn = threading.Lock()
        self.waiting = threading.Semaphore(WAITING_MAX)
        self.size = os.path.getsize(path)
        self.modified = iso(os.path.getmtime(path))
        self._digest = None
        self._digest_lock = threading.Lock()

    def digest(self):
        """SHA-256 of the weights; computed when first asked for, since it takes a moment."""
        with self._digest_lock:
            if self._digest is None:
                with open(self.path, "rb") as file:
                    self._digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(
                        hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
            return self._digest

    def exclusively(self, gone, work):
        """Runs `work` when the model is free; gives up when the client is gone."""
        if not self.waiting.acquire(blocking=False):
            raise Refused(503, "overloaded", f"more than {WAITING_MAX} requests wait for the model")
        try:
            while not self.turn.acquire(timeout=LEFT_CHECK_S):
                if gone():
                    raise ClientLeft
            try:
                return work()
            finally:
                self.turn.release()
        finally:
            self.waiting.release()

    def chat(self, body, gone, on_chunk):
        """Generates; calls `on_chunk` with every OpenAI-shaped chunk as it comes."""
        self._generate(self.server.handle_chat_completions, body, gone, on_chunk)

    def complete(self, body, gone, on_chunk):
        """As `chat`, for a bare prompt."""
        self._generate(self.server.handle_completions, body, gone, on_chunk)

    def _generate(self, call, body, gone, on_chunk):
        # The prompt cache would make the logits of a repeated prompt differ in their last bits.
        body = {**body, "stream": True, "stream_options": {"include_usage": True}, "cache_prompt": False}
        failures = []

        def relay(chunk):
            """True ends the generation. Exceptions do not cross the binding: keep them."""
            try:
                if isinstance(chunk, dict) and "error" in chunk:
                    error = chunk["error"]
                    raise Refused(error.get("code", 500), error.get("type", "server_error"),
                                  error.get("message", "the model failed"))
                if gone():
                    raise ClientLeft
                on_chunk(chunk)
                return False
            except Exception as error:  # noqa: BLE001 - handed on below
                failures.append(error)
                return True

        def work():
            try:
                returned = call(body, relay)
            except ValueError as error:
                raise Refused(400, "invalid_request_error", str(error)) from error
            if not failures and isinstance(returned, dict) and "error" in returned:
                relay(returned)

        self.exclusively(gone, work)
        if failures:
            raise failures[0]

    def count(self, messages):
        """Roughly how many tokens a prompt has: what a stream says before it has counted."""
        return max(1, sum(len(str(message["content"])) for message in messages) // 4)

    def embed(self, texts, gone):
        """One vector for each text, and how many tokens they had together."""
        def work():
            try:
                return self.server.handle_embeddings({"input": texts})
            except ValueError as error:
                raise Refused(400, "invalid_request_error", str(error)) from error

        answer = self.exclusively(gone, work)
        if "error" in answer:
            error = answer["error"]
            raise Refused(error.get("code", 500), error.get("type", "server_error"), error.get("message", ""))
        vectors = [item["embedding"] for item in sorted(answer["data"], key=lambda item: item.get("index", 0))]
        return vectors, answer["usage"]["prompt_tokens"]


class Control:
    """Faults to inject, settings, and the log of calls."""

    def __init__(self):
        self.changed = threading.Condition()
        self.faults = collections.deque()
        self.settings = {"token_delay_ms": 0}
        self.calls = collections.deque(maxlen=LOG_CALLS_MAX)
        self.started = self.finished = 0

    def apply(self, order):
        if not isinstance(order, dict) or set(order) - {"faults", "settings", "reset"}:
            raise Refused(400, "invalid_request_error", "expected an object with faults, settings, reset")
        with self.changed:
            if order.get("reset"):
                self.faults.clear()
                self.calls.clear()
                self.settings = {"token_delay_ms": 0}
                self.started = self.finished = 0
            for fault in order.get("faults", []):
                if fault.get("kind") not in FAULTS:
                    raise Refused(400, "invalid_request_error",
                                  f"unknown fault {fault.get('kind')!r}: expected one of {', '.join(FAULTS)}")
                self.faults.append({"times": 1, **fault})
            self.settings.update(order.get("settings", {}))

    def state(self):
        with self.changed:
            return {"faults": list(self.faults), "settings": dict(self.settings)}

    def take_fault(self, path):
        with self.changed:
            for fault in self.faults:
                if path.startswith(fault.get("path", "/")):
                    fault["times"] -= 1
                    if fault["times"] <= 0:
                        self.faults.remove(fault)
                    return dict(fault)
            return None

    def begin(self, call):
        with self.changed:
            self.started += 1
            call["n"] = self.started
            self.calls.append(call)
            self.changed.notify_all()

    def end(self, call):
        with self.changed:
            call["duration_ms"] = round(time.time() * 1000) - call["at_ms"]
            self.finished += 1
            self.changed.notify_all()

    def log(self, started, finished, wait_s):
        with self.changed:
            self.changed.wait_for(lambda: self.started >= started and self.finished >= finished, wait_s)
            return {"started": self.started, "finished": self.finished, "calls": list(self.calls)}


FAULTS = ("status", "delay", "tokens", "cut", "hang", "garbage")


class Handler(BaseHTTPRequestHandler):
    """One connection. `server` carries model, control and options."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = WAIT_S_MAX

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("HEAD")

    def do_POST(self):
        self.route("POST")

    def log_message(self, *args):
        """Nothing on stderr: the log route tells."""

    def route(self, method):
        self.chunked = self.headed = False
        self.call = self.fault = None
        self.chunks_sent = 0
        url = urlsplit(self.path)
        self.dialect = "openai" if url.path.startswith("/v1/") else "ollama"
        if url.path == "/v1/messages":
            self.dialect = "anthropic"
        try:
            body = self.read_body()
            if url.path.startswith("/__control"):
                return self.control(method, url, body)
            name, model_call = ROUTES.get((method, url.path), (None, False))
            if name is None:
                known = any(path == url.path for _, path in ROUTES)
                raise Refused(405 if known else 404, "not_found", f"no {method} {url.path} here")
            if not model_call:
                self.authorize()
                return getattr(self, name)(None)
            self.model_call(name, url.path, body)
        except Refused as refused:
            self.refuse(refused)
        except (ClientLeft, ConnectionError, TimeoutError):
            self.close_connection = True

    def model_call(self, name, path, body):
        self.call = call = {
            "method": "POST", "path": path, "model": None, "stream": None, "input": None, "status": None,
            "headers": {key.lower(): value for key, value in self.headers.items() if key.lower() != "authorization"},
            "fault": None, "tokens_in": None, "tokens_out": None, "cancelled": False,
            "at_ms": round(time.time() * 1000), "duration_ms": None}
        self.server.control.begin(call)
        try:
            self.authorize()
            request = parse_object(body)
            call["model"] = request.get("model")
            call["input"] = last_input(request)
            self.fault = self.server.control.take_fault(path)
            call["fault"] = self.fault and self.fault["kind"]
            self.before_answer()
            self.check_model(request)
            getattr(self, name)(request)
        except Refused as refused:
            self.refuse(refused)
        except (ClientLeft, ConnectionError, TimeoutError):
            call["cancelled"] = True
            self.close_connection = True
        finally:
            self.server.control.end(call)

    # -- what every route needs -------------------------------------------------------------------------

    def read_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            parts, total = [], 0
            while size := int(self.rfile.readline().split(b";")[0].strip() or b"0", 16):
                total += size
                if total > REQUEST_BYTES_MAX:
                    break
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            else:
                self.rfile.readline()
                return b"".join(parts)
            length = total
        else:
            length = int(self.headers.get("Content-Length") or 0)
        if length > REQUEST_BYTES_MAX:
            self.close_connection = True
            raise Refused(413, "request_too_large", f"a request may have {REQUEST_BYTES_MAX} bytes")
        return self.rfile.read(length)

    def authorize(self):
        key = self.server.options.api_key
        given = (self.headers.get("Authorization"), self.headers.get("x-api-key"))
        if key and self.dialect != "ollama" and f"Bearer {key}" != given[0] and key != given[1]:
            raise Refused(401, "invalid_api_key", "incorrect api key provided")

    def check_model(self, request):
        wanted = request.get("model")
        if not isinstance(wanted, str):
            raise Refused(400, "invalid_request_error", "model is required")
        if canonical(wanted) not in self.server.models:
            raise Refused(404, "model_not_found", f"model '{wanted}' not found")

    def gone(self):
        """Whether the client has closed its side. Bytes of a pipelined request do not count as leaving."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def wait_or_leave(self, seconds):
        """Waits; wakes early when the client says or closes something, and raises if it left."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            readable, _, _ = select.select([self.connection], [], [], left)
            if readable:
                if self.gone():
                    raise ClientLeft
                time.sleep(min(left, LEFT_CHECK_S))

    def before_answer(self):
        fault = self.fault or {}
        if fault.get("kind") == "status":
            headers = {"Retry-After": str(fault["retry_after"])} if fault.get("retry_after") is not None else {}
            raise Refused(int(fault.get("status", 500)), "injected", "a fault asked for on /__control", headers)
        if fault.get("kind") == "delay":
            self.wait_or_leave(fault.get("delay_ms", 1000) / 1000)
        if fault.get("kind") == "hang":
            self.wait_or_leave(WAIT_S_MAX)
            raise ClientLeft
        if fault.get("kind") == "garbage":
            self.answer(200, b"\x00<html>this is no JSON", "application/json")
            raise ClientLeft

    def between_tokens(self):
        delay = self.server.control.state()["settings"]["token_delay_ms"]
        if self.fault and self.fault["kind"] == "tokens":
            delay = self.fault.get("token_delay_ms", 50)
        if delay:
            self.wait_or_leave(delay / 1000)

    def maybe_cut(self):
        """The `cut` fault: breaks the connection as a crashed server would."""
        if self.fault and self.fault["kind"] == "cut" and self.chunks_sent >= self.fault.get("after_chunks", 1):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.wfile.flush()
            raise ClientLeft

    def answer(self, status, body, content_type, headers=None):
        """A whole answer, in one write."""
        if self.call is not None:
            self.call["status"] = status
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.headed = True
        head, self._headers_buffer = b"".join(self._headers_buffer) + b"\r\n", []
        self.wfile.write(head if self.command == "HEAD" else head + body)
        self.wfile.flush()

    def answer_json(self, status, value, headers=None):
        if self.fault and self.fault["kind"] == "cut":
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.chunks_sent = self.fault.get("after_chunks", 1)
            self.maybe_cut()
        self.answer(status, json.dumps(value).encode(), "application/json", headers)

    def piece(self, data, content_type):
        """One piece of a streamed answer."""
        if not self.chunked:
            self.call["status"] = 200
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.chunked = self.headed = True
        self.maybe_cut()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()
        self.chunks_sent += 1

    def last_piece(self):
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def refuse(self, refused):
        if self.headed:  # in the middle of a stream nothing but breaking it off is honest
            self.close_connection = True
            return
        if self.dialect == "openai":
            value = {"error": {"message": refused.message, "type": refused.code, "param": None, "code": refused.code}}
        elif self.dialect == "anthropic":
            value = {"type": "error", "error": {"type": refused.code, "message": refused.message}}
        else:
            value = {"error": refused.message}
        try:
            self.answer(refused.status, json.dumps(value).encode(), "application/json", refused.headers)
        except OSError:
            self.close_connection = True

    def control(self, method, url, body):
        control = self.server.control
        if url.path == "/__control/log" and method == "GET":
            query = {key: int(values[0]) for key, values in parse_qs(url.query).items()}
            wait_s = min(query.get("wait_ms", 0) / 1000, WAIT_S_MAX)
            return self.answer_json(200, control.log(query.get("started", 0), query.get("finished", 0), wait_s))
        if url.path == "/__control":
            if method == "POST":
                control.apply(parse_object(body))
            return self.answer_json(200, control.state())
        raise Refused(404, "not_found", f"no {method} {url.path} here")

    # -- Ollama -----------------------------------------------------------------------------------------

    def ollama_root(self, _):
        self.answer(200, b"Ollama is running", "text/plain; charset=utf-8")

    def ollama_version(self, _):
        self.answer_json(200, {"version": OLLAMA_API_VERSION})

    def ollama_tags(self, _):
        self.answer_json(200, {"models": [self.ollama_model(name) for name in self.server.models]})

    def ollama_ps(self, _):
        model = self.server.model
        self.answer_json(200, {"models": [
            {**self.ollama_model(name), "expires_at": "9999-12-31T00:00:00Z", "size_vram": 0,
             "context_length": CONTEXT_TOKENS} for name in self.server.models[:1]]} if model else {"models": []})

    def ollama_model(self, name):
        model = self.server.model
        return {"name": name, "model": name, "modified_at": model.modified, "size": model.size,
                "digest": model.digest(), "details": DETAILS}

    def ollama_show(self, request):
        self.answer_json(200, {
            "license": "Apache-2.0", "modelfile": f"FROM {canonical(request['model'])}\nSYSTEM {SYSTEM_PROMPT}\n",
            "parameters": "temperature 0", "template": "", "system": SYSTEM_PROMPT, "details": DETAILS,
            "model_info": {"general.architecture": "llama", "general.parameter_count": 134515008,
                           "llama.context_length": 8192, "llama.embedding_length": 576},
            "capabilities": ["completion", "embedding"], "modified_at": self.server.model.modified})

    def ollama_chat(self, request):
        messages = request.get("messages")
        if not isinstance(messages, list):
            raise Refused(400, "invalid_request_error", "messages must be an array")
        body = {**from_ollama_options(request), "messages": with_system(from_ollama_messages(messages))}
        if request.get("tools"):
            body["tools"] = request["tools"]
        self.ollama_generation(request, self.server.model.chat, body, chat_shape)

    def ollama_generate(self, request):
        prompt = request.get("prompt", "")
        if not isinstance(prompt, str):
            raise Refused(400, "invalid_request_error", "prompt must be a string")
        options = from_ollama_options(request)
        if request.get("raw"):
            return self.ollama_generation(request, self.server.model.complete,
                                          {**options, "prompt": prompt}, generate_shape)
        messages = [{"role": "user", "content": prompt}]
        if request.get("system"):
            messages.insert(0, {"role": "system", "content": request["system"]})
        self.ollama_generation(request, self.server.model.chat,
                               {**options, "messages": with_system(messages)}, generate_shape)

    def ollama_generation(self, request, generate, body, shape):
        stream = request.get("stream", True) is not False
        self.call["stream"] = stream
        began = time.monotonic_ns()
        total = Answer()

        def line(value):
            head = {"model": request["model"], "created_at": iso(time.time())}
            self.piece(json.dumps({**head, **value}).encode() + b"\n", "application/x-ndjson")

        def on_chunk(chunk):
            text, calls = total.add(chunk)
            if text or calls:
                self.between_tokens()
            if stream and (text or calls):
                line({**shape(text, calls), "done": False})

        generate(body, self.gone, on_chunk)
        self.count(total)
        took = time.monotonic_ns() - began
        end = {"done": True, "done_reason": total.reason or "stop", "total_duration": took, "load_duration": 0,
               "prompt_eval_count": total.tokens_in, "prompt_eval_duration": total.prompt_ns,
               "eval_count": total.tokens_out, "eval_duration": total.answer_ns}
        if stream:
            line({**shape("", []), **end})
            return self.last_piece()
        head = {"model": request["model"], "created_at": iso(time.time())}
        self.answer_json(200, {**head, **shape(total.text, total.tool_calls()), **end})

    def ollama_embed(self, request):
        self.call["stream"] = False
        single = self.call["path"] == "/api/embeddings"  # the older spelling: one prompt, one vector
        texts = texts_of(request.get("prompt" if single else "input"))
        began = time.monotonic_ns()
        vectors, tokens = self.server.model.embed(texts, self.gone)
        self.call["tokens_in"] = tokens
        if single:
            return self.answer_json(200, {"embedding": vectors[0]})
        self.answer_json(200, {"model": request["model"], "embeddings": vectors,
                               "total_duration": time.monotonic_ns() - began, "load_duration": 0,
                               "prompt_eval_count": tokens})

    # -- OpenAI -----------------------------------------------------------------------------------------

    def openai_models(self, _):
        self.answer_json(200, {"object": "list", "data": [
            {"id": name, "object": "model", "created": int(os.path.getmtime(self.server.model.path)),
             "owned_by": "library"} for name in self.server.models]})

    def openai_chat(self, request):
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "invalid_request_error", "messages must be a non-empty array")
        limit = request.get("max_completion_tokens", request.get("max_tokens"))
        body = {"temperature": 0, "seed": 0, **request, "messages": with_system(messages),
                "max_tokens": limit or ANSWER_TOKENS_DEFAULT}
        body.pop("max_completion_tokens", None)
        stream = request.get("stream") is True
        usage_wanted = bool((request.get("stream_options") or {}).get("include_usage"))
        self.call["stream"] = stream
        total = Answer()
        last = {}

        def on_chunk(chunk):
            text, calls = total.add(chunk)
            if text or calls:
                self.between_tokens()
            chunk = {key: value for key, value in chunk.items() if key not in ("timings", "system_fingerprint")}
            chunk["model"] = request["model"]
            last.update(id=chunk.get("id"), created=chunk.get("created"))
            if stream and (chunk.get("choices") or usage_wanted):
                self.piece(b"data: " + json.dumps(chunk).encode() + b"\n\n", "text/event-stream")

        self.server.model.chat(body, self.gone, on_chunk)
        self.count(total)
        if stream:
            self.piece(b"data: [DONE]\n\n", "text/event-stream")
            return self.last_piece()
        message = {"role": "assistant", "content": total.text or None if total.calls else total.text}
        if total.calls:
            message["tool_calls"] = total.calls
        self.answer_json(200, {
            "id": last.get("id"), "object": "chat.completion", "created": last.get("created"),
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": total.reason}],
            "usage": {"prompt_tokens": total.tokens_in, "completion_tokens": total.tokens_out,
                      "total_tokens": total.tokens_in + total.tokens_out}})

    def openai_embeddings(self, request):
        self.call["stream"] = False
        vectors, tokens = self.server.model.embed(texts_of(request.get("input")), self.gone)
        self.call["tokens_in"] = tokens
        self.answer_json(200, {
            "object": "list", "model": request["model"],
            "data": [{"object": "embedding", "index": index, "embedding": vector}
                     for index, vector in enumerate(vectors)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    # -- Anthropic --------------------------------------------------------------------------------------

    def anthropic_messages(self, request):
        if not isinstance(request.get("max_tokens"), int):
            raise Refused(400, "invalid_request_error", "max_tokens: field required")
        body = {"temperature": request.get("temperature", 0), "seed": 0, "max_tokens": request["max_tokens"],
                "messages": with_system(from_anthropic_messages(request))}
        if request.get("tools"):
            body["tools"] = [{"type": "function", "function": {
                "name": tool["name"], "description": tool.get("description", ""),
                "parameters": tool["input_schema"]}} for tool in request["tools"]]
        stream = request.get("stream") is True
        self.call["stream"] = stream
        total = Answer()
        begun = []

        def event(name, **value):
            data = json.dumps({"type": name, **value})
            self.piece(f"event: {name}\ndata: {data}\n\n".encode(), "text/event-stream")

        def begin():
            if not begun:
                begun.append(True)
                # What was read is not known before the end here; a real server says it at once.
                event("message_start", message={**head, "content": [], "stop_reason": None, "usage": {
                    "input_tokens": self.server.model.count(body["messages"]), "output_tokens": 1}})
                event("content_block_start", index=0, content_block={"type": "text", "text": ""})

        def on_chunk(chunk):
            text, calls = total.add(chunk)
            if text or calls:
                self.between_tokens()
            if stream and text:
                begin()
                event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

        head = {"id": f"msg_{time.monotonic_ns():x}", "type": "message", "role": "assistant",
                "model": request["model"], "stop_sequence": None}
        self.server.model.chat(body, self.gone, on_chunk)
        self.count(total)
        reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(total.reason, "end_turn")
        usage = {"input_tokens": total.tokens_in, "output_tokens": total.tokens_out}
        if stream:
            begin()
            event("content_block_stop", index=0)
            event("message_delta", delta={"stop_reason": reason, "stop_sequence": None},
                  usage={"output_tokens": total.tokens_out})
            event("message_stop")
            return self.last_piece()
        content = [{"type": "text", "text": total.text}] if total.text or not total.calls else []
        content += [{"type": "tool_use", "id": call["id"], "name": call["function"]["name"],
                     "input": json.loads(call["function"]["arguments"] or "{}")} for call in total.calls]
        self.answer_json(200, {**head, "content": content, "stop_reason": reason, "usage": usage})

    def count(self, total):
        self.call["tokens_in"], self.call["tokens_out"] = total.tokens_in, total.tokens_out


class Answer:
    """A streamed answer, put together again from OpenAI-shaped chunks."""

    def __init__(self):
        self.text = ""
        self.calls = []
        self.reason = None
        self.tokens_in = self.tokens_out = self.prompt_ns = self.answer_ns = 0

    def add(self, chunk):
        """Takes in a chunk; returns the text and the finished tool calls that it brought."""
        usage, timings = chunk.get("usage") or {}, chunk.get("timings") or {}
        self.tokens_in = usage.get("prompt_tokens", self.tokens_in)
        self.tokens_out = usage.get("completion_tokens", self.tokens_out)
        self.prompt_ns = int(timings.get("prompt_ms", 0) * 1e6) or self.prompt_ns
        self.answer_ns = int(timings.get("predicted_ms", 0) * 1e6) or self.answer_ns
        text = ""
        for choice in chunk.get("choices", [])[:1]:
            delta = choice.get("delta") or {}
            text = delta.get("content") or choice.get("text") or ""
            self.reason = choice.get("finish_reason") or self.reason
            for part in delta.get("tool_calls") or []:
                self.add_call(part)
        self.text += text
        # Ollama sends a tool call whole, so it goes out with the chunk that ends the answer.
        finished = any(choice.get("finish_reason") == "tool_calls" for choice in chunk.get("choices", []))
        return text, self.tool_calls() if finished else []

    def add_call(self, part):
        index = part.get("index", 0)
        while len(self.calls) <= index:
            self.calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = self.calls[index], part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""

    def tool_calls(self):
        """The calls in Ollama's shape: arguments as an object."""
        shaped = []
        for call in self.calls:
            try:
                arguments = json.loads(call["function"]["arguments"] or "{}")
            except ValueError:
                arguments = {}
            shaped.append({"function": {"name": call["function"]["name"], "arguments": arguments}})
        return shaped


ROUTES = {
    ("GET", "/"): ("ollama_root", False),
    ("HEAD", "/"): ("ollama_root", False),
    ("GET", "/api/version"): ("ollama_version", False),
    ("GET", "/api/tags"): ("ollama_tags", False),
    ("GET", "/api/ps"): ("ollama_ps", False),
    ("POST", "/api/show"): ("ollama_show", True),
    ("POST", "/api/chat"): ("ollama_chat", True),
    ("POST", "/api/generate"): ("ollama_generate", True),
    ("POST", "/api/embed"): ("ollama_embed", True),
    ("POST", "/api/embeddings"): ("ollama_embed", True),
    ("GET", "/v1/models"): ("openai_models", False),
    ("POST", "/v1/chat/completions"): ("openai_chat", True),
    ("POST", "/v1/embeddings"): ("openai_embeddings", True),
    ("POST", "/v1/messages"): ("anthropic_messages", True),
}

DETAILS = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"],
           "parameter_size": "134.52M", "quantization_level": "Q4_1"}


def from_anthropic_messages(request):
    """Messages as OpenAI's format has them; parts other than text are named, not seen."""
    def text_of(content):
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise Refused(400, "invalid_request_error", "content: expected a string or a list")
        return "\n".join(str(part.get("text", part.get("content", f"[{part.get('type')}]"))) for part in content)

    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "invalid_request_error", "messages: field required")
    told = [{"role": "system", "content": text_of(request["system"])}] if request.get("system") else []
    return told + [{"role": message["role"], "content": text_of(message["content"])} for message in messages]


def iso(seconds):
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat().replace("+00:00", "Z")


def canonical(name):
    """A name without a tag means `:latest`, as in Ollama."""
    return name if ":" in name else f"{name}:latest"


def parse_object(body):
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Refused(400, "invalid_request_error", f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "invalid_request_error", "the body must be a JSON object")
    return value


def texts_of(value):
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "invalid_request_error", "input must be a string or a non-empty array of strings")
    return texts


def last_input(request):
    """What a test looks for in the log: the last message, the prompt or the texts to embed."""
    messages = request.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return messages[-1].get("content")
    return request.get("prompt", request.get("input"))


def with_system(messages):
    if any(isinstance(message, dict) and message.get("role") in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": SYSTEM_PROMPT}, *messages]


def from_ollama_messages(messages):
    """Ollama has tool arguments as objects, the OpenAI format as strings."""
    shaped = []
    for message in messages:
        if not isinstance(message, dict):
            raise Refused(400, "invalid_request_error", "a message must be an object")
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {"id": f"call_{index}", "type": "function",
                 "function": {"name": call["function"]["name"],
                              "arguments": json.dumps(call["function"].get("arguments", {}))}}
                for index, call in enumerate(message["tool_calls"])]
        shaped.append(message)
    return shaped


def from_ollama_options(request):
    """Ollama's options in the OpenAI names that llama.cpp takes."""
    options = request.get("options") or {}
    body = {"temperature": 0, "seed": 0}
    for name in ("temperature", "seed", "top_p", "top_k", "min_p", "repeat_penalty", "stop"):
        if options.get(name) is not None:
            body[name] = options[name]
    limit = options.get("num_predict")
    body["max_tokens"] = limit if isinstance(limit, int) and limit > 0 else ANSWER_TOKENS_DEFAULT
    wanted = request.get("format")
    if wanted == "json":
        body["response_format"] = {"type": "json_object"}
    elif isinstance(wanted, dict):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}
    return body


def chat_shape(text, calls):
    message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def generate_shape(text, _calls):
    return {"response": text}


class ModelServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request, client_address):
        """A client that broke off is no news; anything else is a bug in this file and is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser = argparse.ArgumentParser(description="A real language model behind the Ollama and OpenAI APIs.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for containers too")
    parser.add_argument("--port", type=int, default=0, help="0 = any free one")
    parser.add_argument("--model-file", default=os.path.join(
        root, ".tools", "models", "SmolLM2-135M-Instruct.Q4_1.gguf"), help="GGUF weights")
    parser.add_argument("--model-name", action="append", help="name to serve them under; may be repeated")
    parser.add_argument("--api-key", help="ask for this bearer token on /v1/")
    # llama.cpp's threads spin at a barrier between layers: on cores that others use too, one thread is faster
    # than two by far (a test run beside a build took 85 s with two).
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--token-delay-ms", type=int, default=0, help="makes every answer slow")
    parser.add_argument("--fail-next", metavar="N:STATUS[:RETRY_AFTER]", help="fail the first N calls")
    parser.add_argument("--until-stdin-closes", action="store_true",
                        help="end when stdin does, so that no test leaves a server behind")
    options = parser.parse_args()
    if not os.path.isfile(options.model_file):
        parser.exit(3, f"error: no weights at {options.model_file}: run scripts/tools model\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        # Nothing to save; tearing llama.cpp down in the middle of a token could hang.
        signal.signal(number, lambda *_: os._exit(0))
    server = ModelServer((options.host, options.port), Handler)
    server.options = options
    server.models = [canonical(name) for name in options.model_name or ["smollm2:135m"]]
    server.control = Control()
    server.control.settings["token_delay_ms"] = options.token_delay_ms
    if options.fail_next:
        times, status, *retry_after = options.fail_next.split(":")
        fault = {"kind": "status", "status": int(status), "times": int(times)}
        server.control.apply({"faults": [{**fault, **({"retry_after": retry_after[0]} if retry_after else {})}]})
    server.model = Model(options.model_file, options.threads)
    if options.until_stdin_closes:
        threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
    port = server.server_address[1]
    print(json.dumps({"port": port, "base_url": f"http://127.0.0.1:{port}", "models": server.models,
                      "pid": os.getpid()}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

"""The model server keeps its promises: real answers, the two wire formats, faults only when asked for."""

import http.client
import json
import socket
import struct
import threading
import time
import unittest

from support import CALL_S, call, call_json, model_server

MODEL = "smollm2:135m"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


class ModelServerTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.child = model_server("--model-name", MODEL, "--model-name", "other")
        cls.addClassCleanup(cls.child.stop)
        cls.url = cls.child.ready["base_url"]

    def setUp(self):
        self.control({"reset": True})

    def control(self, order):
        status, state = call_json(self.url, "POST", "/__control", order)
        self.assertEqual(status, 200, state)
        return state

    def log(self, **query):
        path = "/__control/log?" + "&".join(f"{key}={value}" for key, value in query.items())
        return call_json(self.url, "GET", path)[1]

    def chat(self, **more):
        return call(self.url, "POST", "/api/chat", {"model": MODEL, "messages": CAPITAL, "stream": False, **more})

    def lines(self, path, body):
        status, headers, data = call(self.url, "POST", path, body)
        self.assertEqual(status, 200, data)
        self.assertEqual(headers["Content-Type"], "application/x-ndjson")
        return [json.loads(line) for line in data.splitlines()]

    def events(self, body):
        status, headers, data = call(self.url, "POST", "/v1/chat/completions", body)
        self.assertEqual(status, 200, data)
        self.assertEqual(headers["Content-Type"], "text/event-stream")
        events = [line[len(b"data: "):] for line in data.splitlines() if line]
        self.assertEqual(events[-1], b"[DONE]")
        return [json.loads(event) for event in events[:-1]]

    def test_it_answers_from_the_model_and_the_same_each_time(self):
        answers = [json.loads(self.chat()[2]) for _ in range(3)]
        self.assertIn("Paris", answers[0]["message"]["content"])
        self.assertEqual({answer["message"]["content"] for answer in answers}, {answers[0]["message"]["content"]})
        self.assertTrue(answers[0]["done"])
        self.assertGreater(answers[0]["prompt_eval_count"], 0)
        self.assertGreater(answers[0]["eval_count"], 0)

    def test_a_seed_decides_a_warm_answer_and_neighbours_do_not(self):
        options = {"temperature": 1.2, "seed": 7, "num_predict": 24}
        alone = json.loads(self.chat(options=options)[2])["message"]["content"]
        answers = []
        threads = [threading.Thread(target=lambda seed=seed: answers.append(
            (seed, json.loads(self.chat(options={**options, "seed": seed})[2])["message"]["content"])))
            for seed in (7, 8, 9, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(CALL_S)
        self.assertEqual([text for seed, text in answers if seed == 7], [alone, alone])
        self.assertGreater(len({text for _, text in answers}), 1)

    def test_streams_add_up_to_the_whole_answer_in_both_formats(self):
        whole = json.loads(self.chat()[2])["message"]["content"]
        lines = self.lines("/api/chat", {"model": MODEL, "messages": CAPITAL})
        self.assertEqual("".join(line["message"]["content"] for line in lines), whole)
        self.assertEqual([line["done"] for line in lines], [False] * (len(lines) - 1) + [True])
        self.assertGreater(len(lines), 3)
        events = self.events({"model": MODEL, "messages": CAPITAL, "stream": True,
                              "stream_options": {"include_usage": True}})
        text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        self.assertEqual(text, whole)
        self.assertEqual(events[-1]["usage"]["completion_tokens"], lines[-1]["eval_count"])
        status, answer = call_json(self.url, "POST", "/v1/chat/completions", {"model": MODEL, "messages": CAPITAL})
        self.assertEqual(status, 200)
        self.assertEqual(answer["choices"][0]["message"]["content"], whole)
        self.assertEqual(answer["usage"]["total_tokens"],
                         answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"])

    def test_generate_and_limits(self):
        lines = self.lines("/api/generate", {"model": MODEL, "prompt": "Count to ten.", "options": {"num_predict": 5}})
        self.assertEqual(lines[-1]["eval_count"], 5)
        self.assertEqual(lines[-1]["done_reason"], "length")
        self.assertTrue("".join(line["response"] for line in lines))

    def test_json_format_yields_json(self):
        answer = json.loads(self.chat(
            messages=[{"role": "user", "content": "Name a city."}],
            format={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})[2])
        self.assertIsInstance(json.loads(answer["message"]["content"])["city"], str)

    def test_embeddings_are_vectors_that_know_likeness(self):
        texts = ["a cat sat on the mat", "a kitten sat on the rug", "quarterly tax accounting rules"]
        status, ollama = call_json(self.url, "POST", "/api/embed", {"model": MODEL, "input": texts})
        self.assertEqual(status, 200)
        status, openai = call_json(self.url, "POST", "/v1/embeddings", {"model": MODEL, "input": texts})
        self.assertEqual(status, 200)
        self.assertEqual(ollama["embeddings"], [item["embedding"] for item in openai["data"]])
        cat, kitten, tax = ollama["embeddings"]
        self.assertEqual(len(cat), 576)
        near, far = (sum(a * b for a, b in zip(cat, other)) for other in (kitten, tax))
        self.assertGreater(near, far)

    def test_lists_and_versions(self):
        names = [model["name"] for model in call_json(self.url, "GET", "/api/tags")[1]["models"]]
        self.assertEqual(names, [MODEL, "other:latest"])
        self.assertEqual([model["id"] for model in call_json(self.url, "GET", "/v1/models")[1]["data"]], names)
        self.assertIn("version", call_json(self.url, "GET", "/api/version")[1])
        self.assertEqual(call(self.url, "GET", "/")[2], b"Ollama is running")
        self.assertEqual(call_json(self.url, "GET", "/api/ps")[0], 200)
        self.assertEqual(call_json(self.url, "POST", "/api/show", {"model": MODEL})[1]["details"]["format"], "gguf")

    def test_bad_requests_get_errors_in_the_dialect_of_the_route(self):
        for path, body, status in (
                ("/api/chat", b"{", 400), ("/api/chat", b"[]", 400), ("/api/chat", {"messages": []}, 400),
                ("/api/chat", {"model": "absent", "messages": CAPITAL}, 404),
                ("/api/chat", {"model": MODEL, "messages": "text"}, 400),
                ("/api/chat", {"model": MODEL, "messages": ["text"]}, 400),
                ("/api/generate", {"model": MODEL, "prompt": 7}, 400),
                ("/api/embed", {"model": MODEL, "input": []}, 400), ("/api/nothing", {}, 404)):
            with self.subTest(path=path, body=body):
                got, answer = call_json(self.url, "POST", path, body)
                self.assertEqual(got, status)
                self.assertIsInstance(answer["error"], str)
        for path, body, status in (
                ("/v1/chat/completions", b"{", 400), ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400),
                ("/v1/chat/completions", {"model": "absent", "messages": CAPITAL}, 404),
                ("/v1/chat/completions", {"model": MODEL, "messages": [{"rule": 1}]}, 400),
                ("/v1/embeddings", {"model": MODEL}, 400), ("/v1/nothing", {}, 404)):
            with self.subTest(path=path, body=body):
                got, answer = call_json(self.url, "POST", path, body)
                self.assertEqual(got, status)
                self.assertIsInstance(answer["error"]["message"], str)
        too_long = [{"role": "user", "content": "many words " * 5000}]
        got, answer = call_json(self.url, "POST", "/v1/chat/completions", {"model": MODEL, "messages": too_long})
        self.assertEqual(got, 400, answer)

    def test_status_faults_are_used_up_in_order_and_by_path(self):
        self.control({"faults": [{"kind": "status", "status": 429, "retry_after": "1", "times": 2},
                                 {"kind": "status", "status": 500, "path": "/v1/"}]})
        status, headers, _ = self.chat()
        self.assertEqual((status, headers["Retry-After"]), (429, "1"))
        self.assertEqual(self.chat()[0], 429)
        self.assertEqual(self.chat()[0], 200)
        status, answer = call_json(self.url, "POST", "/v1/chat/completions", {"model": MODEL, "messages": CAPITAL})
        self.assertEqual(status, 500, answer)
        self.assertEqual(self.control({})["faults"], [])
        self.assertEqual([entry["status"] for entry in self.log()["calls"]], [429, 429, 200, 500])
        self.assertEqual(call_json(self.url, "POST", "/__control", {"faults": [{"kind": "magic"}]})[0], 400)

    def test_a_cut_breaks_the_stream_after_real_chunks(self):
        self.control({"faults": [{"kind": "cut", "after_chunks": 2}, {"kind": "cut"}]})
        connection = http.client.HTTPConnection("127.0.0.1", self.child.ready["port"], timeout=CALL_S)
        connection.request("POST", "/api/chat", json.dumps({"model": MODEL, "messages": CAPITAL}))
        response = connection.getresponse()
        self.assertIn("The", json.loads(response.readline())["message"]["content"])
        with self.assertRaises((http.client.HTTPException, OSError)):
            response.read()
        connection.close()
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.chat()
        self.assertEqual(self.chat()[0], 200)

    def test_garbage_and_delay(self):
        self.control({"faults": [{"kind": "garbage"}, {"kind": "delay", "delay_ms": 300}]})
        status, _, data = self.chat()
        self.assertEqual(status, 200)
        with self.assertRaises(ValueError):
            json.loads(data)
        began = time.monotonic()
        self.assertEqual(self.chat()[0], 200)
        self.assertGreater(time.monotonic() - began, 0.3)

    def test_a_client_that_leaves_ends_its_call(self):
        for fault in ({"kind": "hang"}, {"kind": "tokens", "token_delay_ms": 200}):
            for stream in (False, True):
                with self.subTest(fault=fault, stream=stream):
                    self.control({"reset": True})
                    self.control({"faults": [fault]})
                    connection = http.client.HTTPConnection("127.0.0.1", self.child.ready["port"], timeout=CALL_S)
                    connection.request("POST", "/api/chat", json.dumps(
                        {"model": MODEL, "messages": CAPITAL, "stream": stream, "options": {"num_predict": 1000}}))
                    self.assertEqual(self.log(started=1, wait_ms=10_000)["started"], 1)
                    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()  # with a reset, as from a process that was killed
                    log = self.log(finished=1, wait_ms=10_000)
                    self.assertEqual(log["finished"], 1)
                    self.assertTrue(log["calls"][0]["cancelled"])
        self.assertEqual(self.chat()[0], 200)

    def test_the_log_tells_what_was_asked_but_no_credential(self):
        call(self.url, "POST", "/api/chat", {"model": MODEL, "messages": CAPITAL, "stream": False},
             {"Authorization": "Bearer hidden", "Idempotency-Key": "k1"})
        entry = self.log(finished=1, wait_ms=1000)["calls"][0]
        self.assertEqual((entry["input"], entry["headers"]["idempotency-key"]), (CAPITAL[0]["content"], "k1"))
        self.assertNotIn("hidden", json.dumps(entry))
        self.assertGreater(entry["tokens_out"], 0)

    def test_a_chunked_request_is_read(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.child.ready["port"], timeout=CALL_S)
        body = json.dumps({"model": MODEL, "messages": CAPITAL, "stream": False}).encode()
        connection.request("POST", "/api/chat", iter([body[:20], body[20:]]), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})
        response = connection.getresponse()
        self.assertEqual((response.status, json.loads(response.read())["done"]), (200, True))
        connection.close()


class CommandLineTest(unittest.TestCase):
    def test_key_and_failures_from_the_command_line(self):
        child = model_server("--api-key", "sk-right", "--fail-next", "1:503:2")
        self.addCleanup(child.stop)
        url, body = child.ready["base_url"], {"model": MODEL, "messages": CAPITAL}
        right = {"Authorization": "Bearer sk-right"}
        self.assertEqual(call(url, "POST", "/v1/chat/completions", body)[0], 401)
        self.assertEqual(call(url, "GET", "/v1/models", headers={"Authorization": "Bearer sk-wrong"})[0], 401)
        status, headers, _ = call(url, "POST", "/v1/chat/completions", body, right)
        self.assertEqual((status, headers["Retry-After"]), (503, "2"))
        self.assertEqual(call(url, "POST", "/v1/chat/completions", body, right)[0], 200)

    def test_it_ends_with_its_parent(self):
        child = model_server()
        self.addCleanup(child.stop)
        child.process.stdin.close()
        self.assertEqual(child.process.wait(10), 0)


if __name__ == "__main__":
    unittest.main()

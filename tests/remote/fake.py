"""A server in this process that speaks as much of OpenAI's API as a test wants, and misbehaves."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from fireopd_jax.remote.client import Client
from fireopd_jax.remote.settings import ServedConfig
from fireopd_jax.text.tokenizer import byte_tokenizer

SECRET = "sk-very-secret-0123456789"
VOCABULARY = 261
EVERYTHING = frozenset(
    {"ids", "text", "prefill", "n", "seed", "max_tokens", "prompt_logprobs", "given_ids", "echo"}
    | {"tokenize", "bare", "zero"}
)
KNOWN = {
    "model", "prompt", "messages", "tools", "temperature", "top_p", "max_tokens",
    "max_completion_tokens",
}  # fmt: skip
FIELDS = {
    "n": "n", "seed": "seed", "continue_final_message": "prefill",
    "add_generation_prompt": "prefill", "prompt_logprobs": "prompt_logprobs",
    "prompt_logprob_token_ids": "given_ids", "prompt_logprob_start": "given_ids",
    "echo": "echo", "logprobs": "echo", "return_tokens_as_token_ids": "echo",
    "add_special_tokens": "bare", "max_tokens": "max_tokens",
}  # fmt: skip


def bigram():
    """Return log-probabilities [V, V] of a token after a token."""
    logits = 2 * np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class Refusal(Exception):
    """A status, with a message."""


class FakeServer:
    """Answers as a bigram model; `script(number, path, body)` may answer or raise instead.

    `supports` has what of the API there is; other fields are refused, or ignored if `lenient`.
    """

    def __init__(self, supports=EVERYTHING, *, lenient=False, key=None, top=20, script=None):
        self.supports, self.lenient, self.key, self.top = set(supports), lenient, key, top
        self.script = script or (lambda number, path, body: None)
        self.logprobs = bigram()
        self.text_of = lambda body, i: f" text {body.get('seed', 0)} {i}"
        self.tokenizer = byte_tokenizer()
        self.seen, self.answered, self.lock = [], [], threading.Lock()
        self.now = self.most = 0
        self.http = None
        self.port = 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        """Listen, on the port of before."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Close the socket."""
        if self.http is not None:
            self.http.shutdown()
            self.http.server_close()
            self.http = None

    def handle(self, handler):
        """Answer one request."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        path = handler.path
        with self.lock:
            number = len(self.seen)
            self.seen.append((path, body))
            self.now += 1
            self.most = max(self.most, self.now)
        status, headers, content = 200, {}, None
        try:
            given = handler.headers.get("Authorization")
            if self.key and given != f"Bearer {self.key}":
                status, content = 401, {"error": {"message": f"wrong API key: {given}"}}
            else:
                scripted = self.script(number, path, body)
                if scripted is None:
                    content = self.answer(path, body)
                elif scripted == "close":
                    handler.connection.close()
                    return
                else:
                    status, headers, content = scripted
        except Refusal as refusal:
            status, content = refusal.args[0], {"error": {"message": refusal.args[1]}}
        finally:
            with self.lock:
                self.now -= 1
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        if status == 200:
            self.answered.append((path, body))
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    def answer(self, path, body):
        """Return what a server that supports `supports` answers."""
        if path == "/tokenize":
            if "tokenize" not in self.supports:
                raise Refusal(404, "no such path")
            return {"tokens": self.tokenizer(body["prompt"])["input_ids"]}
        for name in list(body):
            if name not in KNOWN or name == "max_tokens":
                if FIELDS.get(name) in self.supports:
                    continue
                if not self.lenient:
                    raise Refusal(422, f"unknown field {name}")
                body = {key: value for key, value in body.items() if key != name}
        if path == "/v1/completions":
            return self.completions(body)
        if path == "/v1/chat/completions":
            return self.chat(body)
        raise Refusal(404, "no such path")

    def chat(self, body):
        """Return the answer to a conversation; templates add 4 tokens to a finished message."""
        count = sum(len(m["content"]) + 4 for m in body["messages"])
        count += 0 if body.get("continue_final_message") else 4
        choices = [
            {"index": i, "message": {"role": "assistant", "content": self.text_of(body, i)}}
            for i in range(body.get("n", 1))
        ]
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        return self.whole(choices, count, len(choices) * limit)

    def completions(self, body):
        """Return continuations and scores."""
        prompt, fewest = body["prompt"], 0 if "zero" in self.supports else 1
        kind = "text" if isinstance(prompt, str) else "ids"
        if kind not in self.supports:
            raise Refusal(400, f"prompt must not be {kind}")
        if body["max_tokens"] < fewest:
            raise Refusal(400, "max_tokens must be at least 1")
        choice = {}
        if kind == "ids":
            places = self.logprobs[np.array(prompt)]
            if (k := body.get("prompt_logprobs")) is not None:
                choice["prompt_logprobs"] = self.listed(places, prompt, k)
            if "prompt_logprob_token_ids" in body:
                choice["prompt_token_id_logprobs"] = self.given(places, body)
            if body.get("echo"):
                choice["logprobs"] = self.echoed(places, prompt, body["logprobs"])
        choices = [
            {"index": i, "text": self.text_of(body, i), **choice} for i in range(body.get("n", 1))
        ]
        return self.whole(choices, len(prompt), len(choices) * body["max_tokens"])

    def best(self, place, k):
        if k > self.top:
            raise Refusal(400, f"at most {self.top}")
        return np.argsort(-place)[:k].tolist()

    def listed(self, places, prompt, k):
        out = [None]
        for place, token in zip(places[:-1], prompt[1:], strict=True):
            ids = dict.fromkeys([token, *self.best(place, k)])
            out.append(
                {
                    str(i): {"logprob": place[i], "decoded_token": self.tokenizer.decode([i])}
                    for i in ids
                }
            )
        return out

    def given(self, places, body):
        ids, start = body["prompt_logprob_token_ids"], body["prompt_logprob_start"]
        rows = places[start:-1]
        if len(ids) != len(rows):
            raise Refusal(400, f"expected {len(rows)} rows")
        return [
            [None if i < 0 else row[i] for i in asked] for row, asked in zip(rows, ids, strict=True)
        ]

    def echoed(self, places, prompt, k):
        own = [place[t] for place, t in zip(places[:-1], prompt[1:], strict=True)]
        best = [{f"token_id:{i}": p[i] for i in self.best(p, k)} for p in places[:-1]]
        return {
            "tokens": [f"token_id:{t}" for t in prompt],
            "token_logprobs": [None, *own, -1.0],
            "top_logprobs": [None, *best, {}],
        }

    def whole(self, choices, tokens_in, tokens_out):
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        return {"choices": choices, "usage": usage}


def npy(rows):
    """Return rows as vLLM writes them: a .npy file as base64."""
    file = io.BytesIO()
    np.save(file, np.array([[-np.inf if x is None else x for x in row] for row in rows], "<f4"))
    return base64.b64encode(file.getvalue()).decode()


class Said(list):
    """The lines of a log, and the waits between repetitions."""

    def __init__(self):
        self.waits = []

    def __call__(self, line):
        self.append(line)

    def sleep(self, seconds):
        """Record a wait; wait a moment, so that a server can come back."""
        self.waits.append(seconds)
        time.sleep(0.01)


@contextmanager
def serving(*args, **known):
    """Yield a server that stops at the end."""
    server = FakeServer(*args, **known)
    try:
        yield server
    finally:
        server.stop()


def client_of(server, file=None, said=None, **settings):
    """Return a client of the server that does not wait between repetitions."""
    said = Said() if said is None else said
    settings = ServedConfig(url=server.url, model="m", **settings)
    return Client(settings, file, said, name="judge", sleep=said.sleep)

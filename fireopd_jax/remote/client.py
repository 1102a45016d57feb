"""Many requests to one served teacher: concurrent, repeated on failure, cached, within a budget.

    requests -> cache? -> budget -> send, wait and repeat -> read -> cache -> answers in order

Order and content of the answers do not depend on which request is answered first.
"""

import contextlib
import dataclasses
import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from fireopd_jax.remote.cache import Cache
from fireopd_jax.remote.errors import Failure, Malformed, Refused, Stopped, Unreachable
from fireopd_jax.remote.ledger import Ledger, Tokens
from fireopd_jax.remote.settings import ServedConfig
from fireopd_jax.remote.transport import Transport

LONGEST_BACKOFF_S = 60.0
LONGEST_WAIT_S = 600.0
PROBE_RETRIES = 2
"""Of requests that ask what the server supports: some servers answer 500 to what they lack."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A POST, and how its answer is read."""

    path: str
    """Relative to the API (`/completions`), or a whole URL of the same server."""
    body: Mapping[str, Any]
    """Fields besides `model` and `extra_body`, which the client adds."""
    read: Callable[[Any], Any]
    """Returns the useful part of an answer, as JSON; raises `Malformed`."""
    bound: Tokens
    """The most tokens of prompt and completions that it may cost."""
    index: str = ""
    """Distinguishes requests of equal body for different samples, in the cache."""
    kind: str = "texts"
    """`texts`, `scores` or `probe`: decides, with `cache`, whether the answer is kept."""


class Client:
    """A served teacher; `with` closes it.

    `cache` is the file of answers, None for none. `sleep` replaces the waits between repetitions.
    """

    def __init__(
        self,
        settings: ServedConfig,
        cache: Path | None,
        log: Callable[[str], None],
        *,
        name: str = "default",
        sleep: Callable[[float], object] | None = None,
    ):
        self.settings, self.name, self.log = settings, name, log
        self._transport = Transport(settings, name)
        self._cache = Cache(cache) if cache is not None and settings.cache != "none" else None
        paid = (self._cache.tokens_in, self._cache.tokens_out) if self._cache else (0, 0)
        self._ledger = Ledger(settings, name, paid)
        self._stops: list[threading.Event] = []
        self._sleep = sleep
        self._pool = ThreadPoolExecutor(settings.concurrency, f"teacher-{name}")

    @property
    def label(self) -> str:
        """The teacher and its URL, as messages name them."""
        return f"teacher {self.name!r} at {self.settings.base}"

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """Return what each request's `read` returned, in the order of the requests.

        Equal requests are sent once. They are sent in order, up to `concurrency` at a time. Raises
        the first error, after the requests that were on their way have ended.
        """
        keys = [self._key(request) for request in requests]
        futures: dict[str, Future] = {}
        with self._stopping() as stop:
            for key, request in zip(keys, requests, strict=True):
                if key not in futures:
                    futures[key] = self._pool.submit(self._answer, key, request, stop)
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        wait(futures.values())
        errors = [error for future in futures.values() if (error := future.exception())]
        # What stopped the others comes before that they were stopped.
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return [futures[key].result() for key in keys]

    def probe(self, request: Request) -> Any:
        """Return the answer of one request, never from the cache; raises `Refused` on refusal.

        Server errors count as a refusal after fewer repetitions.
        """
        request = dataclasses.replace(request, kind="probe")
        with self._stopping() as stop:
            return self._answer(self._key(request), request, stop)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter of `stats`."""
        self._ledger.count(name, number)

    def stats(self) -> dict[str, float]:
        """Return counters of requests, tokens and cost since the start, for metrics.

        `requests_unanswered` were lost with a connection or a time-out: they may have been paid.
        `total_tokens` and `total_cost` include what the answers in the cache were paid with.
        """
        return self._ledger.stats()

    def close(self) -> None:
        """End all waits, and close the connections and the cache."""
        for stop in list(self._stops):
            stop.set()
        # Requests that wait in the pool end by the event; a cancelled one would not wake `ask`.
        self._pool.shutdown(wait=True)
        self._transport.close()
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> "Client":
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[threading.Event]:
        """Yield an event that ends all waits when the block or the client ends."""
        stop = threading.Event()
        self._stops.append(stop)
        try:
            yield stop
        finally:
            stop.set()
            self._stops.remove(stop)

    def _body(self, request: Request) -> dict[str, Any]:
        return {**self.settings.extra_body, "model": self.settings.model, **request.body}

    def _key(self, request: Request) -> str:
        """Return the SHA-256 of the request: server, path, body, and index of the sample."""
        whole = [self.settings.base, request.path, self._body(request), request.index]
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _answer(self, key: str, request: Request, stop: threading.Event) -> Any:
        """Return the answer from the cache, or from the server and then put it there."""
        wanted = {"all": ("texts", "scores"), "texts": ("texts",), "none": ()}[self.settings.cache]
        cache = self._cache if request.kind in wanted else None
        if cache is not None and (found := cache.find(key)) is not None:
            self.count("from_cache")
            return found[0]
        retries = PROBE_RETRIES if request.kind == "probe" else self.settings.retries
        for attempt in range(retries + 1):
            if stop.is_set():
                raise Stopped(f"{self.label}: stopped before all requests were answered")
            try:
                answer, used = self._attempt(request)
            except Failure as failure:
                self._after(failure, request, attempt, retries)
                seconds = _wait(self.settings.backoff_s, key, attempt, failure.wait_s)
                (self._sleep or stop.wait)(seconds)
                continue
            self.count("answered")
            if cache is not None:
                cache.add(key, answer, *used)
            return answer
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, request: Request) -> tuple[Any, Tokens]:
        """Return the answer and the tokens of one attempt; raise `Failure` or `BudgetSpent`."""
        used = (0, 0)
        self._ledger.reserve(request.bound)
        try:
            self.count("sent")
            whole = self._transport.send(request.path, self._body(request))
            # Paid, whatever can be made of it.
            used = _usage(whole, request.bound)
            return request.read(whole), used
        except Malformed as problem:
            self.count("malformed")
            # Of a probe it says that the server ignores what was asked for.
            again = request.kind != "probe"
            raise Failure(f"malformed answer: {problem}", status=200, retryable=again) from None
        finally:
            self._ledger.settle(request.bound, used)

    def _after(self, failure: Failure, request: Request, attempt: int, retries: int) -> None:
        """Count a failed attempt; raise if the request is not to be repeated."""
        if failure.status is None:
            self.count("unanswered")
        if failure.status == 429:
            self.count("rate_limited")
        if failure.retryable and attempt < retries:
            self.count("retried")
            return
        probed, status = request.kind == "probe", failure.status or 0
        self.count("failed", int(not probed))
        lacking = probed and (status >= 500 or status == 200)
        if lacking or not failure.retryable:
            raise Refused(self._refusal(failure, request), status) from None
        kept = f"; answers so far are in {self._cache.path}" if self._cache is not None else ""
        raise Unreachable(
            f"{self.label}: {failure} (status {failure.status}, {attempt + 1} attempts){kept}: "
            "start the same command again to go on"
        ) from None

    def _refusal(self, failure: Failure, request: Request) -> str:
        """Return the line for a refused request: status, the server's words, what to check."""
        settings = self.settings
        advice = {
            401: f"check the key in the environment variable {settings.api_key_env}",
            403: f"check the key in {settings.api_key_env} and its rights to {settings.model!r}",
            404: f"check url (usually ending in /v1) and model ({settings.model!r})",
        }.get(failure.status or 0, "check url, model and extra_body")
        path = request.path.removeprefix(settings.root)
        return f"{self.label}: {path} was refused with status {failure.status}: {failure}; {advice}"


def _wait(backoff_s: float, key: str, attempt: int, asked_s: float | None) -> float:
    """Return seconds to wait: the doubled back-off with jitter, or longer if the server asks."""
    jitter = random.Random(f"{key} {attempt}").uniform(0.5, 1.0)
    backoff = min(backoff_s * 2.0**attempt, LONGEST_BACKOFF_S) * jitter
    return min(max(backoff, asked_s or 0.0), LONGEST_WAIT_S)


def _usage(answer: Any, bound: Tokens) -> Tokens:
    """Return the tokens of an answer by its `usage`, the bound where there is none."""
    used = list(bound)
    for i, name in enumerate(("prompt_tokens", "completion_tokens")):
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            used[i] = max(int(answer["usage"][name]), 0)
    return used[0], used[1]

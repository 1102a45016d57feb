"""One attempt of one request through the `openai` library, without the library's own retries.

path, body -> decoded answer, or a `Failure` that says whether to try again
"""

import importlib
import json
import os
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.remote.errors import Failure
from fireopd_jax.remote.settings import ServedConfig
from fireopd_jax.runtime.limits import parse_json

RETRYABLE = (408, 409, 425, 429)
EXHAUSTED = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that waiting does not help."""
LARGEST_ANSWER = 2**28
"""Bytes of an answer, decompressed."""
SHOWN = 300
NO_KEY = "none"
VISIBLE = re.compile(r"[!-~]+")
SECRET = 16
"""Fewest characters of a key that is looked for in answers."""


class Transport:
    """Sends requests to one server; holds the key."""

    def __init__(self, settings: ServedConfig, name: str):
        openai = _library()
        self.settings, self._openai = settings, openai
        self._secret = os.environ.get(settings.api_key_env, "").strip()
        if not self._secret and not settings.is_local:
            raise UserError(
                f"teacher {name!r}: the environment variable {settings.api_key_env} is not set: "
                f"expected the API key of {settings.base} (api_key_env names another variable)"
            )
        if self._secret and not VISIBLE.fullmatch(self._secret):
            # A library's message would show it.
            raise UserError(
                f"teacher {name!r}: the environment variable {settings.api_key_env} is no API key: "
                "it has a space, a line break or a character that is not ASCII"
            )
        # Not through a proxy of the environment: it cannot reach this machine's loopback.
        http = openai.DefaultHttpxClient(
            trust_env=not settings.is_local, event_hooks={"response": [self._read]}
        )
        self._client = openai.OpenAI(
            api_key=self._secret or NO_KEY,
            base_url=settings.base,
            timeout=settings.timeout_s,
            max_retries=0,
            http_client=http,
        )

    def send(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the decoded answer of a POST; raise `Failure`.

        `path` is relative to the API, or a whole URL of the same server.
        """
        library = self._openai
        try:
            text = self._client.post(path, cast_to=str, body=dict(body))
        except library.APITimeoutError:
            reason = f"no answer within {self.settings.timeout_s:g} s (timeout_s)"
            raise Failure(reason, status=None, retryable=True) from None
        except library.APIConnectionError as error:
            reason = self.clean(f"no connection ({error.__cause__ or error})")
            raise Failure(reason, status=None, retryable=True) from None
        except library.APIStatusError as error:
            raise self._failure(error) from None
        try:
            # A key in an answer must not reach the cache; a short one, such as EMPTY, is no secret
            # and may be a word of the answer.
            return parse_json(self.clean(text, None) if len(self._secret) >= SECRET else text)
        except ValueError:
            reason = f"the answer is not JSON: {self.clean(text, 60)!r}"
            raise Failure(reason, status=200, retryable=True) from None

    def _read(self, response: Any) -> None:
        """Read the body of an answer; raise an error of the library for one without end."""
        httpx = importlib.import_module("httpx")
        until = time.monotonic() + self.settings.timeout_s
        parts, size = [], 0
        for part in response.iter_bytes():
            size += len(part)
            parts.append(part)
            if size > LARGEST_ANSWER:
                raise httpx.ReadError(f"an answer of over {LARGEST_ANSWER:,} bytes")
            if time.monotonic() > until:
                raise httpx.ReadTimeout("the answer does not end")
        response._content = b"".join(parts)  # as its own read() does, which has no bounds

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def clean(self, text: str, most: int | None = SHOWN) -> str:
        """Return the text without the key; with `most`, on one line of that many characters."""
        if self._secret:
            text = text.replace(self._secret, "***")
        if most is None:
            return text
        line = " ".join(text.split())
        return line if len(line) <= most else line[: most - 3] + "..."

    def _failure(self, error: Any) -> Failure:
        status, code = error.status_code, str(getattr(error, "code", None))
        retryable = status >= 500 or (status in RETRYABLE and code not in EXHAUSTED)
        return Failure(
            self.clean(_detail(error)),
            status=status,
            retryable=retryable,
            wait_s=_retry_after(error.response.headers),
        )


def _library() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError:
        raise UserError(
            'served teachers need the openai library: pip install "fireopd-jax[served]"'
        ) from None


def _detail(error: Any) -> str:
    """Return the server's own words, from the places where servers put them."""
    body = error.body
    for field in ("error", "message", "detail"):
        if isinstance(body, Mapping) and body.get(field):
            body = body[field]
    return body if isinstance(body, str) else json.dumps(body) if body else str(error)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the server asks to wait: a number, or a date."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        seconds = _until(text)
    return None if seconds is None else max(seconds, 0.0)


def _until(text: str) -> float | None:
    """Return the seconds until an HTTP date, None for a text that is none."""
    try:
        return (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None

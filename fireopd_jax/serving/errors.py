"""Mistakes of a client, in the JSON form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from fireopd_jax.config import UserError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""`type` of an error by status; others are `server_error`."""


class ApiError(UserError):
    """An answer with an error status, and the reason in one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = KINDS.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad_field(name: str, message: str, code: str | None = None) -> ApiError:
    """Return the error of a wrong value in the field `name`."""
    return ApiError(400, f"{name}: {message}", param=name, code=code)


def busy(limit: int) -> ApiError:
    """Return the error of a full queue."""
    return ApiError(
        429,
        f"the server's queue is full: {limit} responses are waiting or being computed; try again",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def stopping() -> ApiError:
    """Return the error of requests that are open when the server stops."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})


def given_up() -> ApiError:
    """Return the error of a request whose client has gone; nobody reads it."""
    return ApiError(499, "the client closed the connection", code="client_gone")

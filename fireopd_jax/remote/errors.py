"""Ways in which a request ends without an answer."""

from fireopd_jax.config import UserError


class BudgetSpent(UserError):
    """The next request could exceed the budget; all answers so far are in the cache."""


class Unreachable(UserError):
    """No answer after all repetitions of a request."""


class Stopped(UserError):
    """Another request failed, or the client was closed, before this one was answered."""


class Refused(UserError):
    """The server refused a request, and would refuse it again: a status of 4xx.

    For requests that ask what a server supports also 5xx, and 200 without the wanted field.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status

    @property
    def is_final(self) -> bool:
        """Whether another form of the request would be refused, too: key, rights or quota."""
        return self.status in (401, 403, 429)


class Mismatched(UserError):
    """The server's token ids are not ours."""


class Malformed(Exception):
    """An answer without what was asked for; the request is repeated."""


class Failure(Exception):
    """One attempt that failed.

    `status` is None without an answer; `retryable` says whether to send the request again, and
    `wait_s` what the server asks to wait.
    """

    def __init__(
        self, reason: str, *, status: int | None, retryable: bool, wait_s: float | None = None
    ):
        super().__init__(reason)
        self.status, self.retryable, self.wait_s = status, retryable, wait_s

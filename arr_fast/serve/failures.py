"""What can keep a request from its answer, each with its HTTP status."""

from __future__ import annotations

from arr_fast.errors import ArrFastError


class ServeError(ArrFastError):
    """A refusal that a client is told about.

    Args:
        message: What was expected and what was found.
        retry_after: Seconds after which it may be worth another try, or None.
    """

    status = 500
    kind = "server_error"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BadRequestError(ServeError):
    """The request makes no sense; the message names the item."""

    status = 400
    kind = "invalid_request_error"


class ForbiddenError(ServeError):
    """The route is off, or the client may not use it."""

    status = 403
    kind = "forbidden"


class TimeoutRequestError(ServeError):
    """The client took too long to send its body."""

    status = 408
    kind = "request_timeout"


class BodyTooLargeError(ServeError):
    """The body is over the limit."""

    status = 413
    kind = "body_too_large"


class InvalidError(ServeError):
    """The request has the wrong shape; the message says where."""

    status = 422
    kind = "invalid_request_error"


class UnjudgedError(ServeError):
    """The judge has no verdict, and the protocol has no place to say so per item."""

    status = 422
    kind = "no_verdict"


class QueueFullError(ServeError):
    """Too much is waiting already."""

    status = 429
    kind = "overloaded"


class ClientGoneError(ServeError):
    """The client closed its connection; nobody reads this."""

    status = 499
    kind = "client_closed_request"


class DrainingError(ServeError):
    """The server is about to stop."""

    status = 503
    kind = "draining"


class AsleepError(ServeError):
    """The judge sleeps, and whoever put it to sleep has not woken it yet."""

    status = 503
    kind = "asleep"


class DeadlineError(ServeError):
    """The request's deadline passed before it was judged."""

    status = 504
    kind = "deadline_exceeded"

"""What the service refuses, as domain words. `service.api.problems` turns them into answers, in one place.

Refusal
├── Malformed            a body that cannot be parsed              400
├── NotFound             no such model, priors, version, ...       404
├── Conflict             not while things are as they are          409
├── Stale                the version named is not the current one  412
├── TooLarge             over a limit of bytes, pixels or items    413
├── UnknownImageFormat   first bytes that name no image format     415
├── Invalid              any other value that cannot be taken      422
├── Overloaded           the queue is full; says when to retry     429
├── Unavailable          not able, with the reason                 503
└── DeadlineExceeded     the time allowed for the request is over  504

StateUnusable            what keeps the service from starting: exit 2 and one line
├── StateLocked          another service has the state
└── StateTooNew          a newer version wrote it
"""

from __future__ import annotations


class Refusal(Exception):  # noqa: N818 - a refusal to a client; `error` is a wrong decision (glossary)
    """A request that is answered with a problem.

    `code` is stable and listed in docs/errors.md; `detail` is one sentence that says what to do; `fields`
    stand in the problem beside them (`position`, `label`, `parameter`, ...).
    """

    def __init__(self, code: str, detail: str, **fields: object) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.fields = fields


class Malformed(Refusal):
    """A body that cannot be parsed."""


class NotFound(Refusal):
    """Something named is not there."""


class Conflict(Refusal):
    """Not while things are as they are."""


class Stale(Refusal):
    """A precondition on the current version does not hold."""


class TooLarge(Refusal):
    """Over a limit of bytes, pixels or items."""


class UnknownImageFormat(Refusal):
    """First bytes that name no image format."""


class Invalid(Refusal):
    """A value that cannot be taken."""


class Overloaded(Refusal):
    """The queue is full; try again after `retry_after_s` seconds."""

    def __init__(self, code: str, detail: str, *, retry_after_s: int) -> None:
        super().__init__(code, detail)
        self.retry_after_s = retry_after_s


class Unavailable(Refusal):
    """Not able to answer, for the reason given."""


class DeadlineExceeded(Refusal):
    """The time allowed for the request is over."""


class StateUnusable(Exception):  # noqa: N818 - as above
    """The state cannot be opened; the message is one line that says why."""


class StateLocked(StateUnusable):
    """Another service has the state open."""


class StateTooNew(StateUnusable):
    """The state was written by a newer version than this one."""

"""One root for everything that MedHive refuses, so that each service can turn an error into its own kind of answer.

An error is named by its cause, carries its data as attributes, and says in its text what to do. It knows no HTTP and no
exit code: one table in the gateway maps `code` to a status, and the command lines exit with 1 for any of them.
"""

from typing import Any, ClassVar


class MedHiveError(Exception):
    """Root of all errors that MedHive raises on purpose.

    `code` is a stable, machine-readable name (kebab-case); `str(error)` is one sentence for a person that names the thing
    and what to do; `data` holds the facts of the case, JSON-serialisable, without secrets or patients' data.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.data: dict[str, Any] = data


class InvalidInput(MedHiveError):
    """A value is outside what it may be."""

    code = "invalid-input"


class NotFound(MedHiveError):
    """The named object does not exist, or the caller may not know that it does."""

    code = "not-found"


class NotAllowed(MedHiveError):
    """The caller is known, but its role or its relation to the object does not permit this."""

    code = "not-allowed"


class NotAuthenticated(MedHiveError):
    """Nobody, or nobody known, asks."""

    code = "not-authenticated"


class Conflict(MedHiveError):
    """The state of the object does not permit this, or somebody else was first."""

    code = "conflict"


class IllegalTransition(Conflict):
    """A state machine has no such step."""

    code = "illegal-transition"


class BadSignature(MedHiveError):
    """A signature is missing, made with another key, or over other content."""

    code = "bad-signature"


class Expired(MedHiveError):
    """A thing with a time limit is past it."""

    code = "expired"


class ClockSkew(MedHiveError):
    """Two clocks differ by more than signatures tolerate."""

    code = "clock-skew"


class IncompatibleVersion(MedHiveError):
    """The two sides speak versions that do not fit; the text says which side to upgrade."""

    code = "incompatible-version"


class TooLarge(MedHiveError):
    """A size is above its limit."""

    code = "too-large"


class DigestMismatch(MedHiveError):
    """Bytes do not have the digest they were announced with."""

    code = "digest-mismatch"


class Unreachable(MedHiveError):
    """The other side does not answer."""

    code = "unreachable"


class Unavailable(Unreachable):
    """The other side answers, but only that it cannot do its work now; whoever waits for an answer waits for this too."""

    code = "unavailable"


class TooSlow(Unreachable):
    """What was announced arrives so slowly that nobody waits for its end: the line is as good as down."""

    code = "too-slow"


class TooManyAttempts(MedHiveError):
    """Somebody tries too often; `data.retry_after_s` says how long to leave it."""

    code = "too-many-attempts"


class NoSpace(MedHiveError):
    """The disk is full."""

    code = "no-space"


class SealedOnly(NotAllowed):
    """Weights pass here only sealed for their reader: somebody else ends TLS on the way."""

    code = "sealed-only"


class SealBroken(MedHiveError):
    """A sealed transfer was changed, cut, mixed up or made for another; nothing of the part that is wrong was used."""

    code = "seal-broken"

"""The hash chain of the event log, computed alike by the gateway that writes it and by whoever verifies it.

Each row carries the SHA-256 of the row before and its own, so that nothing before a signed head can be changed, left out or
put in between without the head's hash changing.
"""

from collections.abc import Iterable
from typing import Any

from medhive.errors import MedHiveError
from medhive.signing import digest_of
from medhive.wire import EventAnswer

ZERO_HASH = "0" * 64
"""What the first row names as the hash of the row before it."""


class BrokenChain(MedHiveError):
    """The event log was shortened, rewritten or reordered; `data.number` says from which row on."""

    code = "broken-chain"


def event_hash(event: EventAnswer) -> str:
    """SHA-256 over the canonical JSON of the row, with the hash of the row before and without its own."""
    body: dict[str, Any] = event.model_dump(mode="json", exclude={"hash"})
    return digest_of(body)


def verify_chain(events: Iterable[EventAnswer], number: int = 0, previous: str = ZERO_HASH) -> tuple[int, str]:
    """Check rows that follow upon the row `number` with the hash `previous`; returns the last number and hash.

    Raises:
        BrokenChain: a row is missing, out of order, or not what its hash says.
    """
    for event in events:
        if event.number != number + 1 or event.previous != previous:
            raise BrokenChain(
                f"Row {event.number} of the event log does not follow upon row {number}: rows were removed, added or "
                "changed before it.",
                number=event.number,
            )
        if event_hash(event) != event.hash:
            raise BrokenChain(
                f"Row {event.number} of the event log was changed: its content does not have its hash.",
                number=event.number,
            )
        number, previous = event.number, event.hash
    return number, previous

"""The event stream's reader lives as long as its program does."""

import ssl
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from medhive import follow
from medhive.errors import Unreachable
from medhive.follow import Feed, Source
from medhive.wire import EventAnswer

EVENT = EventAnswer.model_validate(
    {
        "number": 1, "at": "2026-01-01T00:00:00Z", "kind": "run.ready", "actor": "admin", "subject": "", "data": {},
        "previous": "", "hash": "",
    }
)  # fmt: skip


class Stream:
    """A connection whose stream holds this, or fails so."""

    def __init__(self, found: EventAnswer | Exception) -> None:
        self._found = found

    def events(self, _after: int, _timeout_s: float) -> Iterator[EventAnswer]:
        if isinstance(self._found, Exception):
            raise self._found
        yield self._found

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    "error",
    [Unreachable("cut"), FileNotFoundError("ca.pem"), ssl.SSLError("no certificate"), ValueError("half a row")],
    ids=["away", "no file of CAs", "half a file of CAs", "cut within a row"],
)
def test_a_feed_goes_on_after_what_passes(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "RECONNECT_S", 0.01)
    streams, heard = [Stream(EVENT), Stream(error)], threading.Event()

    def open_source() -> Source:
        return cast(Source, streams.pop() if streams else Stream(Unreachable("over")))

    with Feed(open_source, 0, lambda _event: heard.set()):
        assert heard.wait(10)

"""How tests wait: for what happens, with a deadline, and without keeping the machine busy by looking.

Each look costs somebody processor time, on a machine that a test shares with everything it has started: so what the
gateway's event log tells is heard of, and what can only be looked at is looked at less often the longer a look takes.
"""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from medhive.client import GatewayClient
from medhive.follow import ClientSource, Feed

DEADLINE_S = 120.0
"""Longest wait of a test for something that takes a second or two on a quiet machine."""
SHORTEST_S, LONGEST_S = 0.02, 0.5
"""Pauses between two looks."""
UNHEARD_S = 2.0
"""Between two looks when nothing is heard: the stream is down while its gateway is, and comes back by itself."""

T = TypeVar("T")


def until(
    look: Callable[[], T | None], what: str, seconds: float = DEADLINE_S, pause: Callable[[], None] | None = None
) -> T:
    """Look until the answer is true, and return it; `pause` returns when another look is worth it."""
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if found := look():
            return found
        now = time.monotonic()
        assert now < deadline, f"waited {seconds} s for {what}"
        if pause:
            pause()
        else:
            time.sleep(min(LONGEST_S, max(SHORTEST_S, 3 * (now - began))))


class Listener:
    """The live event stream of a gateway, as a bell.

    Args:
        connect: opens an administrator's connection, as it is trusted and logged in at that moment.
    """

    def __init__(self, connect: Callable[[], GatewayClient]) -> None:
        self._rang = threading.Event()
        self._feed = Feed(lambda: ClientSource(connect()), 0, lambda _event: self._rang.set())
        self._feed.__enter__()

    def close(self) -> None:
        """Listen no longer."""
        self._feed.__exit__()

    def before(self, look: Callable[[], T]) -> Callable[[], T]:
        """The look, after which `wait` misses nothing that has happened since it began."""

        def listening() -> T:
            self._rang.clear()
            return look()

        return listening

    def wait(self) -> None:
        """Return when something has happened since the last look began, or after `UNHEARD_S`."""
        self._rang.wait(UNHEARD_S)

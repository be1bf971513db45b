"""Wakes the live streams: at once for what this process appends, within a moment for what other gateways append.

One task a process looks at the head of the log; the streams wait for it, so that a thousand listening hospitals cost one
small query a moment.
"""

import asyncio
import contextlib
from collections.abc import Callable

POLL_S = 0.5  # how late a stream may hear of what another gateway process has appended
MAX_STREAMS = 2000  # open streams of one process; each costs a socket and a little memory


class Hub:
    """A bell that any thread can ring and any number of streams wait for."""

    def __init__(self) -> None:
        """Make it silent; `attach` binds it to a running loop."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell = asyncio.Event()
        self.closing = False
        self.streams = 0

    def attach(self) -> None:
        """Use the running event loop."""
        self._loop = asyncio.get_running_loop()

    def wake(self) -> None:
        """Ring; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        self._bell.set()
        self._bell = asyncio.Event()

    def close(self) -> None:
        """End all streams: the process stops."""
        self.closing = True
        self.wake()

    @property
    def bell(self) -> asyncio.Event:
        """The bell for what comes next; take it before looking, so that nothing is missed between looking and waiting."""
        return self._bell

    async def wait(self, bell: asyncio.Event, timeout_s: float) -> None:
        """Return when this bell rings, or after the time-out, or at once when the process stops."""
        if not self.closing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), timeout_s)

    async def watch(self, head: Callable[[], int]) -> None:
        """Ring whenever `head` (called in a thread) has changed; until cancelled."""
        last = await asyncio.to_thread(head)
        while not self.closing:
            await asyncio.sleep(POLL_S)
            newest = await asyncio.to_thread(head)
            if newest != last:
                last = newest
                self._ring()

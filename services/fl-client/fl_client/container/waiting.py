"""How the container waits for a coordinator that is away: it says so once, then every minute, and its health says it too."""

import time
from collections.abc import Callable
from typing import Final

from fl_client import events
from fl_client.container.health import Pulse

REMIND_S: Final = 60.0


class Patience:
    """Knows who is away since when. Told from the node's threads one call at a time, ticked by its loop.

    Args:
        say: prints a line for the people who read the container's log.
        pulse: the mark that the health check reads.
        clock: seconds of any origin, only ever forward.
    """

    def __init__(self, say: Callable[[str], None], pulse: Pulse, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._pulse = pulse
        self._clock = clock
        self._away: dict[str, float] = {}
        self._seen: set[str] = set()
        self._said = clock()

    def away(self, who: str) -> bool:
        """Somebody does not answer; True when that is news."""
        if who in self._away:
            return False
        if not self._away:
            self._said = self._clock()
        self._away[who] = self._clock()
        return True

    def back(self, who: str) -> None:
        """Somebody answers."""
        self._seen.add(who)
        self._away.pop(who, None)

    def tick(self) -> None:
        """Leave the mark, and remind people once a minute of who is still away."""
        away = dict(self._away)
        self._pulse.beat(self._words(away))
        if away and self._clock() - self._said >= REMIND_S:
            self._said = self._clock()
            minutes = (self._clock() - min(away.values())) / 60
            self._say(f"still waiting for the {_listed(away)}, {minutes:.0f} min; trying again")

    def _words(self, away: dict[str, float]) -> str:
        if away:
            return f"waiting for the {_listed(away)}"
        return f"connected to the {_listed(self._seen)}" if self._seen else "starting"


def _listed(names: "dict[str, float] | set[str]") -> str:
    return " and the ".join(sorted(names))


class Voice:
    """Hands a node's events on, and has its comings and goings counted."""

    def __init__(self, listener: events.Listener, patience: Patience) -> None:
        self._listener = listener
        self._patience = patience

    def __call__(self, event: events.NodeEvent) -> None:
        """Hear one event."""
        self._listener(event)
        if isinstance(event, events.Disconnected):
            self._patience.away(event.to)
        elif isinstance(event, events.Connected):
            self._patience.back(event.to)

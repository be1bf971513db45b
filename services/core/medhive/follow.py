"""Following a request to its decision and a run to its end, live, for everybody who waits at a command line.

The event stream wakes the follower, and what it says comes from the run itself, so that a lost connection or a missed event
costs nothing: the next look catches up.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Final, Protocol, Self, TypeVar

from medhive.client import GatewayClient
from medhive.errors import MedHiveError, NotAllowed, NotAuthenticated, Unreachable
from medhive.states import FINAL_RUN_STATES, Activity, ConsentState, RequestState, RoundState, RunState
from medhive.views import round_line
from medhive.wire import API, ActivityAnswer, ConsentAnswer, EventAnswer, Head, RequestAnswer, RoundAnswer, RunAnswer

LOOK_AGAIN_S: Final = 2.0  # epochs inside a round make no events; this often they are looked up
RECONNECT_S: Final = 2.0
STREAM_TIMEOUT_S: Final = 30.0  # the gateway sends a sign of life more often than this

Seen = TypeVar("Seen")
Say = Callable[[Any, str], None]
"""Called with what happened, for a program, and the same in words."""


class Source(Protocol):
    """What a follower reads; an administrator's connection and a hospital's are two of them."""

    def request(self, request_id: str) -> RequestAnswer:
        """One request."""

    def run(self, run_id: str) -> RunAnswer:
        """One run."""

    def rounds(self, run_id: str) -> list[RoundAnswer]:
        """The rounds of a run so far."""

    def head(self) -> Head:
        """The signed newest row of the event log."""

    def events(self, after: int, timeout_s: float) -> Iterator[EventAnswer]:
        """Rows of the live event stream, until the gateway or the time-out ends it."""

    def close(self) -> None:
        """Close the connections."""


OpenSource = Callable[[], Source]


class ClientSource:
    """A source over a plain connection to the gateway."""

    def __init__(self, client: GatewayClient) -> None:
        """Read through this connection."""
        self._client = client

    def request(self, request_id: str) -> RequestAnswer:
        """One request."""
        return RequestAnswer.model_validate(self._client.get(f"{API}/requests/{request_id}"))

    def run(self, run_id: str) -> RunAnswer:
        """One run."""
        return RunAnswer.model_validate(self._client.get(f"{API}/runs/{run_id}"))

    def rounds(self, run_id: str) -> list[RoundAnswer]:
        """The rounds of a run so far."""
        return [RoundAnswer.model_validate(row) for row in self._client.get(f"{API}/runs/{run_id}/rounds")]

    def head(self) -> Head:
        """The signed newest row of the event log."""
        return Head.model_validate(self._client.get(f"{API}/events/head"))

    def events(self, after: int, timeout_s: float) -> Iterator[EventAnswer]:
        """Rows of the live event stream, until the gateway or the time-out ends it."""
        for row in self._client.events(after, timeout_s=timeout_s):
            yield EventAnswer.model_validate(row)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class Feed:
    """The live event stream, read by a thread of its own that reconnects for as long as needed."""

    def __init__(
        self, open_source: OpenSource, after: int, on_event: Callable[[EventAnswer], None] | None = None
    ) -> None:
        """Prepare; `with` starts it.

        Args:
            open_source: makes a connection of the feed's own.
            after: number of the last event that is known already.
            on_event: called in the feed's thread; without it events are collected for `wait`.
        """
        self._open_source = open_source
        self._after = after
        self._events: queue.SimpleQueue[EventAnswer] = queue.SimpleQueue()
        self._on_event = on_event or self._events.put
        self._stop = threading.Event()
        self.refused: MedHiveError | None = None

    def __enter__(self) -> Self:
        # A daemon: it may be inside a read when the command ends, and has nothing to put in order.
        threading.Thread(target=self._read_for_ever, name="event-feed", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def wait(self, timeout_s: float) -> EventAnswer | None:
        """The next event, or None when there is none in time."""
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _read_for_ever(self) -> None:
        while not self._stop.is_set():
            try:
                self._read()
            except (NotAuthenticated, NotAllowed) as error:
                self.refused = error
                return
            except (MedHiveError, OSError, ValueError):
                # It restarts, the line was cut within a row, or a file of CAs is being exchanged: what was missed comes
                # after the last number seen.
                pass
            self._stop.wait(RECONNECT_S)

    def _read(self) -> None:
        with closing(self._open_source()) as source:
            for event in source.events(self._after, STREAM_TIMEOUT_S):
                if self._stop.is_set():
                    return
                self._after = event.number
                self._on_event(event)


class RunFollower:
    """Says what is new about one run each time it looks."""

    def __init__(self, source: Source, run_id: str, say: Say, *, epochs: bool = False) -> None:
        """Nothing is known yet, so that the first look tells everything so far.

        Args:
            epochs: also say each epoch that a site trains.
        """
        self._source = source
        self._run_id = run_id
        self._say = say
        self._epochs = epochs
        self._consents: dict[str, ConsentState] = {}
        self._state: RunState | None = None
        self._rounds: set[int] = set()
        self._activity: dict[str, tuple[int, str, int]] = {}

    def look(self) -> RunAnswer:
        """Fetch the run and say what changed."""
        run = self._source.run(self._run_id)
        self._tell_consents(run)
        if self._epochs:
            for activity in run.activity:
                self._tell_activity(activity)
        self._tell_rounds(run)
        if run.state is not self._state:
            self._state = run.state
            self._say({"run": run.id, "state": run.state, "reason": run.reason}, _state_line(run))
        return run

    def _tell_consents(self, run: RunAnswer) -> None:
        answered = sum(item.state is not ConsentState.PENDING for item in run.consents)
        for item in run.consents:
            if item.state in (ConsentState.PENDING, self._consents.get(item.site)):
                continue
            self._consents[item.site] = item.state
            self._say({"run": run.id, "site": item.site, "consent": item.state}, _consent_line(run, item, answered))

    def _tell_activity(self, item: ActivityAnswer) -> None:
        now = (item.round, str(item.activity), item.epoch)
        if self._activity.get(item.site) == now or item.activity is Activity.DONE:
            return
        self._activity[item.site] = now
        text = f"{item.site}: round {item.round}, {item.activity}"
        if item.epoch:
            text += f", epoch {item.epoch}/{item.epochs}"
        if item.loss is not None:
            text += f", loss {item.loss:.4f}"
        if item.accuracy is not None:
            text += f", accuracy {item.accuracy:.4f}"
        self._say({"run": self._run_id, "activity": item.model_dump(mode="json")}, text)

    def _tell_rounds(self, run: RunAnswer) -> None:
        if run.round == 0 and run.state in (RunState.CONSENTING, RunState.READY):
            return
        for item in self._source.rounds(run.id):
            if item.state is RoundState.OPEN or item.number in self._rounds or item.number == 0:
                continue
            self._rounds.add(item.number)
            self._say({"run": run.id, "round": item.model_dump(mode="json")}, round_line(item, run.rounds))


def _consent_line(run: RunAnswer, item: ConsentAnswer, answered: int) -> str:
    reason = f": {item.consent.body.reason}" if item.consent and item.consent.body.reason else ""
    return f"{item.site} {item.state} ({answered} of {len(run.consents)} answered){reason}"


def _state_line(run: RunAnswer) -> str:
    line = f"{run.id} is {run.state}"
    if run.state is RunState.CONSENTING:
        line += f", waiting for consents until {run.consent_deadline.astimezone():%Y-%m-%d %H:%M}"
    if run.state is RunState.COMPLETED and run.version is not None:
        line += f": version {run.version} of {run.study}"
        line += "".join(
            f", {name} {run.metrics[name]:.4f}"
            for name in ("val_accuracy", "val_loss", "test_accuracy")
            if name in run.metrics
        )
    return f"{line}: {run.reason}" if run.reason else line


def follow_request(source: Source, open_source: OpenSource, request_id: str, say: Say) -> RequestAnswer:
    """Wait until a request is decided, and return it."""
    with Feed(open_source, source.head().body.number) as feed:
        while True:
            request = _patiently(lambda: source.request(request_id), say, feed)
            if request is not None and request.state is not RequestState.PENDING:
                say({"request": request.id, "state": request.state}, _decision_line(request))
                return request
            feed.wait(LOOK_AGAIN_S)


def _decision_line(request: RequestAnswer) -> str:
    line = f"{request.id} is {request.state}"
    if request.decided_by:
        line += f" by {request.decided_by}"
    return f"{line}: {request.reason}" if request.reason else line


def follow_run(source: Source, open_source: OpenSource, run_id: str, say: Say, *, epochs: bool = False) -> RunAnswer:
    """Say what happens in a run until it has ended, and return it."""
    follower = RunFollower(source, run_id, say, epochs=epochs)
    follower.look()
    with Feed(open_source, source.head().body.number) as feed:
        while True:
            run = _patiently(follower.look, say, feed)
            if run is not None and run.state in FINAL_RUN_STATES:
                return run
            feed.wait(LOOK_AGAIN_S)


def _patiently(look: Callable[[], Seen], say: Say, feed: Feed) -> Seen | None:
    """Look; a coordinator that does not answer is waited for, because runs take days and machines are restarted."""
    try:
        return look()
    except Unreachable as error:
        say({"waiting": str(error)}, f"waiting: {error}")
        feed.wait(RECONNECT_S)
        return None

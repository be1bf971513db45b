"""The loop of `medhive-site run`: it talks, and lets the trainer work.

Three things go on beside each other, each on a thread of its own: the fleet connection takes tasks and brings answers, the
watch keeps in step with the gateway, and each accepted task waits for the trainer. None holds up another, and each tries
again for as long as needed when its server is away. Only the coordinator's word that this site is no longer wanted, or the
caller's `stop`, ends the loop.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from types import TracebackType
from typing import Protocol

import structlog

from fl_client import updates
from fl_client.acceptance import Order, answer_without_update, check_task
from fl_client.activity import ActivityReporter
from fl_client.events import (
    Connected,
    Disconnected,
    Listener,
    NodeEvent,
    PauseChanged,
    Problem,
    Revoked,
    Serving,
    Stopped,
    TaskRefused,
    VersionArrived,
    VersionJudged,
)
from fl_client.flower import FleetClosed, FleetConnection, Inbound, NodeRevoked, Outage, RunGone
from fl_client.gateway import SiteRevoked
from fl_client.identity import connect
from fl_client.jobs import Cancelled, JobFailed
from fl_client.rounds import Assignment, Worker
from fl_client.site import Site, only_node
from fl_client.store import InboxItem
from fl_client.trainer import Trainer
from fl_client.watch import Watch, Watched
from medhive.envelope import Task, TaskBody, TaskHead, from_bytes, head_of, to_bytes
from medhive.errors import ClockSkew, IncompatibleVersion, MedHiveError, NotFound, Unreachable
from medhive.follow import Feed
from medhive.wire import EventAnswer

# Tasks, consents and evaluations that may wait at once; each is a thread that mostly sleeps.
MAX_AT_ONCE = 32
# How often local things are looked at: limits that a person has changed, hours that have begun, answers to deliver.
TICK_S = 1.0
# After a look that an event called for: events come in bursts, and those of a burst are answered by one more look.
BURST_S = 0.3
# After a refusal that may pass (a registration under way, an upgrade at the coordinator).
REFUSED_WAIT_S = 5.0
# Kinds of events after which the coordinator may be reached or trusted in another way.
ABOUT_COORDINATOR = frozenset({"coordinator", "tunnel"})
# The coordinator may hold a look for a task so long: below the 30 s after which proxies end silent connections, and above
# any pace below, which is that of coordinators (or proxies before them) that do not hold it.
HOLD_S = 20.0
# After a task the next one is likely near, whatever the gateway says.
FAST_AFTER_TASK_S = 15.0
# While a task is worked on, only another run's can come, which would share the trainer with it; and each look costs the
# SuperLink about 10 ms of processor time, which with many sites would be missing in training.
WORKING_POLL_S = 1.0

log = structlog.get_logger()


class Fleet(Protocol):
    """A connection to the fleet, as `fl_client.flower.FleetConnection` is one."""

    def __enter__(self) -> "Fleet":
        """Connect."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say goodbye."""

    def receive(self, hold_s: float) -> Inbound | None:
        """The next message, or None; a coordinator that can keeps the question open for so long."""

    def confirm(self, inbound: Inbound) -> None:
        """Say that a message is kept here."""

    def reply(self, inbound: Inbound, payload: bytes) -> bool:
        """Answer a message; False when nobody wants the answer."""

    def close(self) -> None:
        """End every wait."""


OpenFleet = Callable[[Site, Callable[[Outage | None], None]], Fleet]


def open_fleet(site: Site, on_outage: Callable[[Outage | None], None]) -> Fleet:
    """The connection to the coordinator's SuperLink, with this site's node key and corrected clock."""
    return FleetConnection(
        address=site.identity.fleet_url,
        tls=site.identity.tls(site.settings.extra_ca_file),
        node_key=site.keys.node_file,
        node_file=site.settings.state_dir / "node.id",
        clock_offset=lambda: site.gateway.clock_offset_s,
        on_outage=on_outage,
    )


class Node:
    """A hospital's node. `run` blocks until `stop` is called or the site is no longer wanted."""

    def __init__(
        self,
        site: Site,
        listener: Listener,
        trainer: Trainer | None = None,
        open_fleet: OpenFleet = open_fleet,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Start nothing yet.

        Args:
            listener: told what happens, on the node's threads, one call at a time.
            trainer: where the work is done, closed by who made it; one of the node's own when left out.
            open_fleet: makes a connection to the fleet, again after each that has failed.
            on_tick: called about every second by the loop itself, and so no longer once the loop hangs.
        """
        self._open_fleet = open_fleet
        self._on_tick = on_tick
        self._site = site
        self._listener = listener
        self._listening = threading.Lock()
        self._owns_trainer = trainer is None
        self._trainer = trainer or site.trainer()
        self._stopping = threading.Event()
        self._wake_watch = threading.Event()
        self._wake_fleet = threading.Event()
        self._greet_again = threading.Event()
        self._reporter = ActivityReporter(site.gateway.report_activity)
        self._worker = Worker(site, self._trainer, self._reporter, self._emit, self._stopping)
        self._watch = Watch(site, self._trainer, self._emit, self._in_background)
        self._pool = ThreadPoolExecutor(MAX_AT_ONCE, thread_name_prefix="work")
        self._in_work: dict[tuple[str, str, int, str], Assignment] = {}
        self._background: set[str] = set()
        self._lock = threading.Lock()
        self._fleet: Fleet | None = None  # what may have to be closed
        self._connected: Fleet | None = None  # the same once it can carry answers
        self._fleet_away: Outage | None = None
        self._fast_until = 0.0
        self._heard_to: int | None = None
        self._told = ""
        self._busy = False
        self._paused = False
        self._end: MedHiveError | None = None

    @property
    def trainer_restarts(self) -> int:
        """How often the trainer was started again."""
        return self._trainer.restarts

    # ---- life ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped.

        Raises:
            AlreadyRunning: another node uses this state folder.
            SiteRevoked: the coordinator no longer works with this site.
        """
        with only_node(self._site.settings.state_dir):
            fleet = threading.Thread(target=self._keep_fleet, name="fleet", daemon=True)
            self._emit(self._serving())
            fleet.start()
            try:
                self._keep_watch()
            finally:
                self.stop()
                self._close()
                fleet.join(timeout=REFUSED_WAIT_S)
        self._emit(Stopped())
        if self._end is not None:
            raise self._end

    def stop(self) -> None:
        """End the loop; safe from any thread and from a signal handler. What is in work is resumed at the next start."""
        self._stopping.set()
        self._wake_watch.set()
        self._wake_fleet.set()
        fleet = self._fleet
        if fleet is not None:
            fleet.close()

    def _close(self) -> None:
        if self._owns_trainer:
            self._trainer.close()
        self._reporter.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, error: MedHiveError) -> None:
        if self._end is None:
            self._end = error
            self._emit(Revoked(str(error)))
        self.stop()

    def _emit(self, event: NodeEvent) -> None:
        with self._listening:
            self._listener(event)
        if isinstance(event, VersionArrived) and event.candidate:
            self._in_background(f"judge {event.study} {event.version}", lambda: self._judge(event))

    def _serving(self) -> Serving:
        store, identity = self._site.store, self._site.identity
        studies = sorted({item.study for item in store.versions()} | {item.study for item in store.consents()})
        newest = {item.study: item.version for item in reversed(store.versions())}
        champions = {study: store.champion(study) for study in studies}
        return Serving(
            site=self._site.name,
            coordinator=identity.coordinator_name,
            addresses=identity.addresses,
            fleet_address=identity.fleet_address,
            state_dir=self._site.settings.state_dir,
            studies={study: self._site.data_dir(study) for study in studies},
            champions={study: version for study, version in champions.items() if version is not None},
            newest=newest,
        )

    def _in_background(self, name: str, work: Callable[[], None], *, again: bool = False) -> None:
        """Do it on another thread; not while work of this name is being done, unless `again`."""
        with self._lock:
            if self._stopping.is_set() or (name in self._background and not again):
                return
            self._background.add(name)
        self._pool.submit(self._guarded, name, work)

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (Cancelled, FleetClosed):
            log.info("work.ended", work=name)
        except MedHiveError as error:
            self._emit(Problem(name, str(error)))
        except Exception:
            # The outermost loop of this thread: without this, an error would vanish with the thread.
            log.exception("work.failed", work=name)
            self._emit(Problem(name, "An error of the software; the log has the details."))
        finally:
            with self._lock:
                self._background.discard(name)

    # ---- the gateway ---------------------------------------------------------------------------------------------

    def _keep_watch(self) -> None:
        away_since: float | None = None
        greeted = False
        feed: Feed | None = None
        next_look = 0.0
        try:
            while not self._stopping.is_set():
                self._on_tick()
                self._look_at_limits()
                due, woken = time.monotonic() >= next_look, self._wake_watch.is_set()
                self._wake_watch.clear()
                if due or woken:
                    away_since, greeted = self._look(away_since, greeted, due)
                    if feed is None and self._heard_to is not None:
                        feed = self._feed(self._heard_to)
                if due:
                    pace = TICK_S if away_since is not None else self._site.settings.sync_s
                    next_look = time.monotonic() + pace
                elif woken:
                    self._stopping.wait(BURST_S)
                self._wake_watch.wait(TICK_S)
        finally:
            if feed is not None:
                feed.__exit__()

    def _look(self, away_since: float | None, greeted: bool, everywhere: bool) -> tuple[float | None, bool]:
        """Look once; returns since when the gateway is away, and whether it has been greeted since then."""
        try:
            if not greeted or self._greet_again.is_set():
                self._greet_again.clear()
                if self._site.greet():
                    self._reach_fleet_anew()
                if not greeted:
                    self._emit(Connected("gateway", time.monotonic() - away_since if away_since else 0.0))
            if self._heard_to is None:
                # Before the first look, so that what happens during it is heard of afterwards.
                self._heard_to = self._site.gateway.head().body.number
            self._note(self._watch.look() if everywhere or not greeted else self._watch.follow())
        except Unreachable as error:
            if away_since is None:
                self._emit(Disconnected("gateway", str(error)))
                away_since = time.monotonic()
            return away_since, False
        except SiteRevoked as error:
            self._finish(error)
        except MedHiveError as error:
            self._tell_once(str(error))
            return None, not isinstance(error, IncompatibleVersion)
        self._told = ""
        return None, True

    def _tell_once(self, problem: str) -> None:
        """Not again at each look, where it lasts (a version that does not fit may last for days)."""
        if problem != self._told:
            self._told = problem
            self._emit(Problem("gateway", problem))

    def _reach_fleet_anew(self) -> None:
        """Leave a fleet address, or a trust in it, that the coordinator has replaced."""
        fleet = self._fleet
        if fleet is not None:
            fleet.close()
            self._wake_fleet.set()

    def _note(self, watched: Watched) -> None:
        if watched.busy and not self._busy:
            self._wake_fleet.set()
        self._busy = watched.busy

    def _feed(self, after: int) -> Feed:
        """The event stream on a connection of its own, beginning after that event."""
        site = self._site
        feed = Feed(
            lambda: connect(site.identity, site.keys, site.store, site.settings.extra_ca_file),
            after,
            self._hear,
        )
        feed.__enter__()
        return feed

    def _hear(self, event: EventAnswer) -> None:
        if event.kind.partition(".")[0] in ABOUT_COORDINATOR:
            self._greet_again.set()
        if self._watch.hear(event):
            self._wake_watch.set()

    def _look_at_limits(self) -> None:
        paused = not self._site.limits().may_train(datetime.now().astimezone())
        if paused != self._paused:
            self._paused = paused
            self._emit(PauseChanged(paused))
        self._trainer.pause(paused)
        self._trainer.refresh_limits()

    def _judge(self, event: VersionArrived) -> None:
        try:
            judgement = updates.judge(self._site, self._trainer, event.study, event.version)
        except JobFailed as error:
            self._emit(Problem(f"evaluation of version {event.version} of {event.study}", str(error)))
            return
        accuracies = {name: item["accuracy"]["value"] for name, item in judgement["evaluations"].items()}
        self._emit(VersionJudged(event.study, event.version, accuracies))

    # ---- the fleet -----------------------------------------------------------------------------------------------

    def _keep_fleet(self) -> None:
        while not self._stopping.is_set():
            try:
                self._serve_fleet()
            except FleetClosed:
                continue
            except NodeRevoked as error:
                if self._is_revoked():
                    return
                self._fleet_problem(error)
            except ClockSkew as error:
                self._relearn_clock(error)
            except MedHiveError as error:
                self._fleet_problem(error)
            except Exception:
                # The outermost loop of this thread; a node that stops talking in silence would be worse.
                log.exception("fleet.failed")
                self._stopping.wait(REFUSED_WAIT_S)

    def _serve_fleet(self) -> None:
        connection = self._open_fleet(self._site, self._on_outage)
        self._fleet = connection
        if self._stopping.is_set():
            return
        try:
            with connection as fleet:
                self._connected = fleet
                self._serve_connected(fleet)
        finally:
            self._connected = None

    def _serve_connected(self, fleet: Fleet) -> None:
        self._emit(Connected("fleet"))
        for kept in [_inbound_of(item) for item in self._site.store.inbox()]:
            self._take(kept)
            fleet.confirm(kept)  # the process may have ended just before it did
        while not self._stopping.is_set():
            asked = time.monotonic()
            inbound = fleet.receive(HOLD_S)
            if inbound is None:
                # Where the coordinator did not keep the question open, the next one is not asked at once.
                self._wake_fleet.wait(max(0.0, asked + self._pace() - time.monotonic()))
                self._wake_fleet.clear()
                continue
            self._fast_until = time.monotonic() + FAST_AFTER_TASK_S
            self._site.store.keep_inbound(_item_of(inbound))
            self._take(inbound)
            fleet.confirm(inbound)

    def _pace(self) -> float:
        """Seconds until the next look for a task; the end of one's own work, and of a quiet time, cuts it short."""
        settings = self._site.settings
        if self._in_work:
            return max(settings.fast_poll_s, min(settings.slow_poll_s, WORKING_POLL_S))
        fast = self._busy or time.monotonic() < self._fast_until
        return settings.fast_poll_s if fast else settings.slow_poll_s

    def _on_outage(self, outage: Outage | None) -> None:
        if outage is None and self._fleet_away is not None:
            self._emit(Connected("fleet", self._fleet_away.seconds))
        elif outage is not None and self._fleet_away is None:
            self._emit(Disconnected("fleet", outage.reason))
        self._fleet_away = outage

    def _fleet_problem(self, error: MedHiveError) -> None:
        self._emit(Problem("fleet", str(error)))
        self._stopping.wait(REFUSED_WAIT_S)

    def _is_revoked(self) -> bool:
        """Whether the gateway says so too: the fleet alone may only be behind with its registrations."""
        try:
            self._site.gateway.renew()
        except (SiteRevoked, NotFound) as error:
            self._finish(error)
            return True
        except MedHiveError as error:
            log.info("gateway.away", reason=error.code)
        return False

    def _relearn_clock(self, error: ClockSkew) -> None:
        try:
            self._site.gateway.coordinator()
        except MedHiveError:
            self._fleet_problem(error)
        self._stopping.wait(TICK_S)

    # ---- tasks ---------------------------------------------------------------------------------------------------

    def _take(self, inbound: Inbound) -> None:
        """Judge a message and put it in work; nothing here takes long."""
        try:
            task = from_bytes(Task, inbound.payload)
        except IncompatibleVersion as error:
            self._refuse_unread(inbound, error)
            return
        except MedHiveError as error:
            log.warning("task.unreadable", reason=error.code)
            self._site.store.forget_inbound(inbound.message_id)
            return
        if task.key_id not in self._site.identity.key_ids and self._site.follow(task.key_id):
            self._reach_fleet_anew()
        try:
            order = check_task(self._site, task, self._site.latest_now())
        except MedHiveError as error:
            self._refuse(inbound, task.body, error)
            return
        self._assign(order, inbound)

    def _refuse_unread(self, inbound: Inbound, error: IncompatibleVersion) -> None:
        """Say at once, to both sides, that a task of another version cannot be done: nobody waits for a deadline."""
        try:
            head = head_of(inbound.payload)
        except MedHiveError as unreadable:
            log.warning("task.unreadable", reason=unreadable.code)
            self._emit(Problem("task", str(error)))
            self._site.store.forget_inbound(inbound.message_id)
            return
        self._refuse(inbound, head, error)

    def _refuse(self, inbound: Inbound, body: TaskBody | TaskHead, error: MedHiveError) -> None:
        log.warning("task.refused", run_id=body.run_id, round=body.round, reason=error.code)
        self._emit(TaskRefused(body.run_id, body.round, error.code, str(error)))
        payload = to_bytes(answer_without_update(self._site, body, "refused", error.code))
        # Again, as for answers: the first one may be on its way still, over a connection that has ended meanwhile.
        self._in_background(f"refusal {inbound.message_id}", lambda: self._send(inbound, payload), again=True)

    def _assign(self, order: Order, inbound: Inbound) -> None:
        with self._lock:
            known = self._in_work.get(order.key)
            if known is not None:
                # A resumed run asks again while the first answer is still being made: it gets the same one.
                known.inbounds = [item for item in known.inbounds if item.message_id != inbound.message_id]
                known.inbounds.append(inbound)
                return
            assignment = Assignment(order, [inbound])
            self._in_work[order.key] = assignment
        # Again: its answer may be on its way still, over a connection that has ended meanwhile.
        self._in_background(f"task {inbound.message_id}", lambda: self._fulfil(assignment), again=True)

    def _fulfil(self, assignment: Assignment) -> None:
        order = assignment.order
        payload: bytes | None = None
        try:
            payload = self._worker.make_answer(order)
        except Cancelled as error:
            log.info("task.ended", run_id=order.task.run_id, round=order.task.round, reason=error.code)
            if not self._stopping.is_set():
                payload = to_bytes(answer_without_update(self._site, order.task, "refused", "not-allowed"))
        finally:
            with self._lock:
                del self._in_work[order.key]
                inbounds = tuple(assignment.inbounds)
            self._fast_until = time.monotonic() + FAST_AFTER_TASK_S
            self._wake_fleet.set()
        if payload is None:
            return
        for inbound in inbounds:
            self._send(inbound, payload)
        self._worker.report_done(order)

    def _send(self, inbound: Inbound, payload: bytes) -> None:
        """Bring an answer; what cannot be brought stays in the inbox and is answered after the next connecting."""
        fleet = self._connected
        if fleet is None:
            return
        try:
            if not fleet.reply(inbound, payload):
                log.info("answer.not-wanted", flower_run=inbound.flower_run)
        except RunGone:
            log.info("answer.run-gone", flower_run=inbound.flower_run)
        self._site.store.forget_inbound(inbound.message_id)


def _item_of(inbound: Inbound) -> InboxItem:
    message = {name: value for name, value in asdict(inbound).items() if name != "payload"}
    return InboxItem(inbound.message_id, message, inbound.payload)


def _inbound_of(item: InboxItem) -> Inbound:
    return Inbound(payload=item.payload, **item.message)

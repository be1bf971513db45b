"""Keeping a hospital's node in step with the coordinator: runs, consents, versions, the event log.

Each look asks for the state of things and acts on the difference to what is kept in site.db, so that events which were
missed, seen twice or seen late change nothing. The event stream only says when to look, and at what: a look that it
calls for asks about nothing else, and a burst of events is one look. Everything is looked at now and then all the same.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol

import structlog

from fl_client import consents, queues, updates
from fl_client.events import (
    ConsentFailed,
    ConsentGiven,
    ConsentWanted,
    Listener,
    LogRewritten,
    Problem,
    QueueConsentWanted,
    RunFinished,
    VersionArrived,
)
from fl_client.gateway import SiteRevoked
from fl_client.jobs import Job, JobFailed, JobKind
from fl_client.policy import PolicyBody
from fl_client.site import Site
from fl_client.store import KnownRun
from fl_client.trainer import Trainer
from medhive.errors import Conflict, MedHiveError, NotFound, Unreachable
from medhive.queues import QueueAnswer
from medhive.signing import sign
from medhive.states import FINAL_RUN_STATES, RunState
from medhive.wire import CountersignBody, EventAnswer, Head, RunAnswer

# A head is countersigned at most so often: enough to date a rewriting to the minute, few enough to stay unnoticed.
COUNTERSIGN_EVERY = timedelta(seconds=30)
# Runs that changed within this before the last one seen are asked for again: two may change in the same moment.
CHANGED_OVERLAP = timedelta(seconds=2)
LISTED_RUNS = 200  # of the gateway's list; older ones have long been announced
GOING_ON = frozenset({RunState.READY, RunState.RUNNING})
# What an event is about, by the part of its kind before the dot. Decisions, requests, contributions and countersignatures
# are known here already, and nothing here follows from its own comings and goings; a kind that is not named calls for a
# look at everything.
ABOUT_RUNS = frozenset({"run", "consent", "round"})
ABOUT_VERSIONS = frozenset({"version"})
ABOUT_NOTHING_HERE = frozenset(
    {"decision", "request", "contribution", "head", "invite", "join", "login", "account", "cleanup"}
)
SITE_GOES_ON = frozenset({"site.joined", "site.connected", "site.disconnected", "site.dropped"})
EXPORTED = "version.exported"

log = structlog.get_logger()


class Background(Protocol):
    """Runs a piece of work beside the watch, each name once at a time."""

    def __call__(self, name: str, work: Callable[[], None]) -> None:
        """Begin it, unless work of that name is going on."""


@dataclass(frozen=True)
class Watched:
    """What a look found: studies of this site, and whether a run with its consent is ready or running."""

    studies: tuple[str, ...]
    busy: bool


@dataclass(frozen=True)
class Touched:
    """What there is to look at: everything, or runs and the versions of some studies; exports are told by events alone."""

    everything: bool = False
    runs: bool = False
    versions: frozenset[str] = frozenset()
    exports: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def by(cls, event: EventAnswer, site: str) -> "Touched":
        """What an event has touched, as far as a site's node minds."""
        about, study = event.kind.partition(".")[0], event.study
        if about in ABOUT_NOTHING_HERE or event.kind in SITE_GOES_ON:
            return cls()
        if about in ABOUT_RUNS:
            return cls(runs=True)
        if about not in ABOUT_VERSIONS or study is None:
            return cls(everything=True)
        exports: set[tuple[str, int]] = set()
        version = event.data.get("version")
        if event.kind == EXPORTED and event.site == site and isinstance(version, int):
            exports.add((study, version))
        return cls(versions=frozenset({study}), exports=frozenset(exports))

    def __or__(self, other: "Touched") -> "Touched":
        return Touched(
            self.everything or other.everything,
            self.runs or other.runs,
            self.versions | other.versions,
            self.exports | other.exports,
        )

    def __bool__(self) -> bool:
        return self != Touched()


@dataclass
class _Heard:
    """What the event stream's thread has heard and the watching thread has not looked at yet."""

    touched: Touched = Touched()
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, touched: Touched) -> None:
        with self.lock:
            self.touched |= touched

    def take(self) -> Touched:
        with self.lock:
            taken, self.touched = self.touched, Touched()
        return taken


class Watch:
    """Looks at the coordinator's state; used by one thread, but for `hear`."""

    def __init__(self, site: Site, trainer: Trainer, emit: Listener, background: Background) -> None:
        self._site = site
        self._trainer = trainer
        self._emit = emit
        self._background = background
        self._heard = _Heard()
        self._studies: tuple[str, ...] = ()
        self._waiting: dict[str, RunAnswer] = {}
        self._ending: dict[str, RunAnswer] = {}
        self._asked: set[str] = set()
        self._agreeing: set[str] = set()
        self._warmed: set[str] = set()
        self._since: datetime | None = None
        self._countersigned_at: datetime | None = None
        self._rewritten = False

    def hear(self, event: EventAnswer) -> bool:
        """Note what an event is about, from any thread; whether there is anything to look at."""
        touched = Touched.by(event, self._site.name)
        self._heard.add(touched)
        return bool(touched)

    def look(self) -> Watched:
        """Look at everything once, and act.

        Raises:
            Unreachable: the coordinator does not answer.
            SiteRevoked: the coordinator no longer works with this site.
        """
        return self._look(self._heard.take() | Touched(everything=True))

    def follow(self) -> Watched:
        """Look at what events have touched since the last look, and act; raises as `look`."""
        return self._look(self._heard.take())

    def _look(self, touched: Touched) -> Watched:
        since = self._since
        try:
            self._deliver()
            # Runs first: a version that has just come then belongs to a run whose end is announced with it.
            runs = self._changed_runs() if touched.runs or touched.everything else self._ended_runs()
            if touched.everything:
                self._studies = tuple(study.name for study in self._site.gateway.studies())
            for study in self._studies if touched.everything else sorted(touched.versions):
                self._one_at_a_time(f"versions of {study}", partial(self._look_at_versions, study))
            for study, version in sorted(touched.exports):
                self._one_at_a_time(f"version {version} of {study}", partial(self._look_at_export, study, version))
            for run in runs:
                self._one_at_a_time(run.id, partial(self._look_at_run, run))
            for run in list(self._waiting.values()):
                self._one_at_a_time(run.id, partial(self._ask_consent, run))
            if touched.everything:
                for study in self._studies:
                    self._one_at_a_time(f"queue of {study}", partial(self._look_at_queue, study))
                self._one_at_a_time("event log", self._look_at_head)
        except MedHiveError:
            # What was not looked at is looked at again, also what nothing will call for a second time.
            self._heard.add(touched)
            self._since = since
            raise
        busy = any(run.state in GOING_ON and self._is_mine(run.run_id) for run in self._site.store.runs())
        return Watched(self._studies, busy)

    def _changed_runs(self) -> list[RunAnswer]:
        """Runs that have changed since the last look, and ended ones whose model is still to come; oldest first."""
        since = (self._since - CHANGED_OVERLAP).isoformat() if self._since is not None else None
        changed = {run.id: run for run in self._site.gateway.runs(changed_after=since, limit=LISTED_RUNS)}
        self._since = max((run.updated_at for run in changed.values()), default=self._since)
        found = {run.id: run for run in self._ended_runs()} | changed
        return sorted(found.values(), key=lambda run: run.created_at)

    def _ended_runs(self) -> list[RunAnswer]:
        """Runs that have ended and are not announced yet: what they were is final, so each is asked for once at most."""
        for known in self._site.store.runs():
            if known.state in FINAL_RUN_STATES and not known.announced and known.run_id not in self._ending:
                self._ending[known.run_id] = self._site.gateway.run(known.run_id)
        return list(self._ending.values())

    def _one_at_a_time(self, what: str, work: Callable[[], None]) -> None:
        """One bad run or version must not stop the others."""
        try:
            work()
        except (Unreachable, SiteRevoked):
            raise
        except (MedHiveError, OSError) as error:
            log.warning("watch.problem", what=what, reason=getattr(error, "code", type(error).__name__))
            self._emit(Problem(what, str(error)))

    def _deliver(self) -> None:
        for item, error in consents.deliver(self._site):
            if error is not None:
                self._emit(Problem(f"{item.kind} of {item.created_at:%Y-%m-%d %H:%M}", str(error)))

    # ---- runs ----------------------------------------------------------------------------------------------------

    def _is_mine(self, run_id: str) -> bool:
        given = self._site.store.consent(run_id)
        return given is not None and given.state in ("sending", "granted")

    def _look_at_run(self, run: RunAnswer) -> None:
        known = self._site.store.run(run.id)
        seen = KnownRun(run.id, run.study, run.state, run.round, run.rounds, known is not None and known.announced)
        if known != seen:
            self._site.store.keep_run(seen)
        if run.state is RunState.CONSENTING:
            self._waiting[run.id] = run
        else:
            self._waiting.pop(run.id, None)
        if run.state is RunState.READY and run.id not in self._warmed and self._is_mine(run.id):
            self._warmed.add(run.id)
            self._background(f"warm {run.id}", partial(self._warm, run))
        if run.state in FINAL_RUN_STATES and not seen.announced:
            self._announce_end(run, seen)

    def _warm(self, run: RunAnswer) -> None:
        """Have the trainer load its libraries and read the data while the aggregator is still starting the run."""
        source = self._site.source(run.study, run.spec.task, run.spec.data)
        device = self._site.limits().device
        try:
            self._trainer.run(Job(id=f"warm-{run.id}", kind=JobKind.STATISTICS, source=source, device=device))
        except JobFailed as error:
            # The first task will fail for the same reason, and say so to everybody.
            log.info("watch.not-warmed", run_id=run.id, reason=error.cause_code)

    def _ask_consent(self, run: RunAnswer) -> None:
        """Consent by itself where that is allowed, by now perhaps by a new policy; else say once that a person must."""
        if self._site.store.consent(run.id) is not None:
            self._waiting.pop(run.id, None)
            return
        try:
            allowed = consents.permission(self._site, run)
        except MedHiveError as error:
            allowed = str(error)
        if not isinstance(allowed, str):
            # Tried once: when the data do not allow it, a person decides.
            self._waiting.pop(run.id, None)
            self._background(f"consent {run.id}", partial(self._consent, run, allowed))
        elif run.id not in self._asked:
            self._asked.add(run.id)
            self._emit(ConsentWanted(run.id, run.study, run.rounds, run.requested_by, allowed))

    def _consent(self, run: RunAnswer, allowed: consents.Permission) -> None:
        try:
            check = consents.check_data(self._site, self._trainer, run.spec)
            consents.grant(self._site, run, person=allowed.person, check=check, given_by=allowed.given_by)
        except MedHiveError as error:
            self._emit(ConsentFailed(run.id, str(error)))
            return
        self._emit(ConsentGiven(run.id, run.study, allowed.given_by, allowed.person))

    def _look_at_queue(self, study: str) -> None:
        """Agree to a queue by itself where a policy allows it; else say once that a person must answer."""
        try:
            queue = self._site.gateway.queue(study)
        except NotFound:
            return
        if queue.id in self._agreeing or not queues.is_unanswered(self._site, queue):
            return
        try:
            allowed = queues.policy_on(self._site, queue)
        except MedHiveError as error:
            allowed = str(error)
        if not isinstance(allowed, str):
            self._agreeing.add(queue.id)  # tried once, as for a run
            self._background(f"consent {queue.id}", partial(self._agree_to_queue, queue, allowed))
        elif queue.id not in self._asked:
            self._asked.add(queue.id)
            self._emit(QueueConsentWanted(queue.id, study, queue.spec.options.capacity, allowed))

    def _agree_to_queue(self, queue: QueueAnswer, policy: PolicyBody) -> None:
        try:
            queues.agree_by_policy(self._site, self._trainer, queue, policy)
        except MedHiveError as error:
            self._emit(ConsentFailed(queue.id, str(error)))
            return
        self._emit(ConsentGiven(queue.id, queue.study, "policy", policy.person))

    def _announce_end(self, run: RunAnswer, seen: KnownRun) -> None:
        if self._is_mine(run.id):
            # A site that only evaluates is offered none.
            number = None if self._site.identity.evaluates_only else run.version
            version = self._site.store.version(run.study, number) if number is not None else None
            if number is not None and version is None:
                self._ending[run.id] = run
                return  # its file is still to come; the next look announces both
            metrics = version.manifest.body.metrics if version is not None else {}
            self._emit(
                RunFinished(
                    run_id=run.id,
                    study=run.study,
                    state=run.state,
                    rounds=run.round,
                    reason=run.reason,
                    accuracy=metrics.get("val_accuracy"),
                    loss=metrics.get("val_loss"),
                    version=number,
                    file=version.file if version is not None else None,
                )
            )
        self._ending.pop(run.id, None)
        if run.version is not None:
            updates.keep_own_layers(self._site, run.study, run.id, run.rounds)
        self._site.store.keep_run(replace(seen, announced=True))
        # Weights and optimiser states of the rounds; the model itself lies in the models folder.
        shutil.rmtree(self._site.folder("runs") / run.id, ignore_errors=True)

    # ---- versions ------------------------------------------------------------------------------------------------

    def _look_at_versions(self, study: str) -> None:
        for arrival in updates.sync_versions(self._site, study):
            self._announce_version(arrival)

    def _look_at_export(self, study: str, version: int) -> None:
        arrival = updates.note_export(self._site, study, version)
        if arrival is not None:
            self._announce_version(arrival)

    def _announce_version(self, arrival: updates.Arrival) -> None:
        version = arrival.version
        metrics = version.manifest.body.metrics
        self._emit(VersionArrived(version.study, version.version, version.file, arrival.candidate, metrics))

    # ---- the event log -------------------------------------------------------------------------------------------

    def _look_at_head(self) -> None:
        now = datetime.now(UTC)
        if self._countersigned_at is not None and now - self._countersigned_at < COUNTERSIGN_EVERY:
            return
        head = self._site.gateway.head()
        newest = self._site.store.newest_head()
        try:
            self._keep_head(head, newest.number if newest else 0)
        except Conflict as error:
            if not self._rewritten:
                self._rewritten = True
                self._emit(LogRewritten(str(error)))
            return
        if newest is None or newest.number != head.body.number or not newest.countersigned:
            self._countersign(head)
        self._countersigned_at = now

    def _keep_head(self, head: Head, newest: int) -> None:
        self._site.follow(head.key_id)
        body = head.verify(self._site.identity.verify_key)
        if body.number < newest:
            raise Conflict(
                f"The coordinator's event log was shortened: it ends at row {body.number}, and row {newest} was seen "
                "before. Tell the coordinator, and keep site.db.",
                number=body.number,
                seen=newest,
            )
        self._site.store.keep_head(head)

    def _countersign(self, head: Head) -> None:
        body = CountersignBody(
            site=self._site.name, number=head.body.number, hash=head.body.hash, seen_at=self._site.now()
        )
        self._site.gateway.post("/events/countersign", sign(body, self._site.consent_key))
        self._site.store.keep_head(head, countersigned=True)

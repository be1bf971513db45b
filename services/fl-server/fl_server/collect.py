"""One question to many sites: asking, asking again, checking who answered, and knowing when to stop waiting.

Flower vouches neither for the sender of a reply nor for its arrival. So an answer counts only with the signature of the
very site that was asked, for the very task; whatever else comes is named and refused, and the site is asked again, because
its own answer may still be on its way. A site that trains is given its time from the moment when its training began, since
it may have had to wait for another run; a site that shows no sign of life is given the same time from the question.

A node that is killed may lose a question that Flower takes for delivered. So a site that says nothing of it, though its node
is there, is asked again; being asked twice is harmless, for a site trains once a round and keeps its answer.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import structlog

from fl_server.cohort import Member, Present
from fl_server.flower import NodeUnknown, Reply, ReplyError
from fl_server.gateway import RunOver, is_passing
from medhive.envelope import (
    Contribution,
    ContributionBody,
    TaskBody,
    TaskType,
    check_contribution_envelope,
    from_bytes,
    to_bytes,
)
from medhive.errors import MedHiveError, NoSpace, Unreachable
from medhive.signing import SigningKey, sign
from medhive.states import FINAL_RUN_STATES, Activity, ConsentState
from medhive.version import PROTOCOL
from medhive.wire import ActivityAnswer, RunAnswer

POLL_S = 0.15
"""How soon a checked update is seen while other sites' answers are waited for."""
CHECKED_S = 0.02
"""How soon a checked update is seen once every site has answered: this look asks nobody, and the round waits for it."""
LOOK_S = 1.0
"""How soon a stop, a withdrawal or the start of a training is seen."""
QUEUE_PATIENCE = 10
"""A site whose node says that it waits (for another run, for its hours, for bytes) gets this many times the deadline."""
MAX_FAULTS = 3
"""Forged, foreign or unreadable answers to one question before the site is dropped; the first may be an attacker's."""
ASK_AGAIN_S = 2.0
"""Between two tries, so that an offline node is not asked in a busy loop."""
SILENCE_S = 30.0
"""A node says within a second or two that it has a task. Doubled each time, so that a site whose word does not come through
has a handful of messages to answer, not hundreds."""
DOWNLOADS = 3
"""Updates fetched and checked at once: enough to fill two cores and a line, small enough to stay at a few MiB each."""
EVALUATOR_PATIENCE_S = 30.0
"""An evaluate-only site that has not said by then that it is at work holds nobody up, once all who train are done."""
REASON_LENGTH = 300
MAX_LISTED = 5  # names beside one reason, which must not be lost among them; the round's record names all

WAITING: Mapping[TaskType, frozenset[Activity]] = MappingProxyType(
    {
        TaskType.TRAIN: frozenset({Activity.QUEUED, Activity.FETCHING, Activity.EVALUATING}),
        TaskType.EVALUATE: frozenset({Activity.QUEUED, Activity.FETCHING}),
        TaskType.INITIALISE: frozenset({Activity.QUEUED}),
        TaskType.STATISTICS: frozenset({Activity.QUEUED}),
    }
)
BEGUN: Mapping[TaskType, frozenset[Activity]] = MappingProxyType(
    {
        TaskType.TRAIN: frozenset({Activity.TRAINING, Activity.SENDING, Activity.DONE}),
        # The round's number is that of the last training, whose "done" must not start this clock.
        TaskType.EVALUATE: frozenset({Activity.EVALUATING}),
        TaskType.INITIALISE: frozenset({Activity.TRAINING, Activity.EVALUATING}),
        TaskType.STATISTICS: frozenset({Activity.TRAINING, Activity.EVALUATING}),
    }
)

log = structlog.get_logger()


class StopRequested(MedHiveError):
    """An admin asked for the run to stop."""

    code = "stop-requested"


class Exchange(Protocol):
    """Small signed envelopes to nodes and back; Flower's grid, or a test's own."""

    def send(self, node_id: int, payload: bytes, ttl_s: float) -> str:
        """Send and return the message's id. Raises `NodeUnknown`."""

    def wait(self, seconds: float) -> list[Reply]:
        """The answers that have come since the last call; waits for the first of them, at most so long."""

    def forget(self, message_id: str) -> None:
        """Ask no more for the answer to a message."""


class Clock(Protocol):
    """Time, which tests turn by hand."""

    def now(self) -> datetime:
        """The wall clock, with a zone."""

    def monotonic(self) -> float:
        """Seconds that never jump."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock:
    """The machine's own time."""

    def now(self) -> datetime:
        """The wall clock."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class Watch:
    """The run as the gateway shows it, asked at most once in `LOOK_S`; an outage leaves the last view standing."""

    def __init__(self, look: Callable[[], RunAnswer], clock: Clock) -> None:
        self._look = look
        self._clock = clock
        self._next = 0.0
        self._away = False
        self.run: RunAnswer = self._wait_for_first()

    def _wait_for_first(self) -> RunAnswer:
        while True:
            try:
                return self._look()
            except MedHiveError as error:
                if not is_passing(error):
                    raise
                log.warning("gateway.away", reason=str(error))
                self._clock.sleep(LOOK_S)

    def refresh(self, *, at_once: bool = False) -> RunAnswer:
        """The newest view.

        Raises:
            StopRequested: somebody stopped the run.
            RunOver: it has ended already.
            LeaseLost: another aggregator has it.
        """
        now = self._clock.monotonic()
        if at_once or now >= self._next:
            self._next = now + LOOK_S
            self._see()
        self._require_going()
        return self.run

    def _see(self) -> None:
        try:
            self.run = self._look()
        except MedHiveError as error:
            if not is_passing(error):
                raise
            if not self._away:
                log.warning("gateway.away", reason=str(error))
            self._away = True
        else:
            if self._away:
                log.info("gateway.back")
            self._away = False

    def _require_going(self) -> None:
        if self.run.state in FINAL_RUN_STATES:
            raise RunOver(f"{self.run.id} is {self.run.state} already.")
        if self.run.stop_requested:
            raise StopRequested(self.run.reason or "The run was stopped by an admin.")


@dataclass(frozen=True)
class Correction:
    """What one site is to correct its steps by: a packed file here, and what the site is told of it."""

    path: Path
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Question:
    """What the sites of a cohort are asked.

    `needed` is how many must answer; fewer possible ones end the wait. `evaluators` are only asked to evaluate, whatever
    `type` is, and do not count for it. `base` is the file of the weights to begin from, and `updates` the folder that takes
    what the sites make of them, where there are any: these two stay here. `corrections` are by site.
    """

    type: TaskType
    run_id: str
    study: str
    round: int
    rounds: int
    spec_hash: str
    deadline_s: float
    needed: int
    base_digest: str = ""
    base_size_bytes: int = 0
    statistics: Mapping[str, list[float]] = field(default_factory=dict)
    evaluators: frozenset[str] = frozenset()
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    base: Path | None = None
    updates: Path | None = None

    def to(self, site: str, now: datetime) -> TaskBody:
        """The task for one site."""
        correction = self.corrections.get(site)
        return TaskBody(
            protocol=PROTOCOL,
            type=TaskType.EVALUATE if site in self.evaluators else self.type,
            run_id=self.run_id,
            study=self.study,
            site=site,
            round=self.round,
            rounds=self.rounds,
            spec_hash=self.spec_hash,
            base_digest=self.base_digest,
            base_size_bytes=self.base_size_bytes,
            correction_digest=correction.digest if correction else "",
            correction_size_bytes=correction.size_bytes if correction else 0,
            statistics=dict(self.statistics),
            deadline_s=self.deadline_s,
            issued_at=now.astimezone(UTC),
            nonce=secrets.token_hex(16),
        )


@dataclass(frozen=True)
class Answer:
    """What a site said, verified; `path` and `norm` (L2, of its change) where it brought an update."""

    body: ContributionBody
    path: Path | None = None
    norm: float = 0.0


@dataclass
class Collected:
    """Who answered, in the order of names, and why each other one did not."""

    answers: dict[str, Answer]
    dropped: dict[str, str]

    def sort(self) -> "Collected":
        """The same in the order of names, whatever the order of arrival."""
        return Collected(dict(sorted(self.answers.items())), dict(sorted(self.dropped.items())))

    def apart(self, evaluators: frozenset[str]) -> "tuple[Collected, Collected]":
        """Those who train, and those who only evaluate."""
        return self._only(lambda site: site not in evaluators), self._only(lambda site: site in evaluators)

    def _only(self, wanted: Callable[[str], bool]) -> "Collected":
        answers = {site: answer for site, answer in self.answers.items() if wanted(site)}
        return Collected(answers, {site: reason for site, reason in self.dropped.items() if wanted(site)})


@dataclass
class _Seat:
    """One asked site."""

    member: Member
    task: TaskBody
    asked_at: float
    # What the site had said of this round before it was asked: the word of an earlier life is no answer to this question.
    said_before: datetime | None
    message_ids: list[str] = field(default_factory=list)
    ask_again_at: float | None = None
    silent_until: float | None = None
    silence_s: float = SILENCE_S
    began_at: float | None = None
    waiting: bool = False
    faults: int = 0

    def due_at(self, deadline_s: float) -> float:
        """When the wait for this site ends (monotonic)."""
        if self.began_at is not None:
            return self.began_at + deadline_s
        return self.asked_at + deadline_s * (QUEUE_PATIENCE if self.waiting else 1)


Accept = Callable[[Member, Contribution], Answer]
Refuse = Callable[[str, str], None]
"""Told of a contribution that was refused: in which site's name it came, and the error's code."""


class Collector:
    """Asks one question and waits for its answers.

    Args:
        exchange: the way to the nodes; used from the calling thread alone.
        watch: the run's view, for stops, withdrawals and the start of trainings.
        key: signs every task.
        nodes: each site's registered node, asked where Flower does not know one.
        online: the sites whose node is connected; asked where one is silent.
        accept: makes an answer of a verified contribution (fetches and checks its update), on another thread; what it
            raises drops the site, except `NoSpace`, which is the aggregator's own trouble.
        refuse: hears of every contribution that does not count, whoever it came from.
    """

    def __init__(
        self,
        *,
        exchange: Exchange,
        watch: Watch,
        key: SigningKey,
        clock: Clock,
        nodes: Callable[[], Mapping[str, int]],
        online: Callable[[], frozenset[str]],
        accept: Accept,
        refuse: Refuse,
    ) -> None:
        self._exchange = exchange
        self._nodes = nodes
        self._online = online
        self._watch = watch
        self._key = key
        self._clock = clock
        self._accept = accept
        self._refuse = refuse

    def collect(
        self,
        question: Question,
        members: Sequence[Member],
        given: Mapping[str, Answer],
        on_asked: Callable[[], None] = lambda: None,
    ) -> Collected:
        """Ask, and return when all have answered or been dropped, or when `needed` cannot be reached any more.

        Args:
            question: what to ask.
            members: whom.
            given: answers that a former life of this process verified and kept; these sites are not asked again.
            on_asked: done once all are asked, while they work.

        Raises:
            StopRequested, RunOver, LeaseLost: from the watch.
            NoSpace: the aggregator's disk is full.
            RunStopped: from the exchange.
        """
        pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="updates")
        call = _Call(self, question, given, pool)
        try:
            call.ask(members)
            on_asked()
            return call.run()
        finally:
            call.abandon()
            # Not waited for: after a stop, a transfer from a gateway that is away may take long to give up.
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def exchange(self) -> Exchange:
        return self._exchange

    @property
    def watch(self) -> Watch:
        return self._watch

    @property
    def clock(self) -> Clock:
        return self._clock

    def nodes(self) -> Mapping[str, int]:
        """Each site's registered node."""
        return self._nodes()

    def online(self) -> frozenset[str]:
        """The sites whose node is connected; none while that cannot be known."""
        try:
            return self._online()
        except MedHiveError as error:
            if not is_passing(error):
                raise
            log.warning("gateway.away", reason=str(error))
            return frozenset()

    def envelope(self, task: TaskBody) -> bytes:
        """The task, signed."""
        return to_bytes(sign(task, self._key))

    def accept(self, member: Member, contribution: Contribution) -> Answer:
        """Fetch and check what came with a verified contribution."""
        return self._accept(member, contribution)

    def refuse(self, site: str, code: str) -> None:
        """A contribution in this site's name does not count."""
        self._refuse(site, code)


class _Call:
    """One question on its way."""

    def __init__(
        self,
        collector: Collector,
        question: Question,
        given: Mapping[str, Answer],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._by = collector
        self._question = question
        self._pool = pool
        self._collected = Collected(dict(given), {})
        self._seats: dict[str, _Seat] = {}
        self._checking: dict[str, Future[Answer]] = {}
        self._log = log.bind(run_id=question.run_id, round=question.round, task=str(question.type))

    def ask(self, members: Sequence[Member]) -> None:
        """Ask everybody whose answer is not there yet."""
        for member in members:
            if member.site not in self._collected.answers:
                self._ask_first(member)

    def run(self) -> Collected:
        while (self._seats or self._checking) and self._can_succeed():
            for reply in self._next_replies():
                self._on_reply(reply)
            self._collect_checked()
            self._observe(self._by.watch.refresh())
            self._drop_late()
            self._drop_idle_evaluators()
            self._remind_silent()
            self._ask_again()
        for site in list(self._seats):
            self._drop(site, "the round was given up before it answered, since too few other sites could")
        return self._collected.sort()

    def _next_replies(self) -> list[Reply]:
        """Wait for an answer, until something else has to be seen to."""
        if not self._seats:
            self._by.clock.sleep(CHECKED_S)
            return []
        return self._by.exchange.wait(POLL_S if self._checking else LOOK_S)

    def abandon(self) -> None:
        """Ask no more for what has not come."""
        for seat in self._seats.values():
            self._forget(seat)

    def _forget(self, seat: _Seat) -> None:
        for message_id in seat.message_ids:
            self._by.exchange.forget(message_id)

    def _can_succeed(self) -> bool:
        possible = {*self._collected.answers, *self._seats, *self._checking} - self._question.evaluators
        return len(possible) >= self._question.needed

    # asking

    def _ask_first(self, member: Member) -> None:
        task = self._question.to(member.site, self._by.clock.now())
        said = next((item for item in self._by.watch.run.activity if item.site == member.site), None)
        seat = _Seat(member, task, self._by.clock.monotonic(), said.updated_at if said else None)
        self._seats[member.site] = seat
        self._send(seat)

    def _send(self, seat: _Seat) -> None:
        seat.ask_again_at = None
        # The node may take it for as long as its answer could still count.
        ttl_s = (QUEUE_PATIENCE + 1) * self._question.deadline_s
        try:
            message_id = self._by.exchange.send(seat.member.node_id, self._by.envelope(seat.task), ttl_s)
        except NodeUnknown:
            self._on_unknown_node(seat)
            return
        seat.message_ids.append(message_id)
        seat.silent_until = self._by.clock.monotonic() + seat.silence_s

    def _on_unknown_node(self, seat: _Seat) -> None:
        """Flower takes messages for no node that it does not know, nor for one that has never been online."""
        node_id = self._by.nodes().get(seat.member.site)
        if node_id is None:
            self._drop(seat.member.site, "its node is not registered any more; it was revoked or has left")
            return
        self._log.info("site.away", site=seat.member.site, reason="its node has not connected yet")
        seat.member = replace(seat.member, node_id=node_id)
        seat.ask_again_at = self._by.clock.monotonic() + ASK_AGAIN_S

    def _remind_silent(self) -> None:
        """Ask those again who should have said by now that they have the task; the earlier question may be answered too."""
        now = self._by.clock.monotonic()
        silent = [seat for seat in self._seats.values() if seat.silent_until is not None and now >= seat.silent_until]
        online = self._by.online() if silent else frozenset()
        for seat in silent:
            seat.silent_until = now + seat.silence_s
            if seat.member.site in online:
                self._log.info("site.silent", site=seat.member.site, seconds=seat.silence_s)
                seat.silence_s *= 2
                self._send(seat)

    def _ask_again(self) -> None:
        now = self._by.clock.monotonic()
        for seat in list(self._seats.values()):
            if seat.ask_again_at is not None and now >= seat.ask_again_at:
                self._send(seat)

    # answers

    def _on_reply(self, reply: Reply) -> None:
        seat = next((item for item in self._seats.values() if reply.message_id in item.message_ids), None)
        if seat is None:
            return
        seat.message_ids.remove(reply.message_id)
        if reply.payload is None:
            self._on_no_answer(seat, reply.error or ReplyError.MALFORMED)
            return
        try:
            contribution = from_bytes(Contribution, reply.payload)
            body = check_contribution_envelope(contribution, seat.member.key, seat.task)
        except MedHiveError as error:
            self._on_fault(seat, str(error), error.code)
            return
        self._on_contribution(seat, contribution, body)

    def _on_no_answer(self, seat: _Seat, error: ReplyError) -> None:
        if error in (ReplyError.MALFORMED, ReplyError.REFUSED):
            self._on_fault(seat, f"its node's answer is {error}", f"answer-{error}")
            return
        self._log.info("site.away", site=seat.member.site, reason=str(error))
        seat.ask_again_at = self._by.clock.monotonic() + ASK_AGAIN_S

    def _on_fault(self, seat: _Seat, reason: str, code: str) -> None:
        """What came is not this site's answer. Somebody else may have sent it, so the site is asked again."""
        seat.faults += 1
        self._refuse(seat.member.site, reason, code)
        if seat.faults >= MAX_FAULTS:
            self._drop(seat.member.site, f"{seat.faults} answers were refused, the last because: {reason}")
        else:
            seat.ask_again_at = self._by.clock.monotonic() + ASK_AGAIN_S * (seat.faults - 1)

    def _refuse(self, site: str, reason: str, code: str) -> None:
        self._log.warning("contribution.refused", site=site, code=code, reason=reason[:REASON_LENGTH])
        self._by.refuse(site, code)

    def _on_contribution(self, seat: _Seat, contribution: Contribution, body: ContributionBody) -> None:
        site = seat.member.site
        if body.outcome != "ok":
            self._drop(site, f"{body.outcome} ({body.reason_code or 'no code'}): {body.reason or 'no reason given'}")
            return
        self._forget(self._seats.pop(site))
        self._checking[site] = self._pool.submit(self._by.accept, seat.member, contribution)

    def _collect_checked(self) -> None:
        for site, future in list(self._checking.items()):
            if not future.done():
                continue
            del self._checking[site]
            try:
                self._collected.answers[site] = future.result()
                self._log.info("contribution.accepted", site=site)
            except NoSpace:
                raise
            except Unreachable as error:
                self._drop(site, str(error))
            except MedHiveError as error:
                self._refuse(site, str(error), error.code)
                self._drop(site, str(error))

    # waiting

    def _observe(self, run: RunAnswer) -> None:
        activity = {item.site: item for item in run.activity if item.round == self._question.round}
        consents = {item.site: item.state for item in run.consents}
        for site, seat in list(self._seats.items()):
            self._observe_activity(seat, activity.get(site))
            if consents.get(site) == ConsentState.WITHDRAWN:
                self._drop(site, "it withdrew its consent")

    def _observe_activity(self, seat: _Seat, activity: ActivityAnswer | None) -> None:
        if activity is None:
            return
        kind = seat.task.type
        if activity.updated_at != seat.said_before and activity.activity in WAITING[kind] | BEGUN[kind]:
            seat.silent_until = None
        seat.waiting = activity.activity in WAITING[kind]
        if seat.began_at is None and activity.activity in BEGUN[kind]:
            # Counted on this clock, from when it is seen: the hospital's and the gateway's clocks may be off.
            seat.began_at = self._by.clock.monotonic()

    def _drop_late(self) -> None:
        now = self._by.clock.monotonic()
        for site, seat in list(self._seats.items()):
            if now < seat.due_at(self._question.deadline_s):
                continue
            since = "its training began" if seat.began_at is not None else "it was asked"
            waited = now - (seat.asked_at if seat.began_at is None else seat.began_at)
            self._drop(site, f"late: no answer {waited:.0f} s after {since}")

    def _drop_idle_evaluators(self) -> None:
        """Go on without those who only evaluate and show no sign of it, when all others are done."""
        if not self._question.evaluators or {*self._seats, *self._checking} - self._question.evaluators:
            return
        overdue = self._by.clock.monotonic() - EVALUATOR_PATIENCE_S
        for site, seat in list(self._seats.items()):
            if seat.began_at is None and not seat.waiting and seat.asked_at <= overdue:
                self._drop(site, "it had not begun to evaluate when all others were done")

    def _drop(self, site: str, reason: str) -> None:
        seat = self._seats.pop(site, None)
        if seat is not None:
            self._forget(seat)
        self._collected.dropped[site] = reason[:REASON_LENGTH]
        self._log.warning("site.dropped", site=site, reason=reason[:REASON_LENGTH])


def too_few(what: str, collected: Collected, left_out: Mapping[str, str], needed: int) -> str:
    """The sentence that says why a step failed: how many answered, and for each reason the sites that have it."""
    asked = len(collected.answers) + len(collected.dropped)
    listed = _by_reason({**collected.dropped, **left_out}) or "no other site was asked"
    return f"{what}: {len(collected.answers)} of {asked} sites answered, {needed} are needed ({listed})."


def too_few_there(what: str, present: Present, needed: int) -> str:
    """The sentence that says why a step is not begun: how many sites could be asked, and for each reason who cannot."""
    known, listed = len(present.sites) + len(present.left_out), _by_reason(present.left_out)
    reasons = f" ({listed})" if listed else ""
    return f"{what}: {len(present.sites)} of {known} sites can be asked, {needed} are needed{reasons}."


def _by_reason(reasons: Mapping[str, str]) -> str:
    """Each reason once, with the sites that have it; empty without any."""
    sites: dict[str, list[str]] = {}
    for site, reason in reasons.items():
        sites.setdefault(reason.removesuffix("."), []).append(site)
    return "; ".join(f"{_listed(names)}: {reason}" for reason, names in sites.items())


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def drop_from(collected: Collected, reasons: Mapping[str, str], **bound: Any) -> Collected:
    """The same without the answers of the sites named in `reasons`."""
    for site, reason in reasons.items():
        log.warning("site.dropped", site=site, reason=reason[:REASON_LENGTH], **bound)
    answers = {site: answer for site, answer in collected.answers.items() if site not in reasons}
    return Collected(answers, {**collected.dropped, **{site: text[:REASON_LENGTH] for site, text in reasons.items()}})

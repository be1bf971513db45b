"""Doing one accepted task, from its weights to its answer, so that a crash at any point costs nothing twice.

The order of the steps is the guarantee: train, write the update, make the answer durable, send the update's bytes, send
the answer. Whatever is interrupted after the third step is only sent again; before it, it is computed again from the same
weights, plan and optimiser state, with the same bits.
"""

import errno
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog

from fl_client.acceptance import Order, answer_without_update, code_of
from fl_client.activity import ActivityReporter
from fl_client.events import EpochDone, Listener, RoundDone, RoundFailed, RoundStarted, RunStarted
from fl_client.flower import Inbound
from fl_client.jobs import Cancelled, Epoch, Job, JobEvent, JobKind, Opened, Plan, Started
from fl_client.local_round import Memory, memory_file, needed_memory, newest_memory
from fl_client.site import Site
from fl_client.store import Reply
from fl_client.trainer import Trainer
from medhive.envelope import Contribution, ContributionBody, TaskType, from_bytes, matrix_to_send, to_bytes
from medhive.errors import IncompatibleVersion, MedHiveError, NoSpace, Unreachable
from medhive.signing import sign
from medhive.states import FINAL_RUN_STATES, Activity
from medhive.version import PROTOCOL
from medhive.wire import ActivityReport

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
# How often a running task asks whether it is still wanted; a withdrawal takes hold within this.
LOOK_S = 0.5

BASE, CORRECTION = "base", "correction"
KINDS = {
    TaskType.INITIALISE: JobKind.INITIALISE,
    TaskType.STATISTICS: JobKind.STATISTICS,
    TaskType.TRAIN: JobKind.TRAIN,
    TaskType.EVALUATE: JobKind.EVALUATE,
}

Result = TypeVar("Result")

log = structlog.get_logger()


class NotWanted(Cancelled):
    """The run has ended, or its consent was withdrawn."""

    code = "not-wanted"


@dataclass
class Assignment:
    """One accepted task and everybody who waits for its answer (a resumed run asks again)."""

    order: Order
    inbounds: list[Inbound] = field(default_factory=list)
    payload: bytes | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Worker:
    """Does assignments; one call of `make_answer` per assignment, each on a thread of its own."""

    def __init__(
        self, site: Site, trainer: Trainer, reporter: ActivityReporter, emit: Listener, stopping: threading.Event
    ) -> None:
        self._site = site
        self._trainer = trainer
        self._reporter = reporter
        self._emit = emit
        self._stopping = stopping
        self._started_runs: set[str] = set()

    def make_answer(self, order: Order) -> bytes:
        """The signed answer to a task: the kept one, or one that is made now. Its update has been sent when this returns.

        Raises:
            NotWanted: nobody wants it any more.
            Cancelled: this process stops.
        """
        try:
            kept = self._kept(order) or self._do(order)
            self._send_update(order, kept)
        except Cancelled:
            raise
        except MedHiveError as error:
            return self._failure(order, error)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return self._failure(order, NoSpace("The disk of the state folder is full; free some space."))
        return kept.payload

    def _kept(self, order: Order) -> Reply | None:
        """The answer that was made before; one from before an upgrade, which nobody can read any more, is made again."""
        kept = self._site.store.reply(*order.key)
        try:
            if kept is not None:
                from_bytes(Contribution, kept.payload)
        except IncompatibleVersion:
            log.info("answer.of-another-version", run_id=order.task.run_id, round=order.task.round)
            self._site.store.forget_reply(*order.key)
            return None
        return kept

    def _failure(self, order: Order, error: MedHiveError) -> bytes:
        task, code = order.task, code_of(error)
        self._emit(RoundFailed(task.run_id, task.round, code, str(error)))
        self._report(order, Activity.DONE)
        return to_bytes(answer_without_update(self._site, task, "failed", code))

    # ---- the steps -----------------------------------------------------------------------------------------------

    def _do(self, order: Order) -> Reply:
        task = order.task
        self._report(order, Activity.QUEUED)
        folder = self._folder(task.run_id)
        self._tidy(folder, order)
        base = self._fetch(order, folder, BASE, order.task.base_digest, order.task.base_size_bytes)
        size = order.task.correction_size_bytes
        correction = self._fetch(order, folder, CORRECTION, order.task.correction_digest, size)
        began = time.monotonic()
        result = self._work(order, self._job(order, folder, base, correction))
        contribution = sign(self._contribution(order, result), self._site.consent_key)
        file = folder / _update_name(order) if contribution.body.content_digest else None
        reply = Reply(*order.key, payload=to_bytes(contribution), file=file)
        self._require_wanted(order)
        self._site.store.keep_reply(reply)
        minutes = (time.monotonic() - began) / 60
        metrics = contribution.body.metrics
        self._emit(RoundDone(task.run_id, task.round, task.rounds, task.type.value, metrics, minutes))
        return reply

    def _fetch(self, order: Order, folder: Path, what: str, digest: str, size_bytes: int) -> Path | None:
        if not digest:
            return None
        self._report(order, Activity.FETCHING)
        file, run_id = folder / _fetched_name(what, digest), order.task.run_id
        self._patiently(order, lambda: self._site.gateway.fetch_blob(run_id, digest, file, size_bytes))
        self._report(order, Activity.QUEUED)
        return file

    def _work(self, order: Order, job: Job) -> dict[str, Any]:
        ticket = self._trainer.submit(job, lambda event: self._on_job(order, event))
        try:
            while not ticket.wait(LOOK_S):
                self._require_wanted(order)
            return ticket.result()
        finally:
            self._trainer.cancel(ticket)

    def _send_update(self, order: Order, reply: Reply) -> None:
        if reply.file is None:
            return
        if not reply.file.exists():
            # A later round has tidied it away, so the coordinator had received it.
            log.info("update.tidied-away", run_id=reply.run_id, round=reply.round)
            return
        file, digest = reply.file, _digest_in(reply)
        self._report(order, Activity.SENDING)
        self._patiently(order, lambda: self._site.gateway.send_blob(order.task.run_id, file, digest))

    def _patiently(self, order: Order, exchange: Callable[[], Result]) -> Result:
        """Make an exchange with the gateway, for as long as it takes and is wanted."""
        wait = FIRST_WAIT_S
        while True:
            self._require_wanted(order)
            try:
                return exchange()
            except Unreachable as error:
                log.info("gateway.away", run_id=order.task.run_id, reason=error.code)
            self._stopping.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _require_wanted(self, order: Order) -> None:
        if self._stopping.is_set():
            raise Cancelled("The node stops.")
        run_id = order.task.run_id
        given = self._site.store.consent(run_id)
        if given is None or given.state not in ("sending", "granted"):
            raise NotWanted(f"The consent to {run_id} was withdrawn.", run_id=run_id)
        run = self._site.store.run(run_id)
        if run is not None and run.state in FINAL_RUN_STATES:
            raise NotWanted(f"{run_id} is {run.state}.", run_id=run_id)

    # ---- what is said --------------------------------------------------------------------------------------------

    def _on_job(self, order: Order, event: JobEvent) -> None:
        task = order.task
        if isinstance(event, Started):
            training = task.type is TaskType.TRAIN
            self._report(order, Activity.TRAINING if training else Activity.EVALUATING)
            self._emit(RoundStarted(task.run_id, task.round, task.rounds, task.type.value))
        elif isinstance(event, Opened) and task.run_id not in self._started_runs:
            self._started_runs.add(task.run_id)
            self._emit(RunStarted(task.run_id, task.study, task.rounds, event.classes, event.parts))
        elif isinstance(event, Epoch):
            self._on_epoch(order, event)

    def _on_epoch(self, order: Order, event: Epoch) -> None:
        task = order.task
        self._emit(
            EpochDone(
                task.run_id,
                task.round,
                task.rounds,
                event.epoch,
                event.epochs,
                event.loss,
                event.accuracy,
                event.seconds,
            )
        )
        report = ActivityReport(
            round=task.round,
            activity=Activity.TRAINING,
            epoch=event.epoch,
            epochs=event.epochs,
            loss=event.loss if math.isfinite(event.loss) else None,
            accuracy=event.accuracy if math.isfinite(event.accuracy) else None,
            examples=event.examples,
        )
        self._reporter.report(task.run_id, report)

    def report_done(self, order: Order) -> None:
        """The answer has been sent."""
        self._report(order, Activity.DONE)

    def _report(self, order: Order, activity: Activity) -> None:
        self._reporter.report(order.task.run_id, ActivityReport(round=order.task.round, activity=activity))

    def _contribution(self, order: Order, result: dict[str, Any]) -> ContributionBody:
        task = order.task
        return ContributionBody(
            protocol=PROTOCOL,
            type=task.type,
            run_id=task.run_id,
            site=self._site.name,
            round=task.round,
            spec_hash=task.spec_hash,
            base_digest=task.base_digest,
            content_digest=result.get("digest", ""),
            content_size_bytes=result.get("size_bytes", 0),
            examples=result.get("examples", 0),
            rate_sum=result.get("rate_sum", 0.0),
            metrics={name: value for name, value in result.get("metrics", {}).items() if math.isfinite(value)},
            statistics=result.get("statistics", {}),
            confusion=matrix_to_send(result.get("confusion", [])),
            training_s=result.get("training_s", 0.0),
            issued_at=self._site.now(),
        )

    # ---- jobs and files ------------------------------------------------------------------------------------------

    def _job(self, order: Order, folder: Path, base: Path | None, correction: Path | None) -> Job:
        task, spec = order.task, order.consent.spec
        training = task.type is TaskType.TRAIN
        # What this round's own training left counts for the judgement after it, and not for the training itself.
        own = newest_memory(folder, Memory.OWN, task.round if training else task.round + 1)
        return Job(
            id="/".join(str(part) for part in order.key),
            kind=KINDS[task.type],
            source=self._site.source(spec.study, spec.task, spec.data, dict(task.statistics)),
            device=self._site.limits().device,
            fingerprint=order.consent.signed.body.dataset_fingerprint,
            weights={"base": base} if base is not None else {},
            own={"base": own} if own is not None else {},
            plan=_plan(order, folder, correction) if training else None,
            out=folder / _update_name(order),
        )

    def _folder(self, run_id: str) -> Path:
        folder = self._site.folder("runs") / run_id
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _tidy(self, folder: Path, order: Order) -> None:
        """Delete what no round can need any more: other weights, sent updates, what was kept of rounds before the last."""
        task = order.task
        fetched = {_fetched_name(BASE, task.base_digest), _fetched_name(CORRECTION, task.correction_digest)}
        keep = fetched | {f"{name}.part" for name in fetched}
        keep |= {path.name for path in needed_memory(folder, task.round)}
        for file in folder.iterdir():
            if file.name not in keep:
                file.unlink()


def _fetched_name(what: str, digest: str) -> str:
    return f"{what}-{digest}.safetensors"


def _plan(order: Order, folder: Path, correction: Path | None) -> Plan:
    task, options = order.task, order.consent.spec.options
    return Plan(
        round=task.round,
        rounds=task.rounds,
        local_epochs=options.local_epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        mu=options.local_mu,
        seed=options.seed,
        penalty=options.penalty,
        C=options.C,
        deadline_s=task.deadline_s,
        state_in=newest_memory(folder, Memory.OPTIMISER, task.round),
        state_out=memory_file(folder, Memory.OPTIMISER, task.round),
        own_out=memory_file(folder, Memory.OWN, task.round) if options.keeps_own_layers else None,
        correction=correction,
    )


def _update_name(order: Order) -> str:
    return f"update-{order.task.type.value}-{order.task.round}.safetensors"


def _digest_in(reply: Reply) -> str:
    return from_bytes(Contribution, reply.payload).body.content_digest

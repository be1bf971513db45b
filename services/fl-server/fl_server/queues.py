"""Averages what waits in contribution queues, one average at a time, beside the runs.

The gateway says what is due and who may make it (a lease with a fence); this module keeps nothing but files that it can
fetch again: it may be killed at any moment, and whoever takes up the average next arrives at the same bits. What a
contribution is was checked when it came; it is checked again here, with its signature and its hospital's consent, since this
process believes no other.
"""

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import structlog

from fl_server.gateway import LeaseLost, RunOver, is_passing, lease_loss_named
from medhive.client import GatewayClient
from medhive.contribution import ContributionLimits, NormTooLarge, NotFinite, check_contribution, norm_outliers
from medhive.errors import (
    BadSignature,
    Conflict,
    DigestMismatch,
    Expired,
    InvalidInput,
    MedHiveError,
    NotFound,
    TooLarge,
)
from medhive.packing import CorruptWeights, WeightsFile, WrongLayout
from medhive.queues import (
    Change,
    ExecutionEnd,
    ExecutionTask,
    TakenContribution,
    Waiting,
    check_queue_consent,
    check_queue_contribution,
    plan_average,
    require_enough,
    write_average,
)
from medhive.signing import VerifyKey
from medhive.wire import API, Fenced, LeaseRequest

LOOK_S = 1.0
"""How soon an average that is due begins."""
LONGEST_WAIT_S = 15.0
"""Between two looks while something is wrong."""
BEAT_S = 5.0
"""A sixth of a lease: several may get lost before it lapses."""
HEADER_ROOM_BYTES = 1024 * 1024
"""How much longer weights may be than others of their model: texts in the header differ, numbers do not."""
REASON_LENGTH = 500
"""What the gateway takes of a reason."""
NORM_OUTLIER = "norm-outlier"
"""The code of what only the comparison with the other contributions shows."""
CHANGED = "execution-changed"
"""The gateway's word for an average that was made of something else than what is there now."""
REFUSED = (
    BadSignature,
    CorruptWeights,
    DigestMismatch,
    Expired,
    InvalidInput,
    NormTooLarge,
    NotFinite,
    NotFound,
    TooLarge,
    WrongLayout,
)
"""What is wrong with one contribution, and costs it alone its place."""

log = structlog.get_logger()


class AveragerStopped(MedHiveError):
    """The service ends; the average is made by its next life."""

    code = "averager-stopped"


class Averager:
    """Makes averages, one pass at a time.

    Args:
        gateway: a connection of its own, with the aggregator's token.
        holder: our name in leases.
        coordinator_key_ids: asked for the keys of the coordinator that hospitals' consents may name.
        folder: for weights on their way; emptied after each average.
        say: told one line about each average, for people.
        stopped: set to end.
    """

    def __init__(
        self,
        *,
        gateway: GatewayClient,
        holder: str,
        coordinator_key_ids: Callable[[], Sequence[str]],
        folder: Path,
        say: Callable[[str], None],
        stopped: threading.Event,
    ) -> None:
        self._gateway = gateway
        self._holder = holder
        self._coordinator_key_ids = coordinator_key_ids
        self._folder = folder
        self._say = say
        self._stopped = stopped
        self._beat_at = 0.0

    def serve(self) -> None:
        """Make whatever falls due, until stopped; nothing that goes wrong here ends the runs beside it."""
        wait_s, trouble = LOOK_S, ""
        while not self._stopped.wait(wait_s):
            try:
                while self.step():
                    pass
            except AveragerStopped:
                return
            except Exception as error:  # the thread's outermost loop
                if str(error) != trouble:
                    log.warning("queue.trouble", reason=str(error), exc_info=not isinstance(error, MedHiveError))
                wait_s, trouble = min(wait_s * 2, LONGEST_WAIT_S), str(error)
            else:
                wait_s, trouble = LOOK_S, ""

    def step(self) -> bool:
        """Make the oldest average that is due; False when there is none.

        Raises:
            Unreachable: the gateway does not answer; the next pass goes on with what has been fetched.
            AveragerStopped: the service ends.
        """
        answer = self._gateway.post(f"{API}/server/queue/lease", LeaseRequest(holder=self._holder))
        if answer is None:
            return False
        task = ExecutionTask.model_validate(answer)
        bound = log.bind(execution=task.execution, queue=task.queue_id, study=task.spec.study, fence=task.fence)
        bound.info("queue.leased", contributions=len(task.contributions))
        try:
            self._until_settled(task)
        except (LeaseLost, RunOver, NotFound) as error:
            bound.warning("queue.lease-lost", reason=str(error))
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def _until_settled(self, task: ExecutionTask) -> None:
        """Make the average, anew each time that what it is made of has changed meanwhile."""
        while True:
            end = self._made(task)
            try:
                self._end(task, end)
            except Conflict as error:
                if error.data.get("cause") != CHANGED:
                    raise
                task = self._look(task)
            else:
                return

    def _made(self, task: ExecutionTask) -> ExecutionEnd:
        """The average and its report; a report of failure when it cannot be made."""
        counted, refused = self._checked(task)
        numbers = tuple(sorted(counted))
        end = ExecutionEnd(
            fence=task.fence, state="failed", newest_version=task.newest_version, counted=numbers, refused=refused
        )
        try:
            waiting = [counted[number] for number in numbers]
            require_enough(waiting, task.spec.options)
            digest = self._average(task, waiting)
        except MedHiveError as error:
            if is_passing(error) or isinstance(error, AveragerStopped | LeaseLost | RunOver):
                raise
            return end.model_copy(update={"reason": str(error)[:REASON_LENGTH]})
        return end.model_copy(update={"state": "done", "digest": digest})

    # ---- checking ------------------------------------------------------------------------------------------------

    def _checked(self, task: ExecutionTask) -> tuple[dict[int, Waiting], dict[int, str]]:
        """The contributions that may count, and the codes of why others may not."""
        refused: dict[int, str] = {}
        norms: dict[str, float] = {}
        waiting: dict[int, Waiting] = {}
        for item in task.contributions:
            try:
                norms[str(item.number)] = self._check(task, item)
            except REFUSED as error:
                if is_passing(error):
                    raise
                refused[item.number] = error.code
                continue
            body = item.contribution.body
            waiting[item.number] = Waiting(item.number, body.site, body.examples, body.base_version)
        for number in sorted(map(int, norm_outliers(norms))):
            refused[number] = NORM_OUTLIER
            del waiting[number]
        return waiting, refused

    def _check(self, task: ExecutionTask, item: TakenContribution) -> float:
        """Everything that must hold of one contribution; returns the L2 norm of its change."""
        self._beat(task)
        key, body = VerifyKey.from_text(item.consent_public_key), item.contribution.body
        check_queue_consent(
            item.consent,
            key,
            site=body.site,
            queue_id=task.queue_id,
            spec=task.spec,
            coordinator_key_ids=self._coordinator_key_ids(),
            now=datetime.now(UTC),
        )
        check_queue_contribution(item.contribution, key, site=body.site, queue_id=task.queue_id, spec=task.spec)
        base = self._fetch(task, body.base_digest)
        update = self._fetch(task, body.content_digest)
        limits = ContributionLimits(task.spec.options.max_norm)
        whose = f"the contribution of {body.site}"
        return check_contribution(update, WeightsFile.at(base).layout, base, limits, whose)

    def _fetch(self, task: ExecutionTask, digest: str) -> Path:
        """A file of weights by its digest; what lies here already is not fetched again."""
        path = self._folder / f"{digest}.safetensors"
        limit = task.newest_size_bytes + HEADER_ROOM_BYTES
        where = f"{self._path(task)}/blobs/{digest}"
        self._gateway.download(where, path, digest, max_bytes=limit, on_progress=lambda _done, _total: self._beat(task))
        return path

    # ---- averaging -----------------------------------------------------------------------------------------------

    def _average(self, task: ExecutionTask, waiting: list[Waiting]) -> str:
        """Write the average and bring it to the gateway; returns its digest."""
        weights = {item.number: item.contribution.body for item in task.contributions}
        newest = self._fetch(task, task.newest_digest)
        changes = [
            Change(
                self._fetch(task, weights[share.number].content_digest),
                self._fetch(task, weights[share.number].base_digest),
                share.weight,
            )
            for share in plan_average(waiting, task.newest_version)
        ]
        out = self._folder / "average.safetensors"
        digest, norm = write_average(newest, changes, out, lambda: self._beat(task))
        self._gateway.upload(f"{self._path(task)}/blobs/{digest}", out, lambda _done, _total: self._beat(task))
        log.info("queue.average-made", execution=task.execution, contributions=len(changes), norm=norm)
        return digest

    # ---- the gateway ---------------------------------------------------------------------------------------------

    def _path(self, task: ExecutionTask) -> str:
        return f"{API}/server/queue/executions/{task.execution}"

    def _look(self, task: ExecutionTask) -> ExecutionTask:
        with lease_loss_named():
            answer = self._gateway.post(f"{self._path(task)}/look", Fenced(fence=task.fence))
        self._beat_at = time.monotonic() + BEAT_S
        return ExecutionTask.model_validate(answer)

    def _beat(self, task: ExecutionTask) -> None:
        """Keep the lease, now and then; between two pieces of work."""
        if self._stopped.is_set():
            raise AveragerStopped("The service ends.")
        if time.monotonic() >= self._beat_at:
            self._look(task)

    def _end(self, task: ExecutionTask, end: ExecutionEnd) -> None:
        with lease_loss_named():
            answer = self._gateway.post(f"{self._path(task)}/end", end)
        self._tell(task, end, answer)

    def _tell(self, task: ExecutionTask, end: ExecutionEnd, answer: Mapping[str, object]) -> None:
        counted, refused = len(end.counted), len(end.refused)
        if end.state == "done":
            text = f"{task.queue_id}: version {answer['version']} of {task.spec.study} out of {counted} contributions"
            text += f", {refused} refused" if refused else ""
        else:
            text = f"{task.queue_id}: no average, {counted} contributions wait on ({end.reason})"
        log.info("queue.settled", execution=task.execution, state=end.state, counted=counted, refused=end.refused)
        self._say(text)

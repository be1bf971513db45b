"""Takes approved work from the gateway, starts one Flower run for each lease, and starts it again when its process died.

The gateway says what is to be done and who may do it (a lease, with a number that grows with each holder); the SuperLink
says what is going on; between them this module keeps nothing but the leases it holds, in one small file, so that a
restarted service goes on with its own runs at once instead of waiting until its leases have lapsed.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from fl_server.app import FENCE_KEY, RUN_KEY
from fl_server.checkpoint import write_durably
from fl_server.flower import FlowerRun, FlowerRunNotFound, SuperLink
from fl_server.gateway import LeaseLost, RunOver, lease_loss_named
from medhive.client import GatewayClient
from medhive.errors import InvalidInput, NotFound
from medhive.states import FINAL_RUN_STATES
from medhive.wire import API, Fenced, Lease, LeaseRequest, RunAnswer, RunEnd

HEARTBEAT_S = 5.0
"""A sixth of a lease: several may get lost before it lapses."""
MAX_DEATHS = 5
"""Deaths of a run's process without a round closed in between, after which the run fails: the fault is in the run."""
GOODBYE_S = 10.0
"""How long the process of a run that is over may take to end by itself."""
FIRST_WAIT_S = 1.0
"""Before a process that died is started again; doubled with every death."""
REASON_LENGTH = 500
NEWEST_RUNS = 10
"""Looked at in each pass; others of ours are asked for one by one. Whenever Flower lists a run that has ended it tidies up
after it, in 2 ms of processor time: with some hundred runs behind it, it would do little else."""

log = structlog.get_logger()


@dataclass
class Held:
    """A run under our lease.

    `flower_run` is the SuperLink's number of its present process, None before one is started; `confirmed_at` is when the
    gateway last said that the lease holds.
    """

    run_id: str
    fence: int
    flower_run: int | None = None
    round: int = -1
    deaths: int = 0
    start_at: float = 0.0
    beat_at: float = 0.0
    confirmed_at: float = 0.0
    last_words: str = field(default="", repr=False)


class Dispatcher:
    """Works in passes, about one a second.

    Args:
        gateway: with the aggregator's token.
        superlink: the control side.
        holder: our name in leases.
        leases_file: where the leases we hold are kept.
        runs_dir: the folders of the runs; that of a run that is over is deleted.
        max_runs: how many may go on at once.
        monotonic: seconds that never jump.
    """

    def __init__(
        self,
        *,
        gateway: GatewayClient,
        superlink: SuperLink,
        holder: str,
        leases_file: Path,
        runs_dir: Path,
        max_runs: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._gateway = gateway
        self._superlink = superlink
        self._holder = holder
        self._leases_file = leases_file
        self._runs_dir = runs_dir
        self._max_runs = max_runs
        self._monotonic = monotonic
        self._ending: dict[int, float] = {}
        kept, now = _read_leases(leases_file), monotonic()
        self._held = {run_id: Held(run_id, fence, confirmed_at=now) for run_id, fence in kept.items()}

    @property
    def held(self) -> tuple[Held, ...]:
        """The runs under our lease."""
        return tuple(self._held.values())

    def lease_ages(self) -> tuple[float, ...]:
        """For each run that is held, the seconds since the gateway last confirmed its lease; from any thread."""
        return tuple(self._monotonic() - held.confirmed_at for held in self.held)

    def stop_stale(self) -> None:
        """Stop whatever an earlier life of this service left at the SuperLink; its runs are started anew.

        Raises:
            SuperLinkUnreachable: it is not there yet.
        """
        for number, run in self._superlink.runs().items():
            if not run.phase.is_over:
                self._stop(number)
                log.info("run.stale-stopped", flower_run=number, run_id=run.config.get(RUN_KEY))

    def restart_all(self) -> None:
        """The superexec died, and every run's process with it: do not wait until the SuperLink notices."""
        for held in self._held.values():
            if held.flower_run is not None:
                self._stop(held.flower_run)
                held.flower_run = None

    def remove_ended(self) -> None:
        """Delete the folders of runs that ended without us: at another aggregator, or before an older backup was restored.

        Raises:
            Unreachable: the gateway does not answer.
        """
        for folder in self._runs_dir.glob("RUN_*"):
            if folder.name not in self._held and self._is_over(folder.name):
                shutil.rmtree(folder, ignore_errors=True)

    def _is_over(self, run_id: str) -> bool:
        try:
            run = RunAnswer.model_validate(self._gateway.get(f"{API}/runs/{run_id}"))
        except NotFound:
            return True
        except InvalidInput:  # no run has this name
            return False
        return run.state in FINAL_RUN_STATES

    def step(self) -> None:
        """One pass.

        Raises:
            Unreachable: gateway or SuperLink do not answer; the next pass goes on.
        """
        # Before more work is asked for: a lease that lapsed while the gateway was away would come back as a new one, with
        # which the run's own process, still at work, has nothing to do.
        for held in self.held:
            if self._monotonic() >= held.beat_at:
                self._beat(held)
        self._take_leases()
        runs = self._processes() if self._held or self._ending else {}
        self._end_stragglers(runs)
        for held in list(self._held.values()):
            self._attend(held, runs)

    def _processes(self) -> dict[int, FlowerRun]:
        """What the SuperLink says of our runs' processes, and of the newest ones."""
        runs = self._superlink.runs(NEWEST_RUNS)
        ours = {*self._ending, *(held.flower_run for held in self.held if held.flower_run is not None)}
        for number in ours - runs.keys():
            with suppress(FlowerRunNotFound):
                runs[number] = self._superlink.run(number)
        return runs

    # ---- leases ----------------------------------------------------------------------------------------------------

    def _take_leases(self) -> None:
        while len(self._held) < self._max_runs:
            answer = self._gateway.post(f"{API}/server/lease", LeaseRequest(holder=self._holder))
            if answer is None:
                return
            lease = Lease.model_validate(answer)
            self._held[lease.run_id] = Held(lease.run_id, lease.fence, confirmed_at=self._monotonic())
            self._keep_leases()
            log.info("run.leased", run_id=lease.run_id, fence=lease.fence)

    def _keep_leases(self) -> None:
        leases = {held.run_id: held.fence for held in self._held.values()}
        write_durably(self._leases_file, json.dumps(leases).encode())

    def _forget(self, held: Held) -> None:
        """The process of a run that is not ours any more hears it from the gateway too, and ends by itself."""
        if held.flower_run is not None:
            self._ending[held.flower_run] = self._monotonic() + GOODBYE_S
        del self._held[held.run_id]
        self._keep_leases()

    def _end_stragglers(self, runs: dict[int, FlowerRun]) -> None:
        for number, deadline in list(self._ending.items()):
            run = runs.get(number)
            if run is None or run.phase.is_over:
                del self._ending[number]
            elif self._monotonic() >= deadline:
                self._stop(number)
                del self._ending[number]

    # ---- one run ---------------------------------------------------------------------------------------------------

    def _attend(self, held: Held, runs: dict[int, FlowerRun]) -> None:
        now = self._monotonic()
        self._find_process(held, runs)
        process = runs.get(held.flower_run) if held.flower_run is not None else None
        is_over = held.flower_run is not None and (process is None or process.phase.is_over)
        if (now >= held.beat_at or is_over) and not self._beat(held):
            return
        if is_over:
            self._on_death(held, process.details if process else "The SuperLink does not know it any more.")
        if held.flower_run is None and held.run_id in self._held and now >= held.start_at:
            self._start(held)

    def _find_process(self, held: Held, runs: dict[int, FlowerRun]) -> None:
        """A start whose answer was lost has begun a process all the same. Two of a run would write into one folder."""
        ours = (held.run_id, held.fence)
        for number, run in runs.items():
            if run.phase.is_over or (run.config.get(RUN_KEY), run.config.get(FENCE_KEY)) != ours:
                continue
            if held.flower_run is None:
                held.flower_run = number
                log.info("run.found", run_id=held.run_id, flower_run=number)
            elif number != held.flower_run:
                self._stop(number)
                log.warning("run.second-stopped", run_id=held.run_id, flower_run=number)

    def _beat(self, held: Held) -> bool:
        """Keep the lease; False when the run is over or another's."""
        held.beat_at = self._monotonic() + HEARTBEAT_S
        try:
            with lease_loss_named():
                answer = self._gateway.post(f"{API}/server/runs/{held.run_id}/heartbeat", Fenced(fence=held.fence))
        except (LeaseLost, RunOver, NotFound) as error:
            log.warning("run.lease-lost", run_id=held.run_id, reason=str(error))
            self._forget(held)
            return False
        run = RunAnswer.model_validate(answer)
        if run.state in FINAL_RUN_STATES:
            log.info("run.over", run_id=run.id, state=str(run.state))
            self._forget(held)
            shutil.rmtree(self._runs_dir / run.id, ignore_errors=True)
            return False
        held.confirmed_at = self._monotonic()
        if run.round > held.round:
            held.round, held.deaths = run.round, 0
        return True

    def _on_death(self, held: Held, details: str) -> None:
        """The process ended though the run goes on."""
        held.flower_run = None
        held.deaths += 1
        held.last_words = details
        held.start_at = self._monotonic() + FIRST_WAIT_S * 2 ** (held.deaths - 1)
        log.warning("run.process-died", run_id=held.run_id, deaths=held.deaths, reason=details)
        if held.deaths >= MAX_DEATHS:
            self._give_up(held)

    def _give_up(self, held: Held) -> None:
        reason = (
            f"The process of this run ended {held.deaths} times without closing a round. {held.last_words} Read the "
            "aggregator's log for the cause, then ask for the run again."
        )
        end = RunEnd(fence=held.fence, state="failed", reason=reason[:REASON_LENGTH])
        try:
            with lease_loss_named():
                self._gateway.post(f"{API}/server/runs/{held.run_id}/end", end)
        except (LeaseLost, RunOver) as error:
            log.warning("run.lease-lost", run_id=held.run_id, reason=str(error))
        else:
            shutil.rmtree(self._runs_dir / held.run_id, ignore_errors=True)
        log.error("run.given-up", run_id=held.run_id, reason=reason)
        self._forget(held)

    def _start(self, held: Held) -> None:
        held.flower_run = self._superlink.start_run({RUN_KEY: held.run_id, FENCE_KEY: held.fence})
        log.info("run.started", run_id=held.run_id, fence=held.fence, flower_run=held.flower_run)

    def _stop(self, flower_run: int) -> None:
        try:
            self._superlink.stop_run(flower_run)
        except FlowerRunNotFound:
            log.debug("run.unknown", flower_run=flower_run)


def _read_leases(path: Path) -> dict[str, int]:
    """The leases of an earlier life; none when the file is missing or unreadable, since they lapse by themselves."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {str(run_id): int(fence) for run_id, fence in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("leases.unreadable", reason=str(error))
        return {}

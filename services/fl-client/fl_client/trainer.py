"""The node's handle on its trainer: starts it, keeps it warm, notices its death, and gives its work to a fresh one.

A trainer that is killed for its memory takes every run with it that it holds, and a process may be killed for reasons that
have nothing to do with its work. So the runs that were active are tried again one at a time; only the one that dies again,
alone, is answered as out of memory.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import structlog
from pydantic import ValidationError

from fl_client.jobs import (
    EVENT,
    EXIT_OUT_OF_MEMORY,
    MAX_LINE_BYTES,
    Cancel,
    Cancelled,
    Failed,
    Finished,
    Job,
    JobEvent,
    JobFailed,
    Loading,
    OutOfMemory,
    Pause,
    Ready,
    Start,
    Started,
    TrainerCrashed,
    TrainerStuck,
)
from fl_client.limits import Limits
from fl_client.settings import PREFIX

# A step of training is far shorter; who does not give way by then is killed with the whole process.
CANCEL_GRACE_S = 5.0
# A trainer that ends without having begun anything is broken; starting it for ever would only heat the room.
MAX_FRUITLESS_STARTS = 3
CLOSE_GRACE_S = 2.0
# A child comes up, and loads its libraries, within seconds; giving way to all else on a busy machine, within minutes. One
# that has too little memory may search for more until the end of time instead of failing.
START_DEADLINE_S = 600.0
# Rest before a child that was stuck, or could not be started, is started again, doubled each time: what it lacked may come
# back meanwhile.
FIRST_REST_S, LONGEST_REST_S = 2.0, 60.0
# Secrets of the parent's environment that the trainer has no use for.
SECRETS = ("JOIN_TOKEN", "PACS_PASSWORD", "PACS_TOKEN")
WITHHELD = frozenset({*SECRETS, *(PREFIX + name for name in SECRETS)})
# What is limited is address space, and each of glibc's arenas, one a thread, reserves 64 MB of it that nothing uses.
FEW_ARENAS = {"MALLOC_ARENA_MAX": "1"}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

log = structlog.get_logger()

Listener = Callable[[JobEvent], None]


def _deaf(_event: JobEvent) -> None:
    return


@dataclass
class Ticket:
    """One job in the trainer's hands."""

    job: Job
    listener: Listener = _deaf
    started: bool = False
    suspect: bool = False
    sent: bool = False
    outcome: Finished | Failed | None = None
    _done: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is over, after waiting so long at most."""
        return self._done.wait(timeout_s)

    def result(self) -> dict[str, Any]:
        """What it made.

        Raises:
            Cancelled: it was cancelled.
            JobFailed: it failed, for the reason that `cause_code` names.
        """
        self._done.wait()
        if isinstance(self.outcome, Finished):
            return self.outcome.result
        if self.outcome is None or self.outcome.code == Cancelled.code:
            raise Cancelled("The work was cancelled.")
        raise JobFailed(self.outcome.code, self.outcome.message)

    def settle(self, outcome: Finished | Failed) -> None:
        """Say how it ended; the first word counts."""
        if self.outcome is None:
            self.outcome = outcome
            self._done.set()


class Trainer:
    """Supervises one child process. Safe to use from several threads."""

    def __init__(
        self,
        limits: Callable[[], Limits] = Limits,
        command: tuple[str, ...] | None = None,
        *,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        """Start nothing yet: the first job starts the child.

        Args:
            limits: asked at every start of the child.
            command: the child's command line without its setup; this interpreter's `fl_client.child` when left out.
            start_deadline_s: within which the child must come up, and each task's libraries must be loaded.
        """
        self._limits = limits
        self._start_deadline_s = start_deadline_s
        self._watchdog: threading.Timer | None = None
        self._stuck = False
        self._rest_s = 0.0
        self._command = command or (sys.executable, "-m", "fl_client.child")
        self._tickets: dict[str, Ticket] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._applied: Limits | None = None
        self._paused = False
        self._ready = False
        self._killed_on_purpose = False
        self._fruitless = 0
        self._starts = 0
        self._closed = False
        self._change = threading.Condition()
        self._supervisor = threading.Thread(target=self._supervise, name="trainer-supervisor", daemon=True)
        self._supervisor.start()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_id(self) -> int | None:
        """The child's, while there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def submit(self, job: Job, listener: Listener = _deaf) -> Ticket:
        """Hand over a job; `listener` hears of its progress on the supervisor's thread."""
        ticket = Ticket(job, listener)
        with self._change:
            if self._closed:
                raise Cancelled("The trainer is closed.")
            self._tickets[job.id] = ticket
            self._send_waiting()
            self._change.notify_all()
        return ticket

    def run(self, job: Job, listener: Listener = _deaf) -> dict[str, Any]:
        """Do a job and return its result.

        Raises:
            JobFailed: it failed, for the reason that `cause_code` names.
        """
        ticket = self.submit(job, listener)
        try:
            return ticket.result()
        except BaseException:
            self.cancel(ticket)
            raise

    def cancel(self, ticket: Ticket) -> None:
        """Stop a job now; a child that does not give way within seconds is killed, and its other jobs begin anew."""
        with self._change:
            if ticket.outcome is not None:
                return
            if not ticket.sent:
                self._settle(ticket, Failed(id=ticket.job.id, code=Cancelled.code, message="The work was cancelled."))
                return
            self._tell(Cancel(id=ticket.job.id))
        if not ticket.wait(CANCEL_GRACE_S):
            with self._change:
                self._settle(ticket, Failed(id=ticket.job.id, code=Cancelled.code, message="The work was cancelled."))
                self._kill()

    def pause(self, paused: bool) -> None:
        """Hold training, or go on with it."""
        with self._change:
            if paused != self._paused:
                self._paused = paused
                self._tell(Pause(paused=paused))

    def refresh_limits(self) -> None:
        """Have changed limits take hold: an idle child is replaced at once, a busy one when it is idle."""
        with self._change:
            if self._process is not None and not self._tickets and self._stale():
                self._kill()

    def close(self) -> None:
        """End the child and every job."""
        with self._change:
            self._closed = True
            for ticket in list(self._tickets.values()):
                self._settle(ticket, Failed(id=ticket.job.id, code=Cancelled.code, message="The trainer was closed."))
            process = self._process
            if process is not None and process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            self._change.notify_all()
        if process is not None:
            try:
                process.wait(CLOSE_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._supervisor.join(CLOSE_GRACE_S)

    @property
    def restarts(self) -> int:
        """How often a child was started after one that had ended, for whatever reason."""
        return max(0, self._starts - 1)

    # ---- supervision ---------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """Start a child whenever there is work; on Linux it dies with this very thread, which lives as long as we do."""
        while True:
            with self._change:
                while not self._closed and not self._tickets:
                    self._change.wait()
                self._change.wait_for(lambda: self._closed, timeout=self._rest_s)
                if self._closed:
                    return
                process = self._started()
            if process is None:
                continue
            answers = process.stdout
            if answers is not None:
                self._listen(answers)
            process.wait()
            self._bury(process)

    def _started(self) -> subprocess.Popen[bytes] | None:
        """A new child; None where the machine has no room for one now, or the limits cannot be read."""
        try:
            return self._spawn()
        except Exception as error:
            # The outermost loop of this thread, without which every job would wait for ever.
            log.exception("trainer.not-started")
            self._rest_s = _longer(self._rest_s)
            self._blame([], partial(_not_started, error=error))
            return None

    def _spawn(self) -> subprocess.Popen[bytes]:
        limits = self._limits()
        setup = {
            "parent": os.getpid(),
            "memory_bytes": limits.memory_bytes,
            "gpu_memory_fraction": limits.gpu_memory_fraction,
        }
        process = subprocess.Popen(
            [*self._command, json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(os.environ, limits),
        )
        self._starts += 1
        self._process, self._applied, self._killed_on_purpose = process, limits, False
        self._ready = False
        self._arm(process)
        if self._paused:
            self._tell(Pause(paused=True))
        return process

    def _arm(self, process: subprocess.Popen[bytes]) -> None:
        """From now on the child must get on in time: it is coming up, or loads libraries."""
        self._disarm()
        self._watchdog = threading.Timer(self._start_deadline_s, self._give_up, (process,))
        self._watchdog.daemon = True
        self._watchdog.start()

    def _disarm(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None

    def _give_up(self, process: subprocess.Popen[bytes]) -> None:
        with self._change:
            if self._watchdog is threading.current_thread():
                self._stuck = True
                process.kill()

    def _stale(self) -> bool:
        wanted, applied = self._limits(), self._applied
        if applied is None:
            return False
        fields = ("cpu_threads", "memory_bytes", "gpu_memory_fraction")
        return any(getattr(wanted, name) != getattr(applied, name) for name in fields)

    def _listen(self, answers: IO[bytes]) -> None:
        while line := answers.readline(MAX_LINE_BYTES):
            try:
                event = EVENT.validate_json(line)
            except ValidationError:
                log.warning("trainer.unreadable-answer", size_bytes=len(line))
                continue
            self._take(event)

    def _take(self, event: JobEvent) -> None:
        with self._change:
            if isinstance(event, Loading) and self._process is not None:
                self._arm(self._process)
            else:
                self._disarm()
            if isinstance(event, Ready):
                self._ready = True
                self._send_waiting()
            ticket = self._tickets.get(event.id)
            if ticket is None:
                return
            if isinstance(event, Loading | Started):
                ticket.started = True
                self._fruitless = 0
        self._tell_listener(ticket, event)
        if isinstance(event, Finished | Failed):
            with self._change:
                self._settle(ticket, event)
                self._send_waiting()

    def _tell_listener(self, ticket: Ticket, event: JobEvent) -> None:
        try:
            ticket.listener(event)
        except Exception:
            # Whoever cannot hear misses it, such as a terminal that was closed; with this thread the child would die.
            log.exception("trainer.unheard", job=ticket.job.id)

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        """Decide what becomes of the jobs of a child that has ended."""
        with self._change:
            self._process = None
            self._disarm()
            stuck, self._stuck = self._stuck, False
            self._rest_s = _longer(self._rest_s) if stuck else 0.0
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            if self._closed:
                return
            active = [ticket for ticket in self._tickets.values() if ticket.started]
            for ticket in self._tickets.values():
                ticket.started = ticket.sent = False
            if self._killed_on_purpose or process.returncode == EXIT_OUT_OF_MEMORY:
                return
            log.warning("trainer.ended", returncode=process.returncode, active=len(active), stuck=stuck)
            self._blame(active, self._being_stuck if stuck else partial(_death_of, returncode=process.returncode))

    def _blame(self, active: list[Ticket], reason: Callable[[Ticket], Failed]) -> None:
        if len(active) == 1 and active[0].suspect:
            self._settle(active[0], reason(active[0]))
        elif active:
            for ticket in active:
                ticket.suspect = True
        else:
            self._fruitless += 1
            if self._fruitless >= MAX_FRUITLESS_STARTS:
                self._fruitless = 0
                for ticket in list(self._tickets.values()):
                    self._settle(ticket, reason(ticket))

    def _being_stuck(self, ticket: Ticket) -> Failed:
        text = (
            f"The trainer did not come up within {self._start_deadline_s:.0f} s and was ended, most likely for want of "
            "memory; give it more with `medhive-site settings --memory-mb`, or end other programs."
        )
        return Failed(id=ticket.job.id, code=TrainerStuck.code, message=text)

    def _settle(self, ticket: Ticket, outcome: Finished | Failed) -> None:
        self._tickets.pop(ticket.job.id, None)
        ticket.settle(outcome)

    def _send_waiting(self) -> None:
        """Send what the child has not been told; while something is suspected of killing children, that alone.

        Only to one that has come up: another does not read yet, and whoever waits for it here could not end it.
        """
        if self._process is None or not self._ready:
            return
        suspects = [ticket for ticket in self._tickets.values() if ticket.suspect]
        if any(ticket.sent for ticket in suspects):
            return
        for ticket in suspects[:1] or list(self._tickets.values()):
            if not ticket.sent:
                ticket.sent = self._tell(Start(job=ticket.job))

    def _tell(self, command: Start | Cancel | Pause) -> bool:
        process = self._process
        if process is None or process.stdin is None:
            return False
        try:
            process.stdin.write(command.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def _kill(self) -> None:
        if self._process is not None:
            self._killed_on_purpose = True
            self._process.kill()


def child_environment(own: Mapping[str, str], limits: Limits) -> dict[str, str]:
    """The trainer's environment: the parent's without its secrets, with the threads and memory that the hospital allows."""
    environment = {name: value for name, value in own.items() if name not in WITHHELD}
    if limits.cpu_threads is not None:
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(limits.cpu_threads)))
    if limits.memory_bytes is not None:
        environment.update(FEW_ARENAS)
    return environment


def _longer(rest_s: float) -> float:
    return min(2 * rest_s or FIRST_REST_S, LONGEST_REST_S)


def _not_started(ticket: Ticket, error: Exception) -> Failed:
    text = f"The trainer cannot be started ({error}); free memory or disk space on this machine, and try again."
    return Failed(id=ticket.job.id, code=TrainerCrashed.code, message=text)


def _death_of(ticket: Ticket, returncode: int) -> Failed:
    if returncode == -signal.SIGKILL:
        text = "The trainer was killed, most likely for want of memory; lower the batch size or give it more."
        return Failed(id=ticket.job.id, code=OutOfMemory.code, message=text)
    text = f"The trainer ended by itself (exit code {returncode}); its messages are above."
    return Failed(id=ticket.job.id, code=TrainerCrashed.code, message=text)

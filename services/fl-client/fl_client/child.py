"""The trainer: one warm process that holds data, models and device, and lets several runs take turns.

It is started by `fl_client.trainer` as `python -m fl_client.child`, takes commands on its standard input and answers on
what was its standard output. Each training is a generator that gives way after every step, so a short run is not held up
by a long one. It never outlives its parent: the end of its input, and on Linux a signal from the kernel, end it.
"""

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from fl_client.jobs import (
    COMMAND,
    EXIT_OUT_OF_MEMORY,
    MAX_LINE_BYTES,
    PAUSABLE,
    Cancel,
    DataChanged,
    Epoch,
    Failed,
    Finished,
    Job,
    JobEvent,
    JobKind,
    Loading,
    Opened,
    OutOfMemory,
    Pause,
    Plan,
    Reading,
    Ready,
    Source,
    Start,
    Started,
)
from fl_client.local_round import evaluated, finite, local_round, validated, with_own
from fl_client.tasks import (
    EpochProgress,
    Judged,
    LocalOptions,
    RoundPlan,
    Skipped,
    Weights,
    Workspace,
    load_task,
)
from fl_client.uncompiled import leave_out_the_compiler
from medhive.errors import InvalidInput, MedHiveError, NoSpace, TooLarge
from medhive.packing import read_weights, write_weights

# How long one run trains before the next one has its turn: long against a step, short against a round.
SLICE_S = 0.25
# More runs than these wait: each active one holds a model and an optimiser.
MAX_ACTIVE = 4
# Opened data sets that are kept ready.
MAX_WORKSPACES = 3
READING_EVERY_S = 0.5  # progress of reading is for a person's eye
PR_SET_PDEATHSIG = 1  # prctl(2)
# Training gives way to everything else on the machine: to the node loop, whose answers others wait for, first of all.
NICENESS = 10

# What libraries say when memory is short and the exception's class does not tell.
MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "failed to map segment",  # the dynamic linker, of a library that no longer fits
)

Result = TypeVar("Result")
Steps = Generator[JobEvent | None, None, dict[str, Any]]


class Trainer:
    """The trainer's loop."""

    def __init__(self, tell: Callable[[JobEvent], None]) -> None:
        self._tell = tell
        self._commands: queue.SimpleQueue[Start | Cancel | Pause] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._active: deque[tuple[Job, Steps]] = deque()
        self._workspaces: OrderedDict[str, Workspace] = OrderedDict()
        self._loaded: set[str] = set()
        self._paused = False

    def give(self, command: Start | Cancel | Pause) -> None:
        """Take a command, from any thread."""
        self._commands.put(command)

    def serve(self) -> None:
        """Work for ever."""
        self._tell(Ready())
        while True:
            self._take_commands(wait=not self._runnable())
            self._activate()
            for _turn in range(len(self._active)):
                if not self._active:
                    break
                job, steps = self._active.popleft()
                if self._may_step(job) and not self._slice(job, steps):
                    continue
                self._active.append((job, steps))
                self._take_commands(wait=False)

    def _may_step(self, job: Job) -> bool:
        return not (self._paused and job.kind in PAUSABLE)

    def _runnable(self) -> bool:
        jobs = [job for job, _steps in self._active]
        if len(self._active) < MAX_ACTIVE:
            jobs.extend(self._waiting)
        return any(self._may_step(job) for job in jobs)

    def _take_commands(self, *, wait: bool) -> None:
        while wait or not self._commands.empty():
            command = self._commands.get()
            wait = False
            if isinstance(command, Start):
                self._waiting.append(command.job)
            elif isinstance(command, Cancel):
                self._cancel(command.id)
            else:
                self._paused = command.paused

    def _cancel(self, job_id: str) -> None:
        self._waiting = deque(job for job in self._waiting if job.id != job_id)
        for item in list(self._active):
            if item[0].id == job_id:
                item[1].close()
                self._active.remove(item)
        self._tell(Failed(id=job_id, code="cancelled", message="The work was cancelled."))

    def _activate(self) -> None:
        for job in list(self._waiting):
            if len(self._active) < MAX_ACTIVE and self._may_step(job):
                self._waiting.remove(job)
                self._active.append((job, self._begun(job)))

    def _slice(self, job: Job, steps: Steps) -> bool:
        """Advance one job for a while; False once it is over."""
        until = time.monotonic() + SLICE_S
        try:
            while time.monotonic() < until:
                event = next(steps)
                if event is not None:
                    self._tell(event)
        except StopIteration as end:
            self._tell(Finished(id=job.id, result=end.value))
            return False
        except MedHiveError as error:
            self._tell(Failed(id=job.id, code=error.code, message=str(error)))
            return False
        except Exception as error:  # noqa: BLE001 - the outermost loop of this process
            self._fail(job, error)
            return False
        return True

    def _fail(self, job: Job, error: Exception) -> None:
        if is_out_of_memory(error):
            text = "Training needed more memory than it may have; lower the batch size or raise the limit."
            self._tell(Failed(id=job.id, code=OutOfMemory.code, message=text))
            # What could not be allocated may have left fragments behind: the parent starts a fresh process.
            os._exit(EXIT_OUT_OF_MEMORY)
        traceback.print_exc(file=sys.stderr)
        text = f"Training stopped by an error of the software: {type(error).__name__}: {error}."
        self._tell(Failed(id=job.id, code="internal-error", message=text))

    # ---- the kinds of jobs ---------------------------------------------------------------------------------------

    def _begun(self, job: Job) -> Steps:
        task = job.source.task
        # Looking at data starts quickly because it needs no heavy library.
        if job.kind is not JobKind.CHECK and task not in self._loaded:
            yield Loading(id=job.id)
            load_task(task).load()
            self._loaded.add(task)
        yield Started(id=job.id)
        return (yield from self._steps(job))

    def _steps(self, job: Job) -> Steps:
        kinds: dict[JobKind, Callable[[Job], Steps]] = {
            JobKind.CHECK: self._check,
            JobKind.INITIALISE: self._initialise,
            JobKind.STATISTICS: self._statistics,
            JobKind.TRAIN: self._train,
            JobKind.EVALUATE: self._evaluate,
            JobKind.JUDGE: self._judge,
            JobKind.LOCAL_ONLY: self._local_only,
            JobKind.PREDICT: self._predict,
        }
        return kinds[job.kind](job)

    def _check(self, job: Job) -> Steps:
        yield None
        source = job.source
        task = load_task(source.task)
        report = task.check(
            source.data_dir,
            source.read_as,
            source.secret_file.read_bytes(),
            on_progress=self._reading(job),
            local=local_options(source),
        )
        return report.to_json()

    def _initialise(self, job: Job) -> Steps:
        workspace = yield from self._open(job)
        return _pack(_out_of(job), workspace.initial_weights(job.source.data.initial_seed))

    def _statistics(self, job: Job) -> Steps:
        workspace = yield from self._open(job)
        sums = workspace.statistics() or {}
        return {"statistics": {name: [float(x) for x in values.ravel()] for name, values in sums.items()}}

    def _train(self, job: Job) -> Steps:
        started = time.time()
        plan = _plan_of(job)
        workspace = yield from self._open(job)
        base, own = read_weights(_base_of(job)), _own(job, "base") if plan.own_out is not None else None
        correction = read_weights(plan.correction) if plan.correction is not None else None
        yield None
        deadline = started + plan.deadline_s if plan.deadline_s else None
        state = plan.state_in.read_bytes() if plan.state_in is not None else None
        round_plan = replace(_round_plan(plan, deadline, state), correction=correction)
        done = yield from _told(job, plan.round, local_round(workspace, base, round_plan, own))
        if plan.state_out is not None and done.optimiser_state is not None:
            _write_durably(plan.state_out, done.optimiser_state)
        if plan.own_out is not None and done.own is not None:
            write_weights(plan.own_out, dict(done.own))
        return {
            **_pack(_out_of(job), done.weights),
            "examples": done.examples,
            "metrics": done.metrics,
            "confusion": done.confusion,
            "rate_sum": done.rate_sum,
            "training_s": time.time() - started,
        }

    def _evaluate(self, job: Job) -> Steps:
        started = time.time()
        workspace = yield from self._open(job)
        judged = yield from validated(workspace, _weights(job, "base"))
        return {**asdict(judged), "training_s": time.time() - started}

    def _judge(self, job: Job) -> Steps:
        workspace = yield from self._open(job)
        from fl_client.tasks.evaluation import compare  # noqa: PLC0415 - came with the task's own libraries

        judged: dict[str, Judged] = {}
        for name in job.weights:
            judged[name] = yield from workspace.judge(_weights(job, name), job.part)
        evaluations = {}
        for name, item in judged.items():
            evaluations[name] = {**evaluated(workspace, item).to_json(), "own": finite(item.metrics)}
            yield None
        first, *others = judged
        comparisons = {}
        for name in others:
            pair = (judged[first].probabilities, judged[name].probabilities)
            comparisons[name] = compare(judged[first].labels, *pair).to_json()
            yield None
        return {
            "evaluations": evaluations,
            "comparisons": comparisons,
            "fingerprint": workspace.report.fingerprint,
        }

    def _local_only(self, job: Job) -> Steps:
        """The same recipe on the own data alone: the same rounds and epochs from the same seed, no proximal term."""
        plan = _plan_of(job)
        workspace = yield from self._open(job)
        own = workspace.statistics()
        if own:
            # Its own sums stand in for those of all sites, so nobody else may be given this workspace.
            self._workspaces.clear()
            workspace.use_statistics(own)
        weights = workspace.initial_weights(job.source.data.initial_seed)
        state: bytes | None = None
        for number in range(1, plan.rounds + 1):
            one = replace(_round_plan(plan, None, state), round=number, mu=0.0)
            result = yield from _told(job, number, workspace.train(weights, one))
            weights, state = result.weights, result.optimiser_state
        return {**_pack(_out_of(job), weights), "fingerprint": workspace.report.fingerprint}

    def _predict(self, job: Job) -> Steps:
        yield None
        predictor = load_task(job.source.task).predictor(job.source.data, device=job.device)
        tell = self._reading(job)
        found: list[dict[str, Any]] = []
        for done, (path, items) in enumerate(predictor.predict_files(_weights(job, "base"), job.paths), 1):
            found.extend({"path": str(path), **_prediction(item)} for item in items)
            tell(done, len(job.paths))
            yield None
        return {"predictions": found}

    # ---- data ----------------------------------------------------------------------------------------------------

    def _reading(self, job: Job) -> Callable[[int, int], None]:
        last = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done >= total or now - last >= READING_EVERY_S:
                last = now
                self._tell(Reading(id=job.id, done=done, total=total))

        return tell

    def _open(self, job: Job) -> Generator[JobEvent | None, None, Workspace]:
        """The job's data, kept from an earlier job or read now.

        Raises:
            DataChanged: they are not those that were consented to.
        """
        key = job.source.model_dump_json() + job.device
        workspace = self._workspaces.pop(key, None)
        if workspace is not None and job.fingerprint not in ("", workspace.report.fingerprint):
            workspace = None
        if workspace is None:
            workspace = self._read(job)
        if job.fingerprint not in ("", workspace.report.fingerprint):
            raise DataChanged("The data were changed since they were consented to; decline or consent anew.")
        self._workspaces[key] = workspace
        while len(self._workspaces) > MAX_WORKSPACES:
            self._workspaces.popitem(last=False)
        report = workspace.report
        yield Opened(
            id=job.id,
            classes=dict(report.classes),
            parts={part: dict(counts) for part, counts in report.parts.items()},
        )
        return workspace

    def _read(self, job: Job) -> Workspace:
        source = job.source
        workspace = load_task(source.task).open(
            source.data_dir,
            source.read_as,
            source.secret_file.read_bytes(),
            device=job.device,
            on_progress=self._reading(job),
            local=local_options(source),
        )
        if source.statistics:
            import numpy as np  # noqa: PLC0415 - only tables come here

            workspace.use_statistics({name: np.asarray(values) for name, values in source.statistics.items()})
        return workspace


def local_options(source: Source) -> LocalOptions:
    """A source's local settings as the tasks take them."""
    return LocalOptions(
        class_map=source.class_map,
        groups_csv=source.groups_csv,
        weights_file=source.weights_file,
        labels_csv=source.labels_csv,
        cache_dir=source.cache_dir,
        cache_bytes=source.cache_bytes,
        subset="judge" if source.evaluates_only else "train",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, the machine's or the GPU's, was short."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and any(
        word in str(error).lower() for word in MEMORY_WORDS
    )


def _round_plan(plan: Plan, deadline: float | None, state: bytes | None) -> RoundPlan:
    return RoundPlan(
        round=plan.round,
        rounds=plan.rounds,
        local_epochs=plan.local_epochs,
        batch_size=plan.batch_size,
        lr=plan.lr,
        mu=plan.mu,
        seed=plan.seed,
        optimiser_state=state,
        deadline=deadline,
        penalty=plan.penalty,
        C=plan.C,
    )


def _told(
    job: Job, number: int, steps: Generator[EpochProgress | None, None, Result]
) -> Generator[JobEvent | None, None, Result]:
    """The same steps, each epoch told to the parent."""
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            return cast(Result, end.value)
        yield Epoch(id=job.id, round=number, **asdict(progress)) if progress is not None else None


def _prediction(item: Any) -> dict[str, Any]:
    if isinstance(item, Skipped):
        return {"name": item.name, "skipped": item.reason}
    return {"name": item.name, "label": item.label, "probabilities": dict(item.probabilities)}


def _pack(path: Path, weights: Mapping[str, Any]) -> dict[str, Any]:
    digest = write_weights(path, dict(weights))
    return {"digest": digest, "size_bytes": path.stat().st_size}


def _write_durably(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NoSpace(f"Cannot write {path.name} to the state folder: {error.strerror}.") from error
    part.replace(path)


def _plan_of(job: Job) -> Plan:
    if job.plan is None:
        raise InvalidInput("The job has no plan.")
    return job.plan


def _out_of(job: Job) -> Path:
    if job.out is None:
        raise InvalidInput("The job does not say where its weights shall be written.")
    return job.out


def _base_of(job: Job) -> Path:
    return job.weights["base"]


def _own(job: Job, name: str) -> Weights:
    return read_weights(job.own[name]) if name in job.own else {}


def _weights(job: Job, name: str) -> Weights:
    """A model as this site uses it."""
    return with_own(read_weights(job.weights[name]), _own(job, name))


# ---- the process ---------------------------------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Ask the kernel for a signal when the parent ends; the end of the input does the same elsewhere, later."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def apply_limits(memory_bytes: int | None, gpu_memory_fraction: float | None) -> None:
    """Take the hospital's limits on; threads are set by the parent in the environment."""
    if memory_bytes is not None and sys.platform != "win32":
        import resource  # noqa: PLC0415 - absent on Windows

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if gpu_memory_fraction is not None:
        import torch  # noqa: PLC0415 - seconds of imports, needed only where there is a GPU

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(gpu_memory_fraction)


def read_commands(source: IO[bytes], trainer: Trainer) -> None:
    """Hand commands on until the input ends, then end the process: the parent is gone."""
    while line := source.readline(MAX_LINE_BYTES):
        trainer.give(COMMAND.validate_json(line))
    os._exit(0)


def line_of(event: JobEvent) -> bytes:
    """An event as the parent reads it; one that is too long for that as the failure that it is."""
    line = event.model_dump_json().encode() + b"\n"
    if len(line) <= MAX_LINE_BYTES:
        return line
    text = (
        f"The result takes more than {MAX_LINE_BYTES} bytes; ask for it in parts, such as fewer files or rows at once."
    )
    return line_of(Failed(id=event.id, code=TooLarge.code, message=text))


def give_way() -> None:
    """Let this process have what processor time others leave."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    # Linux compares niceness only within a session where it groups processes by session (sched(7), autogroup).
    with suppress(OSError):
        os.setsid()
        Path("/proc/self/autogroup").write_text(f"{NICENESS}\n")


def main() -> None:
    """Run as a process of its own; the one argument is a JSON object with the parent's id and the limits."""
    setup = json.loads(sys.argv[1])
    die_with_parent(setup["parent"])
    # A person's Ctrl-C goes to the whole group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def tell(event: JobEvent) -> None:
        with lock, suppress(BrokenPipeError):
            answers.write(line_of(event))
            answers.flush()

    trainer = Trainer(tell)
    threading.Thread(target=read_commands, args=(sys.stdin.buffer, trainer), daemon=True, name="commands").start()
    leave_out_the_compiler()
    apply_limits(setup.get("memory_bytes"), setup.get("gpu_memory_fraction"))
    give_way()
    trainer.serve()


if __name__ == "__main__":
    main()

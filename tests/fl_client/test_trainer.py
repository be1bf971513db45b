"""The trainer: one warm child, several runs in turn, and what becomes of them when it dies."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from site_data import IMAGES, TABLE, make_images, make_table

import fl_client.child
import fl_client.trainer
from fl_client.child import NICENESS
from fl_client.jobs import (
    Cancelled,
    Epoch,
    Failed,
    Finished,
    Job,
    JobEvent,
    JobFailed,
    JobKind,
    Opened,
    Plan,
    Reading,
    Source,
    Started,
)
from fl_client.limits import SMALLEST_MEMORY_BYTES, Limits
from fl_client.store import Store
from fl_client.trainer import Ticket, Trainer, child_environment
from medhive.errors import InvalidInput, NoSpace
from medhive.packing import read_weights, sha256_file, write_weights

DEADLINE_S = 60.0
ONE_THREAD = Limits(cpu_threads=1, device="cpu")


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    with Trainer(lambda: ONE_THREAD) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_of(tmp_path_factory.mktemp("site"), "image-folder")


def source_of(folder: Path, task: str) -> Source:
    secret = folder / "data.secret"
    secret.write_bytes(b"s" * 32)
    if task == "image-folder":
        return Source(task=task, data=IMAGES, data_dir=make_images(folder / "data"), secret_file=secret)
    make_table(folder / "data")
    return Source(task=task, data=TABLE, data_dir=folder / "data", secret_file=secret)


def training(source: Source, folder: Path, name: str, *, epochs: int = 2, **more: object) -> Job:
    plan = Plan(round=1, rounds=2, local_epochs=epochs, batch_size=16, seed=3, state_out=folder / f"{name}.state")
    fields = {"weights": {"base": folder / "base.safetensors"}, "plan": plan, "out": folder / f"{name}.safetensors"}
    return Job.model_validate({"id": name, "kind": JobKind.TRAIN, "source": source, "device": "cpu", **fields, **more})


def make_base(trainer: Trainer, source: Source, folder: Path) -> None:
    out = folder / "base.safetensors"
    trainer.run(Job(id="initialise", kind=JobKind.INITIALISE, source=source, device="cpu", out=out))


def started(ticket_events: list[JobEvent]) -> bool:
    return any(isinstance(event, Started) for event in ticket_events)


def starts(ticket_events: list[JobEvent]) -> int:
    return sum(isinstance(event, Started) for event in ticket_events)


def kill(trainer: Trainer) -> None:
    """kill -9 the child."""
    assert trainer.process_id, "there is none"
    os.kill(trainer.process_id, signal.SIGKILL)


def wait_for(condition: object, deadline_s: float = DEADLINE_S) -> None:
    until = time.monotonic() + deadline_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def test_trains_a_round_and_writes_an_update(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    events: list[JobEvent] = []
    result = trainer.run(training(images, tmp_path, "a"), events.append)
    assert result["digest"] == sha256_file(tmp_path / "a.safetensors")
    assert result["examples"] > 0
    assert {"val_accuracy", "val_loss", "train_loss", "train_accuracy"} <= result["metrics"].keys()
    assert [event.epoch for event in events if isinstance(event, Epoch)] == [1, 2]
    assert sum(map(sum, result["confusion"])) > 0


def test_the_same_plan_gives_the_same_bits_alone_and_in_company(
    trainer: Trainer, images: Source, tmp_path: Path
) -> None:
    make_base(trainer, images, tmp_path)
    alone = trainer.run(training(images, tmp_path, "alone"))
    tickets = [trainer.submit(training(images, tmp_path, name)) for name in ("left", "right")]
    assert {ticket.result()["digest"] for ticket in tickets} == {alone["digest"]}


def test_a_short_run_is_not_held_up_by_a_long_one(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    long = trainer.submit(training(images, tmp_path, "long", epochs=10_000))
    short = trainer.submit(training(images, tmp_path, "short", epochs=1))
    assert short.wait(DEADLINE_S)
    assert long.outcome is None
    trainer.cancel(long)
    with pytest.raises(Cancelled):
        long.result()


def test_cancelling_stops_one_run_and_leaves_the_child_warm(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    process = trainer.process_id
    ticket = trainer.submit(training(images, tmp_path, "long", epochs=100))
    trainer.cancel(ticket)
    trainer.run(training(images, tmp_path, "next", epochs=1))
    assert trainer.process_id == process


def test_a_killed_childs_job_begins_anew_with_the_same_result(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    unbroken = trainer.run(training(images, tmp_path, "one", epochs=4))["digest"]
    events: list[JobEvent] = []

    def kill_the_first(event: JobEvent) -> None:
        events.append(event)
        if isinstance(event, Started) and starts(events) == 1:
            kill(trainer)  # here and now: a training of four epochs is soon over

    ticket = trainer.submit(training(images, tmp_path, "two", epochs=4), kill_the_first)
    assert ticket.result()["digest"] == unbroken
    assert starts(events) == 2


def test_a_job_that_kills_two_children_is_out_of_memory_and_the_next_one_works(
    trainer: Trainer, images: Source, tmp_path: Path
) -> None:
    make_base(trainer, images, tmp_path)
    events: list[JobEvent] = []
    ticket = trainer.submit(training(images, tmp_path, "big", epochs=100), events.append)
    for deaths in (1, 2):
        wait_for(lambda count=deaths: starts(events) == count)
        kill(trainer)
    with pytest.raises(JobFailed) as caught:
        ticket.result()
    assert caught.value.cause_code == "out-of-memory"
    assert trainer.run(training(images, tmp_path, "next", epochs=1))["examples"] > 0


def test_when_a_child_with_two_runs_dies_both_are_tried_again(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    events: list[JobEvent] = []
    tickets = [trainer.submit(training(images, tmp_path, name, epochs=4), events.append) for name in ("left", "right")]
    wait_for(lambda: sum(isinstance(event, Started) for event in events) == 2)
    kill(trainer)
    assert len({ticket.result()["digest"] for ticket in tickets}) == 1


def test_a_job_without_memory_is_answered_with_the_reason(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    tight = Limits(cpu_threads=1, memory_bytes=SMALLEST_MEMORY_BYTES, device="cpu")
    wide = images.data.model_copy(update={"options": {"image_size": 1024, "model": "resnet-gn-wide"}})
    big = images.model_copy(update={"data": wide})
    (tmp_path / "big").mkdir()
    make_base(trainer, big, tmp_path / "big")
    with Trainer(lambda: tight) as narrow:
        # The libraries load, and small jobs are done, with the least memory that may be set.
        make_base(narrow, images, tmp_path)
        narrow.run(training(images, tmp_path, "small", epochs=1))
        with pytest.raises(JobFailed) as caught:
            narrow.run(training(big, tmp_path / "big", "big"))
    assert caught.value.cause_code == "out-of-memory"


def test_less_memory_than_the_libraries_need_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"at least \d+ MB of memory"):
        Limits(memory_bytes=SMALLEST_MEMORY_BYTES - 1)
    store = Store(tmp_path / "site.db")
    store.set_fact("limits", {**asdict(Limits()), "memory_bytes": 700_000_000})
    assert Limits.load(store).memory_bytes == SMALLEST_MEMORY_BYTES


# A child that says that it has come up, and takes its first command.
UP = (
    "import json, sys, time\nprint(json.dumps({'say': 'ready', 'id': ''}), flush=True)\n"
    "job = json.loads(sys.stdin.readline())['job']\n"
)
LOADING = "print(json.dumps({'say': 'loading', 'id': job['id']}), flush=True)\n"
HANGING = "import time; time.sleep(3600)\n"


@pytest.mark.parametrize("script", [HANGING, UP + LOADING + HANGING], ids=["starting", "loading"])
def test_a_child_that_does_not_come_up_is_ended_and_tried_again(
    script: str, images: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fl_client.trainer, "FIRST_REST_S", 0.1)
    spawned: list[int] = []
    spawn = Trainer._spawn

    def counted(trainer: Trainer) -> "subprocess.Popen[bytes]":
        process = spawn(trainer)
        spawned.append(process.pid)
        return process

    monkeypatch.setattr(Trainer, "_spawn", counted)
    with Trainer(lambda: ONE_THREAD, (sys.executable, "-c", script), start_deadline_s=1.0) as trainer:
        with pytest.raises(JobFailed, match="did not come up within 1 s") as caught:
            # Longer than a pipe holds, which such a child does not empty.
            paths = tuple(images.data_dir / f"{number:0100}" for number in range(2000))
            trainer.run(Job(id="check", kind=JobKind.CHECK, source=images, paths=paths))
        assert trainer._rest_s > fl_client.trainer.FIRST_REST_S, "each rest is longer than the one before"
    assert caught.value.cause_code == "trainer-stuck"
    assert len(spawned) >= 2
    assert not any(alive(process) for process in spawned)


def test_a_child_that_has_come_up_may_take_its_time(images: Source) -> None:
    started = LOADING + "print(json.dumps({'say': 'started', 'id': job['id']}), flush=True)\ntime.sleep(7)\n"
    done = "print(json.dumps({'say': 'finished', 'id': job['id'], 'result': {'x': 1}}), flush=True)\n"
    command = (sys.executable, "-c", UP + started + done)
    with Trainer(lambda: ONE_THREAD, command, start_deadline_s=5.0) as trainer:
        assert trainer.run(Job(id="check", kind=JobKind.CHECK, source=images)) == {"x": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux compares niceness by session")
def test_a_running_trainer_gives_way(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    events: list[JobEvent] = []
    ticket = trainer.submit(training(images, tmp_path, "long", epochs=100), events.append)
    wait_for(lambda: any(isinstance(event, Epoch) for event in events))
    process = trainer.process_id or 0
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, process) == min(19, own + NICENESS)
    assert NICENESS == 10
    assert os.getsid(process) == process, "a session of its own, by which Linux groups processes"
    trainer.cancel(ticket)


def test_a_paused_trainer_waits_and_goes_on(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    trainer.pause(True)
    events: list[JobEvent] = []
    ticket = trainer.submit(training(images, tmp_path, "a", epochs=1), events.append)
    # People's own questions are answered meanwhile, so the child has certainly seen the training too.
    trainer.run(Job(id="check", kind=JobKind.CHECK, source=images))
    assert not started(events)
    trainer.pause(False)
    assert ticket.wait(DEADLINE_S)
    assert started(events)


def test_changed_data_are_refused(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    report = trainer.run(Job(id="check", kind=JobKind.CHECK, source=images))
    trainer.run(training(images, tmp_path, "a", epochs=1, fingerprint=report["fingerprint"]))
    with pytest.raises(JobFailed) as caught:
        trainer.run(training(images, tmp_path, "b", epochs=1, fingerprint="0" * 64))
    assert caught.value.cause_code == "data-changed"


def test_other_weights_than_the_studys_are_refused(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    other = source_of(tmp_path, "tabular")
    make_base(trainer, other, tmp_path)
    with pytest.raises(JobFailed) as caught:
        trainer.run(training(images, tmp_path, "a"))
    assert caught.value.cause_code == "wrong-architecture"


def test_an_optimiser_state_carries_over_and_the_repeat_is_exact(
    trainer: Trainer, images: Source, tmp_path: Path
) -> None:
    make_base(trainer, images, tmp_path)
    trainer.run(training(images, tmp_path, "one"))

    def second(name: str) -> Job:
        plan = Plan(round=2, rounds=2, local_epochs=1, batch_size=16, state_in=tmp_path / "one.state")
        weights = {"base": tmp_path / "one.safetensors"}
        return training(images, tmp_path, name, plan=plan, weights=weights)

    assert trainer.run(second("two"))["digest"] == trainer.run(second("again"))["digest"]


def test_layers_of_its_own_take_the_place_of_the_global_ones(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    options = {**images.data.options, "model": "resnet-bn"}
    images = images.model_copy(update={"data": images.data.model_copy(update={"options": options})})
    make_base(trainer, images, tmp_path)
    base, own = tmp_path / "base.safetensors", tmp_path / "own-1.safetensors"
    plan = Plan(round=1, rounds=2, local_epochs=1, batch_size=16, own_out=own)
    trainer.run(training(images, tmp_path, "one", plan=plan))
    kept, trained = read_weights(own), read_weights(tmp_path / "one.safetensors")
    assert 0 < len(kept) < len(trained)
    assert all(np.array_equal(kept[name], trained[name]) for name in kept)
    # The next round begins from the own layers in the global weights: the same as from such a file.
    write_weights(tmp_path / "mixed", read_weights(base) | kept)
    again = plan.model_copy(update={"round": 2, "own_out": tmp_path / "own-2.safetensors"})
    by_own = trainer.run(training(images, tmp_path, "two", plan=again, own={"base": own}))
    mixed = {"base": tmp_path / "mixed"}
    assert by_own["digest"] == trainer.run(training(images, tmp_path, "three", plan=again, weights=mixed))["digest"]
    for kind in (JobKind.EVALUATE, JobKind.JUDGE):
        fields: dict[str, Any] = {"id": "x", "kind": kind, "source": images, "device": "cpu", "part": "validation"}
        said = [
            trainer.run(Job(**fields, weights={"base": base}, own={"base": own})),
            trainer.run(Job(**fields, weights=mixed)),
            trainer.run(Job(**fields, weights={"base": base})),
        ]
        for item in said:
            item.pop("training_s", None)
        assert said[0] == said[1] != said[2]


def test_a_correction_is_read_and_taken_off(trainer: Trainer, images: Source, tmp_path: Path) -> None:
    make_base(trainer, images, tmp_path)
    base = read_weights(tmp_path / "base.safetensors")
    write_weights(tmp_path / "correction", {name: np.full_like(value, 0.1) for name, value in base.items()})
    plan = Plan(round=1, rounds=2, local_epochs=1, batch_size=16)
    plain = trainer.run(training(images, tmp_path, "plain", plan=plan))
    corrected = plan.model_copy(update={"correction": tmp_path / "correction"})
    result = trainer.run(training(images, tmp_path, "corrected", plan=corrected))
    assert result["rate_sum"] == plain["rate_sum"] > 0
    assert result["digest"] != plain["digest"]


def test_a_table_is_trained_with_the_statistics_of_all(trainer: Trainer, tmp_path: Path) -> None:
    source = source_of(tmp_path, "tabular")
    sums = trainer.run(Job(id="sums", kind=JobKind.STATISTICS, source=source))["statistics"]
    assert sums["examples"][0] > 0
    pooled = source.model_copy(update={"statistics": sums})
    make_base(trainer, pooled, tmp_path)
    result = trainer.run(training(pooled, tmp_path, "a", epochs=5))
    assert result["metrics"]["train_accuracy"] > 0.7
    judged = trainer.run(
        Job(
            id="judge",
            kind=JobKind.JUDGE,
            source=pooled,
            weights={"candidate": tmp_path / "a.safetensors", "champion": tmp_path / "base.safetensors"},
        )
    )
    better, worse = (judged["evaluations"][name]["accuracy"]["value"] for name in ("candidate", "champion"))
    assert better > worse
    assert judged["comparisons"]["champion"]["difference"]["value"] == pytest.approx(better - worse)


def test_predicting_opens_no_data_and_names_what_cannot_be_read(
    trainer: Trainer, images: Source, tmp_path: Path
) -> None:
    make_base(trainer, images, tmp_path)
    bad, none = tmp_path / "bad.jpg", tmp_path / "none.jpg"
    bad.write_bytes(b"x")
    paths = (bad, *sorted(images.data_dir.rglob("*.jpg")), none)
    nowhere = images.model_copy(update={"data_dir": tmp_path / "nowhere"})
    weights = {"base": tmp_path / "base.safetensors"}
    events: list[JobEvent] = []
    job = Job(id="predict", kind=JobKind.PREDICT, source=nowhere, device="cpu", weights=weights, paths=paths)
    found = trainer.run(job, events.append)["predictions"]
    assert [item["path"] for item in found] == [str(path) for path in paths]
    assert [item["skipped"] for item in (found[0], found[-1])] == ["corrupt", "unreadable"]
    assert all(sum(item["probabilities"].values()) == pytest.approx(1) for item in found[1:-1])
    reading = [event for event in events if isinstance(event, Reading)]
    assert (reading[-1].done, reading[-1].total) == (len(paths), len(paths))
    assert not any(isinstance(event, Opened) for event in events)


@pytest.mark.parametrize("kind", [JobKind.JUDGE, JobKind.EVALUATE])
def test_judging_gives_way_as_training_does(
    kind: JobKind, trainer: Trainer, images: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(trainer, images, tmp_path)
    base = tmp_path / "base.safetensors"
    weights = {"base": base} if kind is JobKind.EVALUATE else {"candidate": base, "champion": base}
    monkeypatch.setattr("fl_client.tasks.image_training.EVALUATION_BATCH", 2)
    job = Job(id="judge", kind=kind, source=images, device="cpu", weights=weights, part="validation")
    counts: list[int] = []
    steps = fl_client.child.Trainer(lambda _event: None)._steps(job)
    places = 0
    for event in steps:
        if isinstance(event, Opened):
            counts.append(sum(event.parts["validation"].values()))
        places += event is None
    assert counts[0] > 2
    assert places >= len(weights) * math.ceil(counts[0] / 2)


def test_a_local_only_model_has_the_studys_layout(trainer: Trainer, tmp_path: Path) -> None:
    source = source_of(tmp_path, "tabular")
    make_base(trainer, source, tmp_path)
    plan = Plan(round=1, rounds=3, local_epochs=5, batch_size=32)
    out = tmp_path / "own.safetensors"
    trainer.run(Job(id="own", kind=JobKind.LOCAL_ONLY, source=source, plan=plan, out=out))
    assert read_weights(out).keys() == read_weights(tmp_path / "base.safetensors").keys()


def test_a_child_that_cannot_start_fails_its_jobs(tmp_path: Path, images: Source) -> None:
    with Trainer(lambda: ONE_THREAD, (sys.executable, "-c", "raise SystemExit(3)")) as trainer:
        ticket = trainer.submit(Job(id="check", kind=JobKind.CHECK, source=images))
        with pytest.raises(JobFailed) as caught:
            ticket.result()
    assert caught.value.cause_code == "trainer-crashed"


DONE = UP + "print(json.dumps({'say': 'finished', 'id': job['id'], 'result': {'x': 1}}), flush=True)\n"


def test_what_cannot_be_started_is_tried_again(images: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fl_client.trainer, "FIRST_REST_S", 0.01)
    problems: list[Exception] = [NoSpace("full"), OSError(errno.ENOMEM, "Cannot allocate memory")]

    def limits() -> Limits:
        if problems:
            raise problems.pop()
        return ONE_THREAD

    job = Job(id="check", kind=JobKind.CHECK, source=images)
    with Trainer(limits, (sys.executable, "-c", DONE)) as trainer:
        ticket = trainer.submit(job)
        assert ticket.wait(DEADLINE_S)
        assert ticket.result() == {"x": 1}
    with Trainer(lambda: ONE_THREAD, ("/nowhere/python",)) as trainer:
        ticket = trainer.submit(job)
        assert ticket.wait(DEADLINE_S)
        with pytest.raises(JobFailed, match=r"cannot be started .*/nowhere/python") as caught:
            ticket.result()
    assert caught.value.cause_code == "trainer-crashed"


def test_a_listener_that_fails_ends_no_job(images: Source) -> None:
    def listen(_event: JobEvent) -> None:
        raise BrokenPipeError("the terminal was closed")

    with Trainer(lambda: ONE_THREAD, (sys.executable, "-c", DONE)) as trainer:
        for name in ("first", "second"):
            ticket = trainer.submit(Job(id=name, kind=JobKind.CHECK, source=images), listen)
            assert ticket.wait(DEADLINE_S)
            assert ticket.result() == {"x": 1}


def test_a_result_that_is_too_long_is_said_to_be(tmp_path: Path) -> None:
    source = source_of(tmp_path, "tabular")
    script = "import fl_client.child as child\nchild.MAX_LINE_BYTES = 4000\nchild.main()\n"
    with Trainer(lambda: ONE_THREAD, (sys.executable, "-c", script)) as trainer:
        make_base(trainer, source, tmp_path)
        weights = {"base": tmp_path / "base.safetensors"}
        paths = tuple(source.data_dir.rglob("*.csv"))
        ticket = trainer.submit(
            Job(id="predict", kind=JobKind.PREDICT, source=source, device="cpu", weights=weights, paths=paths)
        )
        assert ticket.wait(DEADLINE_S)
        with pytest.raises(JobFailed, match="more than 4000 bytes; ask for it in parts") as caught:
            ticket.result()
    assert caught.value.cause_code == "too-large"


def test_closing_ends_the_child_and_every_job(images: Source, tmp_path: Path) -> None:
    trainer = Trainer(lambda: ONE_THREAD)
    make_base(trainer, images, tmp_path)
    ticket = trainer.submit(training(images, tmp_path, "long", epochs=100))
    process = trainer.process_id
    trainer.close()
    with pytest.raises(Cancelled):
        ticket.result()
    wait_for(lambda: not alive(process))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux' kernel tells a child of its parent's end")
def test_the_child_dies_with_a_killed_parent(tmp_path: Path, images: Source) -> None:
    script = (
        "import sys, time\n"
        "from fl_client.jobs import Job\n"
        "from fl_client.trainer import Trainer\n"
        "trainer = Trainer()\n"
        "trainer.run(Job.model_validate_json(sys.argv[1]))\n"
        "print(trainer.process_id, flush=True)\n"
        "time.sleep(60)\n"
    )
    job = Job(id="check", kind=JobKind.CHECK, source=images).model_dump_json()
    with subprocess.Popen([sys.executable, "-c", script, job], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        assert os.getpriority(os.PRIO_PROCESS, child) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
        parent.kill()
    wait_for(lambda: not alive(child))


def alive(process: int | None) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_childs_environment_has_the_threads_and_no_invite() -> None:
    environment = child_environment({"JOIN_TOKEN": "mh2.secret", "PATH": "/bin"}, Limits(cpu_threads=3))
    assert environment == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "3",
    }
    limited = child_environment({"PATH": "/bin"}, Limits(memory_bytes=SMALLEST_MEMORY_BYTES))
    assert limited == {"PATH": "/bin", "MALLOC_ARENA_MAX": "1"}, "address space is not spent on what nothing uses"


def test_a_ticket_keeps_its_first_outcome(images: Source) -> None:
    ticket = Ticket(Job(id="a", kind=JobKind.CHECK, source=images))
    ticket.settle(Finished(id="a", result={"x": 1}))
    ticket.settle(Failed(id="a", code="late", message=""))
    assert ticket.result() == {"x": 1}

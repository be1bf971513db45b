"""A simulated study: what it gives, that it repeats and resumes to the same bits, that faults are met as in a deployment."""

import csv
import ctypes
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulation_world import Crash, arguments, make_table, run, table_flags

from fl_client.local_round import LocalRound, local_round
from fl_client.tasks import Divisible, RoundPlan, completed, together
from fl_client.tasks.image_training import ImageModel
from fl_client.tasks.phantoms import make_phantoms
from fl_server.cohort import sample
from medhive.errors import InvalidInput, MedHiveError
from medhive.packing import read_weights, sha256_file, write_weights
from medhive.strategies import Update, make_strategy
from medhive.terminal import main
from simulator import results
from simulator.clients import ClientStates
from simulator.command import simulate_command, simulation_of
from simulator.desk import END, MODEL, RECORD
from simulator.faults import WrongFault
from simulator.federation import Source, read_federation
from simulator.results import TrackingFailed
from simulator.run import ROOM, OtherSimulation, judged_on

DEADLINE_S = 120


@pytest.fixture
def table(tmp_path: Path) -> Path:
    make_table(tmp_path)
    return tmp_path


def test_a_study_is_simulated_and_its_folder_tells_all(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = table / "out"
    assert main(simulate_command, [*arguments(table_flags(table), out), "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert "round 3/3: 6 of 6 clients answered" in said.err
    assert summary["state"] == "completed"
    assert summary["heldout"]["accuracy"] > 0.8
    assert summary["weights_digest"] == sha256_file(out / MODEL)
    with (out / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert {row["answered"] for row in rows[1:4]} == {"6"}
    assert (rows[4]["state"], float(rows[4]["val_accuracy"])) == ("final", summary["validation"]["val_accuracy"])
    with (out / "clients.csv").open() as file:
        assert sum(int(row["no"]) + int(row["yes"]) for row in csv.DictReader(file)) == 240
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert {"heldout_accuracy", "fraction", "strategy"} <= set(re.findall(r"<td>([a-z_.]+)<td>", page))
    assert not [word for word in ("<script", "http:", "https:", "src='/") if word in page]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_the_deployments_own_mathematics(table: Path) -> None:
    """The same cohort, the same local rounds, the same strategy, put together by hand."""
    flags = table_flags(table, rounds=1, strategy="fedavg")
    out = table / "out"
    run(out, flags)
    simulation = simulation_of(flags)
    source = Source("tabular", simulation.data, simulation.spec.data)
    federation = read_federation(source, simulation.partition, 12, 7, trained=frozenset())
    sums = [federation.workspace(client).statistics() or {} for client in range(12)]
    pooled = {name: np.sum([item[name] for item in sums], axis=0) for name in sums[0]}
    base, updates = table / "base", []
    write_weights(base, federation.first().initial_weights(7))
    for name in sample(federation.names, 0.5, 2, 7, 1):
        own = federation.workspace(list(federation.names).index(name))
        own.use_statistics(pooled)
        done = completed(local_round(own, read_weights(base), RoundPlan(1, 1, 5, seed=7)))
        write_weights(table / name, done.weights)
        updates.append(Update(name, table / name, done.examples))
    strategy = make_strategy("fedavg")
    strategy.aggregate(base, updates, strategy.initial_state(table), table / "by-hand")
    assert sha256_file(table / "by-hand") == sha256_file(out / MODEL)


def test_the_same_seed_gives_the_same_bits_and_another_one_others(table: Path) -> None:
    digests = [
        run(table / f"{number}", table_flags(table, seed=seed, partition="dirichlet:0.5", rounds=1))["weights_digest"]
        for number, seed in enumerate([1, 1, 2])
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("strategy", ["fedadam", "krum"])
def test_a_simulation_that_dies_goes_on_to_the_same_bits(table: Path, strategy: str) -> None:
    flags = table_flags(table, strategy=strategy, dropout=0.2, clients=20)
    whole = run(table / "whole", flags)

    def die(done: int, of_all_rounds: int) -> None:
        if (done, of_all_rounds) == (15, 30):  # in the second round
            raise Crash

    with pytest.raises(Crash):
        run(table / "cut", flags, die)
    assert not (table / "cut" / END).exists()
    assert '"number":1' in (table / "cut" / RECORD).read_text()
    # A line that was being written when the power went.
    with (table / "cut" / RECORD).open("ab") as file:
        file.write(b'{"number": 2, "rep')
    (table / "cut" / ROOM / "1.safetensors").write_bytes(b"an update that was cut")
    lines: list[str] = []
    assert run(table / "cut", flags, on_line=lines.append)["weights_digest"] == whole["weights_digest"]
    assert lines[0] == "goes on after round 1/3"
    assert not (table / "cut" / ROOM).exists()
    # And once more: what is complete is only shown.
    shown = run(table / "cut", flags, die, on_line=lines.append)
    assert shown == json.loads((table / "cut" / "summary.json").read_text())
    assert lines[-1].endswith("cut holds it complete")


def test_a_process_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Real images, whose optimiser's state each client keeps from round to round; kill -9 in the middle."""
    make_phantoms(tmp_path / "data", 8)
    flags: dict[str, Any] = {"data": tmp_path / "data", "clients": 4, "fraction": 0.5, "rounds": 8, "local_epochs": 3}
    command = [sys.executable, "-m", "simulator", *arguments(flags, tmp_path / "cut"), "--option", "image_size=32"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + DEADLINE_S
        while not (tmp_path / "cut" / RECORD).exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert (tmp_path / "cut" / RECORD).exists()
    assert not (tmp_path / "cut" / END).exists()
    flags["options"] = ("image_size=32",)
    gone_on = run(tmp_path / "cut", flags)
    assert gone_on["weights_digest"] == run(tmp_path / "whole", flags)["weights_digest"]
    assert not (tmp_path / "cut" / "clients").exists()


def test_a_round_that_is_done_again_begins_from_the_state_before_it(tmp_path: Path) -> None:
    """A process may die when some clients of a round are done and have kept what they learned in it."""
    states = ClientStates(tmp_path)
    for number in (1, 4, 6):
        own = {"norm": np.full(2, number, np.float32)}
        states.save("a", number, LocalRound({}, 1, {}, [], b"%d" % number, own=own))
    assert [states.load("a", before) for before in (1, 4, 6, 7)] == [None, None, b"4", b"6"]
    assert [states.own("a", before).get("norm", [0])[0] for before in (1, 4, 6, 7)] == [0, 0, 4, 6]
    assert states.load("b", 3) is None


@pytest.mark.parametrize("strategy", ["scaffold", "fedbn"])
def test_what_clients_correct_by_or_keep_to_themselves_survives_too(tmp_path: Path, strategy: str) -> None:
    make_phantoms(tmp_path / "data", 8)
    flags: dict[str, Any] = {"data": tmp_path / "data", "clients": 4, "rounds": 3, "local_epochs": 1}
    flags |= {"options": ("image_size=32", "model=resnet-bn"), "partition": "dirichlet:0.5", "seed": 3}
    whole = run(tmp_path / "whole", flags | {"strategy": strategy})
    plain = run(tmp_path / "plain", flags | {"strategy": "fedavg"})
    assert whole["state"] == plain["state"] == "completed"
    assert whole["weights_digest"] != plain["weights_digest"]

    def die(done: int, _all: int) -> None:
        if done == 10:  # in the third round
            raise Crash

    with pytest.raises(Crash):
        run(tmp_path / "cut", flags | {"strategy": strategy}, die)
    assert run(tmp_path / "cut", flags | {"strategy": strategy})["weights_digest"] == whole["weights_digest"]


def test_what_does_not_go_together_is_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match="leave out --forget"):
        run(table / "out", table_flags(table, strategy="fedbn", forget=True))
    alone = arguments(table_flags(table, compare="fedbn"), table / "compared")
    assert main(simulate_command, [*alone, "--forget"]) == 1
    assert "leave out --forget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "reason"), [("scaffold", "sum of its learning rates"), ("fedbn", "this study's model has none")]
)
def test_a_task_that_a_strategy_cannot_have_says_so(table: Path, strategy: str, reason: str) -> None:
    summary = run(table / "out", table_flags(table, strategy=strategy))
    assert summary["state"] == "failed"
    assert reason in summary["reason"]


def test_a_file_is_no_result_folder(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(simulate_command, arguments(table_flags(table), table / "data.csv")) == 1
    assert "data.csv is a file; --out names the folder" in capsys.readouterr().err


def test_another_simulation_is_not_mixed_in(table: Path) -> None:
    run(table / "out", table_flags(table, rounds=1))
    with pytest.raises(OtherSimulation, match="spec"):
        run(table / "out", table_flags(table, rounds=2))
    make_table(table, seed=2)
    with pytest.raises(OtherSimulation, match="data"):
        run(table / "out", table_flags(table, rounds=1))


def test_a_client_a_file_and_a_test_set(table: Path) -> None:
    for name in ("north", "south"):
        (table / name).mkdir()
        make_table(table / name, rows=90, seed=len(name)).rename(table / f"{name}.csv")
    (table / "sites").mkdir()
    for name in ("north", "south"):
        (table / f"{name}.csv").rename(table / "sites" / f"{name}.csv")
    flags = table_flags(
        table, data=table / "sites", partition="sites", test=table / "data.csv", fraction=1.0, clients=2
    )
    summary = run(table / "out", flags)
    assert summary["clients"] == 2
    assert summary["test"]["accuracy"] > 0.8
    assert summary["heldout"] == {}
    assert "north" in (table / "out" / "clients.csv").read_text()


def test_who_says_how_many_clients_there_are_is_not_contradicted_in_silence(table: Path) -> None:
    """Folders and a partition file say it themselves; the same number beside them is no mistake."""
    (table / "sites").mkdir()
    for name in ("north", "south"):
        make_table(table, seed=len(name)).rename(table / "sites" / f"{name}.csv")
    (table / "who.csv").write_text("example,client\ndata.csv:2,north\ndata.csv:3,south\n")
    for partition, where in (("sites", "sites"), (str(table / "who.csv"), "who.csv")):
        flags = table_flags(table, data=table / "sites", partition=partition)
        assert simulation_of({**flags, "clients": 2}).clients is None
        with pytest.raises(InvalidInput, match=f"{where} has 2 clients, and --clients says 12; leave out --clients"):
            simulation_of(flags)


def test_a_file_may_leave_examples_to_nobody_and_name_one_client_alone(table: Path) -> None:
    """Who has nothing is judged by nobody, and one client need not wait for a second one."""
    (table / "who.csv").write_text("".join(f"data.csv:{line},alone\n" for line in range(2, 42)))
    summary = run(table / "out", table_flags(table, clients=None, fraction=1.0, partition=str(table / "who.csv")))
    assert (summary["state"], summary["clients"], summary["clients_answered"]) == ("completed", 1, 3)
    simulation = simulation_of(table_flags(table, clients=None, partition=str(table / "who.csv")))
    judged = [len(item.examples.labels) for item in simulation.read_clients().heldout() if isinstance(item, Divisible)]
    assert judged == [40]


def test_sites_may_hold_their_images_in_different_forms(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "made", 20)
    classes = np.array(sorted(folder.name for folder in (tmp_path / "made").iterdir()))
    (tmp_path / "data" / "north").mkdir(parents=True)
    (tmp_path / "made" / classes[0]).rename(tmp_path / "data" / "north" / classes[0])
    labels = np.arange(40) % len(classes)
    images = np.random.default_rng(1).integers(0, 256, (40, 32, 32), dtype=np.uint8)
    (tmp_path / "data" / "south").mkdir()
    np.savez(tmp_path / "data" / "south" / "set.npz", images=images, labels=labels, class_names=classes)
    flags = {"data": tmp_path / "data", "partition": "sites", "rounds": 1, "options": ("image_size=32",)}
    assert simulation_of(flags).spec.data.classes == tuple(classes)
    assert run(tmp_path / "out", {**flags, "local_epochs": 1})["clients_answered"] == 2


def test_the_mlflow_run_has_every_round_and_the_files(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415 - seconds of imports

    monkeypatch.chdir(table)
    uri, flags = f"sqlite:///{table}/mlflow.db", table_flags(table, rounds=2)
    summary = run(table / "out", flags, mlflow_uri=uri)
    client = MlflowClient(tracking_uri=uri)
    found = client.get_run((table / "out" / "mlflow-run").read_text())
    assert found.info.status == "FINISHED"
    assert found.data.params["spec.options.rounds"] == "2"
    assert found.data.metrics["val_accuracy"] == pytest.approx(summary["validation"]["val_accuracy"])
    assert [item.step for item in client.get_metric_history(found.info.run_id, "train_loss")] == [1, 2]
    assert {"report.html", "model.safetensors", "participation.csv"} <= {
        item.path for item in client.list_artifacts(found.info.run_id)
    }
    # Told again, it is the same run with the same values.
    run(table / "out", flags, mlflow_uri=uri)
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert len(client.get_metric_history(found.info.run_id, "train_loss")) == 2
    assert f"A simulation: {found.info.run_name}." in found.data.tags["mlflow.note.content"]
    # A comparison's simulations are runs beside each other, told apart by their names.
    compared = table_flags(table, rounds=1, dropout=0.1, compare="fedmedian", mlflow=uri)
    assert main(simulate_command, arguments(compared, table / "compared")) == 0
    names = {item.info.run_name for item in client.search_runs([found.info.experiment_id])}
    assert names >= {"fedmedian, 12 clients, iid", "fedmedian, 12 clients, iid, dropout 0.1"}
    with pytest.raises(TrackingFailed, match=r"MLflow at .*nowhere"):
        run(table / "other", flags, mlflow_uri="http://nowhere.invalid:1")


def test_an_mlflow_that_goes_away_stops_nothing_and_is_told_later(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415 - seconds of imports

    def away(*_: object) -> None:
        raise OSError("it is away")

    monkeypatch.chdir(table)
    uri, out = f"sqlite:///{table}/mlflow.db", table / "out"
    with monkeypatch.context() as at_once:
        at_once.setattr(MlflowClient, "log_param", away)
        assert main(simulate_command, arguments(table_flags(table, mlflow=uri), out)) == 1
    capsys.readouterr()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(results, "log_values", away)
        assert main(simulate_command, arguments(table_flags(table, mlflow=uri), out)) == 1
    said = capsys.readouterr()
    assert "completed" in said.out and str(out / "report.html") in said.out
    assert said.err.count("it is away") == 2, "when it happens, and at the end"
    client = MlflowClient(tracking_uri=uri)
    mlflow_id = (out / "mlflow-run").read_text()
    assert client.get_run(mlflow_id).info.status == "RUNNING"
    before = (out / "summary.json").read_bytes()
    assert main(simulate_command, arguments(table_flags(table, mlflow=uri), out)) == 0
    assert client.get_run(mlflow_id).info.status == "FINISHED"
    assert [item.step for item in client.get_metric_history(mlflow_id, "train_loss")] == [1, 2, 3]
    [found] = client.search_runs([client.get_run(mlflow_id).info.experiment_id])
    assert found.data.params["spec.options.rounds"] == "3"
    assert (out / "summary.json").read_bytes() == before


# ---- faults ------------------------------------------------------------------------------------------------------------


def dropped(out: Path) -> dict[str, int]:
    """Why answers did not count, by the first word of the reason."""
    found: dict[str, int] = {}
    with (out / "participation.csv").open() as file:
        for row in csv.DictReader(file):
            if row["dropped"]:
                word = row["dropped"].split()[0]
                found[word] = found.get(word, 0) + 1
    return found


@pytest.mark.parametrize(("kind", "word"), [("nan", "Tensor"), ("boost", "its")])
def test_gross_poison_is_refused_as_in_a_deployment(table: Path, kind: str, word: str) -> None:
    flags = table_flags(table, fraction=1.0, poison=f"0.25:{kind}", strategy="fedavg")
    summary = run(table / kind, flags)
    assert summary["refusals"] == 9
    assert dropped(table / kind) == {word: 9}
    assert summary["heldout"]["accuracy"] > 0.8


def test_subtle_poison_passes_the_checks_and_a_robust_strategy_resists_it(table: Path) -> None:
    flags = table_flags(table, fraction=1.0, rounds=4, poison="0.4:flip")
    mean = run(table / "mean", {**flags, "strategy": "fedavg"})
    middle = run(table / "median", {**flags, "strategy": "fedmedian"})
    assert mean["refusals"] == middle["refusals"] == 0
    assert mean["validation"]["val_loss"] > middle["validation"]["val_loss"]


def test_slow_sites_are_late_unless_the_round_waits(table: Path) -> None:
    flags = table_flags(table, fraction=1.0, slow="0.5:3")
    run(table / "late", flags)
    assert dropped(table / "late") == {"late": 18}
    assert run(table / "waited", {**flags, "patience": 3})["clients_answered"] == 36


def test_too_few_answers_fail_the_run_with_the_reason(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(simulate_command, arguments(table_flags(table, dropout=1.0), table / "out")) == 1
    said = capsys.readouterr().err
    assert re.search(r"0 of 6 sites answered, 2 are needed \((client-\d\d, ){4}client-\d\d and 1 more: .*\)\.", said)
    page = (table / "out" / "report.html").read_text()
    assert "<h1>Simulation: fedavg, 12 clients, iid, dropout 1</h1>" in page
    assert "<p class=failed>failed: Round 1" in page
    assert "model.safetensors" not in page


def test_a_strategy_that_needs_more_clients_than_there_are_says_so(table: Path) -> None:
    summary = run(table / "out", table_flags(table, clients=2, fraction=1.0, rounds=1, strategy="krum"))
    assert (summary["state"], summary["reason"]) == (
        "failed",
        "Round 1 of 1: 2 of 2 sites can be asked, 3 are needed.",
    )


def test_the_bar_never_goes_back_within_the_rounds_nor_beyond_its_end(table: Path) -> None:
    told: list[tuple[int, int]] = []
    run(table / "out", table_flags(table), lambda *progress: told.append(progress))
    everybody, asked, rounds = 12, 6, 3
    sums, training, judging = told[:-30], told[-30:-12], told[-12:]
    assert training == [(number, rounds * asked) for number in range(1, rounds * asked + 1)]
    # Before the first round all are asked for their sums, and after the last one all judge.
    assert sums == judging == [(number, everybody) for number in range(1, everybody + 1)]


def test_with_fedbn_each_client_is_judged_with_its_own_layers(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "data", 8)
    flags: dict[str, Any] = {"data": tmp_path / "data", "clients": 3, "rounds": 1, "local_epochs": 1, "seed": 3}
    flags |= {"options": ("image_size=32", "model=resnet-bn"), "partition": "dirichlet:0.5"}
    for strategy, same in {"fedavg": True, "fedbn": False}.items():
        out = tmp_path / strategy
        said = run(out, flags | {"strategy": strategy})["heldout"]
        simulation = simulation_of(flags | {"strategy": strategy})
        average = judged_on(simulation.read_clients().first(), read_weights(out / MODEL), ["heldout"])
        assert (said["loss"] == pytest.approx(average["loss"], rel=1e-6)) is same
        assert 0 < said["accuracy"] <= 1


@pytest.mark.parametrize(
    "flags",
    [
        {"dropout": 1.5},
        {"slow": "x"},
        {"poison": "0.1:arsenic"},
        {"poison": "0.1"},
        {"slow": "0.1", "patience": 0.5},
        {"patience": 3},
    ],
)
def test_a_fault_that_cannot_be_is_refused(table: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(WrongFault):
        simulation_of(table_flags(table, **flags))


def test_strategies_are_compared_under_faults(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = table_flags(table, fraction=1.0, rounds=2, poison="0.4:flip", compare="fedavg,FedMedian,fedbn")
    assert main(simulate_command, [*arguments(flags, table / "out"), "--forget", "--json"]) == 0
    said = capsys.readouterr()
    assert "fedbn is left out: FedBN's clients keep layers" in said.err
    cells = {(cell["strategy"], cell["fault"]): cell for cell in json.loads(said.out)}
    assert set(cells) == {(name, fault) for name in ("fedavg", "fedmedian") for fault in ("none", "flip 0.4")}
    assert all(cell["accuracy"] > 0.5 for cell in cells.values())
    # The table is the simulations' own: each can be looked into.
    summary = json.loads((table / "out" / "fedmedian" / "flip-0.4" / "summary.json").read_text())
    assert summary["heldout"]["accuracy"] == cells["fedmedian", "flip 0.4"]["accuracy"]
    assert main(simulate_command, [*arguments(flags, table / "out"), "--forget"]) == 0
    assert "flip 0.4" in capsys.readouterr().out
    assert len((table / "out" / "comparison.csv").read_text().splitlines()) == 5
    page = (table / "out" / "report.html").read_text()
    assert re.findall(r"alt='curves of (.*?); at the end: (\w+) ", page) == [
        ("accuracy, no fault", "fedavg"),
        ("accuracy, flip 0.4", "fedavg"),
    ]
    links = set(re.findall(r"href='(.*?)'", page))
    assert links == {
        f"{name}/{fault}/report.html" for name in ("fedavg", "fedmedian") for fault in ("none", "flip-0.4")
    } | {
        "comparison.csv",
        "comparison.json",
    }
    assert all((table / "out" / link).exists() for link in links)
    assert f"<a href='fedmedian/flip-0.4/report.html'>{cells['fedmedian', 'flip 0.4']['accuracy']:.4f}</a>" in page
    assert (table / "out" / "curves.png").exists()
    assert main(simulate_command, arguments({**flags, "compare": "fedavgg"}, table / "out2")) == 1
    assert "Did you mean fedavg?" in capsys.readouterr().err


def test_a_comparison_and_a_simulation_do_not_write_over_each_other(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = table_flags(table, rounds=1, strategy="fedavg", dropout=0.1)
    assert main(simulate_command, arguments(flags, table / "one")) == 0
    assert main(simulate_command, arguments({**flags, "compare": "fedavg"}, table / "one")) == 1
    assert "one holds a single simulation; choose another --out" in capsys.readouterr().err
    assert main(simulate_command, arguments({**flags, "compare": "fedavg,scaffold"}, table / "many")) == 0
    why = "scaffold (no fault, dropout 0.1): Round 1 "
    assert why in capsys.readouterr().out
    assert f"<p class=failed>{why}" in (table / "many" / "report.html").read_text()
    assert main(simulate_command, arguments(flags, table / "many")) == 1
    assert "many holds a comparison; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"strategy": "fedavgg"}, "Did you mean fedavg"),
        ({"validation_share": 2.0}, "validation_share"),
        ({"rounds": 0}, "rounds"),
        ({"dp_epsilon": 1.0}, "differential privacy"),
        ({"partition": "sites", "data": "."}, "clients' names"),
        ({"data": "nowhere.csv"}, "nothing at nowhere.csv"),
        ({"clients": 0}, "1 to 100000 clients"),
        ({"test_every": 5}, "--test-every is of --test"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    table: Path, flags: dict[str, Any], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (table / "two words").mkdir()
    if flags.get("data") == ".":
        flags = {**flags, "data": table}
    assert main(simulate_command, arguments(table_flags(table, **flags), table / "out")) == 1
    assert word in capsys.readouterr().err


# ---- many clients as one computation -----------------------------------------------------------------------------------

UNEQUAL: dict[str, Any] = {
    "clients": 5,
    "partition": "dirichlet:1",
    "rounds": 2,
    "lr": 0.02,
    "strategy": "fedavg",
    "local_epochs": 2,
    "batch_size": 4,
}
"""Two rounds of clients of unequal sizes."""


@pytest.mark.parametrize(
    ("model", "strategy"),
    [("cnn", {}), ("lenet", {"strategy": "scaffold"}), ("resnet-gn", {"strategy": "fedprox", "mu": 5.0})],
)
def test_clients_that_are_trained_together_get_the_same_weights(
    tmp_path: Path, model: str, strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of unequal sizes, so that some have fewer and shorter batches; with momentum, weight decay, and dropout of clients.

    In doubles: with single precision, whether a last bit moves a value over the kink of a ReLU is a matter of luck.
    """
    build, normalised = ImageModel.build, ImageModel.normalised
    monkeypatch.setattr(ImageModel, "build", lambda self, seed: build(self, seed).double())
    monkeypatch.setattr(ImageModel, "normalised", lambda self, pixels: normalised(self, pixels).double())
    monkeypatch.setattr(together, "CHUNK_STEPS", 3)
    monkeypatch.setattr(together, "MOST_ON_CPU", math.inf)
    make_phantoms(tmp_path / "data", 6)
    options = ("image_size=32", f"model={model}", "recipe=plain", "momentum=0.5", "weight_decay=0.01", "crop=24")
    flags = {**UNEQUAL, "data": tmp_path / "data", "options": (*options, "brightness=9"), "dropout": 0.2, "seed": 3}
    flags |= strategy
    apart = run(tmp_path / "apart", flags)
    grouped = run(tmp_path / "together", {**flags, "together": 3})
    for name in ("clients_answered", "refusals", "validation"):
        assert grouped[name] == pytest.approx(apart[name])
    assert grouped["clients_answered"] > 4
    one, other = (read_weights(tmp_path / name / MODEL) for name in ("apart", "together"))
    assert max(float(np.abs(one[name] - other[name]).max()) for name in one) < 1e-5
    initial = read_weights(tmp_path / "apart" / "initial.safetensors")
    assert max(float(np.abs(one[name] - initial[name]).max()) for name in one) > 1e-3


def test_on_a_cpu_large_steps_are_taken_one_after_the_other(tmp_path: Path) -> None:
    """15,002 numbers of an example are passed on by the layers of `lenet`: a batch of four is small, one of all is large."""
    make_phantoms(tmp_path / "data", 16)
    options = ("image_size=32", "channels=3", "model=lenet", "recipe=plain")
    flags: dict[str, Any] = {"data": tmp_path / "data", "clients": 2, "rounds": 1, "lr": 0.02, "options": options}
    flags |= {"strategy": "fedavg", "local_epochs": 2}
    for batch_size, same in ((4, False), (50, True)):
        apart, grouped = (
            run(tmp_path / f"{batch_size}-{size}", {**flags, "batch_size": batch_size, "together": size})
            for size in (1, 2)
        )
        assert (grouped["weights_digest"] == apart["weights_digest"]) is same


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_gives_the_same_weights_on_a_gpu(tmp_path: Path) -> None:
    """What is recorded in the first round is replayed in the second, with fewer clients than there is room for."""
    make_phantoms(tmp_path / "data", 6)
    options = ("image_size=32", "model=lenet", "recipe=plain", "momentum=0.5", "crop=24")
    flags = {**UNEQUAL, "data": tmp_path / "data", "options": options, "device": "cuda"}
    apart, grouped, again = (run(tmp_path / str(n), {**flags, "together": n % 10}) for n in (1, 3, 13))
    assert grouped["weights_digest"] == again["weights_digest"] != apart["weights_digest"]
    one, other = (read_weights(tmp_path / name / MODEL) for name in ("1", "3"))
    assert max(float(np.abs(one[name] - other[name]).max()) for name in one) < 1e-4


def test_what_cannot_be_trained_together_is_refused(table: Path) -> None:
    with pytest.raises(MedHiveError, match="leave out --together"):
        run(table / "out", table_flags(table, together=4))
    make_phantoms(table / "data", 4)
    with pytest.raises(MedHiveError, match="recipe=plain"):
        run(table / "out", {"data": table / "data", "clients": 2, "together": 4, "options": ("image_size=32",)})


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_what_one_client_frees_is_there_for_the_next() -> None:
    code = (
        "from resource import RUSAGE_SELF, getrusage; from simulator.memory import keep_freed_memory; keep_freed_memory()\n"
        "for turn in range(2): before = getrusage(RUSAGE_SELF).ru_minflt; bytes(1) * (100 << 20)\n"
        "print(getrusage(RUSAGE_SELF).ru_minflt - before)"
    )
    faults = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(faults) < 1000  # of 25,600 pages

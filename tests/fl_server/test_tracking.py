"""Tracking against a real MLflow server and a real gateway, through an outage."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from coordinator_stack import CLASSES, CoordinatorStack, coordinator
from matplotlib.figure import Figure
from round_world import World
from waiting import until

from fl_server.figures import draw_confusion, draw_curves
from fl_server.tracking import (
    MAX_SITE_CURVES,
    NOTE,
    Progress,
    Tracker,
    TrackingAway,
    Value,
    panels_of,
    round_values,
)
from medhive.client import GatewayClient
from medhive.packing import sha256_file
from medhive.queues import QueueAnswer
from medhive.states import RoundState, RunState
from medhive.wire import API, RoundAnswer, RunAnswer, SiteRound, VersionAnswer

NAMES = ("a", "b")
AT = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorStack]:
    with coordinator(tmp_path_factory.mktemp("tracked"), with_mlflow=True) as stack:
        stack.start_server()
        stack.add_study("tumours", NAMES, min_sites=2, deadline_s=600)
        for hospital in stack.hospitals.values():
            hospital.start()
        yield stack


@pytest.fixture
def mlflow(stack: CoordinatorStack, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient  # noqa: PLC0415 - after the variable

    return MlflowClient(tracking_uri=stack.mlflow_url)


def tracked(stack: CoordinatorStack, mlflow: Any, run_id: str, status: str) -> Any:
    """The MLflow run of a run, once it has this status."""

    def look() -> Any:
        mlflow_id = stack.run(run_id).mlflow_run_id
        found = mlflow.get_run(mlflow_id) if mlflow_id else None
        return found if found and found.info.status == status else None

    return until(look, f"{run_id} is {status} in MLflow", 120)


def history(mlflow: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return [(item.step, round(item.value, 6)) for item in mlflow.get_metric_history(run.info.run_id, name)]


@pytest.mark.timeout(600)
def test_nothing_is_lost_while_mlflow_is_away(stack: CoordinatorStack, mlflow: Any, tmp_path: Path) -> None:
    # A whole run while MLflow has never been there.
    first = stack.request("tumours", rounds=2)
    assert stack.ended(first).state == "completed"
    backlog = "medhive_server_tracking_backlog_runs"
    until(lambda: stack.figures()[backlog] == 1, "MLflow's backlog is told")
    stack.start_mlflow()
    until(lambda: stack.figures()[backlog] == 0, "and that it is gone")
    shown = httpx.get(f"http://127.0.0.1:{stack.mlflow_metrics_port}/metrics", timeout=60).text
    assert 'mlflow_http_request_total{method="POST",status="200"}' in shown
    assert "mlflow_http_request_duration_seconds_bucket{" in shown
    run = tracked(stack, mlflow, first, "FINISHED")
    assert history(mlflow, run, "val_accuracy") == [(0, 0.6), (1, 0.7), (2, 0.7)]
    # MLflow goes away within a run, which is stopped meanwhile, and comes back.
    for hospital in stack.hospitals.values():
        hospital.training_s = 1.0
    second = stack.request("tumours", rounds=50)
    stack.reached(second, 2)
    stack.mlflow.stop()
    stack.reached(second, 4)
    stack.admin.post(f"{API}/runs/{second}/stop", {"reason": "enough"})
    assert stack.ended(second).state == "cancelled"
    stack.start_mlflow()
    stopped = tracked(stack, mlflow, second, "KILLED")
    closed = [item.number for item in stack.rounds(second) if item.state == RoundState.CLOSED]
    assert [step for step, _ in history(mlflow, stopped, "round_seconds")] == closed
    assert stopped.data.tags["medhive.reason"] == "enough"
    check_description(stack, mlflow, first)
    check_registry(stack, mlflow, first, tmp_path)
    check_second_delivery_changes_nothing(stack, mlflow, first)


def check_description(stack: CoordinatorStack, mlflow: Any, run_id: str) -> None:
    run = mlflow.get_run(stack.run(run_id).mlflow_run_id)
    assert run.info.run_name == run_id
    assert run.data.params["strategy"] == "fedprox"
    assert run.data.params["rounds"] == "2"
    assert run.data.tags["medhive.spec_hash"] == stack.run(run_id).spec_hash
    assert run.data.tags["medhive.sites"] == "a,b"
    assert '"strategy":"fedprox"' in run.data.tags["medhive.spec"]
    assert "2 rounds of 5 local epochs, fedprox, at a, b.\n\n**completed**; made version 1." in run.data.tags[NOTE]
    assert run.data.tags["mlflow.user"] == "admin"
    assert "**tumours**" in mlflow.get_experiment(run.info.experiment_id).tags[NOTE]
    final = next(item.metrics["val_accuracy"] for item in stack.run(run_id).sites if item.site == "a")
    assert history(mlflow, run, "site/a/val_accuracy") == [(0, 0.6), (1, 0.7), (2, final)]
    assert "lr" not in run.data.params, "what has no value is no parameter"
    assert history(mlflow, run, "sites_answered") == [(0, 2), (1, 2), (2, 2)]
    assert [step for step, _ in history(mlflow, run, "bytes_up")] == [0, 1, 2]
    artifacts = {item.path for item in mlflow.list_artifacts(run.info.run_id)}
    assert {"curves.png", "confusion_matrix.png", "rounds.json", "rounds.csv", "spec.json", "model"} <= artifacts
    assert f"runs/{run.info.run_id}/artifacts/rounds.csv)" in run.data.tags[NOTE]


def check_registry(stack: CoordinatorStack, mlflow: Any, run_id: str, folder: Path) -> None:
    version = stack.version("tumours", 1)
    model = mlflow.get_registered_model("medhive-tumours")
    assert model.aliases == {"newest": "1", "candidate": "1"}
    registered = mlflow.get_model_version("medhive-tumours", "1")
    assert registered.tags["medhive.digest"] == version.digest
    assert registered.description.startswith("Version 1 of tumours: 2 rounds on ")
    assert "`medhive.version`" in model.description
    assert registered.run_id == stack.run(run_id).mlflow_run_id
    path = mlflow.download_artifacts(registered.run_id, "model/weights.safetensors", str(folder))
    assert Path(path).stat().st_size == version.size_bytes


def check_second_delivery_changes_nothing(stack: CoordinatorStack, mlflow: Any, run_id: str) -> None:
    run = mlflow.get_run(stack.run(run_id).mlflow_run_id)
    before = {name: history(mlflow, run, name) for name in run.data.metrics}
    stack.server.stop()
    (stack.folder / "server" / "tracking.json").unlink()
    told = stack.server.text.count("tracking.told")
    stack.start_server()
    until(lambda: stack.server.text.count("tracking.told") >= told + 2, "both runs are told again")
    assert {name: history(mlflow, run, name) for name in run.data.metrics} == before
    assert len(mlflow.search_runs([run.info.experiment_id])) == 2
    assert len(mlflow.search_model_versions("name = 'medhive-tumours'")) == 1


def test_a_queues_versions_are_told_with_their_lineage(stack: CoordinatorStack, mlflow: Any, tmp_path: Path) -> None:
    if not stack.mlflow.running:
        stack.start_mlflow()
    assert stack.ended(stack.request("tumours", rounds=1)).state == "completed"
    base = max(VersionAnswer.model_validate(row).version for row in stack.admin.get(f"{API}/studies/tumours/versions"))
    queue = QueueAnswer.model_validate(stack.admin.put(f"{API}/studies/tumours/queue", {"capacity": 3}))
    for hospital, examples in ((stack.hospitals["a"], 10), (stack.hospitals["b"], 20), (stack.hospitals["a"], 30)):
        hospital.contribute(queue, stack.version("tumours", base), examples, tmp_path)
    made = base + 1
    until(lambda: made in registered(mlflow), f"version {made} in the registry", 120)
    run = mlflow.get_run(registered(mlflow)[made].run_id)
    assert (run.info.run_name, run.info.status) == (queue.id, "RUNNING")
    told = {name: history(mlflow, run, name) for name in ("contributions", "examples", "train_loss", "staleness")}
    assert told == {name: [(made, value)] for name, value in zip(told, (3, 60, 0.5, 0), strict=True)}
    assert history(mlflow, run, "site/a/weight") == [(made, round(10 / 60, 6)), (made, round(30 / 60, 6))]
    assert history(mlflow, run, "site/b/val_accuracy") == [(base, 0.8)]
    lineage = json.loads(
        Path(mlflow.download_artifacts(run.info.run_id, f"lineage/v{made}.json", tmp_path)).read_text()
    )
    assert [(row["site"], row["examples"], row["staleness"]) for row in lineage] == [
        ("a", 10, 0),
        ("b", 20, 0),
        ("a", 30, 0),
    ]
    path = mlflow.download_artifacts(run.info.run_id, f"v{made}/weights.safetensors", str(tmp_path))
    assert sha256_file(Path(path)) == stack.version("tumours", made).digest
    newest = registered(mlflow)[made].version
    until(lambda: mlflow.get_registered_model("medhive-tumours").aliases["newest"] == newest, "it is called the newest")
    stack.admin.post(f"{API}/studies/tumours/queue/close", {"reason": "all have sent"})
    until(lambda: mlflow.get_run(run.info.run_id).info.status == "FINISHED", "the queue's run ends")


def registered(mlflow: Any) -> dict[int, Any]:
    """The registered versions of the study, by MedHive's numbers."""
    rows = mlflow.search_model_versions("name = 'medhive-tumours'")
    return {int(row.tags["medhive.version"]): row for row in rows}


def test_values_of_a_round_carry_its_own_time_and_the_right_step() -> None:
    sites = (
        SiteRound(site="a", answered=True, examples=5, metrics={"val_loss": 0.5, "val_recall/x": 1.0}, training_s=2.0),
        SiteRound(site="b", dropped="late"),
        SiteRound(site="c", dropped="not addressed: its consent expired"),
    )
    answer = RoundAnswer(number=3, state=RoundState.CLOSED, opened_at=AT, closed_at=AT, sites=sites, seconds=4.0)
    values = {value.name: value for value in round_values(answer)}
    assert all(value.at == AT for value in values.values())
    assert (values["site/a/val_loss"].step, values["site/a/val_recall/x"].step) == (2, 2)
    assert (values["site/a/training_s"].step, values["round_seconds"].step) == (3, 3)
    counts = [values[f"sites_{name}"].value for name in ("addressed", "answered", "dropped")]
    assert counts == [2, 1, 2]


def test_progress_survives_and_a_broken_file_only_costs_time(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    Progress(path, AT, {"RUN_1": AT.isoformat()}, {"RUN_2"}).save()
    read = Progress.load(path)
    assert (read.cursor, read.told, read.owed) == (AT, {"RUN_1": AT.isoformat()}, {"RUN_2"})
    path.write_text("{")
    assert Progress.load(path).told == {}


class Gateway:
    """Knows one run, which is on and has not begun a round."""

    def __init__(self, run: RunAnswer) -> None:
        self.run = run.model_copy(update={"state": RunState.RUNNING, "started_at": AT, "updated_at": AT})

    def get(self, path: str, **params: Any) -> Any:
        row = self.run.model_dump(mode="json")
        if path == f"{API}/runs":
            return [row] if datetime.fromisoformat(params["changed_after"]) < AT else []
        return [] if path.endswith("/rounds") else row

    def post(self, _path: str, body: dict[str, str]) -> None:
        self.run = self.run.model_copy(update=body)


class Shelf:
    """An MLflow server's names: experiments and runs."""

    def __init__(self) -> None:
        self.experiments: list[Any] = []
        self.runs: list[Any] = []

    def get_experiment(self, number: str) -> Any:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - seconds to collect, in every worker
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST  # noqa: PLC0415

        for item in self.experiments:
            if item.experiment_id == number:
                return item
        raise MlflowException("No such experiment.", RESOURCE_DOES_NOT_EXIST)

    def get_experiment_by_name(self, name: str) -> Any:
        return next((item for item in self.experiments if item.name == name), None)

    def create_experiment(self, name: str, tags: dict[str, str]) -> str:
        number = str(len(self.experiments))
        self.experiments.append(SimpleNamespace(experiment_id=number, name=name, lifecycle_stage="active", tags=tags))
        return number

    def search_runs(self, *_: Any, **__: Any) -> list[Any]:
        return self.runs

    def create_run(self, experiment: str, **about: Any) -> Any:
        info = SimpleNamespace(run_id=f"run-{len(self.runs)}", experiment_id=experiment, **about)
        self.runs.append(SimpleNamespace(info=info))
        return self.runs[-1]

    def get_run(self, _number: str) -> Any:
        return self.runs[0]

    def log_batch(self, *_: Any, **__: Any) -> None:
        """What is in a run is told to a real server above."""

    log_artifact = log_batch


@pytest.mark.parametrize("moment", ["while it was away", "while the service was down"])
@pytest.mark.parametrize("others", [(), ("somebody else's",)])
def test_an_mlflow_that_knows_nothing_of_us_is_told_everything(
    tmp_path: Path, moment: str, others: tuple[str, ...]
) -> None:
    gateway, path = cast("GatewayClient", Gateway(World(tmp_path / "world").desk.run)), tmp_path / "tracking.json"
    shelves, up = [Shelf()], [True]

    def tracker() -> Tracker:
        return Tracker(gateway, shelves[0], lambda: up[0], Progress.load(path))

    known = tracker()
    assert [known.step(), known.step()] == [1, 0]
    assert tracker().step() == 0, "a restart tells nothing again"
    if moment == "while it was away":
        up[0] = False
        with pytest.raises(TrackingAway):
            known.step()
        up[0] = True
        assert known.step() == 0, "it is back as it was"
        up[0] = False
        with pytest.raises(TrackingAway):
            known.step()
        up[0] = True
    else:
        known = tracker()
    shelves[0].__dict__.update(Shelf().__dict__)  # its volume was lost, or the address leads to another one
    for name in others:
        shelves[0].create_experiment(name, {})
    assert [known.step(), known.step()] == [1, 0]
    assert [item.name for item in shelves[0].experiments] == [*others, "tumours"]
    assert len(shelves[0].runs) == 1


def test_pictures_are_drawn(tmp_path: Path) -> None:
    draw_curves(
        {"loss": {"val_loss": [(0, 1.0), (1, 0.5)]}, "accuracy": {"val_accuracy": [(0, 0.5)]}}, tmp_path / "a.png"
    )
    draw_confusion([[5, 1], [0, 0]], (*CLASSES[:1], "100 $ or more $"), tmp_path / "b.png", "RUN_1 of 100 $")
    draw_curves({"of a site": {"$a": [(1, 0.5)]}}, tmp_path / "c.png", "RUN_1 of 100 $")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_a_level_curve_does_not_lie_on_the_frame(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for values in ((2.30, 2.31), (0.0, 0.0)):
        draw_curves({"loss": {"val_loss": list(enumerate(values))}}, tmp_path / "a.png")
        bottom, top = drawn[-1].axes[0].get_ylim()
        assert bottom == 0
        assert top > max(values) * 1.04


def test_the_sites_curves_are_named_after_the_sites_until_there_are_too_many() -> None:
    def values(count: int) -> list[Value]:
        of_sites = [Value(f"site/s{number}/val_accuracy", 0.5, AT, 1) for number in range(count)]
        return [Value("val_accuracy", 0.5, AT, 1), Value("site/s0/val_loss", 0.5, AT, 1), *of_sites]

    assert [list(curves) for curves in panels_of(values(2)).values()] == [["val_accuracy"], ["s0", "s1"]]
    assert list(panels_of(values(MAX_SITE_CURVES + 1))) == ["accuracy"]

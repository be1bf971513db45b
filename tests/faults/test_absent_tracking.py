"""MLflow may be away: no run notices, and nothing of any is missing afterwards."""

from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from hospital_world import World

from fl_server.tracking import round_values
from medhive.wire import API, RoundAnswer

pytestmark = pytest.mark.timeout(600)  # the first test starts a whole installation of eight processes
API_2 = "/api/2.0/mlflow"
ROUNDS = 2


@pytest.fixture
def mlflow(world: World) -> Iterator[httpx.Client]:
    """The tracking server, which runs only while it is looked at."""
    world.stack.start_mlflow()
    with httpx.Client(base_url=world.stack.mlflow_url, verify=world.stack.trust().context(), timeout=60) as client:
        yield client
    world.stack.programs["mlflow"].stop()


def run_of(mlflow: httpx.Client, mlflow_run_id: str) -> Mapping[str, Any]:
    answer = mlflow.get(f"{API_2}/runs/get", params={"run_id": mlflow_run_id}).raise_for_status()
    found: Mapping[str, Any] = answer.json()["run"]
    return found


def history(mlflow: httpx.Client, mlflow_run_id: str, metric: str) -> list[tuple[int, float]]:
    where = {"run_id": mlflow_run_id, "metric_key": metric}
    answer = mlflow.get(f"{API_2}/metrics/get-history", params=where).raise_for_status()
    return sorted((int(row["step"]), float(row["value"])) for row in answer.json()["metrics"])


def recorded(world: World, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric that the gateway holds of a run: by round, and the sites' verdict on the final weights."""
    rounds = [RoundAnswer.model_validate(row) for row in world.admin.get(f"{API}/runs/{run_id}/rounds")]
    values = {(item.name, item.step): item.value for row in rounds for item in round_values(row)}
    run = world.run(run_id)
    values |= {(name, ROUNDS): value for name, value in run.metrics.items()}
    values |= {(f"site/{item.site}/{name}", ROUNDS): v for item in run.sites for name, v in item.metrics.items()}
    names = {name for name, _ in values}
    return {
        wanted: sorted((step, value) for (name, step), value in values.items() if name == wanted) for wanted in names
    }


def test_mlflow_may_die_during_a_run_and_stay_away_for_the_next(world: World, mlflow: httpx.Client) -> None:
    died_in = world.begin("tumours", rounds=ROUNDS)
    world.event(died_in, "run.tracked")
    world.kill_mlflow()
    world.completed(died_in)
    away_in = world.begin("tumours", rounds=ROUNDS)
    world.completed(away_in)
    assert world.run(away_in).mlflow_run_id is None
    world.stack.start_mlflow()
    for run_id in (died_in, away_in):
        require_told_in_full(world, mlflow, run_id)


def require_told_in_full(world: World, mlflow: httpx.Client, run_id: str) -> None:
    """Wait until MLflow has a run as finished, then compare every value that it has of it with the gateway's."""
    mlflow_run_id = str(world.event(run_id, "run.tracked").data["mlflow_run_id"])
    world.wait(lambda: run_of(mlflow, mlflow_run_id)["info"]["status"] == "FINISHED", f"{run_id} FINISHED in MLflow")
    expected = recorded(world, run_id)
    assert {name: history(mlflow, mlflow_run_id, name) for name in expected} == expected
    assert [step for step, _ in expected["train_loss"]] == [1, 2]
    assert [step for step, _ in expected["val_accuracy"]] == [0, 1, 2]

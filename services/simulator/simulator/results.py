"""What a simulation leaves for people: tables, a summary, curves, one page that opens by itself, and the MLflow run."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fl_server.checkpoint import write_durably
from fl_server.figures import Curve, draw_confusion, draw_curves
from fl_server.tracking import (
    NOTE,
    READING_NOTE,
    ROUNDS_CSV,
    RUN_TAG,
    Value,
    flattened,
    log_values,
    panels_of,
    round_values,
)
from medhive.curves import TEST, RoundLine, final_line, rounds_csv
from medhive.errors import MedHiveError
from medhive.spec import RunOptions
from medhive.wire import RunEnd
from simulator import page
from simulator.desk import MODEL, Record, RecordedRound
from simulator.study import FOLDER_TASKS

PARTICIPATION_CSV, CLIENTS_CSV = "participation.csv", "clients.csv"
SUMMARY, CURVES, CONFUSION, PAGE = "summary.json", "curves.png", "confusion.png", "report.html"
PANELS: Final = {"accuracy": ("test_accuracy", "test_macro_f1"), "loss": ("test_loss",)}
MAX_PARAM: Final = 500
TRACKED: Final = (SUMMARY, ROUNDS_CSV, PARTICIPATION_CSV, CLIENTS_CSV, CURVES, CONFUSION, PAGE, MODEL)
"""Files of a result folder that MLflow keeps too."""
FACTS: Final = ("state", "rounds", "best_round", "best_test_accuracy", "seconds")
NOT_HERE: Final = frozenset({"privacy", "compress"})  # asked for, a simulation refuses them
SHOWN_ROUNDS: Final = 200  # rows that a person scrolls through; the CSV has all

MLFLOW_ENVIRONMENT: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is away must not hold up the rounds for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def own_values(recorded: RecordedRound) -> list[Value]:
    """The figures of one round, without those of single clients: steps as in MLflow's copy of a deployed run."""
    values = [value for value in round_values(recorded.as_answer()) if not value.name.startswith("site/")]
    counts = {"sites_addressed": recorded.asked, "sites_answered": recorded.answered}
    at = recorded.report.closed_at or recorded.report.opened_at
    # Clients train one after the other here, so that what is beside the slowest one is no overhead.
    told = [value for value in values if value.name not in {*counts, "sites_dropped", "round_overhead_s"}]
    told += [Value(name, count, at, recorded.number) for name, count in counts.items()]
    return told + [Value(TEST + name, value, at, recorded.number) for name, value in recorded.test.items()]


def final_values(end: RunEnd | None, rounds: Sequence[RecordedRound]) -> list[Value]:
    """What the clients say of the final weights, at the step of the last round."""
    if not rounds or end is None or end.state != "completed":
        return []
    at = rounds[-1].report.closed_at or rounds[-1].report.opened_at
    return [Value(name, value, at, rounds[-1].number) for name, value in end.metrics.items()]


def summary_of(
    identity: Mapping[str, Any], end: RunEnd, rounds: Sequence[RecordedRound], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary: how it ended, the last and the best figures, what it cost, and all that it was made of."""
    trained = [item for item in rounds if item.number and item.report.weights_digest]
    tested = [item for item in trained if item.test]
    best = max(tested, key=lambda item: item.test.get("accuracy", 0.0), default=None)
    return {
        "state": end.state,
        "reason": end.reason,
        "rounds": len(trained),
        "test": tested[-1].test if tested else {},
        "best_round": best.number if best else None,
        "best_test_accuracy": best.test.get("accuracy") if best else None,
        "validation": end.metrics,
        "weights_digest": trained[-1].report.weights_digest if trained else None,
        "seconds": sum(item.report.seconds for item in trained),
        "training_s": sum(item.training_s for item in trained),
        "clients_asked": sum(item.asked for item in trained),
        "clients_answered": sum(item.answered for item in trained),
        "refusals": sum(len(item.report.refusals) for item in rounds),
        **extra,
        "simulation": dict(identity),
    }


def write_results(
    folder: Path,
    summary: Mapping[str, Any],
    end: RunEnd,
    record: Record,
    *,
    clients: Sequence[str],
    counts: npt.NDArray[np.int64],
    classes: Sequence[str],
) -> None:
    """Write everything; each file appears whole."""
    write_durably(folder / ROUNDS_CSV, _rounds_text(record.rounds, end).encode())
    _write_participation(folder / PARTICIPATION_CSV, record.lines())
    rows = ([name, *map(int, row)] for name, row in zip(clients, counts, strict=True))
    _write_csv(folder / CLIENTS_CSV, ["client", *classes], rows)
    panels = panels_with_test(record.rounds, end)
    if panels:
        draw_curves(panels, folder / CURVES, title_of(summary))
    if end.confusion:
        draw_confusion(end.confusion, classes, folder / CONFUSION, "clients' validation parts")
    write_durably(folder / PAGE, page_of(folder, summary, record.rounds, panels).encode())
    write_durably(folder / SUMMARY, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())


def panels_with_test(rounds: Sequence[RecordedRound], end: RunEnd | None) -> dict[str, dict[str, Curve]]:
    """The panels of a deployed run's picture, with the test set's curves first."""
    values = [value for item in rounds for value in own_values(item)] + final_values(end, rounds)
    panels = panels_of(values)
    for title, names in PANELS.items():
        found = {name: sorted((v.step, v.value) for v in values if v.name == name) for name in names}
        curves = {name: curve for name, curve in found.items() if curve} | panels.get(title, {})
        if curves:
            panels[title] = curves
    return panels


def title_of(summary: Mapping[str, Any]) -> str:
    """`fedavg, 100 clients, shards:2, dropout 0.2`."""
    made = summary["simulation"]
    faults = faults_shown(made["faults"])
    named = [f"{name} {faults[name]}" for name in ("dropout", "slow", "poison") if name in faults]
    return ", ".join(
        [made["spec"]["options"]["strategy"], f"{summary['clients']} clients", summary["partition"], *named]
    )


def _rounds_text(rounds: Sequence[RecordedRound], end: RunEnd) -> str:
    lines = [
        RoundLine(item.number, item.report, item.report.metrics, item.test, item.asked, item.answered, item.training_s)
        for item in rounds
    ]
    return rounds_csv([*lines, *final_line(rounds[-1].number if rounds else 0, end.metrics)])


def _write_participation(path: Path, lines: Iterable[RecordedRound]) -> None:
    """A row for each client and round that asked it."""
    columns = ["round", "client", "answered", "examples", "train_loss", "update_norm", "training_s", "dropped"]
    rows = (
        [
            item.number,
            site.site,
            int(site.answered),
            site.examples,
            site.metrics.get("train_loss", ""),
            site.metrics.get("update_norm", ""),
            site.training_s,
            site.dropped or "",
        ]
        for item in lines
        for site in item.report.sites
    )
    _write_csv(path, columns, rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    part.replace(path)


def page_of(
    folder: Path, summary: Mapping[str, Any], rounds: Sequence[RecordedRound], panels: Mapping[str, Mapping[str, Curve]]
) -> str:
    """The page of one simulation."""
    facts = {name: summary[name] for name in FACTS}
    facts |= {TEST + name: value for name, value in summary["test"].items()}
    facts |= {f"heldout_{name}": value for name, value in summary["heldout"].items()} | summary["validation"]
    shown = f" (the last {SHOWN_ROUNDS})" if len(rounds) > SHOWN_ROUNDS else ""
    parts = [
        page.paragraph(f"{summary['state']}: {summary['reason']}", failed=True) if summary["reason"] else "",
        page.curves(panels),
        page.picture(folder / CONFUSION, "what the final model mistakes for what"),
        page.heading("Result"),
        page.table(["figure", "value"], [item for item in facts.items() if item[1] not in (None, "")]),
        page.heading(f"Rounds{shown}"),
        _rounds_table(rounds[-SHOWN_ROUNDS:]),
        page.paragraph("A metric val_... of a round is of the model before it, test_... of the model after it."),
        page.heading("Settings"),
        page.table(["setting", "value"], _settings(summary).items()),
        page.heading("Files"),
        _files(folder, summary),
    ]
    return page.document(f"Simulation: {title_of(summary)}", parts)


def _files(folder: Path, summary: Mapping[str, Any]) -> str:
    """What lies beside the page, and how the weights are known again."""
    kept = (folder / MODEL).exists()
    names = [ROUNDS_CSV, PARTICIPATION_CSV, CLIENTS_CSV, SUMMARY, *([MODEL] if kept else [])]
    links = [piece for name in names for piece in (page.Link(name, name), ", ")][:-1]
    weights = f" with the SHA-256 {summary['weights_digest']}." if kept else ". No weights: it did not come to its end."
    return page.paragraph(*links, weights)


def _settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """All that the result was made of, but what means nothing here or changes nothing."""
    made = summary["simulation"]
    options = RunOptions.model_validate(made["spec"]["options"])
    chosen = {name: value for name, value in made["spec"]["options"].items() if "deadline" not in name}
    of_others = {"mu"} if not options.local_mu else set()
    of_others |= {"penalty", "C"} if made["spec"]["task"] in FOLDER_TASKS else set()
    chosen = {name: value for name, value in chosen.items() if name not in {*of_others, *NOT_HERE}}
    own = {"task": made["spec"]["task"], "clients": summary["clients"], "partition": summary["partition"]}
    how = {name: made[name] or None for name in ("test_every", "forget")}
    how["together"] = made["together"] if made["together"] > 1 else None
    named = {**own, **chosen, **how, "study": made["spec"]["data"]["options"], "faults": faults_shown(made["faults"])}
    return {name: value for name, value in flattened(named).items() if value is not None}


def faults_shown(faults: Mapping[str, Any]) -> dict[str, str]:
    """Each fault that is simulated, by its flag, with the flag's value."""
    shown = {"dropout": f"{faults['dropout']:g}"} if faults["dropout"] else {}
    if faults["slow_share"]:
        shown["slow"] = f"{faults['slow_share']:g}:{faults['slow_factor']:g}"
        shown["patience"] = f"{faults['patience']:g}"
    if faults["poison_share"]:
        shown["poison"] = f"{faults['poison_share']:g}:{faults['poison']}"
    return shown


def _rounds_table(rounds: Sequence[RecordedRound]) -> str:
    metrics = [name for name in ("val_accuracy", "train_loss") if any(name in item.report.metrics for item in rounds)]
    tests = [name for name in ("accuracy", "loss", "macro_f1") if any(name in item.test for item in rounds)]
    rows = [
        [
            item.number,
            f"{item.answered} of {item.asked}",
            *(item.test.get(name, "") for name in tests),
            *(item.report.metrics.get(name, "") for name in metrics),
            item.report.seconds,
        ]
        for item in rounds
    ]
    return page.table(["round", "answered", *(TEST + name for name in tests), *metrics, "seconds"], rows)


class TrackingFailed(MedHiveError):
    """MLflow does not take what it is told."""

    code = "tracking-failed"


class Tracking:
    """The MLflow run of a simulation, told round by round; a resume goes on with it by the id in the folder.

    Every method raises `TrackingFailed`.
    """

    ID_FILE = "mlflow-run"

    def __init__(self, uri: str, folder: Path, identity: Mapping[str, Any], title: str) -> None:
        """Find the run or make it."""
        os.environ.update(MLFLOW_ENVIRONMENT)
        from mlflow import MlflowClient  # noqa: PLC0415 - seconds of imports, only where it is asked for

        self._folder, self._uri = folder, uri
        id_file = folder / self.ID_FILE
        with self._failures_named():
            self._client = MlflowClient(tracking_uri=uri)
            if not id_file.exists():
                # Written down before anything else is told, so that a simulation that ends in between makes no second run.
                write_durably(id_file, self._made(identity, title).encode())
            run = self._client.get_run(id_file.read_text("utf-8").strip())
            self.run_id = str(run.info.run_id)
            for key, value in flattened(identity).items():
                if key not in run.data.params:
                    self._client.log_param(self.run_id, key, str(value)[:MAX_PARAM])

    def tell(self, values: Sequence[Value]) -> None:
        """Log metrics; telling them again changes nothing, for each carries the time of its round."""
        with self._failures_named():
            log_values(self._client, self.run_id, values)

    def finish(self, state: str) -> None:
        """Log the files of the folder and end the run."""
        with self._failures_named():
            for name in TRACKED:
                if (self._folder / name).exists():
                    self._client.log_artifact(self.run_id, str(self._folder / name))
            self._client.set_terminated(self.run_id, "FINISHED" if state == "completed" else "FAILED")

    def _made(self, identity: Mapping[str, Any], title: str) -> str:
        study = identity["spec"]["study"]
        experiment = self._client.get_experiment_by_name(study)
        name = experiment.experiment_id if experiment else self._client.create_experiment(study)
        tags = {RUN_TAG: f"simulation {identity['digest'][:12]}", "mlflow.source.name": "medhive-simulate"}
        tags[NOTE] = f"A simulation: {title}.\n\nIts page is `{PAGE}` among the artifacts. {READING_NOTE}"
        return str(self._client.create_run(name, run_name=title, tags=tags).info.run_id)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            yield
        except (MlflowException, OSError, ModuleNotFoundError) as error:
            raise TrackingFailed(
                f"MLflow at {self._uri.rpartition('@')[2]} does not take the run: {_brief(error)} Start it and "
                "give the same command again, or leave out --mlflow and MLFLOW_TRACKING_URI."
            ) from error


def _brief(error: Exception) -> str:
    """What MLflow says, in one sentence where it is only that nobody answers."""
    text = str(error)
    return "it does not answer." if "Max retries exceeded" in text else text[:MAX_PARAM]

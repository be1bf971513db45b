"""What a simulation leaves for people: tables, a summary, curves, one page that opens by itself, and the MLflow run."""

import base64
import csv
import html
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
from fl_server.tracking import RUN_TAG, Value, flattened, log_values, panels_of, round_values
from medhive.errors import MedHiveError
from medhive.wire import RunEnd
from simulator.desk import MODEL, Record, RecordedRound

ROUNDS_CSV, PARTICIPATION_CSV, CLIENTS_CSV = "rounds.csv", "participation.csv", "clients.csv"
SUMMARY, CURVES, CONFUSION, PAGE = "summary.json", "curves.png", "confusion.png", "report.html"
TEST: Final = "test_"
"""Begins the metrics of the test set, of the model after the step's round, beside `val_*` and `train_*`."""
PANELS: Final = {"accuracy": ("test_accuracy", "test_macro_f1"), "loss": ("test_loss",)}
MAX_PARAM: Final = 500
FACTS: Final = ("state", "reason", "rounds", "best_round", "best_test_accuracy", "seconds")
SHOWN_ROUNDS: Final = 200  # rows that a person scrolls through; the CSV has all

MLFLOW_ENVIRONMENT: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is away must not hold up the rounds for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem }
body { color: #1a1a1a; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100%; background: #fff }
table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } .wide { overflow-x: auto }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #16181c } td, th { border-color: #333 } }
"""


def own_values(recorded: RecordedRound) -> list[Value]:
    """The figures of one round, without those of single clients: steps as in MLflow's copy of a deployed run."""
    values = [value for value in round_values(recorded.as_answer()) if not value.name.startswith("site/")]
    counts = {"sites_addressed": recorded.asked, "sites_answered": recorded.answered}
    at = recorded.report.closed_at or recorded.report.opened_at
    # Clients train one after the other here, so that what is beside the slowest one is no overhead.
    told = [value for value in values if value.name not in {*counts, "sites_dropped", "round_overhead_s"}]
    told += [Value(name, count, at, recorded.number) for name, count in counts.items()]
    return told + [Value(TEST + name, value, at, recorded.number) for name, value in recorded.test.items()]


def final_values(end: RunEnd, rounds: Sequence[RecordedRound]) -> list[Value]:
    """What the clients say of the final weights, at the step of the last round."""
    if not rounds or end.state != "completed":
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
    _write_rounds(folder / ROUNDS_CSV, record.rounds)
    _write_participation(folder / PARTICIPATION_CSV, record.lines())
    rows = ([name, *map(int, row)] for name, row in zip(clients, counts, strict=True))
    _write_csv(folder / CLIENTS_CSV, ["client", *classes], rows)
    panels = panels_with_test(record.rounds, end)
    if panels:
        draw_curves(panels, folder / CURVES, title_of(summary))
    if end.confusion:
        draw_confusion(end.confusion, classes, folder / CONFUSION, "clients' validation parts")
    write_durably(folder / PAGE, page_of(folder, summary, record.rounds).encode())
    write_durably(folder / SUMMARY, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())


def panels_with_test(rounds: Sequence[RecordedRound], end: RunEnd) -> dict[str, dict[str, Curve]]:
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
    """`fedavg, 100 clients, shards:2`."""
    made = summary["simulation"]
    return f"{made['spec']['options']['strategy']}, {summary['clients']} clients, {summary['partition']}"


def _write_rounds(path: Path, rounds: Sequence[RecordedRound]) -> None:
    """A row a round; a metric `val_*` is of the model before it, `test_*` of the model after it."""
    metrics = sorted({name for item in rounds for name in item.report.metrics})
    tests = sorted({name for item in rounds for name in item.test})
    figures = ["seconds", "bytes_up", "bytes_down"]
    columns = [
        "round",
        "state",
        "asked",
        "answered",
        "training_s",
        *figures,
        *(TEST + name for name in tests),
        *metrics,
    ]
    rows = (
        [
            item.number,
            item.report.state,
            item.asked,
            item.answered,
            item.training_s,
            *(getattr(item.report, name) for name in figures),
            *(item.test.get(name, "") for name in tests),
            *(item.report.metrics.get(name, "") for name in metrics),
        ]
        for item in rounds
    )
    _write_csv(path, columns, rows)


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


def page_of(folder: Path, summary: Mapping[str, Any], rounds: Sequence[RecordedRound]) -> str:
    """One page with everything in it: pictures as data, no script, nothing from elsewhere."""
    options = _settings(summary)
    facts = {name: summary[name] for name in FACTS}
    facts |= {TEST + name: value for name, value in summary["test"].items()}
    facts |= {f"heldout_{name}": value for name, value in summary["heldout"].items()} | summary["validation"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{_text(title_of(summary))}</title><style>{STYLE}</style>",
        f"<h1>Simulation: {_text(title_of(summary))}</h1>",
        *(_picture(folder / name, name.partition(".")[0]) for name in (CURVES, CONFUSION)),
        "<h2>Result</h2>",
        _table(
            ["figure", "value"], [[name, _shown(value)] for name, value in facts.items() if value not in (None, "")]
        ),
        f"<h2>Rounds{f' (the last {SHOWN_ROUNDS})' if len(rounds) > SHOWN_ROUNDS else ''}</h2>",
        _rounds_table(rounds[-SHOWN_ROUNDS:]),
        "<h2>Settings</h2>",
        _table(["setting", "value"], [[name, _shown(value)] for name, value in options.items() if value is not None]),
        f"<p>Weights: {_text(MODEL)}, SHA-256 {_text(summary['weights_digest'])}. Tables: {ROUNDS_CSV}, "
        f"{PARTICIPATION_CSV}, {CLIENTS_CSV}. A metric val_... of a round is of the model before it.</p></html>",
    ]
    return "\n".join(part for part in parts if part)


def _settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """All that the result was made of, but what means nothing here."""
    made = summary["simulation"]
    options = {name: value for name, value in made["spec"]["options"].items() if "deadline" not in name}
    own = {"task": made["spec"]["task"], "clients": summary["clients"], "partition": summary["partition"]}
    return flattened({**own, **options, "study": made["spec"]["data"]["options"], "faults": made["faults"]})


def _rounds_table(rounds: Sequence[RecordedRound]) -> str:
    metrics = [name for name in ("val_accuracy", "train_loss") if any(name in item.report.metrics for item in rounds)]
    tests = [name for name in ("accuracy", "loss", "macro_f1") if any(name in item.test for item in rounds)]
    rows = [
        [
            item.number,
            f"{item.answered} of {item.asked}",
            *(_shown(item.test.get(name, "")) for name in tests),
            *(_shown(item.report.metrics.get(name, "")) for name in metrics),
            _shown(item.report.seconds),
        ]
        for item in rounds
    ]
    return _table(["round", "answered", *(TEST + name for name in tests), *metrics, "seconds"], rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(name)}" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}" for cell in row) for row in rows)
    return f"<div class=wide><table><tr>{head}{body}</table></div>"


def _picture(path: Path, what: str) -> str:
    if not path.exists():
        return ""
    return f"<img alt='{_text(what)}' src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
            known = id_file.read_text("utf-8").strip() if id_file.exists() else ""
            self.run_id = str(self._client.get_run(known).info.run_id) if known else self._made(identity, title)
        write_durably(id_file, self.run_id.encode())

    def tell(self, values: Sequence[Value]) -> None:
        """Log metrics; telling them again changes nothing, for each carries the time of its round."""
        with self._failures_named():
            log_values(self._client, self.run_id, values)

    def finish(self, state: str) -> None:
        """Log the files of the folder and end the run."""
        with self._failures_named():
            for name in (SUMMARY, ROUNDS_CSV, CURVES, CONFUSION, PAGE, MODEL):
                if (self._folder / name).exists():
                    self._client.log_artifact(self.run_id, str(self._folder / name))
            self._client.set_terminated(self.run_id, "FINISHED" if state == "completed" else "FAILED")

    def _made(self, identity: Mapping[str, Any], title: str) -> str:
        study = identity["spec"]["study"]
        experiment = self._client.get_experiment_by_name(study)
        name = experiment.experiment_id if experiment else self._client.create_experiment(study)
        tags = {RUN_TAG: f"simulation {identity['digest'][:12]}", "mlflow.source.name": "medhive-simulate"}
        run = self._client.create_run(name, run_name=title, tags=tags)
        for key, value in flattened(identity).items():
            self._client.log_param(run.info.run_id, key, str(value)[:MAX_PARAM])
        return str(run.info.run_id)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            yield
        except (MlflowException, OSError, ModuleNotFoundError) as error:
            raise TrackingFailed(
                f"MLflow at {self._uri.rpartition('@')[2]} does not take the run: {str(error)[:MAX_PARAM]} Start it and "
                "give the same command again, or leave out --mlflow and MLFLOW_TRACKING_URI."
            ) from error

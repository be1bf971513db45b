"""Tells MLflow what the gateway knows: experiments, runs, metrics by round, pictures, registered model versions.

The gateway's database is the truth and MLflow a copy, so nothing here is told as it happens: each pass compares what changed
at the gateway with what was delivered, and delivers the rest. Every value carries the time of the gateway's own row, which
makes a second delivery change nothing, so MLflow may be away for any time, and this process may be killed at any moment,
without a metric lost or told twice. Weights are logged as the safetensors files they are, never through a model flavour,
which would pickle them.

Step n of a metric `val_*` is the model after n rounds (a site evaluates the weights that it was sent, so round n + 1 tells
of them, and the final evaluation of the last); step n of everything else is what happened in round n.
"""

import json
import os
import re
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import structlog

from fl_server.checkpoint import write_durably
from fl_server.figures import Curve, draw_confusion, draw_curves
from fl_server.gateway import MAX_WEIGHTS_BYTES
from fl_server.settings import ServerSettings, read_token
from medhive.client import GatewayClient
from medhive.curves import lines_of, rounds_csv
from medhive.errors import MedHiveError, NotFound, Unreachable
from medhive.queues import QUEUE_PREFIX, QueueContributionAnswer
from medhive.signing import canonical_json
from medhive.states import FINAL_RUN_STATES, ConsentState, RoundState, RunState, VersionState
from medhive.wire import API, NOT_ADDRESSED, RoundAnswer, RunAnswer, VersionAnswer

PASS_S = 2.0
"""How soon a closed round shows in MLflow."""
LONGEST_WAIT_S = 5.0
"""Between two looks at an MLflow server that is away; a look is one connection beside this process, or a refused one."""
STUDIES_S = 20.0
"""How soon a roll-back, and a queue's version, which change no run, show in MLflow."""
OVERLAP = timedelta(seconds=10)
"""Changes are asked for again this far back: a change with an earlier time may be committed after a later one."""
PAGE = 100
MAX_BATCH = 900
"""Metrics in one call; MLflow takes 1,000."""
MAX_TAG = 5000
"""Characters of a tag's value that every version of MLflow takes; what is longer is in an artifact."""
MAX_PARAM = 500
MAX_CONTRIBUTIONS = 1000
"""Contributions to one version of a queue: its largest capacity."""
MAX_SITE_CURVES = 10
"""More curves cannot be told apart by colour."""
HEALTH_TIMEOUT_S = 3.0
REQUEST_TIMEOUT_S = 20
UNSAFE_IN_NAMES = re.compile(r"[^A-Za-z0-9_\-. /:]")
"""What MLflow refuses in the name of a metric."""

BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)
STATUS: Mapping[RunState, str] = {
    RunState.COMPLETED: "FINISHED",
    RunState.FAILED: "FAILED",
    RunState.CANCELLED: "KILLED",
}
ROUNDS_CSV = "rounds.csv"
RUN_TAG, VERSION_TAG = "medhive.run_id", "medhive.version"
NOTE = "mlflow.note.content"
"""The tag that MLflow's pages show as a description, in Markdown."""
READING_NOTE = (
    "Step *n* of a metric `val_...` is the model after *n* rounds, on the sites' validation parts, of a metric `test_...` "
    "the same on a test set; step *n* of every other metric is what happened in round *n*. Round 0 prepares the run. What "
    "begins with `site/<name>/` is one site's."
)
QUEUE_NOTE = (
    "Step *n* of a metric is version *n* of the study. `lineage/` has, for each version, the contributions that it is made "
    "of, with their weights and staleness; `staleness` counts the versions made since a contribution's base. What begins "
    "with `site/<name>/` is one site's."
)
MODEL_NOTE = (
    "Made by MedHive. A version's tag `medhive.version` is its number at the coordinator and in the hospitals, which "
    "MLflow's own number need not be. `newest` is the last one made, `candidate` the one that hospitals decide on."
)

log = structlog.get_logger()


class TrackingAway(Unreachable):
    """The MLflow server does not answer; what it has not been told waits."""

    code = "tracking-away"


@dataclass
class Progress:
    """How far MLflow has been told, kept in a file.

    cursor: changes at the gateway up to here were seen; told: run to the `updated_at` that was delivered, of the runs that
    changed about then; owed: runs whose delivery failed for a reason of their own; experiment: MLflow's id and the name of
    the one that was told last, by which that MLflow is known again.
    """

    path: Path
    cursor: datetime = BEGINNING
    told: dict[str, str] = field(default_factory=dict)
    owed: set[str] = field(default_factory=set)
    experiment: tuple[str, str] | None = None

    @classmethod
    def load(cls, path: Path) -> "Progress":
        """Read it; from the beginning when there is none or it is unreadable, which only costs time."""
        try:
            content = json.loads(path.read_text("utf-8"))
            cursor = datetime.fromisoformat(content["cursor"])
            number, name = content.get("experiment") or ("", "")  # an earlier release kept none
            experiment = (str(number), str(name)) if number else None
            return cls(path, cursor, dict(content["told"]), set(content["owed"]), experiment)
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("tracking.progress-unreadable", reason=str(error))
            return cls(path)

    def save(self) -> None:
        """Make it durable, without what lies too far back to be asked for again."""
        oldest = self.cursor - 2 * OVERLAP
        self.told = {run: at for run, at in self.told.items() if datetime.fromisoformat(at) >= oldest}
        content = {"cursor": self.cursor.isoformat(), "told": self.told, "owed": sorted(self.owed)}
        write_durably(self.path, json.dumps({**content, "experiment": self.experiment}).encode())

    def begin_anew(self) -> None:
        """Nothing was told; durable before anything is, by which this MLflow could be taken for the one before."""
        self.cursor, self.told, self.owed, self.experiment = BEGINNING, {}, set(), None
        self.save()


class Tracker:
    """Delivers, one pass at a time.

    Args:
        gateway: with the aggregator's token.
        mlflow: an `mlflow.MlflowClient`.
        is_up: whether the MLflow server answers.
        progress: what was delivered before.
    """

    def __init__(self, gateway: GatewayClient, mlflow: Any, is_up: Callable[[], bool], progress: Progress) -> None:
        self._gateway = gateway
        self._mlflow = mlflow
        self._is_up = is_up
        self._progress = progress
        self._rounds_told: dict[str, set[int]] = {}
        self._aliases_told: dict[str, dict[str, str]] = {}
        self._queue_told: set[tuple[str, int]] = set()
        self._open_queues: dict[str, tuple[str, str]] = {}
        self._backlog: int | None = None
        self._met = False

    def step(self) -> int:
        """Deliver what changed; returns how many runs were told.

        Raises:
            TrackingAway, Unreachable: MLflow, or the gateway, does not answer; the next pass goes on.
        """
        if not self._is_up():
            self._met = False
            self._tell_backlog(self._waiting())
            raise TrackingAway("The MLflow server does not answer; runs go on, and it is told later.")
        self._meet()
        told = sum(self._try(run_id) for run_id in sorted(self._progress.owed))
        after = self._progress.cursor - OVERLAP
        while True:
            runs = self._changed(after)
            for run in runs:
                if self._progress.told.get(run.id) != run.updated_at.isoformat():
                    told += self._tell_row(run)
            if len(runs) < PAGE:
                self._tell_backlog(len(self._progress.owed))
                return told
            after = runs[-1].updated_at

    def _meet(self) -> None:
        """Tell everything to an MLflow that lacks what was told: it has lost its data, or is another one."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        if self._met:
            return
        try:
            known = self._knows_us()
        except (MlflowException, OSError):
            return  # what is wrong shows at the delivery; this is looked at again
        self._met = True
        if not known:
            log.warning("tracking.begins-anew")
            self._progress.begin_anew()
            for told in (self._rounds_told, self._aliases_told, self._queue_told, self._open_queues):
                told.clear()

    def _knows_us(self) -> bool:
        """Whether MLflow has the experiment that was told last."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        if self._progress.experiment is None:
            return True
        number, name = self._progress.experiment
        try:
            return str(self._mlflow.get_experiment(number).name) == name
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _waiting(self) -> int:
        """How many runs have something to tell; no more than a page of those that changed, which is enough to be alarmed."""
        changed = {run.id for run in self._changed(self._progress.cursor - OVERLAP) if self._is_news(run)}
        return len(changed | self._progress.owed)

    def _is_news(self, run: RunAnswer) -> bool:
        return run.started_at is not None and self._progress.told.get(run.id) != run.updated_at.isoformat()

    def _tell_backlog(self, runs: int) -> None:
        """Say it once; the service, which reads this process's log, makes a figure of it."""
        if runs != self._backlog:
            self._backlog = runs
            log.info("tracking.backlog", runs=runs)

    def _changed(self, after: datetime) -> list[RunAnswer]:
        """The next runs that changed after a moment, in the order of their change."""
        rows = self._gateway.get(f"{API}/runs", changed_after=after.isoformat(), limit=PAGE)
        return [RunAnswer.model_validate(row) for row in rows]

    def _tell_row(self, run: RunAnswer) -> bool:
        told = run.started_at is not None and self._try(run.id, run)
        self._progress.told[run.id] = run.updated_at.isoformat()
        self._progress.cursor = max(self._progress.cursor, run.updated_at)
        self._progress.save()
        return told

    def _try(self, run_id: str, run: RunAnswer | None = None) -> bool:
        """Deliver one run; a failure of its own is kept for later and holds up no other."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415 - as late as possible: heavy

        try:
            self._deliver(run or RunAnswer.model_validate(self._gateway.get(f"{API}/runs/{run_id}")))
        except (MlflowException, httpx.HTTPError, OSError) as error:
            if not self._is_up():
                raise TrackingAway("The MLflow server went away; what it was not told waits.") from error
            self._owe(run_id, error)
            return False
        except Unreachable:
            raise
        except MedHiveError as error:
            self._owe(run_id, error)
            return False
        self._progress.owed.discard(run_id)
        return True

    def _owe(self, run_id: str, error: Exception) -> None:
        log.warning("tracking.failed", run_id=run_id, reason=str(error)[:MAX_PARAM])
        self._progress.owed.add(run_id)

    # ---- one run ---------------------------------------------------------------------------------------------------

    def _deliver(self, run: RunAnswer) -> None:
        mlflow_id = self._mlflow_run(run)
        if run.mlflow_run_id != mlflow_id:
            self._gateway.post(f"{API}/server/runs/{run.id}/mlflow", {"mlflow_run_id": mlflow_id})
        rounds = [RoundAnswer.model_validate(row) for row in self._gateway.get(f"{API}/runs/{run.id}/rounds")]
        ended = [item for item in rounds if item.state != RoundState.OPEN]
        version = self._version(run)
        self._tell_description(run, mlflow_id)
        self._tell_rounds(run, mlflow_id, ended)
        final = self._final_values(run, version, rounds)
        self._log_values(mlflow_id, final)
        if version is not None:
            self._register(mlflow_id, version)
        if run.state in FINAL_RUN_STATES:
            self._log_text(mlflow_id, ROUNDS_CSV, rounds_csv(lines_of(ended, version.metrics if version else {})))
            values = [value for item in ended for value in round_values(item)]
            self._tell_pictures(run, mlflow_id, [*values, *final], version)
            self._mlflow.set_terminated(mlflow_id, STATUS[run.state], _milliseconds(run.ended_at or run.updated_at))
        log.info("tracking.told", run_id=run.id, state=str(run.state), rounds=len(ended))

    def _mlflow_run(self, run: RunAnswer) -> str:
        tags = {
            "medhive.spec_hash": run.spec_hash,
            # What MLflow's own column "User" shows.
            "mlflow.user": run.request_site or run.requested_by,
        }
        return self._run_named(run.id, run.study, run.started_at or run.created_at, tags)

    def _run_named(self, name: str, study: str, began_at: datetime, tags: Mapping[str, str]) -> str:
        """MLflow's id of a run or a queue; made where MLflow has none."""
        experiment = self._experiment(study)
        found = self._mlflow.search_runs([experiment], f"tags.`{RUN_TAG}` = '{name}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        # The source is what MLflow's own column "Source" shows.
        known = {RUN_TAG: name, "medhive.study": study, "mlflow.source.name": "medhive-server", **tags}
        start = _milliseconds(began_at)
        return str(self._mlflow.create_run(experiment, start_time=start, run_name=name, tags=known).info.run_id)

    def _experiment(self, study: str) -> str:
        number = self._experiment_named(study)
        self._progress.experiment = (number, study)
        return number

    def _experiment_named(self, study: str) -> str:
        experiment = self._mlflow.get_experiment_by_name(study)
        if experiment is None:
            return str(self._mlflow.create_experiment(study, tags={NOTE: experiment_note(study)}))
        if experiment.lifecycle_stage == "deleted":
            self._mlflow.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _tell_description(self, run: RunAnswer, mlflow_id: str) -> None:
        from mlflow.entities import Param, RunTag  # noqa: PLC0415

        spec = canonical_json(run.spec.model_dump(mode="json")).decode()
        options = run.spec.options.model_dump(mode="json")
        of_study = {f"study.{name}": value for name, value in run.spec.data.options.items()}
        values = {"task": run.spec.task, "base_version": run.spec.base_version, **of_study, **flattened(options)}
        sites = [item.site for item in run.consents if item.state in (ConsentState.GRANTED, ConsentState.WITHDRAWN)]
        tags = {
            "medhive.state": str(run.state),
            "medhive.reason": run.reason[:MAX_TAG],
            "medhive.sites": ",".join(sites)[:MAX_TAG],
            "medhive.request_id": run.request_id,
            "medhive.spec": spec if len(spec) <= MAX_TAG else "see the artifact spec.json",
            NOTE: run_note(run, sites, self._page_of(mlflow_id))[:MAX_TAG],
        }
        self._mlflow.log_batch(
            mlflow_id,
            params=[Param(name, str(value)[:MAX_PARAM]) for name, value in values.items() if value is not None],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        if run.id not in self._rounds_told:
            self._rounds_told[run.id] = set()
            self._log_text(mlflow_id, "spec.json", spec)

    def _page_of(self, mlflow_id: str) -> str:
        """Where MLflow's own page of the run lies, from any of its pages and behind any proxy."""
        return f"#/experiments/{self._mlflow.get_run(mlflow_id).info.experiment_id}/runs/{mlflow_id}"

    def _log_text(self, mlflow_id: str, name: str, text: str, place: str | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(text, "utf-8")
            self._mlflow.log_artifact(mlflow_id, str(path), place)

    def _tell_rounds(self, run: RunAnswer, mlflow_id: str, ended: Sequence[RoundAnswer]) -> None:
        told = self._rounds_told[run.id]
        fresh = [item for item in ended if item.number not in told]
        if not fresh:
            return
        self._log_values(mlflow_id, [value for item in fresh for value in round_values(item)])
        self._log_text(mlflow_id, "rounds.json", json.dumps([_participation(item) for item in ended], indent=1))
        self._log_text(mlflow_id, ROUNDS_CSV, rounds_csv(lines_of(ended, {})))
        told.update(item.number for item in fresh)

    def _log_values(self, mlflow_id: str, values: Sequence["Value"]) -> None:
        log_values(self._mlflow, mlflow_id, values)

    def _final_values(
        self, run: RunAnswer, version: VersionAnswer | None, rounds: Sequence[RoundAnswer]
    ) -> list["Value"]:
        """What is said of the final weights, of all sites together and of each, at the step of the last round."""
        if version is None:
            return []
        whole = RunAnswer.model_validate(self._gateway.get(f"{API}/runs/{run.id}"))  # a list's row names no sites
        everybody = (*whole.sites, *whole.evaluators)
        own = {f"site/{item.site}/{name}": value for item in everybody for name, value in item.metrics.items()}
        last = max((item.number for item in rounds), default=0)
        at = run.ended_at or version.created_at
        return [Value(name, value, at, last) for name, value in {**version.metrics, **own}.items()]

    def _tell_pictures(
        self, run: RunAnswer, mlflow_id: str, values: Sequence["Value"], version: VersionAnswer | None
    ) -> None:
        panels = panels_of(values)
        with tempfile.TemporaryDirectory() as folder:
            if panels:
                draw_curves(panels, Path(folder) / "curves.png", f"{run.id} of {run.study}")
            if version is not None and version.confusion:
                title = f"Version {version.version} of {run.study}, all sites' validation parts"
                picture = Path(folder) / "confusion_matrix.png"
                draw_confusion(version.confusion, run.spec.data.classes, picture, title)
            for path in sorted(Path(folder).iterdir()):
                self._mlflow.log_artifact(mlflow_id, str(path))

    # ---- model versions --------------------------------------------------------------------------------------------

    def _version(self, run: RunAnswer) -> VersionAnswer | None:
        if run.version is None:
            return None
        row = self._gateway.get(f"{API}/studies/{run.study}/versions/{run.version}")
        return VersionAnswer.model_validate(row)

    def _register(self, mlflow_id: str, version: VersionAnswer, folder: str = "model") -> None:
        """Copy a version's file and manifest into the registry, once."""
        name = model_name(version.study)
        if version.version in self._registered(name):
            return
        if not version.bytes_kept:
            log.info("tracking.version-cleaned-up", study=version.study, version=version.version)
            return
        self._log_model(mlflow_id, version, folder)
        made_by = version.run_id or ""
        tags = {VERSION_TAG: str(version.version), "medhive.digest": version.digest, RUN_TAG: made_by}
        self._mlflow.create_model_version(
            name,
            f"runs:/{mlflow_id}/{folder}",
            run_id=mlflow_id,
            tags=tags,
            description=version_note(version),
            await_creation_for=0,
        )
        self._aliases_told.pop(version.study, None)
        self._tell_aliases(version.study, self._versions(version.study))

    def _log_model(self, mlflow_id: str, version: VersionAnswer, place: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.safetensors"
            path = f"{API}/studies/{version.study}/versions/{version.version}/file"
            self._gateway.download(path, weights, version.digest, max_bytes=MAX_WEIGHTS_BYTES)
            manifest = Path(folder) / "manifest.json"
            manifest.write_text(version.manifest.model_dump_json(indent=1), "utf-8")
            for file in (weights, manifest):
                self._mlflow.log_artifact(mlflow_id, str(file), place)

    def _registered(self, name: str) -> dict[int, str]:
        """MedHive's version numbers in the registry, and MLflow's own for them; makes the model where there is none."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            self._mlflow.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._mlflow.create_registered_model(name, description=MODEL_NOTE)
        rows = self._mlflow.search_model_versions(f"name = '{name}'")
        return {int(row.tags[VERSION_TAG]): str(row.version) for row in rows if VERSION_TAG in row.tags}

    # ---- studies: queues, aliases ------------------------------------------------------------------------------------

    def tell_studies(self) -> None:
        """Bring what no run changes up to date: the versions of queues, and which version is `newest` and `candidate`.

        Raises:
            TrackingAway, Unreachable: MLflow, or the gateway, does not answer; the next pass goes on.
        """
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        for row in self._gateway.get(f"{API}/studies"):
            if row.get("newest_version"):
                try:
                    self._tell_study(str(row["name"]))
                except (MlflowException, httpx.HTTPError, OSError) as error:
                    if not self._is_up():
                        raise TrackingAway("The MLflow server went away; what it was not told waits.") from error
                    log.warning("tracking.failed", study=row["name"], reason=str(error)[:MAX_PARAM])

    def _tell_study(self, study: str) -> None:
        versions = self._versions(study)
        for version in sorted(versions, key=lambda item: item.version):
            key = (study, version.version)
            if _is_of_queue(version) and key not in self._queue_told:
                self._tell_queue_version(version)
                self._queue_told.add(key)
        self._tell_queues_end(study, versions)
        self._tell_aliases(study, versions)

    def _tell_queue_version(self, version: VersionAnswer) -> None:
        """A queue is one run in MLflow, each of its versions one step."""
        queue = str(version.run_id)
        path = f"{API}/studies/{version.study}/queue/contributions"
        rows = self._gateway.get(path, version=version.version, limit=MAX_CONTRIBUTIONS)
        lineage = [QueueContributionAnswer.model_validate(row) for row in reversed(rows)]
        tags = {"medhive.spec_hash": version.manifest.body.spec_hash or "", NOTE: QUEUE_NOTE}
        mlflow_id = self._run_named(queue, version.study, version.created_at, tags)
        self._log_values(mlflow_id, queue_values(version, lineage))
        lines = [row.model_dump(mode="json") for row in lineage]
        self._log_text(mlflow_id, f"v{version.version}.json", json.dumps(lines, indent=1), "lineage")
        self._register(mlflow_id, version, f"v{version.version}")
        self._open_queues[version.study] = (queue, mlflow_id)
        log.info("tracking.version-told", study=version.study, version=version.version, queue=queue)

    def _tell_queues_end(self, study: str, versions: Sequence[VersionAnswer]) -> None:
        if study not in self._open_queues:
            return
        queue, mlflow_id = self._open_queues[study]
        try:
            is_open = self._gateway.get(f"{API}/studies/{study}/queue")["id"] == queue
        except NotFound:
            is_open = False
        if not is_open:
            last = max(version.created_at for version in versions if version.run_id == queue)
            self._mlflow.set_terminated(mlflow_id, STATUS[RunState.COMPLETED], _milliseconds(last))
            del self._open_queues[study]

    def _versions(self, study: str) -> list[VersionAnswer]:
        rows = self._gateway.get(f"{API}/studies/{study}/versions")
        return [VersionAnswer.model_validate(row) for row in rows if row["version"] > 0]

    def _tell_aliases(self, study: str, versions: Sequence[VersionAnswer]) -> None:
        wanted = _aliases(versions)
        if self._aliases_told.get(study) == wanted:
            return
        name = model_name(study)
        registered = self._registered(name)
        for alias in ("newest", "candidate"):
            number = registered.get(int(wanted[alias])) if alias in wanted else None
            if number is not None:
                self._mlflow.set_registered_model_alias(name, alias, number)
            elif alias not in wanted:
                self._mlflow.delete_registered_model_alias(name, alias)
        if all(int(number) in registered for number in wanted.values()):
            self._aliases_told[study] = wanted


@dataclass(frozen=True)
class Value:
    """One metric of a run at one step."""

    name: str
    value: float
    at: datetime
    step: int


def log_values(mlflow: Any, mlflow_id: str, values: Sequence[Value]) -> None:
    """Tell an `mlflow.MlflowClient` metrics of one of its runs, in as few calls as it takes."""
    from mlflow.entities import Metric  # noqa: PLC0415

    metrics = [Metric(_safe(value.name), value.value, _milliseconds(value.at), value.step) for value in values]
    for start in range(0, len(metrics), MAX_BATCH):
        mlflow.log_batch(mlflow_id, metrics=metrics[start : start + MAX_BATCH])


def round_values(item: RoundAnswer) -> list[Value]:
    """Everything that is told of one round, each with the round's own time, so that telling it again changes nothing."""
    at = item.closed_at or item.opened_at
    figures: dict[str, float] = {
        "round_seconds": item.seconds,
        "round_overhead_s": item.overhead_s,
        "bytes_down": item.bytes_down,
        "bytes_up": item.bytes_up,
        **_counts(item),
        **item.metrics,
    }
    for site in (*item.sites, *item.evaluators):
        if site.answered:
            own = {**site.metrics, "training_s": site.training_s, "examples": site.examples, "bytes_up": site.bytes_up}
            figures |= {f"site/{site.site}/{name}": value for name, value in own.items()}
    return [Value(name, value, at, _step(name, item.number)) for name, value in figures.items()]


def queue_values(version: VersionAnswer, lineage: Sequence[QueueContributionAnswer]) -> list[Value]:
    """Everything that is told of one version of a queue, with the version's own time and number."""
    figures: dict[str, float] = {
        "contributions": len(lineage),
        "examples": sum(row.examples for row in lineage),
        "staleness": max((row.staleness or 0 for row in lineage), default=0),
        **version.metrics,
    }
    values = [Value(name, value, version.created_at, version.version) for name, value in figures.items()]
    for row in lineage:
        own = {**row.metrics, "weight": row.weight or 0.0, "staleness": row.staleness or 0, "examples": row.examples}
        for name, value in own.items():
            # What a site says of the weights that it began from is told of the version that they are.
            step = row.base_version if name.startswith("val_") else version.version
            values.append(Value(f"site/{row.site}/{name}", value, row.received_at, step))
    return values


def _counts(item: RoundAnswer) -> dict[str, float]:
    parts = _participation(item)
    return {f"sites_{name}": len(parts[name]) for name in ("addressed", "answered", "dropped")}


def _participation(item: RoundAnswer) -> dict[str, Any]:
    """Who was asked in a round, who counted, and who was dropped why."""
    asked = [site for site in item.sites if not (site.dropped or "").startswith(NOT_ADDRESSED)]
    return {
        "round": item.number,
        "state": str(item.state),
        "addressed": [site.site for site in asked],
        "answered": [site.site for site in asked if site.answered and not site.dropped],
        "dropped": {site.site: site.dropped for site in item.sites if site.dropped},
    }


def _step(name: str, number: int) -> int:
    """What a site says of the weights it was sent is told of the model after the round before."""
    is_of_base = any(part.startswith(("val_", "test_")) for part in name.split("/"))
    return number - 1 if is_of_base else number


def panels_of(values: Sequence[Value]) -> dict[str, dict[str, Curve]]:
    """The curves worth a picture: global accuracy and loss, of validation and training, and the sites' accuracy."""
    of_sites = sorted({value.name for value in values if re.fullmatch(r"site/[^/]+/val_accuracy", value.name)})
    wanted: dict[str, Sequence[str]] = {
        "accuracy": ("val_accuracy", "val_macro_f1", "test_accuracy", "train_accuracy"),
        "loss": ("val_loss", "test_loss", "train_loss"),
        "accuracy on each site's validation part": of_sites if len(of_sites) <= MAX_SITE_CURVES else (),
    }
    panels: dict[str, dict[str, Curve]] = {}
    for title, names in wanted.items():
        found = {name.removeprefix("site/").removesuffix("/val_accuracy"): _curve(values, name) for name in names}
        found = {label: curve for label, curve in found.items() if curve}
        if found:
            panels[title] = found
    return panels


def _curve(values: Sequence[Value], name: str) -> Curve:
    return sorted({value.step: value.value for value in values if value.name == name}.items())


def _aliases(versions: Sequence[VersionAnswer]) -> dict[str, str]:
    """The aliases that a study's model should carry, each with MedHive's version number."""
    if not versions:
        return {}
    candidates = [item.version for item in versions if item.state == VersionState.CANDIDATE]
    newest = {"newest": str(max(item.version for item in versions))}
    return newest | ({"candidate": str(max(candidates))} if candidates else {})


def experiment_note(study: str) -> str:
    """What the page of a study's experiment says."""
    what = f"Training runs of the study **{study}**; a copy of what the coordinator's gateway keeps."
    return f"{what}\n\n{READING_NOTE}"


def run_note(run: RunAnswer, sites: Sequence[str], page: str) -> str:
    """What a run's page says: who asked for what, where it was trained, how it ended, and how to read its metrics."""
    options = run.spec.options
    asked = run.request_site or run.requested_by or "the coordinator"
    where = ", ".join(sites) or "no site yet"
    what = f"{run.rounds} rounds of {options.local_epochs} local epochs, {options.strategy}, at {where}"
    ended = f"{run.state}{f': {run.reason}' if run.reason else ''}"
    made = f"; made version {run.version}" if run.version is not None else ""
    table = f"The curves as a table: [{ROUNDS_CSV}]({page}/artifacts/{ROUNDS_CSV})."
    return f"{run.request_id} of {asked}: {what}.\n\n**{ended}**{made}.\n\n{table} {READING_NOTE}"


def version_note(version: VersionAnswer) -> str:
    """What a registered version's page says."""
    body = version.manifest.body
    where = ", ".join(body.sites) or "no site"
    made = "an average of a queue's contributions" if _is_of_queue(version) else f"{body.rounds} rounds"
    note = f"Version {version.version} of {version.study}: {made} on {body.examples} examples at {where}."
    accuracy = version.metrics.get("val_accuracy")
    return note if accuracy is None else f"{note} Accuracy on the sites' validation parts: {accuracy:.4f}."


def _is_of_queue(version: VersionAnswer) -> bool:
    return (version.run_id or "").startswith(QUEUE_PREFIX)


def model_name(study: str) -> str:
    """The name of a study's model in the registry."""
    return f"medhive-{study}"


def flattened(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one level, their names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _safe(name: str) -> str:
    """A metric's name with what MLflow refuses (a class may be named in any script) written as code points."""
    return UNSAFE_IN_NAMES.sub(lambda found: f"u{ord(found[0]):04x}", name)


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)


# ---- the process ---------------------------------------------------------------------------------------------------


def track(settings: ServerSettings, stopped: threading.Event) -> None:
    """Deliver until stopped. Whatever is away is waited for."""
    if settings.mlflow_url is None:
        return
    with settings.gateway() as gateway, _health(settings) as health:
        client = _mlflow_client(settings)
        tracker = Tracker(gateway, client, lambda: _is_up(health), Progress.load(settings.tracking_file))
        _loop(tracker, stopped)


def _loop(tracker: Tracker, stopped: threading.Event) -> None:
    wait = PASS_S
    studies_in = 0.0
    while not stopped.wait(wait):
        try:
            tracker.step()
            studies_in -= PASS_S
            if studies_in <= 0:
                tracker.tell_studies()
                studies_in = STUDIES_S
        except MedHiveError as error:
            if wait == PASS_S:
                log.warning("tracking.away", reason=str(error))
            wait = min(wait * 2, LONGEST_WAIT_S)
        else:
            if wait > PASS_S:
                log.info("tracking.back")
            wait = PASS_S


def _mlflow_client(settings: ServerSettings) -> Any:
    """MLflow's client reads its settings from this process's environment; they must stand before it is imported."""
    os.environ.update(_mlflow_environment(settings))
    from mlflow import MlflowClient  # noqa: PLC0415 - after the environment

    return MlflowClient(tracking_uri=settings.mlflow_url, registry_uri=settings.mlflow_url)


def _mlflow_environment(settings: ServerSettings) -> dict[str, str]:
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # An outage is this module's business: the client must not sit in its own retries for minutes.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT_S),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    if settings.mlflow_ca_file:
        environment["MLFLOW_TRACKING_SERVER_CERT_PATH"] = str(settings.mlflow_ca_file)
    if settings.mlflow_username and settings.mlflow_password_file:
        environment["MLFLOW_TRACKING_USERNAME"] = settings.mlflow_username
        environment["MLFLOW_TRACKING_PASSWORD"] = read_token(settings.mlflow_password_file)
    return environment


def _health(settings: ServerSettings) -> httpx.Client:
    ca_file = str(settings.mlflow_ca_file) if settings.mlflow_ca_file else None
    verify = ssl.create_default_context(cafile=ca_file)
    return httpx.Client(base_url=str(settings.mlflow_url), timeout=HEALTH_TIMEOUT_S, verify=verify)


def _is_up(health: httpx.Client) -> bool:
    try:
        return health.get("/health").is_success
    except httpx.HTTPError:
        return False

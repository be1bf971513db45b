"""A simulation as data: everything that its result depends on, and the study that the data themselves tell of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fl_client.check import classes_of, read_study, study_of_folder
from fl_client.tasks.base import OnProgress
from fl_client.tasks.errors import DataFolderMissing
from medhive.errors import InvalidInput
from medhive.signing import digest_of
from medhive.spec import RunSpec, StudyData, build_options
from medhive.strategies import make_strategy
from medhive.terminal import build
from simulator.faults import Faults
from simulator.federation import Federation, Source, read_federation, site_paths
from simulator.partition import Partition

STUDY: Final = "simulation"
FOLDER_TASKS: Final = frozenset({"image-folder", "ct-volume"})  # whose classes are told by folders
MIN_SITES: Final = 2  # the default of a run, where there are as many clients
MIN_CLASSES: Final = 2


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    data: folder or file; test: what judges the model after every `test_every`-th round; clients: how many (a partition file
    and `sites` say it themselves); trained: parts that are trained on beside the training part; forget: clients keep nothing
    from round to round; together: how many are trained as one computation; workers: how many processes of Ray they are
    spread over, None for one a core, 0 for none: all in this process; ray_address: HOST:PORT of the Ray cluster that runs
    them, None for a Ray of their own.
    """

    spec: RunSpec
    data: Path
    test: Path | None
    test_every: int
    clients: int | None
    partition: Partition
    faults: Faults
    trained: frozenset[str]
    forget: bool
    device: str
    together: int = 1
    workers: int | None = 0
    ray_address: str | None = None

    @property
    def source(self) -> Source:
        """Where the data are, and how they are read."""
        return Source(self.spec.task, self.data, self.spec.data, self.device)

    def read_clients(self, on_progress: OnProgress | None = None) -> Federation:
        """Read the data and deal them out.

        Raises:
            MedHiveError: the data or the partition do not fit, by cause.
        """
        seed, trained = self.spec.options.seed, self.trained
        return read_federation(
            self.source, self.partition, self.clients, seed, trained=trained, on_progress=on_progress
        )

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """All that the result depends on, with the fingerprint of the data, as plain values with their digest.

        Where clients run is not of it: a simulation that was begun inline may go on in several processes.
        """
        values = {
            "spec": self.spec.model_dump(mode="json"),
            "clients": self.clients,
            "partition": f"{self.partition.kind}:{self.partition.value:g}",
            "faults": self.faults.to_dict(),
            "trained": sorted(self.trained),
            "forget": self.forget,
            "together": self.together,
            "test_every": self.test_every if self.test else 0,
            "data_fingerprint": fingerprint,
        }
        return {**values, "digest": digest_of(values)}


def study_data(
    task: str, data: Path, partition: Partition, study_file: Path | None, fields: Mapping[str, Any]
) -> StudyData:
    """The study: from a file, or from the folders of classes that the data consist of.

    Args:
        task: its name.
        data: where the data are.
        partition: with `sites`, the folders of classes lie one level deeper.
        study_file: JSON with the study's data, as for `medhive-site check-data`.
        fields: of `StudyData`, laid over; `options` are laid over one by one.

    Raises:
        InvalidInput: the task's study cannot be told from the data, or a field does not fit.
        DataFolderMissing: there are no folders of classes.
    """
    if study_file is not None:
        found = read_study(study_file)[1]
    elif task in FOLDER_TASKS:
        found = _of_sites(data) if partition.kind == "sites" else study_of_folder(data)
    else:
        raise InvalidInput(f"Give --study-file: the task {task} needs the study's description.")
    values = {**found.model_dump(), **fields}
    options = {**found.options, **fields.get("options", {})}
    if task in FOLDER_TASKS:
        # Dealt out unevenly, few clients have all classes.
        options = {"allow_missing_classes": True, **options}
    return build(StudyData, **{**values, "options": options})


def _of_sites(data: Path) -> StudyData:
    names = {name for path in site_paths(data).values() for name in classes_of(path)}
    if len(names) < MIN_CLASSES:
        raise DataFolderMissing(f"The folders of clients in {data} hold {len(names)} classes; at least two are needed.")
    return StudyData(classes=tuple(sorted(names)))


def run_spec(task: str, data: StudyData, chosen: Mapping[str, Any], clients: int | None) -> RunSpec:
    """The run specification that a coordinator would make of the same choices.

    Raises:
        InvalidInput: an option is out of range, or asks for what this version has not; the strategy is none.
    """
    defaults = {"min_sites": min(MIN_SITES, clients or MIN_SITES)}
    options = build_options(task, defaults, dict(chosen))
    options.privacy.require_supported()
    make_strategy(options.strategy, options.strategy_params)
    return RunSpec(study=STUDY, task=task, data=data, options=options)

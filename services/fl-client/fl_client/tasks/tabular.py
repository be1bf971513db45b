"""The task `tabular`: logistic regression on a table, with means and variances that all sites pool.

The registry loads this module; numpy and scikit-learn's solver come in with `tabular_training`, only when data are opened.
"""

from importlib import import_module
from pathlib import Path

from fl_client.tasks.base import DataReport, LocalOptions, OnProgress, Predictor, Workspace
from medhive.spec import StudyData


class TabularTask:
    """See `fl_client.tasks.base.Task` for the methods."""

    name = "tabular"

    def load(self) -> None:
        """Import scikit-learn: a second."""
        import_module("fl_client.tasks.tabular_training")

    def predictor(
        self,
        study: StudyData,
        *,
        device: str = "cpu",  # noqa: ARG002 - scikit-learn has the CPU only
    ) -> Predictor:
        """The study's model; raises WrongOption."""
        from fl_client.tasks.tabular_training import TabularModel  # noqa: PLC0415 - a second of imports

        return TabularModel(study)

    def check(
        self,
        data_dir: Path,
        study: StudyData,
        secret: bytes,
        *,
        on_progress: OnProgress | None = None,
        local: LocalOptions | None = None,
    ) -> DataReport:
        """Read everything once and report; raises as `tables.read_table`."""
        from fl_client.tasks.tables import read_table  # noqa: PLC0415 - keeps the command line's start quick

        return read_table(data_dir, study, secret, on_progress=on_progress, local=local).report

    def open(
        self,
        data_dir: Path,
        study: StudyData,
        secret: bytes,
        *,
        device: str = "cpu",  # noqa: ARG002 - scikit-learn has the CPU only; a site may have set a GPU for its images
        on_progress: OnProgress | None = None,
        local: LocalOptions | None = None,
    ) -> Workspace:
        """Read the table into memory; raises as `tables.read_table`."""
        from fl_client.tasks.tabular_training import open_workspace  # noqa: PLC0415 - a second of imports

        return open_workspace(data_dir, study, secret, on_progress=on_progress, local=local)

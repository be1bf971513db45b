"""The task `ct-volume`: CT scans of the chest, a classifier in 3D.

This module is what the registry loads; the work is in `scans` (reading) and `volume_training` (torch and MONAI, imported
only when the data are opened for training).
"""

from importlib import import_module
from pathlib import Path

from fl_client.tasks.base import DataReport, LocalOptions, OnProgress, Predictor, Workspace
from medhive.spec import StudyData


class CtVolumeTask:
    """See `fl_client.tasks.base.Task` for the methods."""

    name = "ct-volume"

    def load(self) -> None:
        """Import torch and MONAI: seconds."""
        import_module("fl_client.tasks.volume_training")

    def predictor(self, study: StudyData, *, device: str = "cpu") -> Predictor:
        """The study's model; raises WrongOption, DeviceUnavailable, UnknownModel."""
        from fl_client.tasks.volume_training import VolumeModel  # noqa: PLC0415 - seconds of imports

        return VolumeModel(study, device)

    def check(
        self,
        data_dir: Path,
        study: StudyData,
        secret: bytes,
        *,
        on_progress: OnProgress | None = None,
        local: LocalOptions | None = None,
    ) -> DataReport:
        """Read everything once and report; raises as `scans.scan_series`."""
        from fl_client.tasks.scans import Boxes, VolumeOptions, scan_series  # noqa: PLC0415 - a second of imports

        boxes = Boxes(VolumeOptions.of(study).box, local or LocalOptions())
        return scan_series(data_dir, study, secret, boxes, on_progress=on_progress, local=local).report

    def open(
        self,
        data_dir: Path,
        study: StudyData,
        secret: bytes,
        *,
        device: str = "cpu",
        on_progress: OnProgress | None = None,
        local: LocalOptions | None = None,
    ) -> Workspace:
        """Read the scans into the cache; raises as `scans.scan_series`, and DeviceUnavailable, UnknownModel."""
        from fl_client.tasks.volume_training import open_workspace  # noqa: PLC0415 - seconds of imports

        return open_workspace(data_dir, study, secret, device=device, on_progress=on_progress, local=local)

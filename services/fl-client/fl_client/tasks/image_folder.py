"""The task `image-folder`: one folder a class, a convolutional classifier.

This module is what the registry loads; the work is in `images` (reading) and `image_training` (torch and MONAI, imported
only when the data are opened for training).
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from fl_client.tasks.base import DataReport, LocalOptions, OnProgress, Predictor, Workspace
from fl_client.tasks.images import scan_folder
from fl_client.tasks.packed_images import set_apart
from medhive.spec import StudyData


class ImageFolderTask:
    """See `fl_client.tasks.base.Task` for the methods."""

    name = "image-folder"

    def load(self) -> None:
        """Import torch and MONAI: seconds."""
        import_module("fl_client.tasks.image_training")

    def predictor(self, study: StudyData, *, device: str = "cpu") -> Predictor:
        """The study's model; raises WrongOption, DeviceUnavailable, UnknownModel."""
        from fl_client.tasks.image_training import ImageModel  # noqa: PLC0415 - seconds of imports

        return ImageModel(study, device)

    def check(
        self,
        data_dir: Path,
        study: StudyData,
        secret: bytes,
        *,
        on_progress: OnProgress | None = None,
        local: LocalOptions | None = None,
    ) -> DataReport:
        """Read everything once and report; raises as `images.scan_folder`."""
        report = scan_folder(data_dir, study, secret, on_progress=on_progress, local=local).report
        return replace(report, remarks=set_apart(data_dir, (local or LocalOptions()).subset))

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
        """Read the images into memory; raises as `images.scan_folder`, and DeviceUnavailable, UnknownModel."""
        from fl_client.tasks.image_training import open_workspace  # noqa: PLC0415 - seconds of imports

        return open_workspace(data_dir, study, secret, device=device, on_progress=on_progress, local=local)

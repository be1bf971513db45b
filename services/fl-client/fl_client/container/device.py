"""What this container can train on, told at its start without the seconds and the memory that PyTorch takes to load."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

GPUS: Final = Path("/proc/driver/nvidia/gpus")  # one folder a GPU that this container was given
MODEL: Final = "Model:"
CPU_BUILD: Final = "+cpu"
MAX_INFORMATION_BYTES: Final = 64 * 1024


def gpus(folder: Path = GPUS) -> tuple[str, ...]:
    """The models of the GPUs in this container, as the driver names them."""
    return tuple(_model(file) for file in sorted(folder.glob("*/information")))


def _model(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            text = opened.read(MAX_INFORMATION_BYTES)
    except OSError:
        text = ""
    models = (line.removeprefix(MODEL).strip() for line in text.splitlines() if line.startswith(MODEL))
    return next(models, "a GPU")


def torch_version() -> str:
    """PyTorch's version, which says whether it was built for the CPU alone; empty when it is not installed."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def device_line(chosen: str, found: tuple[str, ...], torch: str) -> str:
    """What training will run on.

    Args:
        chosen: the hospital's own setting: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        found: the GPUs in this container.
        torch: PyTorch's version.
    """
    if chosen == "cpu":
        return "training on the CPU, as set by this hospital"
    if not found:
        return "training on the CPU: this container has no GPU (docker run --gpus all gives it one)"
    names = ", ".join(found)
    if CPU_BUILD in torch:
        return f"training on the CPU: this image's PyTorch is built for nothing else; {names} needs the image for GPUs"
    return f"training on the GPU: {names}" + ("" if chosen == "auto" else f", {chosen} as set by this hospital")

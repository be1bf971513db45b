"""Files that look as if a process had been killed long ago."""

import os
import time
from pathlib import Path

from medhive.leftovers import LEFTOVER_AGE_S, temporary_beside


def make_old(path: Path, age_s: float) -> Path:
    """Change a file's time."""
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def old_leftover(folder: Path) -> Path:
    """A temporary file of a writer that is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    path = temporary_beside(folder / "global-1.safetensors")
    path.write_bytes(b"half")
    return make_old(path, 2 * LEFTOVER_AGE_S)

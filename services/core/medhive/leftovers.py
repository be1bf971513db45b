"""The temporary files of processes that were killed: how they are named, and when nobody can need them any more.

Whatever must appear whole or not at all is written beside its place under a name of its own, which a process that ends well
takes away again. One that was killed cannot; so each service tidies up when it starts.
"""

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from medhive.errors import NoSpace

SUFFIX: Final = ".tmp"
LEFTOVER_AGE_S: Final = 3600.0
"""A writer changes its file every few seconds; what nobody has changed for an hour has no writer any more."""


def temporary_beside(path: Path) -> Path:
    """A name beside `path` that nobody else takes, and that `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{SUFFIX}")


def remove_leftovers(folder: Path, age_s: float = LEFTOVER_AGE_S) -> int:
    """Delete the temporary files below `folder` that are older than `age_s` seconds; returns how many.

    Links are not followed, and what cannot be deleted is left.
    """
    oldest = time.time() - age_s
    # A list: a folder that disappears while it is looked at (a run that ends) is skipped by `os.walk`.
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names if _is_temporary(name)]
    return sum(_remove(path, oldest) for path in found)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(SUFFIX)


def _remove(path: Path, oldest: float) -> bool:
    try:
        if path.lstat().st_mtime >= oldest:
            return False
        path.unlink()
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders, and keeps its own journal of names."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into `NoSpace`; other failures of the operating system pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"The disk is full: {path.name} could not be written. Free some space.") from error
        raise

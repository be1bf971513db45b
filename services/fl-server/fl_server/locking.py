"""One aggregator a state folder: two would overwrite each other's checkpoints."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from medhive.errors import MedHiveError

LOCK_FILE = "lock"


class FolderInUse(MedHiveError):
    """Another process works in this state folder."""

    code = "folder-in-use"


class FolderLock:
    """Holds a folder as long as the process lives; the operating system lets go of it however the process ends."""

    def __init__(
        self, folder: Path, program: str = "medhive-server", instead: str = "set MEDHIVE_SERVER_STATE_DIR"
    ) -> None:
        """`program` is who may hold it, and `instead` what to do but stop that one."""
        self._folder = folder
        self._program, self._instead = program, instead

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            FolderInUse: it is taken.
        """
        self._file = (self._folder / LOCK_FILE).open("a+b")
        try:
            _lock(self._file.fileno())
        except OSError as error:
            self._file.close()
            raise FolderInUse(
                f"Another {self._program} works in {self._folder}; stop it, or {self._instead}.",
                folder=str(self._folder),
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt  # noqa: PLC0415 - exists on Windows alone

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl  # noqa: PLC0415 - does not exist on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""Whether the two mounted folders can be used, asked before anything else and answered in the words of `docker run`.

Without this a wrong mount shows itself later and elsewhere: an invite used up by a hospital that cannot keep its keys, a
study without a single example.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from medhive.errors import InvalidInput, MedHiveError, NoSpace

PROBE_BYTES: Final = 1024 * 1024
"""Written once at the start: less room than this would not hold the keys, site.db and its log of changes."""

MOST_LOOKED_AT: Final = 20_000
"""Entries of the data folder that are looked at for one readable file; a listing of so many takes about a second."""

KEPT_FILES: Final = ("site.db", "keys/consent.pem", "keys/node.pem", "keys/data.secret")
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class DataUnusable(InvalidInput):
    """There is nothing readable where the data should be."""

    code = "data-unusable"


class StateUnusable(InvalidInput):
    """Keys, database and models cannot be kept where they should be."""

    code = "state-unusable"


def require_state(folder: Path) -> None:
    """Make sure that the state folder can be written, by writing to it.

    Raises:
        StateUnusable: it is read-only, or belongs to another user.
        NoSpace: its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _probe(folder)
    except OSError as error:
        raise state_problem(folder, error) from error
    for name in KEPT_FILES:
        if (folder / name).exists() and not os.access(folder / name, os.R_OK | os.W_OK):
            raise _not_ours(folder / name)


def _probe(folder: Path) -> None:
    # Random, so that a file system that compresses or shares blocks has to find the room.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(os.urandom(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def state_problem(folder: Path, error: OSError) -> MedHiveError:
    """Say what is wrong with a state folder that refused to be written to."""
    if error.errno in FULL:
        return NoSpace(f"The disk that holds the state folder {folder} is full; free some space, or give it more.")
    if error.errno == errno.EROFS:
        return StateUnusable(
            f"The state folder {folder} is read-only; mount a writable volume there: -v state:{folder}, without :ro."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return _not_ours(folder)
    return StateUnusable(
        f"The state folder {folder} cannot be used ({error.strerror}); mount a volume there, or set STATE_DIR."
    )


def _not_ours(path: Path) -> StateUnusable:
    user = os.getuid()
    return StateUnusable(
        f"The state folder cannot be used by this container's user {user}: {path} belongs to another; use a named volume "
        f"(-v state:/state), or give the folder to it on the host: chown -R {user} FOLDER.",
        user=user,
    )


def is_mounted(folder: Path) -> bool:
    """Whether something is mounted at the folder or above it, the root itself aside."""
    resolved = folder.resolve()
    return any(os.path.ismount(each) for each in (resolved, *resolved.parents) if each != each.parent)


def require_data(folder: Path) -> None:
    """Make sure that at least one file of the data can be read.

    Raises:
        DataUnusable: there is none; the text tells a missing mount from missing rights.
    """
    denied = 0
    for number, path in enumerate(_files_below(folder)):
        if _readable(path):
            return
        denied += 1
        if number >= MOST_LOOKED_AT:
            break
    if denied:
        raise DataUnusable(
            f"The data folder {folder} cannot be read by this container's user {os.getuid()}; let it read them on the host "
            "(chmod -R o+rX FOLDER), or start the container with --user or --group-add.",
            user=os.getuid(),
        )
    raise DataUnusable(
        f"The data folder {folder} is empty; mount the folder with the data, which must exist on the host: "
        f"-v /their/scans:{folder}:ro."
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """Files, and folders that cannot be listed, in no particular order; links to folders are not followed."""
    waiting, looked = [folder], 0
    while waiting and looked < MOST_LOOKED_AT:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    looked += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        yield Path(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            if here.is_file():
                yield here
        except OSError:
            yield here


def _readable(path: Path) -> bool:
    """By opening it: what a mode says is not what a network file system does."""
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False

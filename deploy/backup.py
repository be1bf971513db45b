"""One file that holds all that a coordinator's containers know, and the way back: `python backup.py create|verify|restore`.

`create` writes the file to its standard output, `verify` and `restore` read it from their standard input, because the host's
file belongs to the host's user alone. The services are stopped meanwhile (`deploy/backup.sh` does that): then database,
weights, checkpoints and MLflow, which refer to each other, are of one moment, and every database is closed and whole.

The file is a tar archive: first `medhive-backup.json` (what it is, of which version and when), then the files of each
volume, last `SHA256SUMS` over all of them, so that a file that was cut off has none. It holds private keys and is not
encrypted.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tarfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

FORMAT: Final = 1
HEADER: Final = "medhive-backup.json"
SUMS: Final = "SHA256SUMS"
ROOT: Final = Path("/volumes")
PART: Final = ".restore"  # in each volume, what is not yet restored as a whole
MAX_HEADER_BYTES: Final = 64 * 1024  # a few lines; and what is no backup is not read into memory
MAX_SUMS_BYTES: Final = 256 * 1024 * 1024  # a million files
CHUNK_BYTES: Final = 1024 * 1024


class BackupError(Exception):
    """It cannot be done; the text says why and what to do."""


class _Hashing:
    """A stream that counts what is read through it into a SHA-256."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        data = self._stream.read(size)
        self.sha256.update(data)
        return data


def release(text: str) -> tuple[int, ...]:
    """A version's numbers, to compare two."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def volumes(root: Path) -> list[str]:
    """The names of the volumes that are mounted here."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


# ---- create ----------------------------------------------------------------------------------------------------------


def create(root: Path, out: IO[bytes], medhive: str) -> int:
    """Write all volumes below `root`; returns the number of files.

    Raises:
        BackupError: there is something that a backup cannot hold, or nothing to back up.
    """
    header = {"format": FORMAT, "medhive": medhive, "made": datetime.now(UTC).isoformat(), "volumes": volumes(root)}
    sums: dict[str, str] = {}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        sums[HEADER] = _add_bytes(archive, HEADER, json.dumps(header, indent=1).encode())
        for path in _content(root, header["volumes"]):
            name = path.relative_to(root).as_posix()
            if path.is_dir():
                archive.addfile(_member(name + "/", path.stat()))
            else:
                sums[name] = _add_file(archive, name, path)
        if len(sums) == 1:
            raise BackupError("The volumes hold nothing: is this the right project? Nothing was written.")
        _add_bytes(archive, SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())
    return len(sums) - 1


def _content(root: Path, names: Any) -> Iterator[Path]:
    """Folders before what is in them; sockets and pipes belong to processes that have ended."""
    for name in names:
        for folder, folders, files in os.walk(root / name, onerror=_raise):
            folders.sort()
            folders[:] = [each for each in folders if each != PART]
            for each in (*folders, *sorted(files)):
                path = Path(folder, each)
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    raise BackupError(f"{path.relative_to(root)} is a link, which a backup does not hold; remove it.")
                if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                    yield path


def _raise(error: OSError) -> None:
    raise error


def _member(name: str, status: os.stat_result) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name.rstrip("/"))
    made.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
    made.mode, made.mtime = stat.S_IMODE(status.st_mode), status.st_mtime
    made.size = 0 if name.endswith("/") else status.st_size
    return made


def _add_file(archive: tarfile.TarFile, name: str, path: Path) -> str:
    with path.open("rb") as stream:
        hashing = _Hashing(stream)
        archive.addfile(_member(name, os.fstat(stream.fileno())), hashing)
        return hashing.sha256.hexdigest()


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes) -> str:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(content).hexdigest()


# ---- read ------------------------------------------------------------------------------------------------------------


def read(stream: IO[bytes], root: Path, medhive: str, *, into: str | None = None) -> dict[str, Any]:
    """Check every byte of a backup, and write it below `into` of each volume when that is given; returns its header.

    Raises:
        BackupError: it is damaged, no backup, from a newer version, or of a coordinator with other volumes.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            return _read(archive, root, medhive, into)
    except (tarfile.TarError, EOFError) as error:
        raise BackupError(f"The file is damaged, or no backup of MedHive ({error}); use another one.") from error


def _read(archive: tarfile.TarFile, root: Path, medhive: str, into: str | None) -> dict[str, Any]:
    header: dict[str, Any] | None = None
    sums: dict[str, str] = {}
    for member in archive:
        if header is None:
            header, sums[HEADER] = _read_header(archive, member, root, medhive)
        elif member.name == SUMS:
            _compare(_bytes(archive, member, MAX_SUMS_BYTES).decode(), sums)
            return header
        else:
            target = _target(member, header["volumes"], root, into)
            if member.isreg():
                sums[member.name] = _read_file(archive, member, target)
            elif target:
                target.mkdir(mode=0o700, parents=True, exist_ok=True)
    raise BackupError("The file is damaged: its end is missing; use another one.")


def _read_header(
    archive: tarfile.TarFile, member: tarfile.TarInfo, root: Path, medhive: str
) -> tuple[dict[str, Any], str]:
    if member.name != HEADER:
        raise BackupError("The file is no backup of MedHive.")
    content = _bytes(archive, member, MAX_HEADER_BYTES)
    try:
        header = json.loads(content)
        newer = header["format"] > FORMAT or release(header["medhive"]) > release(medhive)
        made_of, made_by = set(header["volumes"]), str(header["medhive"])
    except (ValueError, KeyError, TypeError) as error:
        raise BackupError("The file is damaged: its description cannot be read; use another one.") from error
    if newer:
        raise BackupError(f"The backup is from MedHive {made_by}, newer than this {medhive}: upgrade the images first.")
    if made_of != set(volumes(root)):
        other = ", ".join(sorted(made_of ^ set(volumes(root))))
        raise BackupError(
            f"The backup is of a coordinator with other volumes ({other}): give the same compose files as when it was "
            "made (COMPOSE_FILE), with deploy/compose.postgres.yaml or without."
        )
    return header, hashlib.sha256(content).hexdigest()


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    stream = archive.extractfile(member) if member.isreg() and member.size <= limit else None
    if stream is None:
        raise BackupError(f"The file is damaged: {member.name} is not what it should be; use another one.")
    return stream.read()


def _target(member: tarfile.TarInfo, names: list[str], root: Path, into: str | None) -> Path | None:
    """Where a member goes; None when nothing is written."""
    path = PurePosixPath(member.name)
    within = not path.is_absolute() and ".." not in path.parts and len(path.parts) > 1 and path.parts[0] in names
    if not within or not (member.isreg() or member.isdir()):
        raise BackupError("The file is damaged, or was not made by MedHive: it names places outside of the volumes.")
    return root.joinpath(path.parts[0], into, *path.parts[1:]) if into else None


def _read_file(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path | None) -> str:
    stream = archive.extractfile(member)
    if stream is None:
        raise BackupError(f"The file is damaged: {member.name} has no content; use another one.")
    hashing = _Hashing(stream)
    if target is None:
        while hashing.read(CHUNK_BYTES):
            pass
    else:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Whoever reads it later is this user; nobody else ever may.
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, member.mode & 0o700)
        with os.fdopen(descriptor, "wb") as out:
            shutil.copyfileobj(hashing, out, CHUNK_BYTES)
            out.flush()
            os.fsync(out.fileno())
    return hashing.sha256.hexdigest()


def _compare(text: str, found: Mapping[str, str]) -> None:
    said = {line[66:]: line[:64] for line in text.splitlines()}
    wrong = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
    if wrong:
        raise BackupError(
            f"The file is damaged: {len(wrong)} of its files are not as they were ({wrong[0]}); use another one."
        )


def restore(stream: IO[bytes], root: Path, medhive: str) -> dict[str, Any]:
    """Put a backup into empty volumes: first all of it beside their content, checked, then into its place.

    Raises:
        BackupError: as `read`, or a volume is not empty.
    """
    for name in volumes(root):
        shutil.rmtree(root / name / PART, ignore_errors=True)  # of a restore that was interrupted
        if any(path.is_file() for path in (root / name).rglob("*")):
            raise BackupError(
                f"The volume {name} is not empty: restore goes into a new coordinator alone. `docker compose down "
                "--volumes` deletes the present one, with its keys and models."
            )
    for name in volumes(root):
        (root / name / PART).mkdir(mode=0o700)
    try:
        header = read(stream, root, medhive, into=PART)
    except BaseException:
        for name in volumes(root):
            shutil.rmtree(root / name / PART, ignore_errors=True)
        raise
    for name in volumes(root):
        for path in sorted((root / name / PART).iterdir()):
            path.replace(root / name / path.name)
        (root / name / PART).rmdir()
    os.sync()
    return header


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="backup.py", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["create", "verify", "restore"])
    command, medhive = parser.parse_args().command, version("medhive")
    try:
        if command == "create":
            count = create(ROOT, sys.stdout.buffer, medhive)
            sys.stderr.write(f"{count} files of {len(volumes(ROOT))} volumes\n")
        else:
            header = (restore(sys.stdin.buffer, ROOT, medhive) if command == "restore"
                      else read(sys.stdin.buffer, ROOT, medhive))  # fmt: skip
            sys.stderr.write(
                f"{command}: MedHive {header['medhive']}, made {header['made']}: all files are as they were\n"
            )
    except (BackupError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

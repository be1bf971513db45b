"""The files of the content-addressed store: by their SHA-256, grown by resumable parts. Knows nothing of rights or rows.

An upload is a prefix of the content in a file of the uploader's own, which a crash at any moment leaves usable; the file
gets its final name only when all bytes are there, durable, and have the announced digest.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from medhive.client import BUSY
from medhive.errors import Conflict, DigestMismatch, InvalidInput, NoSpace, TooLarge
from medhive.leftovers import sync_folder
from medhive.packing import Layout

MAX_BLOB_BYTES = 2 * 1024**3  # float32 weights of half a billion parameters
MAX_PART_BYTES = 8 * 1024**2  # of one PUT: what is lost at most when a connection breaks
MAX_UPLOADS_PER_OWNER = 64  # unfinished at one time
UPLOAD_KEPT = timedelta(hours=24)  # how long an unfinished upload waits for its rest
LOCK_WAIT_S = 10.0  # for an earlier connection of the same upload that is being given up
LOCK_RETRY_S = 0.05
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")


@dataclass(frozen=True)
class Part:
    """One piece of an upload: `stop` is exclusive."""

    start: int
    stop: int
    total: int

    @classmethod
    def parse(cls, content_range: str | None, content_length: int | None) -> "Part":
        """Read Content-Range; without one the body is the whole.

        Raises:
            InvalidInput: it makes no sense, or does not fit the body's length.
            TooLarge: the part or the whole is above its limit.
        """
        if content_length is None:
            raise InvalidInput("An upload must say its Content-Length.")
        part = cls(0, content_length, content_length) if content_range is None else cls._from_header(content_range)
        if not 0 <= part.start < part.stop <= part.total or part.stop - part.start != content_length:
            raise InvalidInput("Content-Range and Content-Length do not fit together.")
        if part.total > MAX_BLOB_BYTES:
            raise TooLarge(f"A blob may have {MAX_BLOB_BYTES} bytes, not {part.total}.", limit=MAX_BLOB_BYTES)
        if content_length > MAX_PART_BYTES:
            raise TooLarge(f"A part may have {MAX_PART_BYTES} bytes; send several.", limit=MAX_PART_BYTES)
        return part

    @classmethod
    def _from_header(cls, text: str) -> "Part":
        found = CONTENT_RANGE.fullmatch(text)
        if found is None:
            raise InvalidInput("Content-Range must be `bytes FIRST-LAST/TOTAL`.")
        first, last, total = (int(number) for number in found.groups())
        return cls(first, last + 1, total)


class BlobStore:
    """The files. Knows nothing of rights or rows."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which must be on one file system."""
        self.folder = folder
        self._uploads = folder / "uploads"
        self._locks = folder / "locks"
        for each in (self._uploads, self._locks):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, digest: str) -> Path:
        """Where a complete blob lies."""
        return self.folder / digest[:2] / digest[2:4] / digest

    def has(self, digest: str) -> bool:
        """Whether the bytes are there."""
        return self.path(digest).is_file()

    def layout(self, digest: str) -> Layout:
        """The architecture of packed weights.

        Raises:
            CorruptWeights: the blob holds something else.
        """
        return Layout.from_header(self.path(digest))

    def upload_path(self, owner: str, scope: str, digest: str) -> Path:
        """Where an owner's unfinished upload lies: nobody can disturb another's by naming the same digest."""
        key = hashlib.sha256(f"{scope}/{digest}".encode()).hexdigest()
        return self._uploads / (f"site-{owner}" if owner else "server") / f"{key}.part"

    def offset(self, upload: Path) -> int:
        """How many bytes of an upload have arrived."""
        try:
            return upload.stat().st_size
        except FileNotFoundError:
            return 0

    def resume_at(self, upload: Path, digest: str) -> int:
        """Where an upload goes on. One that is whole and yet no blob ended with a crash at that moment: it comes again."""
        if self.offset(upload):
            # Who is sending it right now, or has died while doing so, is not waited for.
            with (
                contextlib.suppress(FileNotFoundError, Conflict),
                self.upload_lock(upload, 0.0),
                upload.open("rb") as file,
            ):
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                    upload.unlink()
        return self.offset(upload)

    def unfinished_bytes(self, upload: Path) -> int:
        """What the owner's other unfinished uploads take.

        Raises:
            TooLarge: there are too many of them.
        """
        others = [each for each in upload.parent.glob("*.part") if each != upload]
        if len(others) >= MAX_UPLOADS_PER_OWNER:
            raise TooLarge("Too many unfinished uploads; finish some, or wait a day.", limit=MAX_UPLOADS_PER_OWNER)
        return sum(self.offset(each) for each in others)

    @contextlib.contextmanager
    def lock(self, name: str, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """Hold a lock that also other gateways on this folder respect.

        Raises:
            Conflict: somebody else holds it for too long.
        """
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _take_lock(descriptor, wait_s)
            yield
        finally:
            os.close(descriptor)

    def upload_lock(self, upload: Path, wait_s: float = LOCK_WAIT_S) -> "contextlib.AbstractContextManager[None]":
        """The lock under which one upload grows. Few files serve all: a collision only makes somebody wait."""
        return self.lock("upload-" + hashlib.sha256(str(upload).encode()).hexdigest()[:3], wait_s)

    def digest_lock(self, digest: str) -> "contextlib.AbstractContextManager[None]":
        """The lock under which a blob appears or disappears."""
        return self.lock("blob-" + digest[:2])

    @contextlib.contextmanager
    def appending(self, upload: Path, part: Part) -> Iterator[Callable[[bytes], object]]:
        """Append one part; yields the function that writes.

        Raises:
            Conflict: the part does not begin where the last one ended; `data.offset` says where that is.
            NoSpace: the disk is full.
        """
        upload.parent.mkdir(mode=0o700, exist_ok=True)
        with _disk_errors(), upload.open("ab") as file:
            if file.tell() != part.start:
                raise Conflict(
                    f"The upload has {file.tell()} bytes; send the next part from there.", offset=file.tell()
                )
            yield file.write

    def finish(self, upload: Path, digest: str) -> int:
        """Give a complete upload its place, when it is what it was announced to be; returns its size.

        Raises:
            DigestMismatch: it is not; the upload is deleted.
            NoSpace: the disk is full.
        """
        with _disk_errors(), upload.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                upload.unlink()
                raise DigestMismatch(
                    f"The bytes sent do not have the SHA-256 {digest}; send them again.", digest=digest
                )
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        place = self.path(digest)
        with _disk_errors():
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            upload.replace(place)
            sync_folder(place.parent)
        return size

    def complete_files(self) -> Iterator[Path]:
        """All blobs that lie there."""
        return self.folder.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*")

    def drop_old_uploads(self, now: datetime) -> None:
        """Delete unfinished uploads that nobody has continued for a day."""
        oldest = (now - UPLOAD_KEPT).timestamp()
        for upload in self._uploads.glob("*/*.part"):
            with contextlib.suppress(FileNotFoundError):
                if upload.stat().st_mtime < oldest:
                    upload.unlink()


def _take_lock(descriptor: int, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise Conflict("Another connection is sending this blob; try again in a moment.", cause=BUSY) from error
            time.sleep(LOCK_RETRY_S)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise NoSpace("The coordinator's disk is full; an admin must make room.") from error
        raise

"""The file that `make backup` makes: whole or refused, and put only where nothing is."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from backup import FORMAT, HEADER, PART, BackupError, create, read, restore

VOLUMES = ("blobs", "gateway-state")
CONTENT = {"blobs/ab/abcd": b"w" * 100_000, "gateway-state/gateway.db": b"rows", "gateway-state/secrets/ca.key": b"key"}


def mounted(folder: Path, content: dict[str, bytes] | None = None) -> Path:
    for name in VOLUMES:
        (folder / name).mkdir(parents=True)
    for name, data in (content or {}).items():
        (folder / name).parent.mkdir(mode=0o700, exist_ok=True)
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture
def backup(tmp_path: Path) -> bytes:
    out = io.BytesIO()
    assert create(mounted(tmp_path / "before", CONTENT), out, "0.1.0") == len(CONTENT)
    return out.getvalue()


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_was_backed_up_comes_back(backup: bytes, tmp_path: Path) -> None:
    root = mounted(tmp_path / "after")
    (root / "gateway-state" / "secrets").mkdir()  # as an image makes it
    header = restore(io.BytesIO(backup), root, "0.2.0")
    assert (header["format"], header["medhive"], header["volumes"]) == (FORMAT, "0.1.0", list(VOLUMES))
    assert files(root) == CONTENT
    assert (root / "gateway-state/secrets/ca.key").stat().st_mode & 0o777 == 0o600
    assert not list(root.rglob(PART))


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 3000, 60_000, 102_400])
def test_a_file_that_was_cut_off_is_refused(backup: bytes, tmp_path: Path, cut: int) -> None:
    root = mounted(tmp_path / "after")
    with pytest.raises(BackupError, match=r"damaged|no backup"):
        restore(io.BytesIO(backup[:cut]), root, "0.1.0")
    assert files(root) == {}


def test_every_changed_byte_is_noticed(backup: bytes, tmp_path: Path) -> None:
    root = mounted(tmp_path / "after")
    for content in (*CONTENT.values(), b'"made"'):
        changed = bytearray(backup)
        changed[changed.index(content) + 1] ^= 1
        with pytest.raises(BackupError, match="damaged"):
            restore(io.BytesIO(changed), root, "0.1.0")
    assert files(root) == {}


def archive(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    header = {"format": FORMAT, "medhive": "0.1.0", "made": "2026-01-01T00:00:00+00:00", "volumes": list(VOLUMES)}
    with tarfile.open(fileobj=out, mode="w|") as made:
        for name, data in ((HEADER, json.dumps(header).encode()), *members):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), tarfile.REGTYPE if data else kind, "/etc/passwd"
            made.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "blobs/../../x", "elsewhere/x", "blobs"])
def test_places_outside_of_the_volumes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BackupError, match="outside of the volumes"):
        restore(io.BytesIO(archive((name, b"x"))), mounted(tmp_path / "after"), "0.1.0")


def test_links_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="outside of the volumes"):
        restore(io.BytesIO(archive(("blobs/x", b""), kind=tarfile.SYMTYPE)), mounted(tmp_path / "after"), "0.1.0")
    root = mounted(tmp_path / "before", CONTENT)
    (root / "blobs" / "link").symlink_to("/etc/passwd")
    with pytest.raises(BackupError, match="is a link"):
        create(root, io.BytesIO(), "0.1.0")


def test_a_newer_or_foreign_file_and_other_volumes_are_refused(backup: bytes, tmp_path: Path) -> None:
    root = mounted(tmp_path / "after")
    with pytest.raises(BackupError, match=r"newer than this 0\.0\.9"):
        read(io.BytesIO(backup), root, "0.0.9")
    foreign = io.BytesIO()
    with tarfile.open(fileobj=foreign, mode="w") as made:
        made.add(__file__, "notes.txt")
    for content in (foreign.getvalue(), b"a text " * 1000):
        with pytest.raises(BackupError, match="no backup of MedHive"):
            read(io.BytesIO(content), root, "0.1.0")
    (root / "postgres-state").mkdir()
    with pytest.raises(BackupError, match="postgres-state"):
        read(io.BytesIO(backup), root, "0.1.0")


def test_nothing_is_put_where_something_is(backup: bytes, tmp_path: Path) -> None:
    root = mounted(tmp_path / "after", {"blobs/one": b"x"})
    with pytest.raises(BackupError, match="blobs is not empty"):
        restore(io.BytesIO(backup), root, "0.1.0")
    assert files(root) == {"blobs/one": b"x"}


def test_a_restore_that_was_killed_is_begun_anew(backup: bytes, tmp_path: Path) -> None:
    root = mounted(tmp_path / "after")
    (root / "blobs" / PART).mkdir()
    (root / "blobs" / PART / "half").write_bytes(b"x")
    restore(io.BytesIO(backup), root, "0.1.0")
    assert files(root) == CONTENT


def test_an_empty_coordinator_is_not_backed_up(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="hold nothing"):
        create(mounted(tmp_path / "before"), io.BytesIO(), "0.1.0")

"""What a hospital's folder can have wrong with it: each is skipped and counted, or refused by name; nothing crashes."""

import json
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fl_client.check import check_data, study_of_folder
from fl_client.tasks import DataReport, LocalOptions, images
from fl_client.tasks.errors import (
    DataFolderMissing,
    EmptyClass,
    GroupUnknown,
    MissingClass,
    NotEnoughExamples,
    UnknownClass,
    UnknownTask,
    UnreadableExample,
    WrongOption,
)
from medhive.spec import StudyData

STUDY = StudyData(classes=("cat", "dog"))
SECRET = b"a site's secret"


def picture(seed: int, mode: str = "L", size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(15):
            (tmp_path / "data" / name / f"p{i}_x.png").write_bytes(picture(100 * label + i))
    return tmp_path / "data"


def check(folder: Path, study: StudyData = STUDY, **local: object) -> DataReport:
    return check_data("image-folder", folder, study, SECRET, local=LocalOptions(**local))


def reasons(report: DataReport) -> dict[str, str]:
    return {item.name: item.reason for item in report.skipped}


def test_a_clean_folder(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check_data(
        "image-folder", folder, STUDY, SECRET, on_progress=lambda done, total: seen.append((done, total))
    )
    assert report.classes == {"cat": 15, "dog": 15}
    assert report.skipped == report.duplicates == ()
    assert sum(sum(part.values()) for part in report.parts.values()) == 30
    assert seen[-1] == (30, 30)
    json.dumps(report.to_json())


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be as large as its header says."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_every_bad_file_is_skipped_named_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = picture(7, form="JPEG", size=(200, 200))
    bad = {
        "cat/empty.png": (b"", "empty"),
        "cat/truncated.jpg": (whole[: len(whole) // 2], "corrupt"),
        "cat/text.png": (b"hello", "corrupt"),
        "cat/bomb.png": (bomb(60_000, 60_000), "too-many-pixels"),
        "cat/large.png": (bomb(12_000, 5_000), "too-many-pixels"),
        "cat/gif.jpg": (picture(9, form="GIF"), "corrupt"),
        "dog/notes.txt": (b"name of a patient", "not-an-image"),
        "dog/.hidden.png": (picture(8), "not-an-image"),
        "dog/huge.jpg": (b"x" * 3000, "too-large"),
    }
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 2900 + len(whole))
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    (folder / "dog/huge.jpg").write_bytes(b"x" * (2901 + len(whole)))
    report = check(folder)
    assert reasons(report) == {name: reason for name, (_, reason) in bad.items()}
    assert report.classes == {"cat": 15, "dog": 15}
    counts = report.counts_by_reason()
    assert counts == {"corrupt": 3, "empty": 1, "not-an-image": 2, "too-large": 1, "too-many-pixels": 2}
    assert not any(name.split("/")[1] in json.dumps(counts) for name in bad)


def test_links_may_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(picture(1))
    (folder / "cat" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (folder / "cat" / "inside.png").symlink_to(folder / "cat" / "p0_x.png")
    (folder / "cat" / "dangling.png").symlink_to(folder / "cat" / "nothing.png")
    (folder / "dog" / "deep").symlink_to(tmp_path / "outside")
    report = check(folder)
    assert reasons(report) == {"cat/link.png": "link-outside", "cat/dangling.png": "unreadable"}
    assert len(report.duplicates) == 1


def test_a_class_folder_that_leads_outside_is_not_walked(folder: Path, tmp_path: Path) -> None:
    (folder / "more").symlink_to(tmp_path)
    report = check(folder, class_map={"more": "dog"})
    assert reasons(report) == {"more": "link-outside"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can read everything")
def test_a_file_without_permission(folder: Path) -> None:
    (folder / "cat" / "p0_x.png").chmod(0)
    assert reasons(check(folder)) == {"cat/p0_x.png": "unreadable"}


def test_duplicates_count_once_and_contradictions_not_at_all(folder: Path) -> None:
    (folder / "cat" / "z.png").write_bytes((folder / "cat" / "p1_x.png").read_bytes())
    (folder / "dog" / "z.png").write_bytes((folder / "cat" / "p2_x.png").read_bytes())
    report = check(folder)
    assert report.duplicates == (("cat/z.png", "cat/p1_x.png"),)
    assert reasons(report) == {"cat/p2_x.png": "conflicting-labels", "dog/z.png": "conflicting-labels"}
    assert report.classes == {"cat": 14, "dog": 15}
    assert report.counts_by_reason() == {"conflicting-labels": 2, "duplicate": 1}


def test_classes_are_compared_with_the_study(folder: Path) -> None:
    (folder / "katze").mkdir()
    with pytest.raises(UnknownClass, match=r"katze.*cat, dog") as caught:
        check(folder)
    assert caught.value.code == "unknown-class"
    (folder / "katze" / "k.png").write_bytes(picture(999))
    assert check(folder, class_map={"katze": "cat"}).classes == {"cat": 16, "dog": 15}


def test_missing_and_empty_classes(folder: Path) -> None:
    three = StudyData(classes=("cat", "dog", "cow"))
    with pytest.raises(MissingClass, match="cow"):
        check(folder, three)
    (folder / "cow").mkdir()
    with pytest.raises(EmptyClass, match="cow"):
        check(folder, three)
    (folder / "cow" / "bad.png").write_bytes(b"")
    with pytest.raises(EmptyClass, match="cow"):
        check(folder, three)
    tolerant = StudyData(classes=("cat", "dog", "cow", "pig"), options={"allow_missing_classes": True})
    assert check(folder, tolerant).classes["cow"] == 0


def test_a_folder_that_is_not_there_or_too_small(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", folder / "cat" / "p0_x.png"):
        with pytest.raises(DataFolderMissing, match=path.name):
            check(path)
    for path in [*folder.glob("cat/*"), *folder.glob("dog/*")]:
        if not path.name.startswith("p1_"):
            path.unlink()
    with pytest.raises(NotEnoughExamples):
        check(folder)
    with pytest.raises(UnknownTask, match="image-folder"):
        check_data("video", folder, STUDY, SECRET)


def test_the_split_never_changes_and_needs_the_secret(folder: Path) -> None:
    first = images.scan_folder(folder, STUDY, SECRET)
    for path in sorted(folder.rglob("*.png")):  # other names, other order, more files: every image keeps its part
        path.rename(path.with_name(f"renamed_{path.stat().st_size}_{path.name[::-1]}.png"))
    (folder / "dog" / "new.png").write_bytes(picture(5000))
    second = images.scan_folder(folder, STUDY, SECRET)
    parts = {entry.digest: entry.part for entry in second.entries}
    assert all(parts[entry.digest] == entry.part for entry in first.entries)
    other = images.scan_folder(folder, STUDY, b"another secret")
    assert [e.part for e in other.entries] != [e.part for e in second.entries]


def test_the_fingerprint_is_keyed_and_knows_the_content_alone(folder: Path) -> None:
    first = check(folder).fingerprint
    (folder / "cat" / "p0_x.png").rename(folder / "cat" / "other.png")
    assert check(folder).fingerprint == first
    assert check_data("image-folder", folder, STUDY, b"another").fingerprint != first
    (folder / "cat" / "other.png").unlink()
    assert check(folder).fingerprint != first


def test_no_patient_is_on_two_sides(folder: Path, tmp_path: Path) -> None:
    for i in range(15):
        for extra in range(3):
            (folder / "cat" / f"p{i}_{extra}.png").write_bytes(picture(10_000 + 10 * i + extra))
    study = StudyData(classes=("cat", "dog"), options={"group_pattern": "{group}_*.png"})
    scan = images.scan_folder(folder, study, SECRET)
    sides: dict[str, set[str]] = {}
    for entry in scan.entries:
        sides.setdefault(Path(entry.name).name.split("_")[0], set()).add(entry.part)
    assert scan.report.groups == 15
    assert all(len(parts) == 1 for parts in sides.values())
    listed = tmp_path / "groups.csv"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    listed.write_text("".join(f"{name},{name.split('/')[1].split('_')[0]}\n" for name in names))
    again = images.scan_folder(folder, STUDY, SECRET, local=LocalOptions(groups_csv=listed))
    assert {e.name: e.part for e in again.entries} == {e.name: e.part for e in scan.entries}


def test_a_file_whose_patient_cannot_be_told_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "nobody.png").write_bytes(picture(77))
    study = StudyData(classes=("cat", "dog"), options={"group_pattern": "{group}_*"})
    with pytest.raises(GroupUnknown, match="nobody"):
        check(folder, study)
    (tmp_path / "g.csv").write_text("cat/p0_x.png,anna\n")
    with pytest.raises(GroupUnknown):
        check(folder, groups_csv=tmp_path / "g.csv")
    (tmp_path / "g.csv").write_text("one column\n")
    with pytest.raises(GroupUnknown):
        check(folder, groups_csv=tmp_path / "g.csv")
    with pytest.raises(DataFolderMissing):
        check(folder, groups_csv=tmp_path / "none.csv")


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 8},
        {"image_size": 10**9},
        {"image_size": "96"},
        {"channels": 2},
        {"colour": True},
        {"group_pattern": "no placeholder"},
        {"group_pattern": "{group}***"},
        {"group_pattern": "{group}" + "x" * 200},
    ],
)
def test_a_study_with_senseless_options_is_refused(folder: Path, options: dict) -> None:
    with pytest.raises(WrongOption):
        check(folder, StudyData(classes=("cat", "dog"), options=options))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "I;16"])
def test_every_kind_of_png_becomes_bytes(mode: str) -> None:
    if mode == "I;16":
        stream = BytesIO()
        Image.fromarray(np.full((5, 4), 0x8000, dtype=np.uint16)).save(stream, "PNG")
        content = stream.getvalue()
        assert (images.decode(content, 1) == 0x80).all()
    else:
        content = picture(1, mode, (4, 5))
    for channels in (1, 3):
        image = images.decode(content, channels)
        assert image.shape == (channels, 5, 4)
        assert image.dtype == np.uint8


def test_cmyk_jpeg_and_any_cut_of_a_file() -> None:
    content = picture(1, "CMYK", form="JPEG")
    assert images.decode(content, 1).shape == (1, 30, 40)
    for end in range(0, len(content) - 2, 97):
        with pytest.raises(UnreadableExample):
            images.decode(content[:end], 1)


def test_a_study_is_made_up_for_a_folder_without_one(folder: Path, tmp_path: Path) -> None:
    assert study_of_folder(folder).classes == ("cat", "dog")
    with pytest.raises(DataFolderMissing):
        study_of_folder(tmp_path)

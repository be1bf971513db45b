"""CIFAR-10's forms as a deployed study, judged each round on the coordinator's test set by a site that only evaluates.

Each hospital holds its images in another form: the binary version, an npz archive, folders of files.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from PIL import Image
from site_data import fix_split
from whole_world import IMAGE_SITES, PEOPLE, WholeWorld

pytestmark = pytest.mark.timeout(900)

STUDY: Final = "small-images"
REFEREE: Final = "referee"
CLASSES: Final = ("airplane", "ship")
PER_CLASS: Final = 30  # enough for some of each class in every part of each hospital's split
TEST_IMAGES: Final = 20
LAID_OUT: Final = tuple(
    word
    for option in ("image_size=32", "channels=3", "model=cnn", "recipe=plain")
    for word in ("--option", option)
)  # fmt: skip


def make(count: int, seed: int) -> tuple[Any, Any]:
    """Images (count, 32, 32, 3) of noise and their labels; one class is bright at the top, the other below."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = rng.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[16 * label : 16 * label + 16] += 120
    return images, labels


def write_batch(path: Path, images: Any, labels: Any) -> None:
    """CIFAR-10's binary version: a byte of class, then the planes of red, green and blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n")
    rows = np.concatenate([labels[:, None], np.moveaxis(images, 3, 1).reshape(len(images), -1)], axis=1)
    path.write_bytes(rows.astype(np.uint8).tobytes())


def write_forms(whole: WholeWorld) -> None:
    """Each hospital's images in a form of its own."""
    binary, archive, folders = (whole.stack.site_folder(site) / "data" / STUDY for site in IMAGE_SITES)
    write_batch(binary / "data_batch_1.bin", *make(2 * PER_CLASS, 1))
    archive.mkdir(parents=True)
    images, labels = make(2 * PER_CLASS, 2)
    np.savez(archive / "part.npz", images=images, labels=labels, class_names=np.array(CLASSES))
    for number, (image, label) in enumerate(zip(*make(2 * PER_CLASS, 3), strict=True)):
        file = folders / CLASSES[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


@dataclass(frozen=True)
class Judged:
    """A completed run with a test set beside it."""

    run: dict[str, Any]
    watched: str


@pytest.fixture(scope="module")
def referee(whole: WholeWorld) -> Iterator[str]:
    """The coordinator's own site with its test set; it leaves with the last test here."""
    stack, home = whole.stack, whole.stack.site_folder(REFEREE)
    # Of the published folder it takes what was set apart, and all of that.
    write_batch(home / "data" / STUDY / "data_batch_1.bin", *make(8, 4))
    write_batch(home / "data" / STUDY / "test_batch.bin", *make(TEST_IMAGES, 5))
    fix_split(home / "state", REFEREE)
    invite = stack.admin_json("invite", REFEREE, "--evaluate-only", "--study", STUDY)
    stack.site(REFEREE, "join", env={"JOIN_TOKEN": invite["token"]})
    stack.site(REFEREE, "settings", "--cpu-threads", "1", "--device", "cpu")
    stack.start_site(REFEREE).wait_for(r"[Cc]onnected to the fleet")
    yield REFEREE
    stack.programs.pop(REFEREE).stop()


@pytest.fixture(scope="module")
def images_study(whole: WholeWorld) -> str:
    """The study, with its hospitals."""
    write_forms(whole)
    chosen = ("--default", "local_epochs=2", "--default", "lr=0.02", "--default", "strategy=fedavg")
    whole.stack.admin(
        "studies", "create", STUDY, "--task", "image-folder", "--classes", ",".join(CLASSES), *LAID_OUT, *chosen
    )
    whole.stack.admin("studies", "members", STUDY, *(word for site in IMAGE_SITES for word in ("--add", site)))
    return STUDY


@pytest.fixture(scope="module")
def judged(whole: WholeWorld, images_study: str, referee: str) -> Judged:
    """Two rounds of all three, each judged by the referee, who has consented as everybody has."""
    sent = whole.request(IMAGE_SITES[0], images_study, "--rounds", "2", "--min-sites", "3", "--batch-size", "10")
    run_id = whole.approve(sent["id"])
    for site in IMAGE_SITES[1:]:
        whole.consent(site, run_id)
    whole.stack.site(referee, "consent", run_id, "--person", "Dr. Ref", "--yes")
    run = whole.wait_for_run(run_id)
    assert run["state"] == "completed", run["reason"]
    return Judged(run, whole.stack.admin("watch", run_id))


def test_all_three_forms_train_one_model(judged: Judged) -> None:
    for item in judged.run["rounds_done"]:
        if item["number"]:
            assert [(site["site"], site["dropped"]) for site in item["sites"]] == [(s, None) for s in IMAGE_SITES]
            assert all(site["examples"] > PER_CLASS for site in item["sites"])
    assert judged.run["metrics"]["val_accuracy"] > 0.9


def test_the_test_set_is_judged_as_a_whole_after_each_round(whole: WholeWorld, judged: Judged) -> None:
    first, second = (item for item in judged.run["rounds_done"] if item["number"])
    for item in (first, second):
        (row,) = item["evaluators"]
        assert (row["site"], row["answered"], sum(map(sum, row["confusion"]))) == (REFEREE, True, TEST_IMAGES)
        assert item["metrics"]["test_accuracy"] == row["metrics"]["val_accuracy"]
        assert "test_accuracy" in judged.watched
    assert judged.run["metrics"]["test_accuracy"] > 0.9 > first["metrics"]["test_accuracy"]
    shown = whole.stack.admin("show", judged.run["id"])
    assert (
        shown.count(f"{REFEREE} (evaluates only)") == 2
    )  # among the consents, and with what it says of the final weights
    assert "test accuracy" in shown


def test_the_curves_are_to_be_had_as_a_table(whole: WholeWorld, judged: Judged, tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    whole.stack.admin("show", judged.run["id"], "--csv", str(path))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["closed", "closed", "closed", "final"]
    done = [item for item in judged.run["rounds_done"] if item["number"]]
    assert float(rows[1]["test_accuracy"]) == done[1]["metrics"]["test_accuracy"], "of the model after the first round"
    assert float(rows[2]["test_accuracy"]) == judged.run["metrics"]["test_accuracy"]
    assert float(rows[3]["val_accuracy"]) == judged.run["metrics"]["val_accuracy"]
    assert (
        whole.stack.failing(
            ["medhive-admin", "show", f"{STUDY}/1", "--csv", str(path)], whole.stack.admin_env()
        ).returncode
        == 2
    )


def test_mlflow_has_its_curve_beside_the_hospitals(whole: WholeWorld, judged: Judged) -> None:
    whole.tracked_run(judged.run["id"])
    mlflow_id = whole.stack.admin_json("show", judged.run["id"])["mlflow_run_id"]
    for name in ("test_accuracy", f"site/{REFEREE}/val_accuracy", f"site/{IMAGE_SITES[0]}/val_accuracy"):
        curve = whole.mlflow("metrics/get-history", run_id=mlflow_id, metric_key=name)["metrics"]
        assert sorted({int(item["step"]) for item in curve}) == [0, 1, 2], name


def test_it_counts_for_nothing_else(whole: WholeWorld, judged: Judged) -> None:
    version = whole.stack.admin_json("model", STUDY, str(judged.run["version"]))
    assert version["manifest"]["body"]["sites"] == list(IMAGE_SITES)
    assert [item["site"] for item in version["decisions"]] == list(IMAGE_SITES)
    whole.stack.programs[REFEREE].wait_for(rf"{judged.run['id']} .*completed")
    assert not list((whole.stack.site_folder(REFEREE) / "state" / "models").rglob("*.safetensors"))
    whole.stack.site(
        IMAGE_SITES[0], "accept", str(version["version"]), "--study", STUDY, "--person", PEOPLE[IMAGE_SITES[0]]
    )

"""Images in packed files: read as published, and nothing that a hostile file says is believed or run."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_client.check import check_data, study_of_folder
from fl_client.tasks import LocalOptions, RoundPlan, finish, load_task
from fl_client.tasks.errors import (
    DataFolderMissing,
    MissingClass,
    PickledData,
    UnknownClass,
    WrongArchitecture,
    WrongOption,
)
from fl_client.tasks.image_training import cropped, middle, relit, whitened
from fl_client.tasks.images import ImageOptions
from fl_client.tasks.models import build_model
from fl_client.tasks.packed_images import CIFAR_RECORD, packed_classes, read_packed
from medhive.spec import StudyData

COUNT = 40
RNG = np.random.default_rng(5)
IMAGES = RNG.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(COUNT) % 2
MARKS = np.arange(COUNT) >= 30
NAMES = np.array(["cat", "dog"])


def jpeg_blob(folder: Path) -> dict[str, Any]:
    parts = []
    for image in IMAGES:
        path = folder / "one.png"
        Image.fromarray(image).save(path)
        parts.append(path.read_bytes())
    path.unlink()
    offsets = np.cumsum([0, *map(len, parts)])
    return {"blob": np.frombuffer(b"".join(parts), np.uint8), "offsets": offsets, "labels": LABELS}


def write_binary(folder: Path, name: str, places: np.ndarray[Any, Any]) -> None:
    rows = [np.concatenate([[LABELS[i]], np.moveaxis(IMAGES[i], 2, 0).ravel()]) for i in places]
    (folder / name).write_bytes(np.array(rows, dtype=np.uint8).tobytes())


def write(folder: Path, kind: str) -> None:
    """The same images in each of the known forms."""
    folder.mkdir(exist_ok=True)
    if kind == "binary":
        write_binary(folder, "data_batch_1.bin", np.flatnonzero(~MARKS))
        write_binary(folder, "test_batch.bin", np.flatnonzero(MARKS))
        (folder / "batches.meta.txt").write_text("cat\ndog\n")
    elif kind == "prefixed":
        parts = {"train": np.arange(20), "val": np.arange(20, 30), "test": np.arange(30, COUNT)}
        arrays = {f"{name}_images": IMAGES[places] for name, places in parts.items()}
        arrays |= {f"{name}_labels": LABELS[places, None] for name, places in parts.items()}
        np.savez(folder / "set.npz", class_names=NAMES, **arrays)
    else:
        arrays = jpeg_blob(folder) if kind == "blob" else {"images": IMAGES, "labels": LABELS}
        np.savez(folder / "set.npz", class_names=NAMES, is_test=MARKS, **arrays)


@pytest.mark.parametrize("kind", ["binary", "prefixed", "blob", "arrays"])
def test_each_form_gives_the_same_images(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "data", kind)
    data = StudyData(classes=("cat", "dog"), options={"image_size": 32, "channels": 3})
    assert study_of_folder(tmp_path / "data").classes == ("cat", "dog")
    report = check_data("image-folder", tmp_path / "data", data, b"secret")
    assert (report.examples, dict(report.remarks)) == (30, {"images of the publisher's test set, not used": 10})
    judged = check_data(
        "image-folder", tmp_path / "data", data.as_test_set(), b"secret", local=LocalOptions(subset="judge")
    )
    assert (judged.examples, dict(judged.remarks)) == (10, {"images of the publisher's training set, not used": 30})
    for subset, places in (("train", range(30)), ("test", range(30, COUNT)), ("judge", range(30, COUNT))):
        local = LocalOptions(subset=subset)  # type: ignore[arg-type]
        workspace: Any = load_task("image-folder").open(tmp_path / "data", data, b"secret", local=local)
        seen = workspace.pixels(torch.arange(len(places))).numpy()
        assert np.array_equal(seen, np.moveaxis(IMAGES[list(places)], 3, 1))
        assert workspace.examples.labels.tolist() == [int(LABELS[i]) for i in places]


def test_without_names_classes_are_numbers_and_without_marks_all_is_trained_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=IMAGES[..., 0], labels=LABELS)
    assert packed_classes(tmp_path) == ("0", "1")
    assert len(list(read_packed(tmp_path, "train"))) == len(list(read_packed(tmp_path, "judge"))) == COUNT
    assert not list(read_packed(tmp_path, "test"))
    data = StudyData(classes=("0", "1"), options={"image_size": 32, "channels": 3})
    whole = check_data("image-folder", tmp_path / "set.npz", data, b"secret")
    assert (whole.examples, dict(whole.remarks)) == (COUNT, {})
    with pytest.raises(UnknownClass, match="no class '1'"):
        check_data("image-folder", tmp_path, data.model_copy(update={"classes": ("0", "2")}), b"secret")


def test_the_folder_that_an_unpacked_archive_brings_is_named(tmp_path: Path) -> None:
    write(tmp_path / "cifar-10-batches-bin", "binary")
    with pytest.raises(DataFolderMissing, match=r"Or give .*cifar-10-batches-bin, which holds packed images"):
        study_of_folder(tmp_path)
    pickled = tmp_path / "python" / "cifar-10-batches-py" / "data_batch_1"
    pickled.parent.mkdir(parents=True)
    pickled.write_bytes(pickle.dumps({}, protocol=2))
    with pytest.raises(PickledData):
        study_of_folder(tmp_path / "python")


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.array([Evil()] * COUNT, dtype=object), "labels": LABELS},
        {"images": IMAGES.astype(np.float32), "labels": LABELS},
        {"images": IMAGES, "labels": LABELS[:-1]},
        {"images": IMAGES, "labels": LABELS.astype(float)},
        {"images": IMAGES[..., :2], "labels": LABELS},
        {"blob": np.zeros(10, np.uint8), "offsets": np.array([0, 99]), "labels": LABELS[:1]},
        {"blob": np.zeros(10, np.uint8), "offsets": np.array([5, 2]), "labels": LABELS[:1]},
        {"images": IMAGES, "labels": LABELS, "is_test": MARKS[:3]},
        {"weights": IMAGES},
    ],
)
def test_an_archive_that_is_none_is_refused(tmp_path: Path, arrays: dict[str, Any], capfd: Any) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataFolderMissing, match=r"set.npz is no archive of images"):
        list(read_packed(tmp_path, "train"))
    assert "unpickled" not in capfd.readouterr().out


def test_the_pickled_version_is_named_and_never_read(tmp_path: Path, capfd: Any) -> None:
    """As CIFAR-10's version for Python is: at a hospital whose study is known, and before there is one."""
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    (tmp_path / "readme.html").write_text("<html>")
    study = StudyData(classes=("cat", "dog"))
    for look in (lambda: study_of_folder(tmp_path), lambda: check_data("image-folder", tmp_path, study, b"secret")):
        with pytest.raises(PickledData, match=r"data_batch_1 is a pickled file, which is never read.*binary version"):
            look()
    (tmp_path / "cat").mkdir()
    with pytest.raises(MissingClass):
        check_data("image-folder", tmp_path, study, b"secret")
    assert "unpickled" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"x" * (CIFAR_RECORD + 1)])
def test_a_broken_batch_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(DataFolderMissing):
        list(read_packed(tmp_path, "train"))
    (tmp_path / "data_batch_1.bin").rename(tmp_path / "set.npz")
    with pytest.raises(DataFolderMissing):
        list(read_packed(tmp_path, "train"))


# ---- the plain recipe --------------------------------------------------------------------------------------------------


def test_the_plain_recipe_is_sgd_as_written_down(tmp_path: Path) -> None:
    write(tmp_path / "data", "arrays")
    options = {"image_size": 32, "channels": 3, "model": "cnn", "recipe": "plain", "lr_decay": 0.5, "momentum": 0.9}
    study = StudyData(classes=("cat", "dog"), options=options)
    workspace: Any = load_task("image-folder").open(tmp_path / "data", study, b"secret")
    first = workspace.initial_weights(1)
    result = finish(workspace.train(first, RoundPlan(3, 5, 1, batch_size=1000, lr=0.08, seed=1)))
    assert result.optimiser_state is None
    model = workspace.model.new_model(first)
    indices = workspace.indices("train")
    logits = model(whitened(workspace.pixels(indices).float()))
    torch.nn.functional.cross_entropy(logits, workspace.labels(indices)).backward()
    for name, parameter in model.named_parameters():
        expected = (parameter - 0.02 * parameter.grad).detach().numpy()
        assert np.allclose(result.weights[name], expected, atol=1e-5), name


def test_scaffolds_correction_is_taken_off_each_step(tmp_path: Path) -> None:
    write(tmp_path / "data", "arrays")
    options = {"image_size": 32, "channels": 3, "model": "cnn", "recipe": "plain", "momentum": 0.9}
    study = StudyData(classes=("cat", "dog"), options=options)
    workspace: Any = load_task("image-folder").open(tmp_path / "data", study, b"secret")
    first = workspace.initial_weights(1)
    correction = {name: np.full_like(value, 0.5) for name, value in first.items()}
    plan = RoundPlan(1, 5, 1, batch_size=1000, lr=0.08, seed=1)
    plain, corrected = (finish(workspace.train(first, replace(plan, correction=c))) for c in (None, correction))
    assert plain.rate_sum == corrected.rate_sum == 0.08
    for name, value in plain.weights.items():
        assert np.allclose(corrected.weights[name], value - 0.08 * 0.5, atol=1e-6), name
    with pytest.raises(WrongArchitecture):
        finish(workspace.train(first, replace(plan, correction={"w": np.zeros(3, np.float32)})))


def test_weight_decay_and_pull_are_of_the_gradient_which_momentum_carries(tmp_path: Path) -> None:
    """Against torch's own SGD over a loss that has the proximal term in it, as Flower's baseline niid_bench writes it."""
    write(tmp_path / "data", "arrays")
    options = {"image_size": 32, "channels": 3, "model": "lenet", "recipe": "plain", "momentum": 0.9}
    options |= {"weight_decay": 0.01, "pixels": "unit"}
    workspace: Any = load_task("image-folder").open(
        tmp_path / "data", StudyData(classes=("cat", "dog"), options=options), b"secret"
    )
    first = workspace.initial_weights(1)
    plan = RoundPlan(1, 5, 3, batch_size=1000, lr=0.1, mu=0.5, seed=1)
    result = finish(workspace.train(first, plan))
    model, anchor = workspace.model.new_model(first), workspace.model.build(seed=1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    indices = workspace.indices("train")
    for _ in range(3):
        logits = model(workspace.pixels(indices).float() / 255)
        loss = torch.nn.functional.cross_entropy(logits, workspace.labels(indices))
        pairs = zip(model.parameters(), anchor.parameters(), strict=True)
        loss = loss + 0.5 / 2 * sum(((own - its.detach()) ** 2).sum() for own, its in pairs)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, parameter in model.named_parameters():
        assert np.allclose(result.weights[name], parameter.detach().numpy(), atol=1e-6), name


def drawn(count: int, numbers: int) -> torch.Tensor:
    return torch.rand(count, numbers, generator=torch.Generator().manual_seed(0))


def test_a_crop_beyond_the_edge_sees_the_mirror_image() -> None:
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    seen = cropped(pixels, 32, drawn(40, 3), pad=4)
    padded = torch.nn.functional.pad(pixels.float(), [4] * 4, mode="reflect")
    places = set()
    for image, crop in zip(padded, seen, strict=True):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        equal = [(windows == turned).all(dim=(2, 3, 4)).nonzero() for turned in (crop, crop.flip(2))]
        assert sum(map(len, equal)) == 1
        places.add((len(equal[0]), *(int(x) for x in torch.cat(equal)[0])))
    assert len(places) > 30


def test_light_changes_as_in_the_tutorial() -> None:
    pixels = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 255
    lit = relit(pixels, 63.0, 0.8, drawn(200, 2))
    shift = lit.mean(dim=(2, 3)) - pixels.mean(dim=(2, 3))
    factor = lit.std(dim=(2, 3)) / pixels.std(dim=(2, 3))
    for found, least, most in ((shift, -63.0, 63.0), (factor, 0.2, 1.8)):
        assert torch.allclose(found, found[:, :1].expand(-1, 3), atol=1e-3)  # the same for each channel of an image
        assert least <= float(found.min()) < least + 0.1 * (most - least)
        assert most >= float(found.max()) > most - 0.1 * (most - least)


def test_a_crop_lies_in_the_image_and_judging_takes_its_middle() -> None:
    pixels = torch.arange(32 * 32, dtype=torch.uint8).view(1, 1, 32, 32).repeat(60, 3, 1, 1)
    seen = cropped(pixels, 24, drawn(60, 3))
    assert seen.shape == (60, 3, 24, 24)
    whole = pixels[0, 0].float()
    for crop in seen[:, 0]:
        windows = whole.unfold(0, 24, 1).unfold(1, 24, 1)
        assert any((windows == turned).all(dim=(2, 3)).any() for turned in (crop, crop.flip(1)))
    assert torch.equal(middle(pixels, 24), pixels[:, :, 4:28, 4:28])
    assert torch.allclose(whitened(seen).mean(dim=(1, 2, 3)), torch.zeros(60), atol=1e-5)


def test_the_small_cnn_has_a_million_parameters() -> None:
    model = build_model("cnn", channels=3, classes=10, seed=1, side=24)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_068_298
    assert model(torch.zeros(2, 3, 24, 24)).shape == (2, 10)
    small = build_model("lenet", channels=3, classes=10, seed=1, side=32)
    assert sum(parameter.numel() for parameter in small.parameters()) == 62_006
    norm = next(module for module in model if not list(module.children()) and hasattr(module, "band"))
    x = torch.randn(2, 64, 5, 5) * 9
    assert torch.allclose(norm(x), torch.nn.LocalResponseNorm(9, alpha=0.001)(x), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "secret"},
        {"crop": 24},
        {"pixels": "unit"},
        {"recipe": "plain", "crop": 99},
        {"recipe": "plain", "momentum": 1.0},
        {"recipe": "plain", "weight_decay": -0.1},
        {"recipe": "plain", "pixels": "grey"},
        {"recipe": "plain", "pad": 4},
        {"recipe": "plain", "contrast": 1.5},
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(WrongOption):
        ImageOptions.of(StudyData(classes=("a", "b"), options=options))

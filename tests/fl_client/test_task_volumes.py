"""The task ct-volume: repeats bit for bit, keeps its boxes through crashes, predicts series by series."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from made_scans import chest as scan
from made_scans import write_series

from fl_client.tasks import LocalOptions, Prediction, RoundPlan, Skipped, Workspace, completed, finish, load_task
from fl_client.tasks.dicom import Decoder
from fl_client.tasks.errors import UnknownModel, UnreadableExample
from fl_client.tasks.lungs import find_lungs, lungs_alone
from fl_client.tasks.made_chests import CLASSES, SPACING_MM, chest, make_chests, make_chests_from
from fl_client.tasks.models import VOLUME_MODELS, build_volume_model, export_weights
from fl_client.tasks.scans import open_series
from fl_client.tasks.series import Grid, Volume
from fl_client.tasks.volume_training import MAX_SHIFT, MAX_TURN, MAX_ZOOM, RANDOM_NUMBERS, augment, sampled
from medhive.errors import InvalidInput
from medhive.spec import StudyData

STUDY = StudyData(classes=CLASSES, options={"size": 32, "spacing_mm": 8.0}, validation_share=0.3)
SECRET = b"a site's secret"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chests") / "all"
    for number in range(12):
        name = CLASSES[number // 6]
        values = scan((5, 24, 24), seed=number)
        values[2, 10:14, 5:9] = 60 if name == "nodule" else -850
        where = folder / name / f"scan_{number:04d}"
        for place, path in enumerate(write_series(where, f"{number}", values=values, spacing_mm=(30, 10, 10))):
            path.rename(where / f"{place:04d}.dcm")
    return folder


@pytest.fixture
def local(tmp_path: Path) -> LocalOptions:
    return LocalOptions(cache_dir=tmp_path / "cache")


def opened(chests: Path, local: LocalOptions) -> Workspace:
    return load_task("ct-volume").open(chests, STUDY, SECRET, local=local)


def test_a_round_repeats_bit_for_bit_and_learns(chests: Path, local: LocalOptions) -> None:
    workspace = opened(chests, local)
    start = workspace.initial_weights(42)
    plan = RoundPlan(round=1, rounds=1, local_epochs=3, batch_size=4, mu=0.1)
    first, again = (finish(workspace.train(start, plan)) for _ in range(2))
    assert all(np.array_equal(first.weights[name], again.weights[name]) for name in start)
    assert first.optimiser_state == again.optimiser_state
    assert first.examples == sum(workspace.report.parts["train"].values())
    before, after = (workspace.evaluate(weights, "train").loss for weights in (start, first.weights))
    assert after < before
    assert workspace.evaluate(first.weights, "train").per_class["nodule"].auc is not None


def test_boxes_are_kept_and_made_anew_where_they_were_lost(
    chests: Path, local: LocalOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = opened(chests, local)
    weights = workspace.initial_weights(1)
    expected = completed(workspace.judge(weights, "train")).probabilities

    def refuse(*_: object) -> None:
        raise AssertionError("a scan was decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "hounsfield", refuse)
        again = opened(chests, local)
        np.testing.assert_array_equal(completed(again.judge(weights, "train")).probabilities, expected)
    assert local.cache_dir is not None
    shutil.rmtree(local.cache_dir)
    local.cache_dir.mkdir()
    np.testing.assert_array_equal(completed(again.judge(weights, "train")).probabilities, expected)
    # With room for two boxes only, every other one is made anew each time: slow, and right.
    tight = LocalOptions(cache_dir=local.cache_dir / "tight", cache_bytes=2 * 32**3 + 100)
    small = opened(chests, tight)
    np.testing.assert_array_equal(completed(small.judge(weights, "train")).probabilities, expected)
    assert tight.cache_dir is not None
    assert sum(path.stat().st_size for path in tight.cache_dir.rglob("*.box")) <= 2 * 32**3 + 100


def test_a_scan_that_was_exchanged_while_in_use_is_noticed(chests: Path, local: LocalOptions, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(chests, folder)
    workspace = opened(folder, local)
    assert local.cache_dir is not None
    for path in local.cache_dir.rglob("*.box"):
        path.unlink()
    for old, new in (("scan_0000", "scan_0001"), ("scan_0002", "scan_0003")):
        shutil.rmtree(folder / "clear" / old)
        shutil.copytree(folder / "clear" / new, folder / "clear" / old)
    with pytest.raises(UnreadableExample, match="consent anew"):
        for part in ("train", "validation", "heldout"):
            completed(workspace.judge(workspace.initial_weights(1), part))


def test_kill_9_while_reading_loses_nothing(chests: Path, local: LocalOptions) -> None:
    """The next start goes on with what was kept, and gives the same report."""
    code = (
        "import sys, pathlib; from fl_client.tasks import LocalOptions, load_task; from medhive.spec import StudyData;"
        "study = StudyData.model_validate_json(sys.argv[3]); local = LocalOptions(cache_dir=pathlib.Path(sys.argv[2]));"
        "load_task('ct-volume').check(pathlib.Path(sys.argv[1]), study, b\"a site's secret\", local=local)"
    )
    assert local.cache_dir is not None
    arguments = [str(chests), str(local.cache_dir), STUDY.model_dump_json()]
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
        while process.poll() is None and len(list(local.cache_dir.rglob("*.box"))) < 3:
            os.sched_yield()
        process.send_signal(signal.SIGKILL)
    kept = {path: path.read_bytes() for path in local.cache_dir.rglob("*.box")}
    assert len(kept) >= 3
    report = load_task("ct-volume").check(chests, STUDY, SECRET, local=local)
    assert report.examples == 12
    assert not report.skipped
    boxes = {path: path.read_bytes() for path in local.cache_dir.rglob("*.box")}
    assert len(boxes) == 12
    assert boxes.items() >= kept.items()


def test_prediction_is_series_by_series(chests: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unseen"
    for name in ("scan_0000", "scan_0001"):
        shutil.copytree(chests / "clear" / name, folder / name)
    (folder / "notes.txt").write_text("not a scan")
    cut = folder / "scan_0001" / "0003.dcm"
    cut.write_bytes(cut.read_bytes()[:-100])
    predictor = load_task("ct-volume").predictor(STUDY)
    weights = export_weights(build_volume_model("resnet-gn", classes=2, seed=0))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = dict(predictor.predict_files(weights, paths))
    assert found.keys() == set(paths)
    (good,) = found[folder / "scan_0000" / "0000.dcm"]
    assert isinstance(good, Prediction)
    assert sum(good.probabilities.values()) == pytest.approx(1)
    assert found[folder / "scan_0001" / "0000.dcm"] == [Skipped("0000.dcm", "truncated")]
    assert found[folder / "notes.txt"] == [Skipped("notes.txt", "not-dicom")]
    assert sum(len(items) for items in found.values()) == 3


def test_prediction_of_nodules_takes_their_places_from_a_table(chests: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unseen"
    shutil.copytree(chests / "nodule" / "scan_0006", folder)
    study = STUDY.model_copy(update={"options": {"size": 32, "spacing_mm": 2.0, "examples": "nodules"}})
    weights = export_weights(build_volume_model("resnet-gn", classes=2, seed=0))
    predictor = load_task("ct-volume").predictor(study)
    assert [item.reason for item in predictor.predict(weights, sorted(folder.iterdir()))] == ["no-position"]
    table = "file,label,x_mm,y_mm,z_mm\n0000.dcm,nodule,60,0,-90\n0000.dcm,clear,-20,0,-80\n"
    (folder / "places.csv").write_text(table)
    found = predictor.predict(weights, sorted(folder.iterdir()))
    assert [item.name for item in found] == ["0000.dcm at 60, 0, -90", "0000.dcm at -20, 0, -80"]


@pytest.mark.parametrize("name", VOLUME_MODELS)
def test_every_model_takes_volumes(name: str) -> None:
    model = build_volume_model(name, classes=3, seed=0).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 3)
    if name == "resnet-gn":
        assert sum(parameter.numel() for parameter in model.parameters()) < 600_000


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UnknownModel, match="resnet-gn"):
        load_task("ct-volume").predictor(STUDY.model_copy(update={"options": {"model": "video"}}))


def test_augmentation_moves_each_box_on_its_own_and_only_a_little() -> None:
    box = torch.from_numpy(chest(np.random.default_rng(0), nodule=True).clip(-1000, 400) // 6 + 167).to(torch.uint8)
    batch = box[None, None].repeat(4, 1, 1, 1, 1)
    moved = augment(batch, torch.rand(4, RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)))
    assert moved.shape == batch.shape
    assert not torch.allclose(moved[0], moved[1])
    assert (moved.mean(dim=(1, 2, 3, 4)) - batch.float().mean()).abs().max() < 40


def test_made_chests_repeat_and_shuffled_ones_are_the_same_scans_elsewhere(tmp_path: Path) -> None:
    folders = [make_chests(tmp_path / name, 1, seed=3, shuffled=name == "c") for name in ("a", "b", "c")]
    contents = [{path.read_bytes()[-1000:] for path in folder.rglob("*.dcm")} for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 80


def chest_volume(values: np.ndarray) -> Volume:
    return Volume(values.astype(np.int16), Grid(values.shape, np.diag([*SPACING_MM, 1.0])[[2, 1, 0, 3]]))


def test_lungs_are_found_with_what_is_in_them_and_the_rest_is_air() -> None:
    values = chest(np.random.default_rng(3), nodule=True)
    lung = np.argwhere((values > -900) & (values < -700))
    inner = lungs_alone(chest_volume(values))
    assert inner.grid.shape < values.shape
    start = np.rint(inner.grid.affine[:3, 3][[2, 1, 0]] / SPACING_MM).astype(int)
    part = values[tuple(slice(a, a + n) for a, n in zip(start, inner.grid.shape, strict=True))]
    kept = inner.values != -1000
    assert np.array_equal(inner.values[kept], part[kept])
    assert ((part > -900) & (part < -700) & kept).sum() > 0.95 * len(lung)
    assert (inner.values > 200).sum() == 0, "the spine is not of the lungs"
    assert (inner.values > -100).sum() > 20, "vessels and nodule are"


def test_the_middle_of_a_large_nodule_is_kept() -> None:
    values = chest(np.random.default_rng(3), nodule=False)
    z, y, x = np.ogrid[:40, :80, :80]
    ball = np.sqrt(((z - 20) * 5.0) ** 2 + ((y - 40) * 4.0) ** 2 + ((x - 56) * 4.0) ** 2) < 20
    values[ball] = 60
    inner = lungs_alone(chest_volume(values))
    assert (inner.values == 60).sum() == ball.sum()


@pytest.mark.parametrize("part", [slice(19, None), slice(None, 22)])
@pytest.mark.parametrize(("radius_mm", "kept"), [(20, True), (35, False)])
def test_a_nodule_that_an_end_of_the_scan_cuts_is_kept_but_nothing_as_large_as_the_heart(
    part: slice, radius_mm: int, kept: bool
) -> None:
    values = chest(np.random.default_rng(3), nodule=False)
    z, y, x = np.ogrid[:40, :80, :80]
    ball = np.sqrt(((z - 20) * 5.0) ** 2 + ((y - 40) * 4.0) ** 2 + ((x - 56) * 4.0) ** 2) < radius_mm
    lungs = find_lungs(np.where(ball, 60, values)[part].astype(np.int16), SPACING_MM)
    assert lungs is not None
    assert lungs[ball[part]].all() == kept


def test_a_scan_without_lungs_is_used_whole() -> None:
    values = np.full((20, 40, 40), 40)
    values[:, :5] = -1000
    volume = chest_volume(values)
    assert lungs_alone(volume) is volume


def test_the_way_of_sampling_is_that_of_an_affine_grid() -> None:
    r = torch.rand(3, RANDOM_NUMBERS, generator=torch.Generator().manual_seed(1)) * 2 - 1
    angle, zoom = r[:, 0] * MAX_TURN, 1 + r[:, 1] * MAX_ZOOM
    mx, my, mz = (torch.where(r[:, i] < 0, -1.0, 1.0) for i in (2, 8, 9))
    c, s, zero = torch.cos(angle) * zoom, torch.sin(angle) * zoom, torch.zeros(3)
    shift = r[:, 3:6] * MAX_SHIFT
    rows = [
        [c * mx, -s * my, zero, shift[:, 0]],
        [s * mx, c * my, zero, shift[:, 1]],
        [zero, zero, zoom * mz, shift[:, 2]],
    ]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    expected = torch.nn.functional.affine_grid(theta, [3, 1, 5, 6, 7], align_corners=False)
    torch.testing.assert_close(sampled(r, torch.Size([5, 6, 7])), expected)


def test_balls_are_put_into_copies_of_a_scan(tmp_path: Path) -> None:
    clear = make_chests(tmp_path / "source", 1, seed=5) / "clear" / "scan_0000"
    folders = [make_chests_from(clear, tmp_path / name, 2, seed=1) for name in ("a", "b")]
    first, again = ([path.read_bytes() for path in sorted(folder.rglob("*.dcm"))] for folder in folders)
    assert first == again
    bright = {}
    with Decoder() as decoder:
        for label in CLASSES:
            for scan_folder in sorted((folders[0] / label).iterdir()):
                lungs = lungs_alone(open_series(sorted(scan_folder.iterdir())).read(decoder))
                bright.setdefault(label, []).append(int((lungs.values > -200).sum()))
    assert max(bright["clear"]) < min(bright["nodule"])
    with pytest.raises(InvalidInput, match="No lungs"):
        make_chests_from(empty_scan(tmp_path / "empty"), tmp_path / "c", 1)


def empty_scan(folder: Path) -> Path:
    values = np.full((6, 30, 30), 40, np.int16)
    values[:, :4] = -1000
    write_series(folder, "empty", values=values, spacing_mm=(5, 4, 4))
    return folder

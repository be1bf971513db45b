"""Training and judging images: reproducible, interruptible, exact about weights, and able to learn made scans."""

import importlib.util
import math
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from fl_client.partition import split_dataset
from fl_client.tasks import (
    EpochProgress,
    Judged,
    LocalOptions,
    Prediction,
    RoundPlan,
    Skipped,
    Workspace,
    completed,
    finish,
    image_training,
    load_task,
    task_names,
)
from fl_client.tasks.errors import (
    AlreadyThere,
    DeadlinePassed,
    DeviceUnavailable,
    NotEnoughExamples,
    TrainingDiverged,
    UnknownModel,
    UnknownTask,
    WrongArchitecture,
    WrongOptimiserState,
)
from fl_client.tasks.image_training import RANDOM_NUMBERS, Resizer, augment
from fl_client.tasks.models import MODELS, build_model, export_weights, load_weights
from fl_client.tasks.phantoms import CLASSES, make_phantoms
from fl_client.tasks.training import class_weights, learning_rate_factor, log_prior
from medhive.spec import StudyData

SECRET = b"a site's secret"
STUDY = StudyData(classes=CLASSES, options={"image_size": 48})
PLAN = RoundPlan(round=1, rounds=2, local_epochs=1, batch_size=16, mu=0.1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "all", per_class=20)


@pytest.fixture(scope="module")
def workspace(phantoms: Path) -> Workspace:
    return load_task("image-folder").open(phantoms, STUDY, SECRET)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_importing_the_tasks_loads_nothing_heavy() -> None:
    code = (
        "import fl_client.tasks, fl_client.check, sys; print({'torch', 'monai', 'sklearn'} & set(sys.modules)); "
        "import fl_client.tasks.image_training; print('monai' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["set()", "False"]


def test_tasks_are_found_by_name() -> None:
    assert {"image-folder", "tabular"} <= set(task_names())
    with pytest.raises(UnknownTask, match="image-folder"):
        load_task("video")


def test_initial_weights_depend_on_the_seed_alone(workspace: Workspace) -> None:
    torch.manual_seed(1)
    first = workspace.initial_weights(42)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, workspace.initial_weights(42))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(first, workspace.initial_weights(43))
    assert all(array.dtype == np.float32 for array in first.values())
    assert sum(array.size for array in first.values()) < 500_000


def test_a_round_repeats_bit_for_bit_also_from_its_kept_state_and_among_others(workspace: Workspace) -> None:
    start = workspace.initial_weights(42)
    before = {name: array.copy() for name, array in start.items()}
    first = finish(workspace.train(start, PLAN))
    assert same(start, before)
    second = RoundPlan(round=2, rounds=2, local_epochs=1, batch_size=16, mu=0.1, optimiser_state=first.optimiser_state)
    expected = finish(workspace.train(first.weights, second))
    # The same again, with another run taking turns step by step and the global generator moved meanwhile.
    other = workspace.train(start, RoundPlan(round=1, rounds=1, local_epochs=3, batch_size=8, seed=7))
    training = workspace.train(first.weights, second)
    while True:
        next(other)
        torch.rand(3)
        try:
            next(training)
        except StopIteration as end:
            result = end.value
            break
    assert same(result.weights, expected.weights)
    assert result.optimiser_state == expected.optimiser_state
    without = finish(
        workspace.train(first.weights, RoundPlan(round=2, rounds=2, local_epochs=1, batch_size=16, mu=0.1))
    )
    assert not same(without.weights, expected.weights)


def test_progress_is_told_after_each_epoch_and_every_step_can_switch(workspace: Workspace) -> None:
    plan = RoundPlan(round=1, rounds=1, local_epochs=2, batch_size=10)
    told = list(workspace.train(workspace.initial_weights(1), plan))
    epochs = [item for item in told if isinstance(item, EpochProgress)]
    examples = sum(workspace.report.parts["train"].values())
    assert [item.epoch for item in epochs] == [1, 2]
    assert all(item.examples == examples and math.isfinite(item.loss) for item in epochs)
    assert len(told) - 2 == 2 * math.ceil(examples / 10)


def test_the_proximal_term_holds_the_model_near_the_global_one(workspace: Workspace) -> None:
    start = workspace.initial_weights(42)

    def moved(mu: float) -> float:
        plan = RoundPlan(round=1, rounds=1, local_epochs=1, batch_size=16, mu=mu)
        result = finish(workspace.train(start, plan))
        return math.sqrt(sum(float(((result.weights[name] - start[name]) ** 2).sum()) for name in start))

    assert moved(100) < moved(10) < moved(0)


def test_a_deadline_ends_the_training(workspace: Workspace) -> None:
    with pytest.raises(DeadlinePassed):
        finish(
            workspace.train(workspace.initial_weights(1), RoundPlan(round=1, rounds=1, local_epochs=1, deadline=1.0))
        )


def test_a_diverged_training_says_so(workspace: Workspace) -> None:
    weights = {name: np.full_like(array, np.nan) for name, array in workspace.initial_weights(1).items()}
    with pytest.raises(TrainingDiverged, match="--lr"):
        finish(workspace.train(weights, PLAN))


def test_another_architectures_weights_are_named(workspace: Workspace) -> None:
    weights = workspace.initial_weights(1)
    del weights["head.bias"]
    weights["stem.weight"] = weights["stem.weight"][:1]
    weights["extra"] = np.zeros(3, dtype=np.float32)
    for use in (
        lambda: workspace.evaluate(weights, "validation"),
        lambda: finish(workspace.train(weights, PLAN)),
        lambda: workspace.predict(weights, []),
    ):
        with pytest.raises(WrongArchitecture, match=r"head\.bias.*extra.*stem\.weight"):
            use()


def test_a_damaged_optimiser_state_is_refused(workspace: Workspace) -> None:
    start = workspace.initial_weights(42)
    state = finish(workspace.train(start, PLAN)).optimiser_state
    for damaged in (b"", b"junk" * 10, state[: len(state) // 2]):
        with pytest.raises(WrongOptimiserState):
            finish(workspace.train(start, RoundPlan(round=2, rounds=2, local_epochs=1, optimiser_state=damaged)))


def test_predictions_agree_with_the_evaluation(workspace: Workspace, phantoms: Path, tmp_path: Path) -> None:
    weights = workspace.initial_weights(3)
    paths = sorted(phantoms.rglob("*.jpg"))
    (tmp_path / "bad.png").write_bytes(b"x")
    found = workspace.predict(weights, [*paths, tmp_path / "bad.png", tmp_path / "none.png"])
    assert found[-2:] == [Skipped("bad.png", "corrupt"), Skipped("none.png", "unreadable")]
    predictions = [item for item in found if isinstance(item, Prediction)]
    assert all(sum(item.probabilities.values()) == pytest.approx(1) for item in predictions)
    right = sum(item.label == path.parent.name for item, path in zip(predictions, paths, strict=False))
    parts = [workspace.evaluate(weights, part) for part in ("train", "validation", "heldout")]
    assert right == sum(sum(e.confusion[i][i] for i in range(4)) for e in parts)
    same_model = workspace.compare(weights, weights, "validation")
    assert same_model.difference.value == 0


def test_judging_goes_step_by_step_and_models_may_take_turns(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_training, "EVALUATION_BATCH", 8)
    models = [workspace.initial_weights(seed) for seed in (3, 4)]
    turns = deque((seed, workspace.judge(weights, "train")) for seed, weights in enumerate(models))
    steps, found = Counter[int](), dict[int, Judged]()
    while turns:
        seed, turn = turns.popleft()
        try:
            next(turn)
        except StopIteration as end:
            found[seed] = end.value
        else:
            steps[seed] += 1
            turns.append((seed, turn))
    examples = len(found[0].labels)
    assert examples > 24
    assert set(steps.values()) == {math.ceil(examples / 8)}
    for seed, weights in enumerate(models):
        assert np.array_equal(found[seed].probabilities, completed(workspace.judge(weights, "train")).probabilities)


def test_a_model_predicts_without_any_data(workspace: Workspace, phantoms: Path) -> None:
    weights = workspace.initial_weights(3)
    paths = sorted(phantoms.rglob("*.jpg"))
    alone = load_task("image-folder").predictor(STUDY)
    assert alone.predict(weights, paths) == workspace.predict(weights, paths)
    with pytest.raises(UnknownModel):
        load_task("image-folder").predictor(StudyData(classes=CLASSES, options={"model": "alexnet"}))


def test_an_empty_part_is_said(tmp_path: Path) -> None:
    folder = make_phantoms(tmp_path / "few", per_class=3, seed=1)
    study = StudyData(classes=CLASSES, options={"image_size": 32}, heldout_share=0.0001, validation_share=0.5)
    small = load_task("image-folder").open(folder, study, SECRET)
    with pytest.raises(NotEnoughExamples, match="heldout"):
        small.evaluate(small.initial_weights(1), "heldout")


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_trains_and_its_weights_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    folder = make_phantoms(tmp_path / "few", per_class=4, seed=2)
    study = StudyData(classes=CLASSES, options={"image_size": 32, "channels": 3, "model": name}, validation_share=0.5)
    space = load_task("image-folder").open(folder, study, SECRET)
    start = space.initial_weights(5)
    plan = RoundPlan(round=1, rounds=1, local_epochs=1, batch_size=4)
    first, second = finish(space.train(start, plan)), finish(space.train(start, plan))
    assert same(first.weights, second.weights)  # also with dropout
    assert all(array.dtype == np.float32 for array in first.weights.values())
    model = build_model(name, channels=3, classes=4, seed=0, side=32)
    load_weights(model, first.weights)
    assert same(export_weights(model), first.weights)


def test_unknown_models_and_devices(phantoms: Path) -> None:
    with pytest.raises(UnknownModel, match="densenet121"):
        load_task("image-folder").open(phantoms, StudyData(classes=CLASSES, options={"model": "alexnet"}), SECRET)
    with pytest.raises(DeviceUnavailable):
        load_task("image-folder").open(phantoms, STUDY, SECRET, device="warp drive")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="cuda"):
            load_task("image-folder").open(phantoms, STUDY, SECRET, device="cuda")


def test_a_local_backbone_is_laid_over_the_first_weights(phantoms: Path, tmp_path: Path) -> None:
    stem = np.ones((32, 1, 5, 5), dtype=np.float32)
    save_file({"stem.weight": stem, "unknown": stem}, tmp_path / "backbone.safetensors")
    local = LocalOptions(weights_file=tmp_path / "backbone.safetensors")
    space = load_task("image-folder").open(phantoms, STUDY, SECRET, local=local)
    assert np.array_equal(space.initial_weights(1)["stem.weight"], stem)
    save_file({"unknown": stem}, tmp_path / "backbone.safetensors")
    with pytest.raises(WrongArchitecture, match="backbone"):
        space.initial_weights(1)
    (tmp_path / "backbone.safetensors").write_bytes(b"pickle")
    with pytest.raises(WrongArchitecture, match="safetensors"):
        space.initial_weights(1)


def test_a_torchvision_model_without_its_extra_says_what_to_install(phantoms: Path) -> None:
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    study = StudyData(classes=CLASSES, options={"model": "torchvision:resnet18", "channels": 3})
    with pytest.raises(UnknownModel, match=r"\[vision\]"):
        load_task("image-folder").open(phantoms, study, SECRET)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_gpu_trains_too(phantoms: Path) -> None:
    space = load_task("image-folder").open(phantoms, STUDY, SECRET, device="cuda")
    result = finish(space.train(space.initial_weights(42), PLAN))
    assert all(np.isfinite(array).all() for array in result.weights.values())
    assert space.evaluate(result.weights, "validation").examples > 0


def test_resizing_keeps_the_shape_of_things() -> None:
    resize = Resizer(32)
    wide = np.full((1, 50, 100), 200, dtype=np.uint8)
    small = resize(wide)
    assert small.shape == (1, 32, 32)
    assert (small[0, :7] == 0).all()
    assert (small[0, 9:23] == 200).all()
    assert resize(np.full((3, 5, 4), 9, dtype=np.uint8)).shape == (3, 32, 32)


@pytest.mark.parametrize(("height", "width", "size"), [(50, 100, 32), (100, 77, 32), (17, 9, 48), (40, 41, 41)])
def test_resizing_gives_the_bits_of_monai(height: int, width: int, size: int) -> None:
    from monai.transforms import (  # noqa: PLC0415 - seconds to collect, in every worker
        Compose,
        Resize,
        ResizeWithPadOrCrop,
        ToNumpy,
    )

    image = np.random.default_rng(height).integers(0, 256, (3, height, width), dtype=np.uint8)
    mode = "area" if max(height, width) >= size else "bilinear"
    theirs = Compose([Resize(size, size_mode="longest", mode=mode), ResizeWithPadOrCrop((size, size)), ToNumpy()])
    expected = np.clip(np.rint(theirs(image.astype(np.float32))), 0, 255)
    assert np.array_equal(Resizer(size)(image), expected)


def test_an_image_thinner_than_a_pixel_keeps_one() -> None:
    assert Resizer(32)(np.full((1, 2, 500), 200, dtype=np.uint8)).any(axis=2).sum() == 1


def test_augmentation_changes_each_image_as_its_own_numbers_say() -> None:
    pixels = torch.randint(0, 255, (4, 1, 32, 32), dtype=torch.uint8)
    numbers = torch.rand(4, RANDOM_NUMBERS, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    moved = augment(pixels, numbers)
    assert torch.equal(torch.get_rng_state(), state)
    alone = [augment(pixels[place : place + 1], numbers[place : place + 1]) for place in range(4)]
    assert torch.allclose(moved, torch.cat(alone), atol=1e-3)
    assert not torch.allclose(moved, augment(pixels, numbers.flip(0)), atol=1)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    factors = [learning_rate_factor(i / 100) for i in range(101)]
    assert max(factors) == pytest.approx(1)
    assert factors[0] == 0
    assert factors[-1] == pytest.approx(0, abs=1e-9)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_rare_and_absent_classes_weigh_more_but_not_without_bound() -> None:
    counts = torch.tensor([1000.0, 100.0, 1.0, 0.0])
    weights = class_weights(counts)
    assert weights[0] < weights[1] < weights[2]
    assert weights.max() <= 5
    assert torch.isfinite(log_prior(counts)).all()


def test_phantoms_are_repeatable_and_overwrite_nothing(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "a", per_class=2, seed=5)
    make_phantoms(tmp_path / "b", per_class=2, seed=5)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 8
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    with pytest.raises(AlreadyThere):
        make_phantoms(tmp_path / "a", per_class=2)


def mean(parts: list[tuple[dict[str, np.ndarray], int]]) -> dict[str, np.ndarray]:
    total = sum(n for _, n in parts)
    return {name: sum(w[name] * np.float32(n / total) for w, n in parts) for name in parts[0][0]}


def test_three_sites_learn_the_phantoms_together(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "all", per_class=60)
    parts = split_dataset(tmp_path / "all", tmp_path / "sites", 3)
    sites = [load_task("image-folder").open(part.folder, STUDY, part.site.encode()) for part in parts]
    weights = sites[0].initial_weights(42)
    states: list[bytes | None] = [None] * 3
    for number in (1, 2, 3):
        plans = [
            RoundPlan(round=number, rounds=3, local_epochs=5, batch_size=8, mu=0.1, optimiser_state=state)
            for state in states
        ]
        results = [finish(site.train(weights, plan)) for site, plan in zip(sites, plans, strict=True)]
        states = [result.optimiser_state for result in results]
        weights = mean([(result.weights, result.examples) for result in results])
    judged = [site.evaluate(weights, "validation") for site in sites]
    accuracy = sum(e.accuracy.value * e.examples for e in judged) / sum(e.examples for e in judged)
    assert accuracy > 0.7


@pytest.mark.realdata
def test_real_scans_are_all_read(tmp_path: Path) -> None:
    root = os.environ.get("MEDHIVE_TEST_DATA")
    if root is None:
        pytest.skip("MEDHIVE_TEST_DATA names no folder with real data")
    folder = Path(root) / "brain_mri"
    study = StudyData(classes=tuple(sorted(p.name for p in folder.iterdir())))
    report = load_task("image-folder").check(folder, study, SECRET)
    assert report.examples == 5501
    assert not report.skipped
    assert not report.duplicates
    assert Image.open(next(folder.rglob("*.jpg"))).size == (128, 128)

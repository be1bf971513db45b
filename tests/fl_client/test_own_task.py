"""A task of one's own, installed as a separate package: found by name, trained by the real trainer at two hospitals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# Two hospitals, each with a trainer process of its own; only weights files go between them.
TWO_HOSPITALS = """
import json, sys
from pathlib import Path
from fl_client.jobs import Job, JobKind, Plan, Source
from fl_client.trainer import Trainer
from medhive.packing import read_weights, write_weights
from medhive.spec import StudyData

folder = Path(sys.argv[1])
data = StudyData(classes=("censored", "event"), options={"features": "age stage", "time": "days", "event": "died"})
(folder / "secret").write_bytes(b"a site's secret")
sources = [Source(task="survival", data=data, data_dir=folder / name, secret_file=folder / "secret") for name in "ab"]
base = folder / "base"
with Trainer() as first, Trainer() as second:
    hospitals = list(zip((first, second), sources))
    first.run(Job(id="start", kind=JobKind.INITIALISE, source=sources[0], out=base))
    for number in range(1, 4):
        plan, results = Plan(round=number, rounds=3, local_epochs=2, batch_size=1), []
        for name, (trainer, source) in zip("ab", hospitals):
            job = Job(id=f"{name}{number}", kind=JobKind.TRAIN, source=source, device="cpu", weights={"base": base},
                      plan=plan, out=folder / f"{name}.out")
            results.append((trainer.run(job), read_weights(folder / f"{name}.out")))
        total = sum(result["examples"] for result, _ in results)
        mean = sum(weights["beta"] * (result["examples"] / total) for result, weights in results)
        write_weights(base, {"beta": mean.astype("float32")})
    judged = [trainer.run(Job(id=f"end{i}", kind=JobKind.EVALUATE, source=source, device="cpu", weights={"base": base}))
              for i, (trainer, source) in enumerate(hospitals)]
print(json.dumps({"beta": [float(x) for x in mean], "metrics": [item["metrics"] for item in judged]}))
"""


def write_patients(path: Path, seed: int, patients: int = 400) -> None:
    """Times that follow Cox' model with coefficients 0.05 a year and 0.8 a stage; a third is censored."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir()
    age, stage = rng.uniform(40, 80, patients), rng.integers(1, 5, patients)
    died_at = rng.exponential(1000 * (1 + seed), patients) * np.exp(-0.05 * (age - 60) - 0.8 * (stage - 2))
    seen_until = rng.exponential(2000, patients)
    rows = zip(age, stage, np.minimum(died_at, seen_until) + 1e-3, (died_at <= seen_until).astype(int), strict=True)
    lines = [f"{a:.2f},{s},{t:.3f},{d}" for a, s, t, d in rows]
    path.write_text("\n".join(["age,stage,days,died", *lines, "old,2,3,1"]) + "\n")


def test_the_documented_example_works_as_a_package_of_its_own(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
         "--target", tmp_path / "packages", _copy(ROOT / "docs" / "own-task", tmp_path / "source")],
        check=True, timeout=120,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        write_patients(tmp_path / name / "patients.csv", seed)
    done = subprocess.run(
        [sys.executable, "-c", TWO_HOSPITALS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "packages")},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["beta"] == pytest.approx([0.05, 0.8], rel=0.25)
    assert all(metrics.get("val_concordance", 0) > 0.65 for metrics in found["metrics"]), str(found)


def _copy(source: Path, target: Path) -> Path:
    """pip leaves a build folder beside what it installs."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target

"""Everything at once, as in the real thing: coordinator, MLflow and four hospitals, each its own process over TLS.

One of these serves all tests of the whole path, since its start costs more than any of them. The hospitals have a task of
their own installed (docs/own-task.md), the coordinator has not. Images and tables are made here and small; the images are
named as careless exports name them, after a patient, so that a test can look for the names where they must not be.
"""

import csv
import json
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import own_task
from site_data import fix_split
from stack import Stack, wait_until

from fl_client.tasks.phantoms import CLASSES, make_phantoms

IMAGE_STUDY: Final = "brain-mri"
TABLE_STUDY: Final = "heart"
PATIENT: Final = "Zyxwanz-Erika"  # occurs nowhere by chance
IMAGE_SITES: Final = ("hospital-a", "hospital-b", "hospital-c")
SITES: Final = (*IMAGE_SITES, "hospital-d")
PEOPLE: Final = dict(zip(SITES, ("Dr. Adler", "Dr. Berg", "Dr. Costa", "Dr. Dahl"), strict=True))
PER_CLASS: Final = 16
RUN_DEADLINE_S: Final = 600.0
TRACKING_DEADLINE_S: Final = 240.0

COLUMNS: Final[Sequence[dict[str, Any]]] = (
    {"name": "age"},
    {"name": "sex", "type": "categorical", "categories": ["0", "1"]},
    {"name": "cp", "type": "categorical", "categories": ["1", "2", "3", "4"]},
    {"name": "trestbps"},
    {"name": "chol"},
    {"name": "fbs", "type": "categorical", "categories": ["0", "1"]},
    {"name": "restecg", "type": "categorical", "categories": ["0", "1", "2"]},
    {"name": "thalach"},
    {"name": "exang", "type": "categorical", "categories": ["0", "1"]},
    {"name": "oldpeak"},
    {"name": "slope", "type": "categorical", "categories": ["1", "2", "3"]},
    {"name": "ca"},
    {"name": "thal", "type": "categorical", "categories": ["3", "6", "7"]},
    {"name": "num"},
)
"""The fourteen columns of the heart disease files, which come without a header."""
EMPTY_COLUMNS: Final = ("ca", "thal")  # real hospitals leave whole columns out


@dataclass
class WholeWorld:
    """The running processes, an admin who is logged in, and hospitals that have joined and are connected."""

    stack: Stack
    password: str = ""
    _http: list[httpx.Client] = field(default_factory=list)

    @classmethod
    def start(cls, folder: Path) -> "WholeWorld":
        """Start everything; end it with `stop`."""
        world = cls(Stack(folder, hospitals_env={"PYTHONPATH": str(own_task.install(folder.parent / "own-task"))}))
        try:
            world.password = world.stack.start() or ""
            world.stack.login(world.password)
            world.create_studies()
            for number, site in enumerate(SITES):
                world.bring_in(site, number)
            for site in SITES:
                world.stack.programs[site].wait_for(r"[Cc]onnected to the fleet")
        except BaseException:
            world.stop()
            raise
        return world

    def stop(self) -> None:
        """End everything."""
        for client in self._http:
            client.close()
        self.stack.stop()

    def create_studies(self) -> None:
        """One study of images, one of tables."""
        images = ["--task", "image-folder", "--classes", ",".join(CLASSES), "--option", "image_size=32"]
        self.stack.admin("studies", "create", IMAGE_STUDY, *images, "--default", "local_epochs=1")
        self.create_table_study(TABLE_STUDY)

    def create_table_study(self, name: str, *words: str) -> None:
        """A study of tables like the heart disease files."""
        columns = self.stack.folder / "columns.json"
        columns.write_text(json.dumps(list(COLUMNS)))
        table = ["--columns-file", str(columns), "--label", "num", "--positive-above", "0", "--no-header", *words]
        self.stack.admin("studies", "create", name, "--task", "tabular", "--classes", "absent,present", *table)

    def bring_in(self, site: str, number: int) -> None:
        """Make a hospital's data, let it join and start its node."""
        home = self.stack.site_folder(site) / "data"
        studies = [TABLE_STUDY]
        if site in IMAGE_SITES:
            make_patient_images(home / IMAGE_STUDY, PER_CLASS, number)
            studies.append(IMAGE_STUDY)
        make_heart_table(home / TABLE_STUDY / f"{PATIENT}-ward.data", 120, number)
        fix_split(self.stack.site_folder(site) / "state", site)
        self.stack.join(site, *studies)
        self.stack.site(site, "settings", "--cpu-threads", "1", "--device", "cpu")
        self.stack.start_site(site)

    # ---- what people do

    def consent(self, site: str, run_id: str) -> dict[str, Any]:
        """A person at a hospital agrees to a run."""
        answer: dict[str, Any] = self.stack.site_json(site, "consent", run_id, "--person", PEOPLE[site], "--yes")
        return answer

    def request(self, site: str, study: str, *words: str) -> dict[str, Any]:
        """A person at a hospital asks for a run."""
        sent: dict[str, Any] = self.stack.site_json(site, "request", study, "--person", PEOPLE[site], *words)
        return sent

    def approve(self, request_id: str) -> str:
        """The coordinator approves; returns the run's id."""
        return str(self.stack.admin_json("approve", request_id)["run_id"])

    def wait_for_run(self, run_id: str) -> dict[str, Any]:
        """Wait for a run's end."""
        return self.stack.wait_for_run(run_id, RUN_DEADLINE_S)

    def wait_for_version(self, site: str, study: str, version: int) -> Path:
        """Wait until a version has arrived at a hospital; returns its file."""
        file = self.stack.site_folder(site) / "state" / "models" / study / f"{site}_FinalGlobal_v{version}.safetensors"
        self.stack.programs[site].wait_for(rf"version {version} of {study} has arrived", RUN_DEADLINE_S)
        assert file.exists()
        return file

    # ---- MLflow

    def mlflow(self, question: str, **params: str) -> dict[str, Any]:
        """One question to MLflow's own HTTP API."""
        if not self._http:
            self._http.append(httpx.Client(base_url=self.stack.mlflow_url, verify=self._context(), timeout=30))
        answer = self._http[0].get(f"/api/2.0/mlflow/{question}", params=params)
        value: dict[str, Any] = answer.raise_for_status().json()
        return value

    def _context(self) -> ssl.SSLContext:
        return self.stack.trust().context()

    def tracked_run(self, run_id: str) -> dict[str, Any]:
        """Wait until MLflow has all of a run; returns its `info` and `data`."""
        found: dict[str, Any] = {}

        def told() -> bool:
            mlflow_id = self.stack.admin_json("show", run_id)["mlflow_run_id"]
            if mlflow_id:
                found.update(self.mlflow("runs/get", run_id=mlflow_id)["run"])
            return bool(found) and found["info"]["status"] != "RUNNING"

        wait_until(told, f"MLflow's copy of {run_id}", TRACKING_DEADLINE_S)
        return found


def files_below(folder: Path) -> list[Path]:
    """All files of a folder whose services go on working, and remove others meanwhile."""
    return [Path(place) / name for place, _, names in os.walk(folder) for name in names]


def content_of(path: Path) -> bytes:
    """What a file holds; nothing when a service, which goes on working, has removed it meanwhile."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def make_patient_images(folder: Path, per_class: int, seed: int) -> Path:
    """Phantoms whose file names hold a patient's name."""
    make_phantoms(folder, per_class, seed)
    for path in sorted(folder.glob("*/*.jpg")):
        path.rename(path.with_name(f"{PATIENT}-{path.name}"))
    return folder


def make_heart_table(path: Path, rows: int, seed: int) -> Path:
    """A CSV without header like a heart disease file: `?` for what is missing, two columns mostly so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 7])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        for _ in range(rows):
            writer.writerow(_heart_row(rng))
    return path


def _heart_row(rng: np.random.Generator) -> list[str]:
    """One patient: angina without effort and a low peak rate go with the disease."""
    ill = rng.random() < 0.5
    cells = {
        "age": f"{rng.normal(57 if ill else 51, 8):.1f}",
        "cp": str(4 if rng.random() < (0.8 if ill else 0.2) else 2),
    }
    cells["thalach"] = f"{rng.normal(130 if ill else 158, 18):.1f}"
    cells["oldpeak"] = f"{max(0.0, rng.normal(1.8 if ill else 0.5, 0.6)):.1f}"
    cells["num"] = str(rng.integers(1, 5) if ill else 0)
    row = []
    for column in COLUMNS:
        name = column["name"]
        value = cells.get(name) or (
            str(rng.choice(column["categories"])) if "categories" in column else f"{rng.normal(200, 30):.1f}"
        )
        gone = name != "num" and rng.random() < (0.9 if name in EMPTY_COLUMNS else 0.05)
        row.append("?" if gone else value)
    return row


def _any_value(column: dict[str, Any], rng: np.random.Generator) -> str:
    """A value that has nothing to do with the disease."""
    return str(rng.choice(column["categories"])) if "categories" in column else f"{rng.normal(200, 30):.1f}"

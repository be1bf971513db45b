"""`make demo`: the main job on one machine, from the request for training to each hospital using the accepted model.

It types the commands that people at a coordinator and at hospitals type, shows each of them with what it prints, and stops
at the first that fails. Without `--data` it makes labelled phantoms (CT scans with `--task ct-volume`); with it, one folder
per class is split over the hospitals.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from stack import Program, Stack, StackError

from fl_client.tasks.made_chests import make_chests, make_chests_from
from fl_client.tasks.phantoms import make_phantoms
from medhive.errors import MedHiveError

PEOPLE: Final = ("Dr. Adler", "Dr. Berg", "Dr. Costa", "Dr. Dahl", "Dr. Evers", "Dr. Falk", "Dr. Gray", "Dr. Holm")
PHANTOM_SEED: Final = 42


@dataclass(frozen=True)
class Subject:
    """What the demonstration is about.

    Attributes:
        study: its name.
        what: one calls its examples.
        make: makes data: (folder, examples a class, seed) → folder.
        per_class, test_per_class: how many it makes to train on, and to be judged on at the end.
        made_options: of the study, when the data are made.
    """

    study: str
    what: str
    make: Callable[..., Path]
    per_class: int
    test_per_class: int
    made_options: tuple[str, ...]


SUBJECTS: Final = {
    # Enough phantoms for the default model to learn from, few enough that the demo ends within three minutes on two cores.
    # They are simpler than scans: smaller pictures and batches learn as much in a third of the time.
    "image-folder": Subject(
        "brain-mri", "images", make_phantoms, 180, 30,
        ("--option", "image_size=64", "--default", "local_epochs=6", "--default", "batch_size=16"),
    ),
    # Chests of 256 mm around the lungs, which the made ones fill; all else is as by default.
    "ct-volume": Subject(
        "lung-ct", "CT scans", make_chests, 120, 60,
        ("--option", "size=64", "--option", "spacing_mm=4", "--default", "local_epochs=20"),
    ),
}  # fmt: skip
# The real scan that balls are put into may be a few centimetres high: a flat box of thinner slices holds it.
FLAT: Final = ("--option", "slices=32", "--option", "slice_spacing_mm=2")
# Of the user's own data, when no test folder is given: one part in seven is kept from the hospitals and judged at the end.
SHARES: Final = "6,1"
RUN_DEADLINE_S: Final = 4 * 3600.0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(SUBJECTS), default="image-folder")
    parser.add_argument("--data", type=Path, help="one folder per class; split over the sites")
    parser.add_argument("--test", type=Path, help="one folder per class; judged at the end")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--keep", action="store_true", help="leave everything running and print the addresses")
    parser.add_argument("--scan", type=Path, help="a chest CT in DICOM: make the CT scans out of copies of it")
    parser.add_argument("--shuffled", action="store_true", help="make CT scans of which none shows what its label says")
    arguments = parser.parse_args()
    made = arguments.shuffled or arguments.scan is not None
    if made and (arguments.task != "ct-volume" or arguments.data is not None):
        parser.error("--shuffled and --scan are for CT scans that the demo makes (--task ct-volume without --data)")
    if not 2 <= arguments.sites <= len(PEOPLE):
        parser.error(f"SITES must be 2 to {len(PEOPLE)}")
    for folder in (arguments.data, arguments.test, arguments.scan):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder} is no folder")
    return arguments


def say(text: str = "") -> None:
    """Print a line at once; paths below the present folder are shown from here."""
    print(text.replace(f"{Path.cwd()}{os.sep}", ""), flush=True)  # noqa: T201


def title(text: str) -> None:
    """Print a step's heading with the time."""
    say()
    say(f"── {datetime.now(UTC).astimezone():%H:%M:%S}  {text} " + "─" * max(0, 70 - len(text)))


class Demo:
    """The main job, step by step."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.subject = SUBJECTS[arguments.task]
        self.study = self.subject.study
        self.folder = folder
        self.stack = Stack(folder, show=say)
        self.sites = [f"hospital-{chr(ord('a') + index)}" for index in range(arguments.sites)]
        self.people = dict(zip(self.sites, PEOPLE, strict=False))
        self.test_folder: Path | None = arguments.test
        self.started = time.monotonic()

    def run(self) -> dict[str, Any]:
        """All steps; returns the report."""
        classes = self.prepare_data()
        self.start_coordinator(classes)
        self.bring_in_hospitals()
        run_id = self.request_and_approve()
        self.consent(run_id)
        run = self.follow(run_id)
        self.decide(run["version"])
        test = self.judge(classes)
        return self.report(run, test)

    def at(self, site: str, *words: str) -> str:
        """A hospital's command, shown with what it printed."""
        return shown(self.stack.site(site, *words))

    def admin(self, *words: str) -> str:
        """A coordinator's command, shown with what it printed."""
        return shown(self.stack.admin(*words))

    # ---- steps

    def prepare_data(self) -> list[str]:
        """Split one dataset over the hospitals; returns the classes."""
        title("Data: one dataset, split over the hospitals")
        source = self.arguments.data
        if source is None:
            source = self._make()
        elif self.test_folder is None:
            source, self.test_folder = self._keep_unseen(source)
        self._split(source, len(self.sites), None, self.folder / "split")
        for site, part in zip(self.sites, _parts(self.folder / "split"), strict=True):
            home = self.stack.site_folder(site)
            home.mkdir(parents=True)
            part.rename(home / "data")
        return sorted(path.name for path in source.iterdir() if path.is_dir())

    def _make(self) -> Path:
        subject = self.subject
        how = {"shuffled": True} if self.arguments.shuffled else {}
        make = subject.make
        if self.arguments.scan is not None:
            make = partial(make_chests_from, self.arguments.scan)
        source = make(self.folder / "made", subject.per_class, PHANTOM_SEED, **how)
        say(f"Made {subject.per_class} {subject.what} per class (no medical data) in {source}")
        if self.test_folder is None:
            # Shuffled as well: labels dealt by chance agree with the truth a little more or less often than not. A model may
            # learn that little, and true labels would then judge it as far better or far worse than chance.
            self.test_folder = make(self.folder / "unseen", subject.test_per_class, PHANTOM_SEED + 1, **how)
        return source

    def _keep_unseen(self, source: Path) -> tuple[Path, Path]:
        out = self.folder / "unseen-split"
        self._split(source, 2, SHARES, out)
        known, unseen = _parts(out)
        return known, unseen

    def _split(self, source: Path, sites: int, shares: str | None, out: Path) -> None:
        share = ["--shares", shares] if shares else ["--sites", str(sites)]
        argv = ["medhive-site", "split", str(source), "--out", str(out), *share, "--seed", "42"]
        shown(self.stack.run(argv, self.stack.site_env(self.sites[0])))

    def start_coordinator(self, classes: Sequence[str]) -> None:
        """Start the services and make the study."""
        title("Coordinator: gateway, MLflow, aggregator")
        password = self.stack.start()
        if password is None:
            raise StackError("the gateway did not print the first admin's password")
        say(f"gateway {self.stack.url}, MLflow {self.stack.mlflow_url}, logs in {self.folder / 'logs'}")
        self.stack.login(password)
        options = self.subject.made_options if self.arguments.data is None else ()
        if self.arguments.scan is not None:
            options += FLAT
        self.admin(
            "studies", "create", self.study, "--task", self.arguments.task, "--classes", ",".join(classes), *options
        )

    def bring_in_hospitals(self) -> None:
        """Invite, join, check the data, stay connected."""
        title("Hospitals: join with a one-time invite, check the data, stay connected")
        threads = max(1, (os.cpu_count() or 1) // len(self.sites))
        for site in self.sites:
            self.stack.join(site, self.study)
            self.at(site, "check-data", "--study", self.study)
            # Here the hospitals share one machine; unasked, each would take all of its cores.
            self.stack.site(site, "settings", "--cpu-threads", str(threads))
            self.stack.start_site(site)
        for site in self.sites:
            self.stack.programs[site].wait_for(r"[Cc]onnected")
        self.admin("sites")

    def request_and_approve(self) -> str:
        """One hospital asks, the coordinator approves; returns the run's id."""
        asking = self.sites[0]
        title(f"Request: {asking} asks for {self.arguments.rounds} rounds")
        words = ["request", self.study, "--rounds", str(self.arguments.rounds), "--person", self.people[asking]]
        sent = self.stack.site_json(asking, *words, "--min-sites", str(len(self.sites)))
        self.admin("requests")
        title("Approval")
        self.admin("approve", sent["id"])
        return str(self.stack.admin_json("show", sent["id"])["run_id"])

    def consent(self, run_id: str) -> None:
        """Every other hospital signs; the asking one's node does so by itself."""
        title("Consent: each hospital signs with its own key")
        for site in self.sites[1:]:
            self.at(site, "consent", run_id, "--person", self.people[site], "--yes")

    def follow(self, run_id: str) -> dict[str, Any]:
        """Watch the run to its end."""
        title("Training")
        argv = ["medhive-admin", "watch", run_id]
        say("coordinator $ " + " ".join(argv))
        done = subprocess.run(argv, env=self.stack.admin_env(), timeout=RUN_DEADLINE_S, check=False)
        run: dict[str, Any] = self.stack.admin_json("show", run_id)
        if done.returncode or run["state"] != "completed":
            raise StackError(f"{run_id} is {run['state']}: {run['reason']}")
        self.admin("show", run_id)
        return run

    def decide(self, version: int) -> None:
        """Each hospital looks at the new version on its own held-out data, and accepts it."""
        title(f"Decision: each hospital judges version {version} on its own held-out data")
        for site in self.sites:
            self.stack.programs[site].wait_for(rf"_FinalGlobal_v{version}\.safetensors")
            self.at(site, "updates", "--evaluate", "--study", self.study)
            self.at(
                site, "accept", str(version), "--study", self.study, "--person", self.people[site],
                "--reason", "as good as expected on our own data",
            )  # fmt: skip
        self.admin("models", self.study)

    def judge(self, classes: Sequence[str]) -> dict[str, Any] | None:
        """Let the first hospital's version in use classify images that no hospital has seen."""
        if self.test_folder is None:
            return None
        site = self.sites[0]
        title(f"Use: {site} classifies unseen {self.subject.what} with the version it accepted")
        found = self.stack.site_json(site, "predict", str(self.test_folder), "--study", self.study)
        test = scores(found, classes)
        judged = f"{test['examples']} unseen {self.subject.what}"
        say(f"accuracy {test['accuracy']:.4f}, macro F1 {test['macro_f1']:.4f} over {judged}")
        if "auc" in test:
            say(f"area under the ROC curve {test['auc']:.4f}")
        for name, recall in test["per_class_recall"].items():
            say(f"  recall {name}: {recall:.4f}")
        return test

    def report(self, run: Mapping[str, Any], test: Mapping[str, Any] | None) -> dict[str, Any]:
        """The figures of the whole job."""
        rounds = [item for item in run["rounds_done"] if item["number"] > 0]
        before = {item["site"]: item for item in rounds[0]["sites"]}
        after = {item["site"]: item for item in run["sites"]}
        return {
            "study": run["study"],
            "sites": [
                {
                    "name": site,
                    "examples": before[site]["examples"],
                    "validation_accuracy_before": before[site]["metrics"].get("val_accuracy"),
                    "validation_accuracy_after": after.get(site, {}).get("metrics", {}).get("val_accuracy"),
                }
                for site in self.sites
            ],
            "rounds": [
                {
                    "number": item["number"],
                    "seconds": item["seconds"],
                    "overhead_seconds": item["overhead_s"],
                    "bytes_down": item["bytes_down"],
                    "bytes_up": item["bytes_up"],
                    "metrics": item["metrics"],
                }
                for item in rounds
            ],
            "test": dict(test) if test else None,
            "model_version": run["version"],
            "mlflow_run_id": self._mlflow_run_id(run["id"]),
            "spec_hash": run["spec_hash"],
            "wall_seconds": round(time.monotonic() - self.started, 1),
        }

    def _mlflow_run_id(self, run_id: str) -> str | None:
        """MLflow gets its copy a moment after the run's end; waited for, since the demo's MLflow ends with the demo."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = self.stack.admin_json("show", run_id)["mlflow_run_id"]
            if found:
                return str(found)
            time.sleep(0.5)
        return None


def shown(text: str) -> str:
    """Print a command's output, indented."""
    for line in text.rstrip().splitlines():
        say(f"  {line}")
    return text


def _parts(folder: Path) -> list[Path]:
    """The sites' folders that `medhive-site split` made, in order."""
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name.split("_")[-1]))


def scores(predictions: Any, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro F1, recall per class, and of two classes the AUC.

    The true class is the name of the folder, however deep, that an example lies in.
    """
    judged = [(_truth(item["path"], classes), item) for item in predictions if "class" in item]
    pairs = [(truth, item["class"]) for truth, item in judged if truth]
    if not pairs:
        raise StackError("the test folder holds no image in a folder named after a class")
    recall: dict[str, float] = {}
    f1: list[float] = []
    for name in classes:
        hits = sum(truth == guess == name for truth, guess in pairs)
        actual = sum(truth == name for truth, _ in pairs)
        guessed = sum(guess == name for _, guess in pairs)
        if actual:
            recall[name] = hits / actual
            f1.append(2 * hits / (actual + guessed))
    accuracy = sum(truth == guess for truth, guess in pairs) / len(pairs)
    found = {"accuracy": accuracy, "macro_f1": sum(f1) / len(f1), "per_class_recall": recall, "examples": len(pairs)}
    if len(recall) == len(classes) == 2:
        rows = [(truth == classes[1], item["probabilities"][classes[1]]) for truth, item in judged if truth]
        found["auc"] = _auc([p for ill, p in rows if ill], [p for ill, p in rows if not ill])
    return found


def _truth(path: str, classes: Sequence[str]) -> str | None:
    return next((folder for folder in reversed(Path(path).parent.parts) if folder in classes), None)


def _auc(ill: Sequence[float], well: Sequence[float]) -> float:
    """How often one of the second class is taken for it rather than one of the first, a draw counting half."""
    wins = sum((p > q) + (p == q) / 2 for p in ill for q in well)
    return wins / (len(ill) * len(well))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that Ctrl-C and `kill` both end every process that was started."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def new_folder() -> Path:
    """A fresh folder below `demo-out/`; nothing of an earlier demo is touched."""
    folder = Path("demo-out") / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
    folder.mkdir(parents=True)
    return folder.resolve()


def keep_running(stack: Stack) -> None:
    """Say where everything is, and wait for Ctrl-C."""
    title("Left running")
    say(f"gateway  {stack.url} (CA: {stack.ca_file})")
    # Without the query MLflow opens on its pages for prompts and traces, where MedHive has nothing.
    say(f"MLflow   {stack.mlflow_url}/#/experiments?workflowType=machine_learning")
    say(f"medhive-admin: export MEDHIVE_ADMIN_CONFIG={stack.admin_env()['MEDHIVE_ADMIN_CONFIG']}")
    for name, program in stack.programs.items():
        say(f"{name}: process {program.pid}, log {program.log}")
    say("Ctrl-C ends it.")
    signal.pause()


def explain_failure(stack: Stack, error: Exception) -> None:
    """Print why, and the end of each program's log."""
    say()
    say(f"error: {error}")
    for program in stack.programs.values():
        say(f"---- end of {program.log}")
        say(_last(program))


def _last(program: Program) -> str:
    return program.tail(12) or "(nothing)"


def main() -> int:
    """Run the demo; exit code 0 only when every step worked."""
    arguments = parse_arguments()
    demo = Demo(arguments, new_folder())
    with ended_by_signals(), demo.stack as stack:
        try:
            report = demo.run()
            if arguments.report:
                arguments.report.parent.mkdir(parents=True, exist_ok=True)
                arguments.report.write_text(json.dumps(report, indent=2) + "\n")
            title(f"Done in {report['wall_seconds']:.0f} s: {demo.study} version {report['model_version']} is in use")
            if arguments.keep:
                keep_running(stack)
        except KeyboardInterrupt:
            return 0 if arguments.keep else 130
        except (StackError, MedHiveError, subprocess.TimeoutExpired, OSError) as error:
            explain_failure(stack, error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

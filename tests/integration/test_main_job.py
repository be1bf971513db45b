"""The main job with the real processes: from a hospital's request to each hospital's use of the version it accepted.

The job is done once, by the commands that people type; each test looks at one thing that somebody was shown, or that lies
somewhere afterwards.
"""

import hashlib
import json
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from stack import StackError, wait_until
from whole_world import IMAGE_SITES, IMAGE_STUDY, PATIENT, PEOPLE, PER_CLASS, WholeWorld, content_of, files_below

from fl_client.tasks.phantoms import CLASSES
from medhive.packing import read_weights

# The first test of a file waits for the stack's start and the whole job, also on a busy machine.
pytestmark = pytest.mark.timeout(900)

ROUNDS = 2
A, B, C = IMAGE_SITES
BROKEN = f"{PATIENT}-torn.png"
TOLD_DEADLINE_S = 240.0  # for what a hospital hears of within seconds on a quiet machine
LITTLE_MEMORY_MB = 560  # the trainer itself would start with it, the training library would not load


@dataclass
class Job:
    """What was typed and shown, step by step."""

    world: WholeWorld
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> dict[str, Any]:
        """The first run at its end."""
        found: dict[str, Any] = self.said["run"]
        return found


@pytest.fixture(scope="module")
def job(whole: WholeWorld) -> Iterator[Job]:
    """Two runs, four decisions, a roll-back at a hospital."""
    job = Job(whole)
    spoil_a_file(whole)
    ask_and_train(job)
    decide_on_the_first(job)
    train_on_by_policy(job)
    decide_on_the_second(job)
    yield job


def spoil_a_file(world: WholeWorld) -> None:
    """One hospital has a scan that was cut short."""
    torn = world.stack.site_folder(A) / "data" / IMAGE_STUDY / CLASSES[0] / BROKEN
    torn.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 20)


def ask_and_train(job: Job) -> None:
    world, stack, said = job.world, job.world.stack, job.said
    words = ["--rounds", str(ROUNDS), "--min-sites", "3", "--note", "first of all"]
    said["sent"] = world.request(A, IMAGE_STUDY, *words)
    said["requests"] = stack.admin("requests")
    said["requests at b"] = stack.site_json(B, "requests")
    said["run id"] = world.approve(said["sent"]["id"])
    said["asked at b"] = stack.site_json(B, "status")["waiting_for_consent"]
    said["consent of b"] = world.consent(B, said["run id"])
    said["consent of c"] = stack.site(C, "consent", said["run id"], "--person", PEOPLE[C], "--yes")
    said["watched"] = stack.admin("watch", said["run id"])
    said["run"] = world.wait_for_run(said["run id"])


def decide_on_the_first(job: Job) -> None:
    world, stack, said = job.world, job.world.stack, job.said
    version = str(said["run"]["version"])
    for site in IMAGE_SITES:
        world.wait_for_version(site, IMAGE_STUDY, int(version))
    here = ["--study", IMAGE_STUDY]
    said["judged by a"] = stack.site_json(A, "updates", version, *here, "--own-model")
    said["judged, shown"] = stack.site(A, "updates", version, *here)
    said["accepted by a"] = stack.site(A, "accept", version, *here, "--person", PEOPLE[A], "--reason", "good here")
    said["rejected by b"] = stack.site(B, "reject", version, *here, "--person", PEOPLE[B], "--reason", "too small")
    stack.site(C, "accept", version, *here, "--person", PEOPLE[C])


def train_on_by_policy(job: Job) -> None:
    """The coordinator asks for one more round; signed policies agree to it, and one command follows it all."""
    stack = job.world.stack
    for site in IMAGE_SITES:
        words = ["--study", IMAGE_STUDY, "--max-rounds", "3", "--person", PEOPLE[site], "--yes"]
        stack.site(site, "policy", "sign", *words)
    sent = stack.admin_json("request", IMAGE_STUDY, "--rounds", "1", "--min-sites", "3", "--strategy", "fedavg")
    job.said["second run"] = stack.admin_json("approve", sent["id"], "--wait")


def decide_on_the_second(job: Job) -> None:
    world, stack = job.world, job.world.stack
    version = str(job.said["second run"]["version"])
    world.wait_for_version(A, IMAGE_STUDY, int(version))
    here = ["--study", IMAGE_STUDY, "--person", PEOPLE[A]]
    stack.site(A, "accept", version, *here)
    job.said["rolled back"] = stack.site(A, "rollback", *here, "--reason", "worse on our scanner", "--yes")


# ---- request, approval, consent ----------------------------------------------------------------------------------------


def test_the_coordinator_sees_who_asks_for_what(job: Job) -> None:
    sent = job.said["sent"]
    assert (sent["state"], sent["site"], sent["spec"]["options"]["rounds"]) == ("pending", A, ROUNDS)
    assert sent["spec"]["options"]["strategy"] == "fedprox"
    line = next(row for row in job.said["requests"].splitlines() if row.startswith(sent["id"]))
    for word in (IMAGE_STUDY, A, str(ROUNDS), "fedprox", "127.0.0.1", "pending"):
        assert word in line


def test_other_hospitals_see_the_request_and_are_asked(job: Job) -> None:
    assert job.said["sent"]["id"] in [item["id"] for item in job.said["requests at b"]["requests"]]
    assert job.said["asked at b"] == [job.said["run id"]]
    shown = job.world.stack.admin_json("show", job.said["sent"]["id"])
    assert (shown["state"], shown["decided_by"], shown["run_id"]) == ("approved", "admin", job.said["run id"])


def test_each_consent_is_signed_by_its_hospital_and_says_counts_only(job: Job) -> None:
    assert job.said["consent of b"]["delivered"]
    assert "Agreed to" in job.said["consent of c"]
    consents = {item["site"]: item["consent"]["body"] for item in job.run["consents"]}
    assert {site: body["person"] for site, body in consents.items()} == {site: PEOPLE[site] for site in IMAGE_SITES}
    assert {body["spec_hash"] for body in consents.values()} == {job.run["spec_hash"]}
    assert sum(consents[A]["skipped"].values()) == 1
    assert consents[B]["skipped"] == {}
    fingerprints = {body["dataset_fingerprint"] for body in consents.values()}
    assert len(fingerprints) == len(IMAGE_SITES)


def test_the_hospital_that_asks_agrees_by_itself(job: Job) -> None:
    assert f"agreed to {job.said['run id']} of {IMAGE_STUDY} by itself" in job.world.stack.programs[A].text()


# ---- training ----------------------------------------------------------------------------------------------------------


def test_every_round_has_all_sites_and_their_figures(job: Job) -> None:
    assert (job.run["state"], job.run["version"], job.run["round"]) == ("completed", 1, ROUNDS)
    rounds = [item for item in job.run["rounds_done"] if item["number"] > 0]
    assert [item["number"] for item in rounds] == list(range(1, ROUNDS + 1))
    for item in rounds:
        assert [(site["site"], site["answered"], site["dropped"]) for site in item["sites"]] == [
            (site, True, None) for site in IMAGE_SITES
        ]
        assert {"val_accuracy", "val_loss", "val_macro_f1", "train_loss", "train_accuracy"} <= set(item["metrics"])
        assert item["bytes_up"] > 0
        assert item["seconds"] >= item["overhead_s"] >= 0
    assert {site["site"] for site in job.run["sites"]} == set(IMAGE_SITES)
    judged = sum(map(sum, job.run["confusion"]))
    assert 0 < judged == sum(sum(map(sum, site["confusion"])) for site in job.run["sites"])


def test_the_coordinator_watches_it_live(job: Job) -> None:
    watched = job.said["watched"]
    for number in range(1, ROUNDS + 1):
        assert f"round {number}/{ROUNDS}: 3 of 3 sites answered (hospital-a, hospital-b, hospital-c)" in watched
    assert "val_accuracy" in watched


def test_the_server_prints_each_round(job: Job) -> None:
    printed = job.world.stack.programs["server"].text()
    assert f"round {ROUNDS}/{ROUNDS}" in printed


def test_a_hospital_sees_its_classes_epochs_rounds_and_what_to_do_next(job: Job) -> None:
    said = job.world.stack.programs[A].text()
    run = job.said["run id"]
    assert f"{run} of {IMAGE_STUDY} begins: {ROUNDS} rounds" in said
    assert all(name in said for name in CLASSES)
    assert f"{run} round {ROUNDS}/{ROUNDS}, epoch 1/1: loss" in said
    assert f"{run} of {IMAGE_STUDY} is completed after {ROUNDS} rounds" in said
    assert "final accuracy" in said
    assert f"medhive-site accept 1 --study {IMAGE_STUDY}" in said
    assert f"medhive-site reject 1 --study {IMAGE_STUDY}" in said


def test_a_signed_policy_agrees_by_itself_and_one_command_waits_for_the_end(job: Job) -> None:
    run = job.said["second run"]
    assert (run["state"], run["version"], run["spec"]["base_version"]) == ("completed", 2, 1)
    assert run["base_digest"] == version(job, 1)["digest"]
    for site in IMAGE_SITES:
        assert f"agreed to {run['id']} of {IMAGE_STUDY} by itself" in job.world.stack.programs[site].text()


# ---- versions ----------------------------------------------------------------------------------------------------------


def version(job: Job, number: int) -> dict[str, Any]:
    """A version as the coordinator shows it."""
    found: dict[str, Any] = job.world.stack.admin_json("model", IMAGE_STUDY, str(number))
    return found


def test_every_hospital_has_the_signed_bytes(job: Job) -> None:
    digest = version(job, 1)["digest"]
    for site in IMAGE_SITES:
        found = {item["version"]: item for item in job.world.stack.site_json(site, "models")}
        assert found[1]["condition"] == "intact"
        assert found[1]["sha256"] == digest == hashlib.sha256(Path(found[1]["file"]).read_bytes()).hexdigest()


def test_a_hospital_judges_on_its_own_heldout_data(job: Job) -> None:
    evaluations = job.said["judged by a"]["evaluation"]["evaluations"]
    assert {"candidate", "local_only"} <= set(evaluations)
    judged = evaluations["candidate"]
    assert judged["accuracy"]["low"] <= judged["accuracy"]["value"] <= judged["accuracy"]["high"]
    assert set(judged["per_class"]) == set(CLASSES)
    for word in ("sensitivity, glioma", "specificity, glioma", "AUC, glioma", "calibration error", "own data alone"):
        assert word in job.said["judged, shown"]


def test_decisions_reach_the_coordinator_with_their_reasons(job: Job) -> None:
    assert "is accepted and in use" in job.said["accepted by a"]
    assert "is rejected" in job.said["rejected by b"]
    decisions = {item["site"]: item for item in version(job, 1)["decisions"]}
    assert (decisions[B]["state"], decisions[B]["reason"], decisions[B]["person"]) == (
        "rejected",
        "too small",
        PEOPLE[B],
    )
    assert decisions[A]["state"] == decisions[C]["state"] == "accepted"
    listed = job.world.stack.admin("models", IMAGE_STUDY)
    assert "hospital-c" in next(row for row in listed.splitlines() if row.split()[1:2] == ["1"])


def test_updates_lists_what_a_hospital_must_know(job: Job) -> None:
    rows = {item["version"]: item for item in job.world.stack.site_json(B, "updates")}
    assert {"received_at", "rounds", "accuracy", "loss", "file", "state"} <= set(rows[1])
    assert (rows[1]["decision"], rows[1]["reason"], rows[1]["rounds"]) == ("rejected", "too small", ROUNDS)
    assert rows[2]["decision"] == "pending"


def test_a_roll_back_puts_the_version_before_in_use(job: Job) -> None:
    assert "Version 1 of brain-mri is in use again" in job.said["rolled back"]
    assert job.world.stack.site_json(A, "status")["champions"][IMAGE_STUDY] == 1
    history = job.world.stack.site_json(A, "history")
    assert [entry["version"] for entry in history["in_use"] if entry["study"] == IMAGE_STUDY] == [1, 2, 1]
    second = {item["site"]: item for item in version(job, 2)["decisions"]}
    assert (second[A]["state"], second[A]["reason"]) == ("rejected", "worse on our scanner")


def test_the_version_in_use_predicts_and_a_bad_file_is_named(job: Job) -> None:
    folder = job.world.stack.site_folder(A) / "data" / IMAGE_STUDY / CLASSES[0]
    found = job.world.stack.site_json(A, "predict", str(folder), "--study", IMAGE_STUDY)
    skipped = [item["name"] for item in found if "skipped" in item]
    assert skipped == [BROKEN]
    read = [item for item in found if "probabilities" in item]
    assert len(read) == PER_CLASS
    for item in read:
        assert sum(item["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert item["class"] == max(item["probabilities"], key=item["probabilities"].get)


def test_less_memory_than_the_trainer_needs_is_refused(job: Job) -> None:
    stack = job.world.stack
    argv = ["medhive-site", "settings", "--memory-mb", str(LITTLE_MEMORY_MB)]
    done = stack.failing(argv, stack.site_env(A))
    assert done.returncode == 1, done.stdout
    assert "needs at least 1500 MB of memory" in done.stderr
    assert stack.site_json(A, "settings")["limits"]["memory_bytes"] is None


def test_a_hospital_without_a_version_in_use_cannot_predict(job: Job) -> None:
    stack = job.world.stack
    data = stack.site_folder(B) / "data" / IMAGE_STUDY
    done = stack.failing(["medhive-site", "predict", str(data), "--study", IMAGE_STUDY], stack.site_env(B))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "accept" in done.stderr


def test_two_versions_are_compared(job: Job) -> None:
    both = job.world.stack.admin_json("compare", IMAGE_STUDY, "1", "2")
    assert (both["a"]["version"], both["b"]["version"], both["same_architecture"]) == (1, 2, True)
    difference = both["metric_differences"]["val_loss"]
    assert difference == pytest.approx(both["b"]["metrics"]["val_loss"] - both["a"]["metrics"]["val_loss"])
    assert "difference" in job.world.stack.admin("compare", IMAGE_STUDY, "1", "2")


def test_a_version_is_exported_with_its_digest_and_manifest(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "first.safetensors"
    said = job.world.stack.admin_json("export", IMAGE_STUDY, "1", "--out", str(out))
    assert said["sha256"] == version(job, 1)["digest"] == hashlib.sha256(out.read_bytes()).hexdigest()
    manifest = json.loads(Path(said["manifest"]).read_text())["body"]
    assert (manifest["study"], manifest["version"], manifest["digest"]) == (IMAGE_STUDY, 1, said["sha256"])
    assert read_weights(out)


def test_clean_up_keeps_what_a_hospital_has_accepted(job: Job, tmp_path: Path) -> None:
    """Before the next test makes it the candidate, version 1 is kept for nothing but its acceptance."""
    stack = job.world.stack
    assert version(job, 1)["state"] == "released"
    would = stack.admin_json("cleanup", "--study", IMAGE_STUDY, "--keep", "1", "--dry-run")
    assert f"{IMAGE_STUDY}/1" not in would["versions"]
    stack.admin_json("cleanup", "--study", IMAGE_STUDY, "--keep", "1", "--yes")
    assert version(job, 1)["bytes_kept"]
    out = tmp_path / "kept.safetensors"
    stack.admin("export", IMAGE_STUDY, "1", "--out", str(out))
    assert hashlib.sha256(out.read_bytes()).hexdigest() == version(job, 1)["digest"]


def test_a_version_is_offered_to_all_again_and_to_one(job: Job) -> None:
    stack = job.world.stack
    stack.admin("rollback", IMAGE_STUDY, "1", "--yes")
    assert version(job, 1)["state"] == "candidate"
    assert "offered to hospital-b" in stack.admin("export", IMAGE_STUDY, "1", "--site", B)

    def waits_again() -> bool:
        return f"{IMAGE_STUDY}/1" in stack.site_json(B, "status")["undecided"]

    wait_until(waits_again, "version 1 waiting for hospital-b again", TOLD_DEADLINE_S)


def test_statistics_add_up(job: Job) -> None:
    found = job.world.stack.admin_json("stats")
    assert found["runs_by_state"]["completed"] >= 2
    assert found["success_rate"] is not None
    assert found["versions"] >= 2
    assert found["sites"] >= len(IMAGE_SITES)
    assert found["images"] > 0
    assert found["bytes_up"] > 0
    assert "mean accuracy" in job.world.stack.admin("stats")


# ---- MLflow ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(job: Job) -> dict[str, Any]:
    """MLflow's own view of the first run."""
    return job.world.tracked_run(job.said["run id"])


def test_mlflow_has_the_runs_status_parameters_and_specification(job: Job, tracked: dict[str, Any]) -> None:
    assert tracked["info"]["status"] == "FINISHED"
    params = {item["key"]: item["value"] for item in tracked["data"]["params"]}
    assert (params["rounds"], params["strategy"], params["mu"], params["seed"]) == (str(ROUNDS), "fedprox", "0.1", "42")
    tags = {item["key"]: item["value"] for item in tracked["data"]["tags"]}
    assert tags["medhive.run_id"] == job.said["run id"]
    assert tags["medhive.spec_hash"] == job.run["spec_hash"]
    assert json.loads(tags["medhive.spec"])["options"]["rounds"] == ROUNDS
    assert tags["medhive.sites"].split(",") == list(IMAGE_SITES)


def test_mlflow_has_every_round_of_all_and_of_each_site(job: Job, tracked: dict[str, Any]) -> None:
    def history(key: str) -> dict[int, float]:
        answer = job.world.mlflow("metrics/get-history", run_id=tracked["info"]["run_id"], metric_key=key)
        return {int(item["step"]): float(item["value"]) for item in answer["metrics"]}

    rounds = {item["number"]: item for item in job.run["rounds_done"] if item["number"] > 0}
    losses = history("train_loss")
    assert losses == pytest.approx({number: item["metrics"]["train_loss"] for number, item in rounds.items()})
    names = {item["key"] for item in tracked["data"]["metrics"]}
    for site in IMAGE_SITES:
        key = next(name for name in names if site in name and name.endswith("train_loss"))
        assert set(history(key)) == set(rounds)
    assert {"round_seconds", "round_overhead_s", "bytes_up", "bytes_down"} <= names
    assert history("val_accuracy")[ROUNDS] == pytest.approx(job.run["metrics"]["val_accuracy"])


def test_mlflow_has_pictures_and_the_model_with_its_aliases(job: Job, tracked: dict[str, Any]) -> None:
    run_id = tracked["info"]["run_id"]
    files = {item["path"] for item in job.world.mlflow("artifacts/list", run_id=run_id)["files"]}
    assert {"curves.png", "confusion_matrix.png", "spec.json", "rounds.json", "model"} <= files
    model = {item["path"] for item in job.world.mlflow("artifacts/list", run_id=run_id, path="model")["files"]}
    assert model == {"model/weights.safetensors", "model/manifest.json"}
    job.world.tracked_run(job.said["second run"]["id"])
    registered = job.world.mlflow("registered-models/get", name=f"medhive-{IMAGE_STUDY}")["registered_model"]
    aliases = {item["alias"]: item["version"] for item in registered["aliases"]}
    assert {"newest", "candidate"} <= set(aliases)


# ---- what lies where afterwards ----------------------------------------------------------------------------------------


def test_keys_are_for_their_owner_alone(job: Job) -> None:
    stack = job.world.stack
    secret = [path for site in IMAGE_SITES for path in (stack.site_folder(site) / "state" / "keys").iterdir()]
    secret += [*(stack.gateway_state / "secrets").iterdir(), *(stack.gateway_state / "tls").glob("*.key")]
    secret += [stack.site_folder(site) / "state" / "site.db" for site in IMAGE_SITES]
    assert len(secret) >= 3 * 4 + 5
    loose = [
        str(path) for path in secret if stat.S_IMODE(path.stat().st_mode) & 0o077 and path.parent.stat().st_mode & 0o077
    ]
    assert not loose
    keys = [path for path in secret if path.suffix != ".db"]
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in keys} == {"0o600"}


def test_no_name_of_a_scan_leaves_its_hospital(job: Job) -> None:
    stack = job.world.stack
    at_home = stack.site(A, "check-data", "--study", IMAGE_STUDY)
    assert BROKEN in at_home, "the hospital itself is told the name"
    logs = [stack.folder / "logs" / f"{name}.log" for name in ("gateway", "server", "mlflow")]
    files = [path for path in (*files_below(stack.folder / "coordinator"), *logs) if path.is_file()]
    assert any(path.name == "gateway.db" for path in files)
    forbidden = [PATIENT.encode(), str(stack.site_folder(A) / "data").encode(), b"torn.png"]
    leaks = [(path.name, word) for path in files for word in forbidden if word in content_of(path)]
    assert not leaks


# ---- the event log, last: one test changes a row -----------------------------------------------------------------------


def test_the_log_is_what_everybody_signed(job: Job) -> None:
    stack = job.world.stack

    def countersigned() -> bool:
        found = {item["what"] for item in stack.admin_json("audit", "verify")["findings"]}
        return {f"countersignatures of {site}" for site in IMAGE_SITES} <= found

    wait_until(countersigned, "countersignatures of all", TOLD_DEADLINE_S)
    result = stack.admin_json("audit", "verify")
    assert result["right"], result


def test_the_log_tells_the_whole_story(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "events.jsonl"
    job.world.stack.admin("audit", "export", "--out", str(out))
    rows = [row for row in map(json.loads, out.read_text().splitlines()) if row.get("run_id") == job.said["run id"]]
    kinds = [row["kind"] for row in rows]
    assert kinds.count("consent.granted") == len(IMAGE_SITES)
    assert kinds.index("run.created") < kinds.index("consent.granted") < kinds.index("run.completed")


def test_a_changed_row_is_found(job: Job) -> None:
    stack = job.world.stack
    assert stack.admin_json("audit", "verify")["right"]
    database = stack.gateway_state / "gateway.db"
    query = "SELECT number, actor FROM events WHERE kind = 'consent.granted' ORDER BY number LIMIT 1"
    with sqlite3.connect(database, timeout=30) as connection:
        number, actor = connection.execute(query).fetchone()
        connection.execute("UPDATE events SET actor = 'somebody-else' WHERE number = ?", (number,))
    try:
        with pytest.raises(StackError, match="not what was signed"):
            stack.admin("audit", "verify")
    finally:
        with sqlite3.connect(database, timeout=30) as connection:
            connection.execute("UPDATE events SET actor = ? WHERE number = ?", (actor, number))
    assert stack.admin_json("audit", "verify")["right"]

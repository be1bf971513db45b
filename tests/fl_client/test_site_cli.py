"""`medhive-site` at a hospital that has joined: real processes against a real gateway, only training is left out."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from command_world import STUDY, CommandWorld, Typist, value_of
from old_files import old_leftover
from stack import free_port

from fl_client.__main__ import program
from fl_client.cli import membership
from fl_client.consents import DataCheck
from fl_client.queues import grant_queue
from fl_client.settings import Settings
from fl_client.site import Site
from fl_client.tasks.base import load_task
from fl_client.tasks.phantoms import CLASSES
from medhive import __version__, client, version
from medhive.packing import write_weights
from medhive.terminal import main as run_program
from medhive.version import OLDEST_PROTOCOL, PROTOCOL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandWorld]:
    """A gateway with two hospitals, shared by this module's tests."""
    world = CommandWorld.start(tmp_path_factory.mktemp("world"))
    yield world
    world.stop()


def fails(world: CommandWorld, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the hospital north that must fail."""
    done = world.stack.failing(["medhive-site", *words], world.stack.site_env("north"))
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stderr
    return done


def consenting_run(world: CommandWorld) -> str:
    """A run that waits for consents."""
    request = world.stack.admin_json("request", STUDY, "--rounds", "1")
    return str(world.stack.admin_json("approve", request["id"])["run_id"])


def first_weights(world: CommandWorld, path: Path, seed: int) -> Path:
    """Weights of the study's own model, made at the hospital north."""
    with Site.open(Settings(state_dir=world.stack.site_folder("north") / "state")) as site:
        study = site.gateway.study(STUDY)
        folder = world.stack.site_folder("north") / "data"
        workspace = load_task(study.task).open(folder, study.data, site.keys.secret_file.read_bytes())
    write_weights(path, workspace.initial_weights(seed))
    return path


def test_joining_again_goes_on_as_the_same_hospital(world: CommandWorld) -> None:
    again = world.stack.site_json("north", "join")
    assert (again["site"], again["fresh"], again["studies"]) == ("north", False, [STUDY])
    other = world.stack.failing(["medhive-site", "join"], world.stack.site_env("north") | {"CLIENT_ID": "elsewhere"})
    assert other.returncode == 1
    assert "belongs to the site north" in other.stderr


def test_check_data_takes_study_and_folder_from_the_joined_hospital(world: CommandWorld) -> None:
    found = world.stack.site_json("north", "check-data")
    assert found["study"] == STUDY
    assert set(found["classes"]) == set(CLASSES)
    assert found["examples"] == 10 * len(CLASSES)


def test_settings_are_changed_and_kept(world: CommandWorld, tmp_path: Path) -> None:
    world.stack.site("south", "settings", "--hours", "20:00-06:00", "--cpu-threads", "1", "--pause")
    shown = world.stack.site("south", "settings")
    assert (value_of(shown, "training"), value_of(shown, "hours")) == ("paused", "20:00-06:00")
    world.stack.site("south", "settings", "--hours", "any", "--cpu-threads", "0", "--resume")
    changed = world.stack.site_json(
        "south", "settings", "--study", STUDY, "--data-dir", str(tmp_path), "--class", "a=glioma"
    )
    assert changed["limits"]["paused"] is False
    assert changed["limits"]["cpu_threads"] is None
    assert changed["studies"] == [
        {
            "study": STUDY,
            "data_dir": str(tmp_path),
            "class_map": {"a": "glioma"},
            "groups_csv": None,
            "weights_file": None,
            "labels_csv": None,
        }
    ]
    assert fails(world, "settings", "--hours", "late").returncode == 1
    assert "need --study" in fails(world, "settings", "--data-dir", ".").stderr


def test_a_request_is_sent_and_cancelled(world: CommandWorld) -> None:
    sent = world.stack.site_json("north", "request", "--rounds", "3", "--person", "Dr. North", "--note", "soon")
    assert (sent["study"], sent["spec"]["options"]["rounds"], sent["site"]) == (STUDY, 3, "north")
    assert sent["id"] in world.stack.site("north", "requests")
    assert "cancelled" in world.stack.site("north", "cancel", sent["id"], "--reason", "no longer")
    assert fails(world, "cancel", sent["id"]).returncode == 1
    assert "rounds: " in fails(world, "request", "--rounds", "0").stderr


def test_a_policy_is_signed_shown_and_removed(world: CommandWorld) -> None:
    assert "no policy" in world.stack.site("north", "policy")
    words = ["policy", "sign", "--study", STUDY, "--max-rounds", "5", "--person", "Dr. North"]
    world.stack.site("north", *words)
    assert value_of(world.stack.site("north", "policy"), "most rounds") == "5"
    assert "no longer in force" in world.stack.site("north", "policy", "remove")
    assert fails(world, "policy", "sign", "--study", STUDY).returncode == 2
    assert "within a year" in fails(world, *words, "--days", "1000").stderr


def test_a_consent_shows_the_run_checks_the_data_and_is_withdrawn(world: CommandWorld) -> None:
    run_id = consenting_run(world)
    assert run_id in value_of(world.stack.site("north", "status"), "consent asked")
    with Typist(["medhive-site", "consent"], world.stack.site_env("north")) as person:
        person.expect(run_id)
        person.expect("Your name, for the signature")
        person.type("Dr. North")
        person.expect("glioma")
        person.expect(f"Agree to {run_id} in the name of north? [y/N]:")
        person.type("y")
        person.expect(f"Agreed to {run_id} until")
        assert person.end() == 0
    assert "answered" in fails(world, "consent", run_id).stderr
    answers = {item["site"]: item["state"] for item in world.stack.admin_json("show", run_id)["consents"]}
    assert answers == {"north": "granted", "south": "pending"}
    assert f"Withdrew from {run_id}" in world.stack.site(
        "north", "withdraw", run_id, "--reason", "changed our mind", "--yes"
    )
    world.stack.site("south", "decline", run_id, "--reason", "busy", "--person", "Dr. South")
    shown = world.stack.admin_json("show", run_id)
    assert {item["site"]: item["state"] for item in shown["consents"]} == {"north": "withdrawn", "south": "declined"}


def test_versions_are_judged_accepted_rejected_and_taken_back(world: CommandWorld, tmp_path: Path) -> None:
    first = world.completed_run(first_weights(world, tmp_path / "a.safetensors", 1), 0.7)
    updates = world.stack.site_json("north", "updates")
    assert [(item["version"], item["decision"]) for item in updates] == [(first, "pending")]
    assert updates[0]["file"].endswith(f"/models/{STUDY}/north_FinalGlobal_v{first}.safetensors")
    judged = world.stack.site("north", "updates", "--evaluate")
    assert "held-out examples of this hospital" in judged
    assert "sensitivity, glioma" in judged
    accepted = world.stack.site("north", "accept", "--person", "Dr. North", "--reason", "good enough")
    assert f"Version {first} of {STUDY} is accepted and in use" in accepted
    second = world.completed_run(first_weights(world, tmp_path / "b.safetensors", 2), 0.8)
    world.stack.site("north", "accept", str(second), "--study", STUDY, "--person", "Dr. North")
    back = world.stack.site("north", "rollback", "--reason", "worse on our scanner", "--yes")
    assert back == f"Version {first} of {STUDY} is in use again.\n"
    world.stack.site("south", "reject", str(second), "--reason", "too few examples", "--person", "Dr. South")
    decisions = world.stack.admin_json("model", STUDY, str(second))["decisions"]
    assert {item["site"]: item["state"] for item in decisions} == {"north": "rejected", "south": "rejected"}
    history = world.stack.site_json("north", "history")
    assert [entry["version"] for entry in history["in_use"]] == [first, second, first]
    assert fails(world, "accept", "99").returncode == 1
    assert fails(world, "reject", str(first)).returncode == 2
    _predicts_with_the_version_in_use(world, first)


def _predicts_with_the_version_in_use(world: CommandWorld, version: int) -> None:
    folder = world.stack.site_folder("north") / "data" / "glioma"
    found = world.stack.site_json("north", "predict", str(folder))
    assert len(found) == 10
    assert all(Path(item["path"]).parent == folder.resolve() for item in found)
    assert all(sum(item["probabilities"].values()) == pytest.approx(1, abs=1e-4) for item in found)
    assert fails(world, "predict", "/nowhere").returncode == 1
    models = {item["version"]: item for item in world.stack.site_json("north", "models")}
    assert (models[version]["condition"], models[version]["in_use"]) == ("intact", True)
    file = Path(models[version]["file"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    assert world.stack.site_json("north", "models")[-1]["condition"] == "changed"
    assert "was changed" in fails(world, "predict", str(folder)).stderr
    file.write_bytes(whole)


def test_the_menu_announces_what_arrives(world: CommandWorld) -> None:
    with Typist(["medhive-site", "menu"], world.stack.site_env("south")) as person:
        assert "south of Coordinator" in person.expect("Number:")
        request = world.stack.admin_json("request", STUDY)
        run_id = world.stack.admin_json("approve", request["id"])["run_id"]
        person.expect(f"*** a run asks for consent: {run_id} ***")
        person.type("9")
        person.expect(f"{run_id} of {STUDY} waits for this hospital's consent")
        person.expect("Number:")
        person.type("4")
        person.expect("Run:")
        person.type("RUN_999")
        person.expect("Reason []:")
        person.type("")
        person.expect("Your name")
        person.type("Dr. South")
        person.expect("Withdraw from RUN_999 for good?")
        person.type("n")
        person.expect("left")
        person.expect("Number:")
        person.type("13")
        person.expect("File or folder:")
        person.type("nowhere")
        person.expect("error:")
        person.expect("Number:")
        person.type("14")
        person.expect("CPU threads")
        person.expect("Number:")
        person.type("0")
        assert person.end() == 0
    world.stack.admin("stop", run_id, "--yes")


def test_the_node_says_where_it_stands_and_ends_in_order(world: CommandWorld) -> None:
    command = ["medhive-site", "run", "--json"]
    env = world.stack.site_env("north")
    leftover = old_leftover(Path(env["STATE_DIR"]) / "runs")
    node = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert node.stdout is not None
        seen: list[dict[str, Any]] = []
        while not any(item["event"] == "Connected" and item["to"] == "gateway" for item in seen):
            seen.append(json.loads(node.stdout.readline()))
        assert (seen[0]["event"], seen[0]["site"]) == ("Serving", "north")
        assert not leftover.exists()
        assert "A node is running" in fails(world, "run").stderr
        node.send_signal(signal.SIGTERM)
        rest, _ = node.communicate(timeout=30)
    finally:
        node.kill()
    assert json.loads(rest.splitlines()[-1])["event"] == "Stopped"
    assert node.returncode == 0


def test_without_the_coordinator_what_lies_here_is_shown(world: CommandWorld) -> None:
    away = {"SERVER_ADDRESS": "https://localhost:1"}
    env = world.stack.site_env("north") | away
    status = world.stack.run(["medhive-site", "status"], env)
    assert "not connected: https://localhost:1 does not answer" in status
    world.stack.run(["medhive-site", "history"], env)
    world.stack.run(["medhive-site", "models"], env)


def test_status_says_which_side_to_upgrade(
    world: CommandWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This process plays the hospital of an older version; the gateway is of this one."""
    for name, value in world.stack.site_env("north").items():
        monkeypatch.setenv(name, value)
    now, older = PROTOCOL, OLDEST_PROTOCOL - 1
    for module, names in {
        client: ["PROTOCOL"],
        membership: ["PROTOCOL"],
        version: ["PROTOCOL", "OLDEST_PROTOCOL"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, older)
    assert run_program(program, ["status"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"not connected: the coordinator (MedHive {__version__}) speaks protocol {now}" in said
    assert f"(MedHive {__version__}) {older}: upgrade this hospital, the coordinator is newer" in said
    assert f"software MedHive {__version__}, protocol {older}" in said


def test_status_says_how_full_the_queues_are_and_that_the_first_address_is_left(world: CommandWorld) -> None:
    first = f"https://localhost:{free_port()}"
    away = world.stack.site_env("north") | {"SERVER_ADDRESS": f"{first},{world.stack.url}"}
    world.stack.admin("studies", "queue", STUDY, "--capacity", "4")
    try:
        text = " ".join(world.stack.run(["medhive-site", "status"], away).split())
        assert f"{world.stack.url}, connected" in text
        assert re.search(rf"first address {first} does not serve this hospital since \d{{4}}-", text), text
        assert re.search(
            rf"QUEUE_\d+ of {STUDY}: 0/4 empty, (no model yet|newest version \d+); consent pending", text
        ), text
        done = subprocess.run(
            ["medhive-site", "status", "--json"], env=away, capture_output=True, text=True, check=True
        )
        said = json.loads(done.stdout)
        assert "gateway.address-changed" in done.stderr
        assert (said["address"], said["first_address"]) == (world.stack.url, first)
        assert datetime.fromisoformat(said["first_address_left_at"]) <= datetime.now(UTC)
        with Site.open(Settings(state_dir=world.stack.site_folder("north") / "state")) as site:
            queue = site.gateway.queue(STUDY)
            grant_queue(site, queue, person="Dr. North", check=DataCheck("0" * 64, 40, {}, {}))
            site.store.set_fact(f"queue-update/{STUDY}", {})
        home = world.stack.site("north", "status")
        assert "does not serve" not in home
        assert "0 sent; an update waits for `medhive-site upload`" in home
    finally:
        world.stack.admin("studies", "queue", STUDY, "--close", "--reason", "the test is over")

"""Bad input, and what it gets: a sentence that names the thing and what to do, exit code 1, nothing lost, nothing crashed.

Each line of `ROWS` is one kind of bad input with the tests that prove it. Those of other folders drive the module that
refuses; those here type the commands that people type, against the running services.
"""

import ast
import base64
import io
import json
import secrets
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from PIL import Image
from stack import Program, wait_until
from whole_world import IMAGE_STUDY, PER_CLASS, TABLE_STUDY, WholeWorld, make_heart_table, make_patient_images

from fl_client.tasks.images import MAX_FILE_BYTES
from fl_client.tasks.phantoms import CLASSES

# The first test of a file waits for the stack's start, also on a busy machine.
pytestmark = pytest.mark.timeout(900)

TESTS: Final = Path(__file__).parents[1]
HERE: Final = "integration/test_bad_input.py"
ROUNDS: Final = "fl_server/test_rounds.py"
JOINING: Final = "api_gateway/test_gateway_joining.py"
CONSENTS: Final = "api_gateway/test_gateway_runs.py"

ROWS: Final[Mapping[str, tuple[str, ...]]] = {
    "an empty class folder": (
        f"{HERE}::test_an_empty_class_folder",
        "fl_client/test_check_data.py::test_missing_and_empty_classes",
    ),
    "a missing class folder": (f"{HERE}::test_a_missing_class_folder",),
    "a corrupt, truncated or huge image, a decompression bomb": (
        f"{HERE}::test_bad_images_are_skipped_named_and_counted",
        "fl_client/test_check_data.py::test_every_bad_file_is_skipped_named_and_counted",
    ),
    "a class that the study does not know": (f"{HERE}::test_an_unknown_class",),
    "wrong columns in a CSV": (
        f"{HERE}::test_wrong_columns",
        "fl_client/test_task_tabular.py::test_wrong_columns_are_named",
    ),
    "another architecture's weights": (
        f"{ROUNDS}::test_a_bad_update_is_refused_and_named_and_the_round_goes_on",
        "core/test_contribution.py::test_another_architecture_is_refused",
        "fl_client/test_trainer.py::test_other_weights_than_the_studys_are_refused",
    ),
    "an update with NaN": (
        f"{ROUNDS}::test_a_bad_update_is_refused_and_named_and_the_round_goes_on",
        "core/test_contribution.py::test_nan_and_infinity_are_refused_with_the_tensor",
    ),
    "an update of wrong length": (
        f"{ROUNDS}::test_a_bad_update_is_refused_and_named_and_the_round_goes_on",
        f"{ROUNDS}::test_bytes_that_are_no_weights_are_refused",
        "core/test_packing.py::test_a_file_longer_or_shorter_than_announced_is_refused",
    ),
    "an update with a norm a thousand times the others'": (
        f"{ROUNDS}::test_a_bad_update_is_refused_and_named_and_the_round_goes_on",
        "core/test_contribution.py::test_a_thousandfold_is_caught_and_no_honest_site_with_it",
    ),
    "a request with 0 or 10^9 rounds": (f"{HERE}::test_senseless_rounds",),
    "an unknown strategy": (f"{HERE}::test_an_unknown_strategy",),
    "an expired invite": (f"{HERE}::test_an_expired_invite", f"{JOINING}::test_an_expired_invite_is_refused"),
    "a reused invite": (f"{HERE}::test_a_reused_invite", f"{JOINING}::test_a_used_invite_is_refused"),
    "a forged invite": (
        f"{HERE}::test_a_forged_invite",
        f"{JOINING}::test_a_forged_invite_is_refused",
        "fl_client/test_site_join.py::test_another_coordinator_is_not_joined",
    ),
    "a consent signed by the wrong key": (f"{CONSENTS}::test_a_consent_by_another_key_is_refused",),
    "a consent for another spec, or expired": (f"{CONSENTS}::test_a_consent_that_does_not_cover_the_run_is_refused",),
    "a revoked site": (f"{HERE}::test_a_revoked_site", f"{JOINING}::test_a_revoked_site_can_do_nothing_more"),
    "a second site with the same name": (f"{HERE}::test_a_second_site_of_the_same_name",),
    "a contribution with a forged, missing or replayed signature, or in another site's name": (
        f"{ROUNDS}::test_a_contribution_in_another_sites_name_is_refused_and_the_real_one_counts",
        f"{ROUNDS}::test_a_site_that_only_sends_forgeries_is_dropped_and_named",
        f"{ROUNDS}::test_an_unsigned_answer_and_garbage_are_refused",
        f"{ROUNDS}::test_an_answer_to_an_earlier_round_is_a_replay",
    ),
    "a task with a forged, missing or replayed signature, or for another site": (
        "fl_client/test_node.py::test_what_is_not_the_coordinators_is_refused",
        "fl_client/test_node.py::test_rounds_go_upward_only",
        "fl_client/test_node.py::test_a_round_is_trained_once_and_answered_again",
    ),
    "the trainer child out of memory": (
        "integration/test_main_job.py::test_less_memory_than_the_trainer_needs_is_refused",
        "fl_client/test_trainer.py::test_a_job_without_memory_is_answered_with_the_reason",
        "fl_client/test_node.py::test_a_killed_trainer_is_answered_and_the_next_round_works",
    ),
    "the server gone in mid-round": (
        "fl_server/test_dispatcher_serve.py::test_killed_processes_change_no_bit_of_the_result",
        "fl_server/test_rounds.py::test_a_gateway_that_is_away_for_a_while_costs_nothing",
        "fl_client/test_node.py::test_the_gateway_may_be_away_and_come_back",
    ),
    "the disk full at a checkpoint": (
        f"{ROUNDS}::test_a_full_disk_at_the_checkpoint_fails_the_run_and_keeps_the_one_before",
        "api_gateway/test_gateway_blobs.py::test_a_full_disk_has_a_name",
        "core/test_packing.py::test_a_full_disk_is_named",
    ),
    "a port already in use": (f"{HERE}::test_a_port_in_use",),
    "a clock off by ten minutes": (
        f"{JOINING}::test_a_clock_off_by_ten_minutes_is_told_the_time",
        "fl_client/test_fleet_connection.py::test_a_clock_off_by_ten_minutes_is_named_and_an_offset_corrects_it",
        "fl_client/test_site_join.py::test_a_wrong_clock_is_learnt_from_the_gateway",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_test(row: str) -> None:
    for name in ROWS[row]:
        file, _, function = name.partition("::")
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


# ---- what people are told ----------------------------------------------------------------------------------------------


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed with exit code 1 and one sentence in which these words stand; nothing crashed."""
    assert done.returncode == 1, done.stderr + done.stdout
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def site_fails(world: WholeWorld, site: str, *words: str, env: Mapping[str, str] | None = None) -> Any:
    """A hospital's command that is expected to fail."""
    return world.stack.failing(["medhive-site", *words], world.stack.site_env(site) | dict(env or {}))


def admin_fails(world: WholeWorld, *words: str) -> Any:
    """A coordinator's command that is expected to fail."""
    return world.stack.failing(["medhive-admin", *words], world.stack.admin_env())


# ---- data --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A good folder of images, to be spoiled."""
    return make_patient_images(tmp_path / "images", PER_CLASS, 9)


def check(world: WholeWorld, path: Path, study: str = IMAGE_STUDY, *words: str) -> Any:
    """`check-data` at a hospital, expected to fail."""
    return site_fails(world, "hospital-a", "check-data", str(path), "--study", study, *words)


def test_an_empty_class_folder(whole: WholeWorld, images: Path) -> None:
    for file in (images / CLASSES[1]).iterdir():
        file.unlink()
    refused(check(whole, images), CLASSES[1])


def test_a_missing_class_folder(whole: WholeWorld, images: Path) -> None:
    (images / CLASSES[1]).rename(images.parent / "elsewhere")
    refused(check(whole, images), CLASSES[1], "folder")


def test_an_unknown_class(whole: WholeWorld, images: Path) -> None:
    (images / CLASSES[1]).rename(images / "astrocytoma")
    refused(check(whole, images), "astrocytoma", *CLASSES)
    mapped = ["check-data", str(images), "--study", IMAGE_STUDY, "--class", f"astrocytoma={CLASSES[1]}"]
    assert whole.stack.site_json("hospital-a", *mapped)["classes"][CLASSES[1]] == PER_CLASS


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it is `side` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_bad_images_are_skipped_named_and_counted(whole: WholeWorld, images: Path) -> None:
    folder = images / CLASSES[0]
    whole_image = io.BytesIO()
    Image.new("L", (300, 300), 90).save(whole_image, "JPEG")
    (folder / "corrupt.png").write_bytes(b"this is no picture")
    (folder / "truncated.jpg").write_bytes(whole_image.getvalue()[:400])
    (folder / "bomb.png").write_bytes(bomb(60_000))
    with (folder / "huge.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    found = whole.stack.site_json("hospital-a", "check-data", str(images), "--study", IMAGE_STUDY)
    named = {Path(item["name"]).name: item["reason"] for item in found["skipped"]}
    assert set(named) == {"corrupt.png", "truncated.jpg", "bomb.png", "huge.png"}
    assert sum(found["reasons"].values()) == len(named)
    assert found["examples"] == PER_CLASS * len(CLASSES)


def test_wrong_columns(whole: WholeWorld, tmp_path: Path) -> None:
    table = make_heart_table(tmp_path / "table.csv", 30, 1)
    table.write_text("\n".join(line.rsplit(",", 2)[0] for line in table.read_text().splitlines()) + "\n")
    refused(check(whole, table, TABLE_STUDY), str(table), "has 12 columns, the study has 14", "age, sex, cp")


# ---- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", ["0", "1000000000"])
def test_senseless_rounds(whole: WholeWorld, rounds: str) -> None:
    words = ["request", IMAGE_STUDY, "--rounds", rounds]
    before = len(whole.stack.admin_json("requests"))
    refused(site_fails(whole, "hospital-a", *words, "--person", "Dr. Adler"), "rounds", "equal to")
    refused(admin_fails(whole, *words), "rounds", "equal to")
    assert len(whole.stack.admin_json("requests")) == before


def test_an_unknown_strategy(whole: WholeWorld) -> None:
    words = ["request", IMAGE_STUDY, "--strategy", "fedmagic"]
    refused(site_fails(whole, "hospital-a", *words, "--person", "Dr. Adler"), "fedmagic", "fedprox", "krum")


# ---- invites, sites ----------------------------------------------------------------------------------------------------


def join_fails(world: WholeWorld, site: str, token: str) -> Any:
    """A join that is expected to be refused; leaves no keys behind that count for anything."""
    return site_fails(world, site, "join", env={"JOIN_TOKEN": token})


def test_an_expired_invite(whole: WholeWorld) -> None:
    invite = whole.stack.admin_json("invite", "hospital-late", "--expires-in-h", "0.0001")
    end = datetime.fromisoformat(invite["expires_at"])
    wait_until(lambda: datetime.now(UTC) > end, "the invite's end", 30)
    refused(join_fails(whole, "hospital-late", invite["token"]), "expired", "ask the coordinator for a new one")


def test_a_reused_invite(whole: WholeWorld) -> None:
    token = whole.stack.admin_json("invite", "hospital-once")["token"]
    whole.stack.site("hospital-once", "join", env={"JOIN_TOKEN": token})
    again = {"JOIN_TOKEN": token, "STATE_DIR": str(whole.stack.site_folder("hospital-thief") / "state")}
    done = site_fails(whole, "hospital-once", "join", env=again)
    refused(done, "used already", "ask the coordinator for a new one")
    assert whole.stack.site_json("hospital-once", "status")["connected"]


def test_a_forged_invite(whole: WholeWorld) -> None:
    kind, _, *rest = whole.stack.admin_json("invite", "hospital-forged")["token"].split(".")
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    done = join_fails(whole, "hospital-forged", ".".join((kind, secret, *rest)))
    refused(done, "invite is unknown", "ask the coordinator for a new one")
    assert secret not in done.stderr
    elsewhere = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    other = join_fails(whole, "hospital-forged", f"{kind}.{secret}.{elsewhere}.pinned")
    refused(other, "not the one that made this invite", "'Another server answers'")


def test_a_second_site_of_the_same_name(whole: WholeWorld) -> None:
    refused(admin_fails(whole, "invite", "hospital-a"), "hospital-a has joined already", "choose another name")


def test_a_revoked_site(whole: WholeWorld) -> None:
    whole.stack.join("hospital-gone")
    whole.stack.admin("revoke", "hospital-gone", "--reason", "key lost", "--yes")
    refused(site_fails(whole, "hospital-gone", "requests"), "no longer works with this hospital", "new invite")
    done = site_fails(whole, "hospital-gone", "run")
    assert done.returncode == 1
    assert "no longer works with this hospital" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


# ---- machines ----------------------------------------------------------------------------------------------------------


def test_a_port_in_use(whole: WholeWorld, tmp_path: Path) -> None:
    stack = whole.stack
    gateway = stack.gateway_env() | {"MEDHIVE_GATEWAY_STATE_DIR": str(tmp_path / "gateway")}
    done = stack.failing(["medhive-gateway", "serve"], gateway)
    refused(done, f"Port {stack.ports['gateway']}", "in use", "MEDHIVE_GATEWAY_PORT")
    server = stack.server_env() | {"MEDHIVE_SERVER_STATE_DIR": str(tmp_path / "server")}
    done = stack.failing(["medhive-server", "serve"], server)
    refused(done, f"Port {stack.ports['fleet']}", "in use", "MEDHIVE_SERVER_FLEET_PORT")


def test_a_second_node_on_one_folder(whole: WholeWorld) -> None:
    refused(site_fails(whole, "hospital-a", "run"), "running", "STATE_DIR")


def test_a_hospital_whose_coordinator_is_not_there(whole: WholeWorld, tmp_path: Path) -> None:
    """Started before the server, a node waits and says so; a command says what to look at."""
    nobody = {"SERVER_ADDRESS": "https://localhost:9"}
    refused(site_fails(whole, "hospital-d", "requests", env=nobody), "does not answer", "docs/troubleshooting.md")
    assert whole.stack.site_json("hospital-d", "status")["connected"]
    whole.stack.join("hospital-early")
    env = whole.stack.site_env("hospital-early") | nobody
    node = Program("waiting", ["medhive-site", "run"], env, tmp_path / "waiting.log").start()
    try:
        node.wait_for(r"the gateway does not answer, trying again: https://localhost:9")
    finally:
        node.stop()


# ---- every program, any state folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["medhive-gateway", "medhive-server"])
def test_a_state_folder_that_is_a_file(program: str, whole: WholeWorld, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    name = "GATEWAY" if program == "medhive-gateway" else "SERVER"
    env = whole.stack.gateway_env() if name == "GATEWAY" else whole.stack.server_env()
    env |= {f"MEDHIVE_{name}_STATE_DIR": str(tmp_path / "state"), f"MEDHIVE_{name}_PORT": "0"}
    refused(whole.stack.failing([program, "serve"], env), str(tmp_path / "state"))


def test_json_for_programs_names_the_error(whole: WholeWorld) -> None:
    done = site_fails(whole, "hospital-a", "request", IMAGE_STUDY, "--rounds", "0", "--person", "Dr. Adler", "--json")
    value = json.loads(done.stdout)
    assert (done.returncode, value["error"]) == (1, "invalid-input")
    assert "rounds" in value["detail"]


def test_an_aggregator_before_the_gateways_first_start(whole: WholeWorld, tmp_path: Path) -> None:
    missing = {"MEDHIVE_SERVER_TOKEN_FILE": str(tmp_path / "server-token")}
    env = whole.stack.server_env() | missing | {"MEDHIVE_SERVER_STATE_DIR": str(tmp_path / "server")}
    done = whole.stack.failing(["medhive-server", "serve"], env)
    refused(done, str(tmp_path / "server-token"), "first start")


def test_mlflow_says_what_is_wrong_with_its_settings(tmp_path: Path) -> None:
    script = TESTS.parent / "services" / "mlflow" / "serve.py"
    env = {"MEDHIVE_MLFLOW_STATE_DIR": str(tmp_path), "MEDHIVE_MLFLOW_HOST": "0.0.0.0"}  # noqa: S104 - what is refused
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    refused(done, "MEDHIVE_MLFLOW_TLS_CERT")

"""`medhive-admin` as people and scripts run it: real processes against a real gateway over TLS."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_world import STUDY, CommandWorld, Typist, least_seconds, made_weights, value_of

from api_gateway.admin.__main__ import program
from api_gateway.admin.session import CONFIG_VARIABLE, fingerprint
from medhive.packing import sha256_file
from medhive.terminal import main as run_program

RunHere = Callable[[Sequence[str]], tuple[int, str, str]]
HEAVY = ("fastapi", "sqlalchemy", "torch", "flwr", "pydantic", "httpx", "numpy", "rich")
HELP_LIMIT_S = 0.5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandWorld]:
    """A gateway with two hospitals, shared by this module's tests."""
    world = CommandWorld.start(tmp_path_factory.mktemp("world"))
    yield world
    world.stop()


def fails(world: CommandWorld, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that must fail."""
    done = world.stack.failing(["medhive-admin", *words], world.stack.admin_env() | (env or {}))
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def run_here(world: CommandWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunHere:
    """Run the command in this process, which saves the start of another; returns exit code, stdout and stderr."""
    monkeypatch.setenv(CONFIG_VARIABLE, world.stack.admin_env()[CONFIG_VARIABLE])

    def run(words: Sequence[str]) -> tuple[int, str, str]:
        code = run_program(program, words)
        return code, *capsys.readouterr()

    return run


# ---- without a gateway -----------------------------------------------------------------------------------------------


def test_help_answers_at_once_and_loads_nothing_heavy() -> None:
    command = [sys.executable, "-m", "api_gateway.admin", "--help"]
    assert least_seconds(command, {**os.environ}) < HELP_LIMIT_S
    code = "import sys; from api_gateway.admin.__main__ import program; from medhive.terminal import main"
    code += f"; main(program, ['--help']); sys.exit(','.join(set(sys.modules) & set({HEAVY!r})) or 0)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert loaded.stderr == ""


def test_without_a_login_it_says_how_to_get_one(tmp_path: Path) -> None:
    env = {**os.environ, "MEDHIVE_ADMIN_CONFIG": str(tmp_path / "none.json")}
    command = [sys.executable, "-m", "api_gateway.admin", "sites"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Log in with: medhive-admin login" in done.stderr


def test_an_address_where_nobody_is(tmp_path: Path) -> None:
    env = {**os.environ, "MEDHIVE_ADMIN_CONFIG": str(tmp_path / "none.json")}
    command = [sys.executable, "-m", "api_gateway.admin", "login", "localhost:1", "--fingerprint", "00"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "https://localhost:1 does not answer" in done.stderr


# ---- who is logged in ------------------------------------------------------------------------------------------------


def test_the_login_is_kept_for_its_owner_alone(world: CommandWorld) -> None:
    path = Path(world.stack.admin_env()["MEDHIVE_ADMIN_CONFIG"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["role"] == "admin"


def test_a_wrong_fingerprint_or_password_is_refused(world: CommandWorld, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("not the password\n")
    env = {"MEDHIVE_ADMIN_CONFIG": str(tmp_path / "admin.json")}
    words = ("login", world.stack.url, "--username", "admin", "--password-file", str(password))
    assert "somebody is in between" in fails(world, *words, "--fingerprint", "0" * 64, env=env).stderr
    right = fingerprint(world.stack.ca_file.read_text())
    refused = fails(world, *words, "--fingerprint", right, env=env)
    assert refused.returncode == 1
    untrusted = fails(world, *words, env=env)
    assert (untrusted.returncode, "--ca-file or --fingerprint" in untrusted.stderr) == (2, True)
    assert not (tmp_path / "admin.json").exists()


def test_a_person_is_asked_for_what_is_missing(world: CommandWorld, tmp_path: Path) -> None:
    made = world.stack.admin_json("accounts", "add", "asked", "--role", "analyst")
    env = world.stack.admin_env() | {"MEDHIVE_ADMIN_CONFIG": str(tmp_path / "admin.json")}
    with Typist(["medhive-admin", "login"], env) as person:
        person.expect("Address of the coordinator [https://localhost:8443]:")
        person.type(world.stack.url)
        assert fingerprint(world.stack.ca_file.read_text()) in person.expect("[y/N]:")
        person.type("y")
        person.expect("User name [admin]:")
        person.type("asked")
        person.expect("Password:")
        person.type(made["password"])
        person.expect("Logged in to Coordinator as asked (analyst)")
        assert person.end() == 0
        assert made["password"] not in person.text


def test_an_analyst_reads_and_decides_nothing(world: CommandWorld, tmp_path: Path) -> None:
    made = world.stack.admin_json("accounts", "add", "reader", "--role", "analyst")
    password = tmp_path / "password"
    password.write_text(made["password"])
    env = world.stack.admin_env() | {"MEDHIVE_ADMIN_CONFIG": str(tmp_path / "admin.json")}
    login = ["medhive-admin", "login", world.stack.url, "--username", "reader", "--password-file", str(password)]
    world.stack.run([*login, "--ca-file", str(world.stack.ca_file)], env)
    assert "north" in world.stack.run(["medhive-admin", "sites"], env)
    assert fails(world, "invite", "west", env=env).returncode == 1
    assert "only an admin" in fails(world, "audit", "verify", env=env).stderr
    world.stack.admin("accounts", "revoke-tokens", "reader")
    assert "Log in with" in fails(world, "sites", env=env).stderr
    world.stack.admin("accounts", "remove", "reader")
    listed = {item["username"]: item["disabled"] for item in world.stack.admin_json("accounts")}
    assert listed["reader"] is True
    assert fails(world, "login", world.stack.url, *login[3:], "--ca-file", str(world.stack.ca_file)).returncode == 1


def test_a_changed_password_is_the_one_that_counts(world: CommandWorld, tmp_path: Path) -> None:
    world.stack.admin("accounts", "add", "forgetful", "--role", "analyst")
    password = tmp_path / "password"
    password.write_text("correct horse battery staple\n")
    world.stack.admin("accounts", "password", "forgetful", "--password-file", str(password))
    env = world.stack.admin_env() | {"MEDHIVE_ADMIN_CONFIG": str(tmp_path / "admin.json")}
    login = ["login", world.stack.url, "--username", "forgetful", "--password-file", str(password)]
    world.stack.run(["medhive-admin", *login, "--ca-file", str(world.stack.ca_file)], env)


# ---- hospitals and studies -------------------------------------------------------------------------------------------


def test_invites_are_made_listed_and_made_void(world: CommandWorld, tmp_path: Path) -> None:
    file = tmp_path / "token"
    shown = world.stack.admin("invite", "west", "--study", STUDY, "--out", str(file))
    token = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    assert token.startswith("mh2.")
    assert token not in shown
    number = value_of(shown, "invite")
    assert "west" in world.stack.admin("invite", "--list")
    world.stack.admin("invite", "--delete", number)
    refused = world.stack.failing(["medhive-site", "join"], world.stack.site_env("west") | {"JOIN_TOKEN": token})
    assert refused.returncode == 1
    assert fails(world, "invite", "west", "--out", str(file)).returncode == 1
    assert "site: " in fails(world, "invite", "no/name").stderr


def test_a_revoked_hospital_is_out(world: CommandWorld) -> None:
    world.stack.join("east")
    assert value_of(world.stack.admin("sites", "east"), "state") == "active"
    world.stack.admin("revoke", "east", "--reason", "trial", "--yes")
    assert value_of(world.stack.admin("sites", "east"), "state") == "revoked"
    refused = world.stack.failing(["medhive-site", "requests"], world.stack.site_env("east"))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_a_table_study_out_of_a_columns_file(world: CommandWorld, tmp_path: Path) -> None:
    columns = tmp_path / "columns.csv"
    columns.write_text("age\nsex,categorical,f|m\nnum,numeric\n")
    words = ["studies", "create", "hearts", "--task", "tabular", "--classes", "healthy,ill", "--label", "num"]
    words += ["--positive-above", "0", "--columns-file", str(columns), "--no-header", "--missing", "?"]
    table = world.stack.admin_json(*words)["data"]["table"]
    assert [column["type"] for column in table["columns"]] == ["numeric", "categorical", "numeric"]
    assert table["columns"][1]["categories"] == ["f", "m"]
    assert (table["label"], table["has_header"], table["missing"]) == (
        {"name": "num", "positive_above": 0},
        False,
        ["?"],
    )
    whole = tmp_path / "study.json"
    whole.write_text(json.dumps(world.stack.admin_json("studies", "show", "hearts")["data"]))
    study = tmp_path / "other.json"
    study.write_text(json.dumps({"task": "tabular", "data": json.loads(whole.read_text()), "defaults": {"rounds": 3}}))
    made = world.stack.admin_json("studies", "create", "hearts-2", "--file", str(study), "--default", "C=0.5")
    assert made["defaults"] == {"rounds": 3, "C": 0.5}
    assert "sex" in world.stack.admin("studies", "show", "hearts-2")


def test_members_come_and_go(world: CommandWorld) -> None:
    world.stack.admin("studies", "create", "members", "--task", "image-folder", "--classes", "a,b")
    assert world.stack.admin_json("studies", "members", "members", "--add", "north")["members"] == ["north"]
    assert world.stack.admin_json("studies", "members", "members", "--remove", "north")["members"] == []
    assert fails(world, "studies", "members", "members", "--add", "nowhere").returncode == 1


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["studies", "create", "x", "--task", "image-folder", "--classes", "a"], 1, "classes: "),
        (["studies", "create", "x", "--task", "image-folder", "--classes", "a,a"], 1, "the same name"),
        (["studies", "create", "x", "--classes", "a,b"], 2, "Missing --task"),
        (["studies", "create", "x", "--task", "t", "--classes", "a,b", "--option", "size"], 2, "NAME=VALUE"),
        (["studies", "create", "x", "--task", "t", "--classes", "a,b", "--columns-file", "/nowhere"], 1, "Cannot read"),
        (["request", STUDY, "--rounds", "0"], 1, "rounds: "),
        (["request", STUDY, "--rounds", "1000000000"], 1, "rounds: "),
        (["request", STUDY, "--strategy", "guessing"], 1, "guessing"),
        (["request", STUDY, "--dp-epsilon", "3"], 1, "differential privacy"),
        (["request", "nowhere"], 1, "nowhere"),
        (["approve", "REQ_999"], 1, "REQ_999"),
        (["reject", "REQ_1"], 2, "Missing --reason"),
        (["show", "something"], 2, "no REQ_n, RUN_n or STUDY/n"),
        (["show", f"{STUDY}/99"], 1, "99"),
        (["export", STUDY, "1", "--site", "north", "--out", "x"], 2, "give one of them"),
        (["menu"], 2, "needs a terminal"),
    ],
)
def test_wrong_use_and_wrong_values_are_said(run_here: RunHere, words: list[str], code: int, sentence: str) -> None:
    found, out, err = run_here(words)
    assert (found, out) == (code, "")
    assert sentence in err


# ---- a run, from request to versions ---------------------------------------------------------------------------------


def test_a_rejected_request_says_why(world: CommandWorld) -> None:
    request = world.stack.admin_json("request", STUDY, "--rounds", "3", "--note", "please")
    world.stack.admin("reject", request["id"], "--reason", "not this week")
    shown = world.stack.admin("show", request["id"])
    assert (value_of(shown, "state"), value_of(shown, "reason")) == ("rejected", "not this week")
    assert fails(world, "approve", request["id"]).returncode == 1
    waiting = fails(world, "approve", request["id"], "--json")
    assert json.loads(waiting.stdout)["error"] in ("conflict", "illegal-transition")


def test_a_run_is_followed_from_the_request_to_its_end(world: CommandWorld, tmp_path: Path) -> None:
    env = world.stack.admin_env()
    command = ["medhive-admin", "request", STUDY, "--rounds", "2", "--wait", "--json"]
    waiting = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert waiting.stderr is not None
        said = [waiting.stderr.readline()]
        request_id = said[0].split()[0]
        assert fails(world, "show", "RUN_999").returncode == 1
        run_id = world.stack.admin_json("approve", request_id)["run_id"]
        for site in world.sites:
            world.agree(site, run_id)
        aggregator = world.aggregator()
        assert aggregator.start() == run_id
        aggregator.close_round(1, 0.5, world.sites, {})
        aggregator.close_round(2, 0.75, ["north"], {"south": "late"})
        aggregator.complete(made_weights(tmp_path / "w.safetensors", 1.0), 0.8)
        out, err = waiting.communicate(timeout=120)
    finally:
        waiting.kill()
    said += err.splitlines()
    text = "\n".join(said)
    assert waiting.returncode == 0, text
    run = json.loads(out)
    assert (run["state"], run["version"], len(run["rounds_done"])) == ("completed", 1, 2)
    assert f"{request_id} is approved by admin" in text
    assert "north granted" in text
    assert "round 1/2: 2 of 2 sites answered (north, south), val_accuracy 0.5000" in text
    assert "dropped south: late" in text
    assert f"{run_id} is completed: version 1 of {STUDY}" in text


def test_watching_a_run_that_fails_is_exit_code_1(world: CommandWorld) -> None:
    run_id = world.ready_run("--rounds", "1")
    command = ["medhive-admin", "watch", run_id, "--json"]
    watching = subprocess.Popen(
        command, env=world.stack.admin_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        aggregator = world.aggregator()
        aggregator.start()
        aggregator.fail("the trial wants it so")
        out, err = watching.communicate(timeout=120)
    finally:
        watching.kill()
    assert first == {"run": run_id, "site": "north", "consent": "granted"}
    states = [value["state"] for line in out.splitlines() if "state" in (value := json.loads(line))]
    assert states[-1] == "failed"
    assert watching.returncode == 1
    assert err.startswith(f"error: {run_id} is failed: the trial wants it so")
    assert run_id in world.stack.admin("history")
    assert run_id not in world.stack.admin("runs")


def test_a_run_is_stopped(world: CommandWorld) -> None:
    request = world.stack.admin_json("request", STUDY)
    run_id = world.stack.admin_json("approve", request["id"], "--reason", "as discussed")["run_id"]
    world.stack.admin("stop", run_id, "--reason", "never mind", "--yes")
    shown = world.stack.admin("show", run_id)
    assert value_of(shown, "state") == "cancelled"
    assert value_of(shown, "reason") == "never mind"


def test_versions_are_listed_compared_exported_and_taken_back(world: CommandWorld, tmp_path: Path) -> None:
    first = world.completed_run(made_weights(tmp_path / "a.safetensors", 2.0), 0.8)
    second = world.completed_run(made_weights(tmp_path / "b.safetensors", 3.0), 0.9)
    found = world.stack.admin_json("models", STUDY)
    assert [item["version"] for item in found][-2:] == [first, second]
    shown = world.stack.admin("model", STUDY, str(second))
    assert value_of(shown, "val_accuracy") == "0.9000"
    assert "pituitary" in shown
    compared = world.stack.admin("compare", STUDY, str(first), str(second))
    assert "+0.1000" in compared
    # A download that broke off goes on: the part that is there is not fetched again.
    out = tmp_path / "out.safetensors"
    whole = (tmp_path / "b.safetensors").read_bytes()
    out.with_name("out.safetensors.part").write_bytes(whole[:100])
    exported = world.stack.admin_json("export", STUDY, str(second), "--out", str(out))
    assert exported["sha256"] == sha256_file(out) == sha256_file(tmp_path / "b.safetensors")
    manifest = json.loads(Path(exported["manifest"]).read_text())
    assert manifest["body"]["digest"] == exported["sha256"]
    world.stack.admin("export", STUDY, str(first), "--site", "north")
    world.stack.admin("rollback", STUDY, str(first), "--yes")
    states = {item["version"]: item["state"] for item in world.stack.admin_json("models", STUDY)}
    assert states[first] == "candidate"
    tidy = world.stack.admin_json("cleanup", "--keep", "1", "--dry-run")
    assert isinstance(tidy["bytes_freed"], int)
    world.stack.admin("cleanup", "--keep", "50", "--yes")
    figures = world.stack.admin_json("stats")
    assert figures["versions"] >= 2
    assert value_of(world.stack.admin("stats"), "sites")


# ---- the menu --------------------------------------------------------------------------------------------------------


def test_the_menu_announces_a_request_at_once_and_approves_it(world: CommandWorld) -> None:
    with Typist(["medhive-admin", "menu"], world.stack.admin_env()) as person:
        head = person.expect("pending requests:")
        assert "admin (admin) at https://" in head
        person.expect("Number:")
        request = world.stack.site_json("north", "request", STUDY, "--person", "Dr. North")
        person.expect(f"*** new request: {request['id']} from north ***")
        person.type("1")
        assert request["id"] in person.expect("Number:")
        person.type("99")
        person.expect("no line of this menu")
        person.expect("Number:")
        person.type("2")
        person.expect(f"Request ({request['id']})")
        person.type(request["id"])
        person.expect(f"{request['id']} is approved")
        person.expect("Number:")
        person.type("9")
        person.expect("blob store")
        person.expect("Number:")
        person.type("0")
        assert person.end() == 0


# ---- the audit, last: it changes the log -----------------------------------------------------------------------------


def test_the_log_is_verified_and_exported(world: CommandWorld, tmp_path: Path) -> None:
    result = world.stack.admin_json("audit", "verify")
    assert result["right"] is True
    assert {item["what"] for item in result["findings"]} >= {"hash chain", "coordinator's signature"}
    out = tmp_path / "events.jsonl"
    world.stack.admin("audit", "export", "--out", str(out))
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["number"] for row in rows if "number" in row] == list(
        range(1, sum("number" in row for row in rows) + 1)
    )
    assert any("head" in row for row in rows)
    assert fails(world, "audit", "export", "--out", str(out)).returncode == 1


def test_a_changed_row_is_found(world: CommandWorld) -> None:
    with sqlite3.connect(world.stack.gateway_state / "gateway.db", timeout=60) as database:
        database.execute("UPDATE events SET actor='nobody' WHERE number=3")
    done = fails(world, "audit", "verify")
    assert done.returncode == 1
    assert "3" in done.stdout
    assert "WRONG" in done.stdout
    assert "not what was signed; wrong: hash chain" in done.stderr

"""The container's entry point without a container: arguments, environment, folders, waiting, and each exit code."""

import errno
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from stack import Program, Stack, free_port, wait_until

from fl_client.container import exits
from fl_client.container.arguments import CommandLine, WrongSetting, WrongUse, parse, prepared
from fl_client.container.device import device_line, gpus
from fl_client.container.exits import Exit, exit_code
from fl_client.container.folders import DataUnusable, StateUnusable, require_data, require_state, state_problem
from fl_client.container.health import LONGEST_TURN_S, NAME, Pulse, look
from fl_client.container.health import __file__ as health_file
from fl_client.container.serve import InviteRefused, join_when_it_answers, open_folders, passes_by_itself, refusal
from fl_client.container.waiting import REMIND_S, Patience, Voice
from fl_client.events import Connected, Disconnected, Stopped
from fl_client.gateway import WrongAuthority
from fl_client.identity import AlreadyJoined, Identity, JoinOutcome
from fl_client.settings import Settings
from medhive.errors import (
    BadSignature,
    ClockSkew,
    Conflict,
    DigestMismatch,
    Expired,
    InvalidInput,
    MedHiveError,
    NoSpace,
    NotAllowed,
    Unavailable,
    Unreachable,
)
from medhive.terminal import Terminal

ROOT = Path(__file__).parents[2]
TOKEN = "mh2." + "A" * 43 + "." + "A" * 43 + ".pinned"
ENTRY = [sys.executable, "-P", "-m", "fl_client.container"]


# ---- arguments and environment -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [["-e", "CLIENT_ID=a=b"], ["-eCLIENT_ID=a=b"], ["--env", "CLIENT_ID=a=b"], ["--env=CLIENT_ID=a=b"]]
)
def test_variables_after_the_images_name_are_taken_in_every_form(form: list[str]) -> None:
    assert parse([*form, "-e", "X=", "check-data", "-e", "later"]) == CommandLine(
        {"CLIENT_ID": "a=b", "X": ""}, ("check-data", "-e", "later")
    )


def test_no_command_is_to_serve_and_the_programs_name_may_be_given() -> None:
    assert parse([]) == CommandLine()
    assert parse(["medhive-site", "status", "--json"]).command == ("status", "--json")
    assert parse(["--version"]).command == ("--version",)


@pytest.mark.parametrize(
    "words", [["-e"], ["-e", "JOIN_TOKEN"], ["-e", "=x"], ["--env=9A=1"], ["-v", "/a:/data"], ["--gpus=all"]]
)
def test_what_belongs_before_the_images_name_is_refused(words: list[str]) -> None:
    with pytest.raises(WrongUse) as caught:
        parse(words)
    assert exit_code(caught.value) == Exit.WRONG_USE


def test_a_bare_word_after_e_is_not_repeated() -> None:
    with pytest.raises(WrongUse) as caught:
        parse(["-e", TOKEN])
    assert TOKEN not in str(caught.value)


def test_empty_variables_count_as_none_and_space_is_cut_off() -> None:
    given = {"JOIN_TOKEN": "", "EXTRA_CA_FILE": " ", "SERVER_ADDRESS": "https://a:1\r", "OTHER": " kept ", "EMPTY": ""}
    assert prepared(given) == {"SERVER_ADDRESS": "https://a:1", "OTHER": " kept ", "EMPTY": ""}


def test_a_proxys_address_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "proxy"
    file.write_text("http://user:secret@proxy:3128\n")
    assert prepared({"HTTPS_PROXY_FILE": str(file)}) == {"HTTPS_PROXY": "http://user:secret@proxy:3128"}
    file.write_text("")
    with pytest.raises(WrongSetting, match="HTTPS_PROXY_FILE: "):
        prepared({"HTTPS_PROXY_FILE": str(file)})
    with pytest.raises(WrongSetting, match="HTTPS_PROXY_FILE: "):
        prepared({"HTTPS_PROXY_FILE": str(tmp_path / "none")})


# ---- folders -------------------------------------------------------------------------------------------------------


def test_one_readable_file_anywhere_is_data(tmp_path: Path) -> None:
    (tmp_path / "study" / "class").mkdir(parents=True)
    with pytest.raises(DataUnusable, match="is empty; mount"):
        require_data(tmp_path)
    (tmp_path / "study" / "class" / "1.png").write_bytes(b"x")
    require_data(tmp_path)
    require_data(tmp_path / "study" / "class" / "1.png")


def test_a_missing_folder_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataUnusable, match=r"is empty; mount .* -v /their/scans:"):
        require_data(tmp_path / "none")


def test_where_scans_can_be_pulled_no_data_need_be_there_yet(tmp_path: Path) -> None:
    settings = Settings(
        state_dir=tmp_path / "state", data_dir=tmp_path / "none", pacs_url="https://pacs.example/dicom-web"
    )
    assert open_folders(Terminal(no_input=True), settings) is None
    with pytest.raises(DataUnusable):
        open_folders(Terminal(no_input=True), settings.model_copy(update={"pacs_url": ""}))


def test_a_link_that_leads_nowhere_is_not_readable(tmp_path: Path) -> None:
    (tmp_path / "1.png").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataUnusable, match="cannot be read by this container's user"):
        require_data(tmp_path)


def test_a_state_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    require_state(tmp_path / "state")
    assert list((tmp_path / "state").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnusable, match="cannot be used"):
        require_state(tmp_path / "file")


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EROFS, StateUnusable, "is read-only; mount a writable volume"),
        (errno.EACCES, StateUnusable, "chown -R"),
        (errno.ENOSPC, NoSpace, "is full"),
        (errno.EDQUOT, NoSpace, "is full"),
        (errno.EIO, StateUnusable, "cannot be used"),
    ],
)
def test_each_way_in_which_a_state_folder_fails_is_told(number: int, kind: type[MedHiveError], words: str) -> None:
    error = state_problem(Path("/state"), OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert words in str(error)


# ---- health and waiting --------------------------------------------------------------------------------------------


def test_the_mark_says_what_goes_on_and_grows_old(tmp_path: Path) -> None:
    places = (str(tmp_path / "missing"), str(tmp_path))
    assert look(places) == (True, "a single command, nothing is served")
    Pulse(places).beat("connected to the fleet")
    well, words = look(places)
    assert well
    assert words.startswith("connected to the fleet (")
    old = time.time() - LONGEST_TURN_S - 1
    os.utime(tmp_path / NAME, (old, old))
    assert not look(places)[0]


def test_the_mark_is_written_at_once_only_when_the_words_change(tmp_path: Path) -> None:
    pulse = Pulse((str(tmp_path),))
    pulse.beat("one")
    (tmp_path / NAME).unlink()
    pulse.beat("one")
    assert not (tmp_path / NAME).exists()
    pulse.beat("two")
    assert (tmp_path / NAME).read_text() == "two"


def test_the_check_needs_neither_the_package_nor_site(tmp_path: Path) -> None:
    check = [sys.executable, "-I", "-S", health_file, str(tmp_path)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    Pulse((str(tmp_path),)).beat("connected to the fleet")
    os.utime(tmp_path / NAME, (0, 0))
    hangs = subprocess.run(check, capture_output=True, text=True, check=False)
    assert hangs.returncode == 1
    assert hangs.stdout.startswith("connected to the fleet")


class Clock:
    """Seconds that a test turns forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_waiting_is_told_once_and_then_every_minute(tmp_path: Path) -> None:
    said: list[str] = []
    clock = Clock()
    patience = Patience(said.append, Pulse((str(tmp_path),)), clock)
    voice = Voice(lambda _event: None, patience)
    patience.tick()
    assert (tmp_path / NAME).read_text() == "starting"
    for event in (Connected("gateway"), Disconnected("gateway", "gone"), Disconnected("fleet", "gone"), Stopped()):
        voice(event)
    for _ in range(int(3 * REMIND_S)):
        clock.now += 1
        patience.tick()
    assert said == [f"still waiting for the fleet and the gateway, {n} min; trying again" for n in (1, 2, 3)]
    assert (tmp_path / NAME).read_text() == "waiting for the fleet and the gateway"
    voice(Connected("fleet"))
    voice(Connected("gateway"))
    clock.now += 2 * REMIND_S
    patience.tick()
    assert len(said) == 3
    assert (tmp_path / NAME).read_text() == "connected to the fleet and the gateway"


def outcome() -> JoinOutcome:
    identity = Identity("north", ("https://a",), "https://a", "Coordinator", "", "", "")
    return JoinOutcome(identity, True, ())


def test_a_coordinator_that_is_not_up_is_waited_for(tmp_path: Path) -> None:
    answers: list[MedHiveError | JoinOutcome] = [Unreachable("nobody"), Unavailable("502"), outcome()]
    said: list[str] = []

    def join(_settings: Settings, _token: str) -> JoinOutcome:
        answer = answers.pop(0)
        if isinstance(answer, MedHiveError):
            raise answer
        return answer

    patience = Patience(said.append, Pulse((str(tmp_path),)))
    found = join_when_it_answers(Settings(), TOKEN, patience, said.append, join=join, pause=lambda _s: None)
    assert found.identity.site == "north"
    assert said == ["the coordinator is not up yet, waiting for it and trying again: nobody"]


def no_coordinator() -> MedHiveError:
    """What `introduce` raises when something else answers."""
    request = httpx.Request("GET", "https://a")
    error = InvalidInput("https://a does not answer as a MedHive coordinator; check the address.")
    error.__cause__ = httpx.HTTPStatusError("no", request=request, response=httpx.Response(404, request=request))
    return error


def test_what_does_not_pass_by_itself_is_not_waited_for() -> None:
    assert passes_by_itself(Unavailable("503"))
    assert not passes_by_itself(no_coordinator())
    assert not passes_by_itself(Expired("too late"))


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (NotAllowed("This invite is for another site"), InviteRefused, Exit.INVITE),
        (Expired("This invite expired"), InviteRefused, Exit.INVITE),
        (Conflict("used already"), InviteRefused, Exit.INVITE),
        (BadSignature("no"), InviteRefused, Exit.INVITE),
        (WrongAuthority("another"), WrongAuthority, Exit.AUTHORITY),
        (no_coordinator(), WrongAuthority, Exit.AUTHORITY),
        (AlreadyJoined("another's"), AlreadyJoined, Exit.NOT_WANTED),
        (NoSpace("full"), NoSpace, Exit.DISK_FULL),
        (ClockSkew("off"), ClockSkew, Exit.VERSIONS),
        (DigestMismatch("other bytes"), DigestMismatch, Exit.FAILED),
    ],
)
def test_each_refusal_has_its_exit_code(error: MedHiveError, kind: type[MedHiveError], code: Exit) -> None:
    refused = refusal(error)
    assert (type(refused), exit_code(refused)) == (kind, code)


# ---- exit codes ----------------------------------------------------------------------------------------------------


def codes_of(kind: type[MedHiveError]) -> Iterator[str]:
    """The codes of an error and all kinds of it."""
    yield kind.code
    for each in kind.__subclasses__():
        yield from codes_of(each)


def test_every_cause_in_the_table_exists_and_every_code_is_used() -> None:
    assert set(exits.BY_CAUSE) <= set(codes_of(MedHiveError))
    assert set(exits.BY_CAUSE.values()) | {Exit.STOPPED, Exit.FAILED, Exit.TERMINATED} == set(Exit)


def test_the_guide_explains_every_exit_code() -> None:
    text = (ROOT / "docs" / "hospital-container.md").read_text()
    told = {int(number) for number in re.findall(r"(?m)^\| (\d+) \|", text)}
    assert told == set(Exit)


# ---- the device ----------------------------------------------------------------------------------------------------


def test_the_device_is_named(tmp_path: Path) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA A100\nIRQ:   1\n")
    assert gpus(tmp_path) == ("NVIDIA A100",)
    assert gpus(tmp_path / "none") == ()
    assert device_line("auto", ("NVIDIA A100",), "2.13.0") == "training on the GPU: NVIDIA A100"
    assert "cuda:1 as set" in device_line("cuda:1", ("NVIDIA A100",), "2.13.0")
    assert "--gpus all" in device_line("auto", (), "2.13.0")
    assert "built for nothing else" in device_line("auto", ("NVIDIA A100",), "2.13.0+cpu")
    assert "as set" in device_line("cpu", ("NVIDIA A100",), "2.13.0")


# ---- the real process ----------------------------------------------------------------------------------------------


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a container's process has: its folders, with data in them."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "1.png").write_bytes(b"x")
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {
        "HOME": str(folder),
        "DATA_DIR": str(data),
        "STATE_DIR": str(folder / "state"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def run(env: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point to its end."""
    return subprocess.run([*ENTRY, *words], env=dict(env), capture_output=True, text=True, timeout=120, check=False)


def test_missing_settings_are_named_in_one_sentence(tmp_path: Path) -> None:
    done = run(environment(tmp_path), "-e", "CLIENT_ID=north")
    assert done.returncode == Exit.SETTING
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: SERVER_ADDRESS, JOIN_TOKEN: missing; ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("SERVER_ADDRESS", "http://coordinator", Exit.SETTING),
        ("CLIENT_ID", "a name with spaces", Exit.SETTING),
        ("EXTRA_CA_FILE", "/does/not/exist", Exit.SETTING),
        ("EXTRA_CA_FILE", "/etc/hostname", Exit.SETTING),
        ("HTTPS_PROXY", "gopher://user:secret@proxy", Exit.SETTING),
        ("JOIN_TOKEN_FILE", "/does/not/exist", Exit.SETTING),
        ("JOIN_TOKEN", "not-an-invite", Exit.INVITE),
        ("DATA_DIR", "/does/not/exist", Exit.DATA),
        ("STATE_DIR", "/proc/state", Exit.STATE),
    ],
)
def test_a_wrong_setting_ends_the_start_and_is_named(tmp_path: Path, name: str, value: str, code: Exit) -> None:
    good = {"SERVER_ADDRESS": "https://localhost:9", "CLIENT_ID": "north", "JOIN_TOKEN": TOKEN}
    done = run(environment(tmp_path, **good | {name: value}))
    assert done.returncode == code
    assert f"[exit code {int(code)}]" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    if code is Exit.SETTING:
        assert f"error: {name}: " in done.stderr


def test_a_command_is_medhive_sites(tmp_path: Path) -> None:
    done = run(environment(tmp_path), "medhive-site", "status")
    assert done.returncode == Exit.FAILED
    assert "has not joined yet" in done.stderr
    assert run(environment(tmp_path), "no-such-command").returncode == Exit.WRONG_USE


def test_it_waits_for_the_coordinator_keeps_the_token_to_itself_and_stops_at_once(tmp_path: Path) -> None:
    argv = [
        *ENTRY,
        "-e",
        f"SERVER_ADDRESS=https://localhost:{free_port()}",
        "-e",
        "CLIENT_ID=north",
        "-e",
        f"JOIN_TOKEN={TOKEN}",
    ]
    program = Program("hospital", argv, environment(tmp_path), tmp_path / "log").start()
    try:
        program.wait_for("the coordinator is not up yet, waiting for it")
        assert TOKEN not in Path(f"/proc/{program.pid}/cmdline").read_text()
        assert TOKEN not in program.text()
        os.kill(program.pid, signal.SIGTERM)
        assert program.process is not None
        assert program.process.wait(60) == Exit.STOPPED, "it was cut off in the end"
    finally:
        program.stop()
    assert program.text().count("waiting for it") == 1
    assert "Traceback" not in program.text()


def test_what_does_not_end_by_itself_is_cut_off(tmp_path: Path) -> None:
    code = (
        "import signal, time; from fl_client.container.__main__ import end_in_time; end_in_time(); "
        "signal.signal(signal.SIGTERM, lambda *_: None); print('deaf', flush=True)\n"
        "while True: time.sleep(60)"
    )
    program = Program("deaf", [sys.executable, "-c", code], environment(tmp_path), tmp_path / "log").start()
    try:
        program.wait_for("deaf")
        os.kill(program.pid, signal.SIGTERM)
        assert program.process is not None
        assert program.process.wait(60) == Exit.TERMINATED
    finally:
        program.stop()
    assert "is resumed at the next start" in program.text()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A real gateway with an admin, and no hospital yet."""
    with Stack(tmp_path_factory.mktemp("coordinator"), mlflow=False) as stack:
        stack.login(stack.start_gateway() or "")
        yield stack


def invite(stack: Stack, site: str) -> str:
    return str(stack.admin_json("invite", site)["token"])


def hospital(stack: Stack, folder: Path, site: str, token: str, *words: str, **more: str) -> Program:
    """The container's process, started as people start the container."""
    given = {"SERVER_ADDRESS": stack.url, "CLIENT_ID": site, "JOIN_TOKEN": token}
    env = environment(folder, **given | more)
    return Program(site, [*ENTRY, *words], env, folder / "log").start()


def ended(program: Program) -> int:
    """The exit code of a process that ends by itself."""
    try:
        wait_until(lambda: not program.running(), f"the end of {program.name}", 120)
    finally:
        program.stop()
    assert program.process is not None
    assert "Traceback" not in program.text()
    return program.process.returncode


def test_it_joins_once_and_goes_on_as_the_same_hospital(stack: Stack, tmp_path: Path) -> None:
    token = invite(stack, "first")
    program = hospital(stack, tmp_path, "first", token)
    try:
        program.wait_for("first has joined Coordinator")
        program.wait_for("connected to the gateway")
        program.wait_for("training on the ")
    finally:
        assert program.stop() == Exit.STOPPED
    again = hospital(stack, tmp_path, "first", token, "run", "--json")
    try:
        again.wait_for("JOIN_TOKEN is ignored")
        again.wait_for('"event": "Connected"')
    finally:
        assert again.stop() == Exit.STOPPED
    assert "has joined Coordinator.\n" in program.text()
    other = hospital(stack, tmp_path, "second", token)
    assert ended(other) == Exit.NOT_WANTED
    assert "belongs to first, and CLIENT_ID is second" in other.text()
    assert token not in other.text()


def test_a_refused_invite_has_its_exit_code(stack: Stack, tmp_path: Path) -> None:
    program = hospital(stack, tmp_path, "somebody", invite(stack, "somebody-else"))
    assert ended(program) == Exit.INVITE
    assert "JOIN_TOKEN is refused: This invite is for another site than somebody" in program.text()


def test_another_coordinators_invite_is_a_wrong_authority(stack: Stack, tmp_path: Path) -> None:
    kind, seed, _, trust = invite(stack, "careful").split(".")
    program = hospital(stack, tmp_path, "careful", f"{kind}.{seed}.{'A' * 43}.{trust}")
    assert ended(program) == Exit.AUTHORITY
    assert "not the one that made this invite" in program.text()


class Tunnel(socketserver.StreamRequestHandler):
    """One CONNECT through a hospital's proxy, which leads to the coordinator whatever name was asked for."""

    server: "Proxy"

    def handle(self) -> None:
        self.server.asked.append(self.rfile.readline().decode().split()[1])
        while self.rfile.readline().strip():
            pass
        with socket.create_connection(("127.0.0.1", self.server.target)) as other:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(other, self.connection), daemon=True)
            back.start()
            pump(self.connection, other)
            back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Hand bytes on until one side ends."""
    with suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


class Proxy(socketserver.ThreadingTCPServer):
    """A hospital's outbound proxy."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.target = target
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.ports["gateway"]) as proxy:
        yield proxy
        proxy.shutdown()


def test_a_hospital_behind_a_proxy_joins_through_it(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    program = hospital(stack, tmp_path, "behind", invite(stack, "behind"), HTTPS_PROXY=proxy.url)
    try:
        program.wait_for("connected to the gateway")
        fleet = f"localhost:{stack.ports['fleet']}"
        wait_until(lambda: fleet in proxy.asked, "Flower's connection, which goes through it too", 120)
    finally:
        program.stop()
    assert f"localhost:{stack.ports['gateway']}" in proxy.asked


def test_a_certificate_for_another_name_is_a_wrong_authority(stack: Stack, proxy: Proxy, tmp_path: Path) -> None:
    given = {"SERVER_ADDRESS": "https://coordinator.example", "HTTPS_PROXY": proxy.url}
    program = hospital(stack, tmp_path, "by-name", invite(stack, "by-name"), **given)
    assert ended(program) == Exit.AUTHORITY
    assert "shows a certificate that is not the inviting coordinator's" in program.text()


def test_a_revoked_hospital_is_not_wanted(stack: Stack, tmp_path: Path) -> None:
    program = hospital(stack, tmp_path, "unwanted", invite(stack, "unwanted"))
    program.wait_for("connected to the gateway")
    stack.admin("revoke", "unwanted", "--reason", "trial", "--yes")
    assert ended(program) == Exit.NOT_WANTED
    assert "no longer works with this hospital" in program.text()

"""The aggregator's Flower adapter against a real SuperLink: each trap of flwr 1.41 that it answers for."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
from flower_stack import FlowerStack, ScriptedRun, answering
from flwr.common.config import get_fab_config
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from waiting import until

from fl_server.flower import (
    FlowerRunNotFound,
    NodeKeySpent,
    NodeUnknown,
    RunPhase,
    SuperLink,
    SuperLinkUnreachable,
    _envelope_in,
    bundle_bytes,
    bundle_digest,
    superlink_command,
)
from medhive.errors import InvalidInput


def test_the_bundle_is_the_same_every_time_and_valid_for_flower() -> None:
    assert bundle_bytes() == bundle_bytes()
    assert bundle_digest() == hashlib.sha256(bundle_bytes()).hexdigest()
    assert get_fab_config(bundle_bytes())["tool"]["flwr"]["app"]["config"] == {"medhive-run": "", "medhive-fence": 0}


def test_the_superlink_listens_on_loopback_alone_and_gets_no_secrets_of_medhive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDHIVE_SERVER_TOKEN", "secret")
    files = dict.fromkeys(["database", "cert", "key", "ca", "secret_file", "home"], tmp_path)
    command = superlink_command(port=1, **files)
    assert command.argv[command.argv.index("--host") + 1] == "127.0.0.1"
    assert "MEDHIVE_SERVER_TOKEN" not in command.env
    assert command.env["FLWR_TELEMETRY_ENABLED"] == "0"


@pytest.mark.parametrize(
    "entry", [b"\x12\x00", b"\x12\x02\x08\x01", b"\x12\x01\xff"], ids=["empty", "a number", "cut off"]
)
def test_a_record_that_flower_itself_stumbles_on_is_no_envelope(entry: bytes) -> None:
    """Any node can send one, and its hash is right."""
    named = b"\x0a\x08envelope" + entry
    body = b"\x0a" + bytes([len(named)]) + named
    assert _envelope_in(b"ConfigRecord  %d\x00" % len(body) + body) is None


def test_a_run_exchanges_envelopes_with_its_nodes(flower_stack: FlowerStack) -> None:
    nodes = [flower_stack.make_node() for _ in range(2)]
    with flower_stack.connect(nodes[0]) as one, flower_stack.connect(nodes[1]) as two:
        with answering(one), answering(two):
            run = flower_stack.run_script(*nodes, rounds=2)
            assert run.end().phase is RunPhase.COMPLETED
        assert {node.node_id for node in flower_stack.control.nodes() if node.online} >= {n.node_id for n in nodes}
    told = {(note["round"], note["node"], note["payload"]) for note in run.answers()}
    assert told == {(r, n.node_id, f"echo {r}.0") for r in range(2) for n in nodes}
    assert run.note("started")["fence"] == 7
    assert flower_stack.control.runs()[run.number].config["medhive-fence"] == 7


def test_a_run_goes_on_when_the_superlink_is_killed_and_restarted(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    outages: list[object] = []
    with flower_stack.connect(node, on_outage=outages.append) as connection:
        run = flower_stack.run_script(node, rounds=3)
        inbound = until(connection.receive, "the first message comes")
        flower_stack.kill_superlink()
        with pytest.raises(SuperLinkUnreachable):
            flower_stack.control.nodes()
        flower_stack.start_superlink()
        assert connection.reply(inbound, b"late but there")
        with answering(connection):
            assert run.end().phase is RunPhase.COMPLETED
    assert [note["payload"] for note in run.answers()] == ["late but there", "echo 1.0", "echo 2.0"]


def test_a_killed_serverapp_fails_its_run_at_once_and_can_be_started_again(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        run = flower_stack.run_script(node)
        run.note("sent")
        run.kill()
        ended = run.end()
        assert ended.phase is RunPhase.FAILED
        assert "SIGKILL" in ended.details
        with answering(connection):
            assert flower_stack.run_script(node).end().phase is RunPhase.COMPLETED


def test_runs_of_a_killed_superexec_fail_and_another_superexec_goes_on(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        run = flower_stack.run_script(node)
        child = run.note("started")["started"]
        run.note("sent")
        flower_stack.kill_superexec()
        assert run.end().phase is RunPhase.FAILED
        until(lambda: not Path(f"/proc/{child}").exists(), "the ServerApp process is gone")
        flower_stack.start_superexec()
        with answering(connection):
            assert flower_stack.run_script(node).end().phase is RunPhase.COMPLETED


def test_a_stopped_run_ends_its_process_and_the_round_loop_hears_of_it(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node):
        run = flower_stack.run_script(node)
        child = run.note("started")["started"]
        run.note("sent")
        assert flower_stack.control.stop_run(run.number)
        assert run.note("stopped")["stopped"]
    until(lambda: not Path(f"/proc/{child}").exists(), "the ServerApp process is gone")
    assert flower_stack.control.run(run.number).phase is RunPhase.STOPPED
    assert not flower_stack.control.stop_run(run.number)


def test_the_token_of_a_run_stands_on_no_command_line(flower_stack: FlowerStack) -> None:
    run = flower_stack.run_script(flower_stack.make_seasoned_node())
    child = run.note("started")["started"]
    line = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
    assert b"serverapp" in line
    assert not any(b"token" in word or len(word) == 64 for word in line)
    run.end()


def test_another_bundle_is_never_started(flower_stack: FlowerStack, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    foreign = _with_file("medhive_bundle/server_app.py", f"open({str(mark)!r}, 'w')\n")
    request = StartRunRequest(fab=Fab(hash_str=hashlib.sha256(foreign).hexdigest(), content=foreign))
    number = flower_stack.control._control.StartRun(request).run_id
    ended = ScriptedRun(flower_stack, number, tmp_path / "no-notes").end()
    assert ended.phase is RunPhase.FAILED
    assert "own bundle" in ended.details
    assert not mark.exists()


def test_a_run_with_a_setting_that_the_bundle_lacks_is_refused(flower_stack: FlowerStack) -> None:
    with pytest.raises(InvalidInput, match="evil"):
        flower_stack.control.start_run({"evil": 1})


def test_registering_a_key_twice_gives_the_same_node_and_a_revoked_key_never_again(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    assert flower_stack.control.register_node(node.public_pem) == node.node_id
    flower_stack.control.unregister_node(node.node_id)
    with pytest.raises(NodeUnknown):
        flower_stack.control.unregister_node(node.node_id)
    with pytest.raises(NodeKeySpent):
        flower_stack.control.register_node(node.public_pem)
    with pytest.raises(InvalidInput):
        flower_stack.control.register_node(b"no key")


def test_unknown_runs_and_an_absent_superlink_are_told_apart(flower_stack: FlowerStack) -> None:
    with pytest.raises(FlowerRunNotFound):
        flower_stack.control.run(1)
    with pytest.raises(FlowerRunNotFound):
        flower_stack.control.stop_run(1)
    absent = SuperLink(address="https://127.0.0.1:9", ca=flower_stack.ca)
    with pytest.raises(SuperLinkUnreachable):
        absent.nodes()
    assert not absent.is_ready()
    absent.close()


def test_a_message_to_a_revoked_node_or_an_absent_one_fails_by_name(flower_stack: FlowerStack) -> None:
    revoked, absent = flower_stack.make_seasoned_node(), flower_stack.make_seasoned_node()
    flower_stack.control.unregister_node(revoked.node_id)
    run = flower_stack.run_script(revoked, absent)
    assert run.end().phase is RunPhase.COMPLETED
    assert {note["node"]: note["error"] for note in run.answers()} == {
        revoked.node_id: "unknown",
        absent.node_id: "node-offline",
    }


def _with_file(name: str, text: str) -> bytes:
    source, out = zipfile.ZipFile(io.BytesIO(bundle_bytes())), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for entry in source.namelist():
            archive.writestr(entry, text if entry == name else source.read(entry))
    return out.getvalue()

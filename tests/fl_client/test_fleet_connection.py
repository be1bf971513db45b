"""The hospital's Flower adapter against a real SuperLink: each trap of flwr 1.41 that it answers for."""

import dataclasses
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from flower_stack import FlowerStack, Node, answering
from flwr.app import ArrayRecord, RecordDict
from flwr.app.message import make_message
from flwr.supercore.date import now
from stack import free_port
from waiting import until

import fl_client.flower
from fl_client.flower import (
    FleetClosed,
    FleetConnection,
    FleetUnreachable,
    FleetUntrusted,
    Inbound,
    NodeRevoked,
    Outage,
    RunGone,
)
from medhive.envelope import MAX_ENVELOPE_BYTES
from medhive.errors import ClockSkew, InvalidInput, TooLarge

HOLD_S, DEADLINE_S = 20.0, 60.0


@pytest.fixture(scope="module", autouse=True)
def crashed_node(flower_stack: FlowerStack) -> Node:
    """A node that crashes before the first test, so that the last one need not wait for its heartbeat to lapse."""
    node = flower_stack.make_node()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl_client.flower, "HEARTBEAT_DEFAULT_INTERVAL", 10)  # the shortest that Flower takes
        crashed = flower_stack.connect(node)
        crashed.__enter__()
    abandon(crashed)
    return node


def take(connection: FleetConnection, count: int) -> list[Inbound]:
    """Receive this many messages, leaving them unanswered."""
    taken: list[Inbound] = []

    def look() -> bool:
        if (inbound := connection.receive()) is not None:
            taken.append(inbound)
        return len(taken) == count

    until(look, f"{count} messages come")
    return taken


def test_a_node_that_crashed_and_forgot_its_id_is_kept_out_for_a_while(
    flower_stack: FlowerStack, crashed_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fl_client.flower, "HEARTBEAT_LAPSE_S", 1.0)
    monkeypatch.setattr(fl_client.flower, "LONGEST_WAIT_S", 0.3)
    with pytest.raises(NodeRevoked, match="same state folder"), flower_stack.connect(crashed_node):
        pass


def test_several_messages_are_in_hand_at_once_and_answered_in_any_order(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        run = flower_stack.run_script(node, copies=3)
        in_hand = take(connection, 3)
        assert sorted(inbound.payload for inbound in in_hand) == [b"0.0", b"0.1", b"0.2"]
        for inbound in reversed(in_hand):
            assert connection.reply(inbound, b"re " + inbound.payload)
        run.end()
    assert sorted(note["payload"] for note in run.answers()) == ["re 0.0", "re 0.1", "re 0.2"]


def test_the_superlink_keeps_a_message_until_it_is_confirmed(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        run = flower_stack.run_script(node)
        (inbound,) = take(connection, 1)
        assert connection.receive() is None, "it is handed out once, confirmed or not"
        # Its own object: those below it are shared with every message of the same content.
        assert connection._pull_object(inbound.flower_run, inbound.message_id)
        for _again in range(2):
            connection.confirm(inbound)
            with pytest.raises(InvalidInput, match="never uploaded"):
                connection._pull_object(inbound.flower_run, inbound.message_id)
        assert connection.reply(inbound, b"done")
        run.end()


def test_a_look_that_is_held_ends_with_a_message_and_with_the_connection(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    asking = threading.Event()
    with flower_stack.connect(node) as connection, ThreadPoolExecutor(1) as pool:
        connection._fleet._client.event_hooks = {"request": [lambda _request: asking.set()]}

        def look() -> tuple[Inbound | None, bool]:
            asking.clear()
            begun = time.monotonic()
            return connection.receive(HOLD_S), time.monotonic() - begun < HOLD_S

        first = pool.submit(look)
        run = flower_stack.run_script(node)
        inbound, woken = first.result(DEADLINE_S)
        assert inbound is not None
        assert woken, "by the message"
        connection.confirm(inbound)
        assert connection.reply(inbound, b"done")
        run.end()
        asking.clear()
        second = pool.submit(look)
        assert asking.wait(DEADLINE_S)
        connection.close()
        assert second.result(DEADLINE_S) == (None, True)


def test_a_second_answer_to_one_message_is_not_wanted(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        run = flower_stack.run_script(node, copies=2)
        first, second = take(connection, 2)
        assert connection.reply(first, b"one")
        assert not connection.reply(first, b"other")
        assert connection.reply(second, b"two")
        run.end()


def test_an_answer_after_the_messages_time_or_above_the_limit_is_not_sent(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        run = flower_stack.run_script(node)
        (inbound,) = take(connection, 1)
        assert not connection.reply(dataclasses.replace(inbound, ttl=-1.0), b"late")
        with pytest.raises(TooLarge):
            connection.reply(inbound, bytes(MAX_ENVELOPE_BYTES + 1))
        assert connection.reply(inbound, b"a" * MAX_ENVELOPE_BYTES)
        run.end()


def test_a_message_taken_before_a_crash_is_answered_after_it_without_waiting(
    flower_stack: FlowerStack, tmp_path: Path
) -> None:
    node, memory = flower_stack.make_node(), tmp_path / "node"
    crashed = flower_stack.connect(node, node_file=memory)
    crashed.__enter__()  # and never left: no goodbye, as after a crash
    run = flower_stack.run_script(node)
    (inbound,) = take(crashed, 1)
    with flower_stack.connect(node, node_file=memory) as connection:
        assert connection.reply(inbound, b"from beyond")
        run.end()
    assert run.answers()[0]["payload"] == "from beyond"
    assert memory.stat().st_mode & 0o777 == 0o600
    abandon(crashed)


def test_a_stopped_run_is_gone_for_those_who_ask_and_those_who_answer(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        run = flower_stack.run_script(node)
        (inbound,) = take(connection, 1)
        connection.check_run(inbound.flower_run)
        flower_stack.control.stop_run(run.number)
        with pytest.raises(RunGone):
            connection.check_run(inbound.flower_run)
        with pytest.raises(RunGone):
            connection.reply(inbound, b"too late")
        connection.confirm(inbound)
        assert connection.receive() is None
        run.note("stopped")


def test_a_revoked_node_is_told_so_and_its_process_lives_on(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node) as connection:
        flower_stack.control.unregister_node(node.node_id)
        with pytest.raises(NodeRevoked, match="join again"):
            connection.receive()


def test_a_key_that_is_not_registered_gets_no_connection(
    flower_stack: FlowerStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fl_client.flower, "HEARTBEAT_LAPSE_S", 0.0)
    node = flower_stack.make_node()
    flower_stack.control.unregister_node(node.node_id)
    with pytest.raises(NodeRevoked), flower_stack.connect(node):
        pass


@pytest.mark.parametrize("ahead", [600.0, -600.0])
def test_a_clock_off_by_ten_minutes_is_named_and_an_offset_corrects_it(
    flower_stack: FlowerStack, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    monkeypatch.setattr(fl_client.flower, "now", lambda: now() + timedelta(seconds=ahead))
    node = flower_stack.make_node()
    with pytest.raises(ClockSkew, match=r"(5[5-9]\d|6[0-4]\d) s") as caught, flower_stack.connect(node):
        pass
    assert caught.value.data["seconds_ahead"] == pytest.approx(ahead, abs=50.0)
    with flower_stack.connect(node, clock_offset=lambda: -ahead) as connection:
        run = flower_stack.run_script(node)
        with answering(connection):
            run.end()
    assert run.answers()[0]["payload"] == "echo 0.0"


def test_an_absent_superlink_is_reported_until_patience_ends(flower_stack: FlowerStack) -> None:
    heard: list[Outage | None] = []
    connection = FleetConnection(
        address=f"https://127.0.0.1:{free_port()}",
        tls=flower_stack.tls,
        node_key=flower_stack.make_node().key,
        on_outage=heard.append,
        patience_s=1.0,
    )
    with pytest.raises(FleetUnreachable, match="has not answered"), connection:
        pass
    assert [outage.attempts for outage in heard if outage] == [*range(1, len(heard) + 1)]
    assert heard[-1] is not None
    assert heard[-1].seconds >= 1.0


def test_an_outage_in_mid_connection_is_reported_and_so_is_its_end(flower_stack: FlowerStack) -> None:
    heard: list[Outage | None] = []
    with flower_stack.connect(flower_stack.make_node(), on_outage=heard.append) as connection:
        flower_stack.kill_superlink()
        waiting = threading.Thread(target=connection.receive)
        waiting.start()
        until(lambda: heard, "the outage is heard of")
        flower_stack.start_superlink()
        waiting.join(DEADLINE_S)
        assert not waiting.is_alive()
    assert heard[0] is not None
    assert heard[-1] is None


def test_closing_ends_a_wait_from_another_thread(flower_stack: FlowerStack) -> None:
    address = f"https://127.0.0.1:{free_port()}"
    node = flower_stack.make_node()
    connection = FleetConnection(
        address=address, tls=flower_stack.tls, node_key=node.key, on_outage=lambda _outage: connection.close()
    )
    with pytest.raises(FleetClosed), connection:
        pass


def test_a_certificate_of_another_authority_is_refused(flower_stack: FlowerStack) -> None:
    strict = FleetConnection(
        address=flower_stack.address, tls=ssl.create_default_context(), node_key=flower_stack.make_node().key
    )
    with pytest.raises(FleetUntrusted, match="certificate"), strict:
        pass


def test_flower_does_not_bind_an_answer_to_its_sender(flower_stack: FlowerStack) -> None:
    """One node answers in the name of another: why every envelope is signed, and Flower's word is never taken."""
    victim, thief = flower_stack.make_node(), flower_stack.make_node()
    with flower_stack.connect(victim) as honest, flower_stack.connect(thief) as forger:
        run = flower_stack.run_script(victim)
        (inbound,) = take(honest, 1)
        message = forger._compose(inbound, b"forged", now().timestamp(), 30.0)
        message.metadata.__dict__["_src_node_id"] = victim.node_id
        assert forger._push(inbound.flower_run, message)
        run.end()
    assert run.answers() == [{"round": 0, "node": victim.node_id, "payload": "forged", "error": None}]


def test_a_malformed_or_half_uploaded_answer_of_one_node_holds_up_no_other(flower_stack: FlowerStack) -> None:
    nodes = [flower_stack.make_node() for _ in range(3)]
    odd, half, good = (flower_stack.connect(node) for node in nodes)
    with odd, half, good:
        run = flower_stack.run_script(*nodes)
        (at_odd,), (at_half,), (at_good,) = take(odd, 1), take(half, 1), take(good, 1)
        wrong = odd._compose(at_odd, b"x", now().timestamp(), 30.0)
        wrong = make_message(wrong.metadata, RecordDict({"medhive": ArrayRecord()}))
        assert odd._push(at_odd.flower_run, wrong)
        announced = half._compose(at_half, b"x", now().timestamp(), 30.0)
        half._push_objects = lambda *_: True  # type: ignore[method-assign]
        assert half._push(at_half.flower_run, announced)
        assert good.reply(at_good, b"good")
        until(lambda: len(run.answers()) == 2, "two nodes are heard")
        flower_stack.control.stop_run(run.number)
        run.note("stopped")
    told = {note["node"]: (note["payload"], note["error"]) for note in run.answers()}
    assert told == {nodes[0].node_id: (None, "malformed"), nodes[2].node_id: ("good", None)}


def test_a_node_says_goodbye_so_that_it_may_come_back_at_once(flower_stack: FlowerStack) -> None:
    node = flower_stack.make_node()
    with flower_stack.connect(node):
        assert is_online(flower_stack, node)
    assert not is_online(flower_stack, node)
    with flower_stack.connect(node):
        assert is_online(flower_stack, node)


def test_a_node_that_crashed_and_forgot_its_id_gets_in_once_its_heartbeat_has_lapsed(
    flower_stack: FlowerStack, crashed_node: Node
) -> None:
    with flower_stack.connect(crashed_node) as connection:  # flwr would end this process with exit code 305
        assert connection.receive() is None


def is_online(stack: FlowerStack, node: Node) -> bool:
    return next(state.online for state in stack.control.nodes() if state.node_id == node.node_id)


def abandon(connection: FleetConnection) -> None:
    """End what a crash would have ended, without a goodbye."""
    connection._say_goodbye = lambda: None  # type: ignore[method-assign]
    connection.close()
    connection._heartbeats.join(5)
    connection._fleet.close()

"""The event log: gap-free under concurrent writers, tamper-evident, live on every gateway process."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from gateway_world import GatewayProcess, Hospital, World, running_gateway
from prometheus_client.parser import text_string_to_metric_families
from waiting import DEADLINE_S, until

from medhive.chain import ZERO_HASH, BrokenChain, event_hash, verify_chain
from medhive.errors import BadSignature
from medhive.signing import SigningKey, VerifyKey, sign
from medhive.wire import API, CountersignBody, EventAnswer, Head

LABELS = {"version", "folder", "state", "study", "direction", "site", "certificate", "method", "status", "le"}


def all_events(world: World) -> list[EventAnswer]:
    rows: list[EventAnswer] = []
    while page := world.admin.get(f"{API}/events", after=len(rows), limit=1000):
        rows += [EventAnswer.model_validate(row) for row in page]
    return rows


@pytest.fixture
def second(world: World) -> Iterator[GatewayProcess]:
    """Another gateway process on the same state folder and database."""
    gateway = GatewayProcess(world.gateway.state_dir, world.gateway.environment)
    try:
        yield gateway.start()
    finally:
        if gateway.process and gateway.process.poll() is None:
            assert gateway.stop() == 0


def test_writers_on_two_gateways_leave_no_gap(world: World, second: GatewayProcess) -> None:
    hospital = world.hospital()
    study = world.study(hospital)
    outcomes: list[str] = []

    def ask(gateway: GatewayProcess) -> None:
        with gateway.client(world.admin_token) as client:
            for _ in range(5):
                outcomes.append(client.post(f"{API}/requests", {"study": study})["id"])

    threads = [threading.Thread(target=ask, args=(each,)) for each in (world.gateway, second) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(outcomes)) == 30
    rows = all_events(world)
    number, digest = verify_chain(rows)
    head = Head.model_validate(world.admin.get(f"{API}/events/head")).body
    assert (head.number, head.hash) == (number, digest)
    # One decision on a request that both gateways are asked for at once.
    results: list[int] = []

    def approve(gateway: GatewayProcess) -> None:
        with gateway.http(world.admin_token) as http:
            results.append(http.post(f"/requests/{outcomes[0]}/approve", json={"reason": ""}).status_code)

    threads = [threading.Thread(target=approve, args=(each,)) for each in (world.gateway, second) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [200, 409, 409, 409]
    world.admin.post(f"{API}/runs/{world.admin.get(f'{API}/requests/{outcomes[0]}')['run_id']}/stop", {"reason": ""})


def test_the_stream_tells_what_any_gateway_appends(world: World, second: GatewayProcess) -> None:
    hospital = world.hospital()
    study = world.study(hospital)
    start = world.admin.get(f"{API}/events/head")["body"]["number"]
    heard: list[dict[str, object]] = []
    connected = threading.Event()

    def listen() -> None:
        with second.client(hospital.http.headers["Authorization"].partition(" ")[2]) as client:
            connected.set()
            for row in client.events(start):
                heard.append(row)
                if row["kind"] == "run.created":
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    assert connected.wait(DEADLINE_S)
    stranger = world.study()  # not this hospital's business
    run = world.asked(study)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert [row["kind"] for row in heard] == ["request.sent", "request.approved", "run.created"]
    assert all(row["study"] == study != stranger for row in heard)
    # Resumed in the middle by the number of the last row that was seen.
    with world.gateway.client(world.admin_token) as client:
        again = next(iter(client.events(int(str(heard[0]["number"])))))
    assert again["number"] == int(str(heard[0]["number"])) + 1
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": ""})


def test_a_stream_ends_with_its_callers_rights(world: World) -> None:
    hospital = world.hospital()
    ended = threading.Event()

    def listen() -> None:
        with world.gateway.client(hospital.http.headers["Authorization"].partition(" ")[2]) as client:
            for _ in client.events(0):
                pass
        ended.set()

    thread = threading.Thread(target=listen)
    thread.start()
    until(lambda: "medhive_event_streams 1.0" in _metrics(world) or None, "the stream")
    world.admin.post(f"{API}/sites/{hospital.site}/revoke", {"reason": ""})
    assert ended.wait(DEADLINE_S)
    thread.join()


def test_the_figures_are_numbers_under_short_labels_and_not_for_the_outside(world: World) -> None:
    hospital = world.hospital()
    world.study(hospital)
    samples = [each for family in text_string_to_metric_families(_metrics(world)) for each in family.samples]
    seen = {
        each.labels["site"]: each.value for each in samples if each.name == "medhive_site_last_seen_timestamp_seconds"
    }
    assert abs(seen[hospital.site] - time.time()) < 60
    assert {name for each in samples for name in each.labels} <= LABELS
    exchanges = {each.labels["status"] for each in samples if each.name == "medhive_gateway_exchanges_total"}
    assert exchanges <= {"2xx", "3xx", "4xx", "5xx", "none"}


def test_a_proxy_that_passes_the_figures_on_gets_none(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state", trusted_proxy="127.0.0.1") as gateway, gateway.http() as http:
        inside = http.get(f"{gateway.url}/metrics")
        assert inside.status_code == 200 and inside.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert http.get(f"{gateway.url}/metrics", headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 404


def _metrics(world: World) -> str:
    with world.gateway.http() as http:
        return http.get(f"{world.gateway.url}/metrics").text


def countersign(world: World, hospital: Hospital, number: int, digest: str) -> None:
    body = CountersignBody(site=hospital.site, number=number, hash=digest, seen_at=datetime.now(UTC))
    hospital.client.post(f"{API}/events/countersign", sign(body, hospital.key))


def test_countersignatures_are_kept_also_when_they_disagree(world: World) -> None:
    hospital = world.hospital()
    head = Head.model_validate(hospital.client.get(f"{API}/events/head"))
    seen = head.verify(VerifyKey.from_text(hospital.coordinator.public_key))
    countersign(world, hospital, seen.number, seen.hash)
    after = world.admin.get(f"{API}/events/head")["body"]["number"]
    assert after == seen.number  # a countersignature is no event: it would call for the next one
    countersign(world, hospital, seen.number - 1, "f" * 64)
    newest = world.admin.get(f"{API}/events", after=after)[-1]
    assert newest["kind"] == "head.disputed" and newest["site"] == hospital.site
    kept = [row for row in world.admin.get(f"{API}/events/countersignatures") if row["body"]["site"] == hospital.site]
    assert [row["body"]["hash"] for row in kept] == ["f" * 64, seen.hash]
    body = CountersignBody(site=hospital.site, number=1, hash=ZERO_HASH, seen_at=datetime.now(UTC))
    with pytest.raises(BadSignature):
        hospital.client.post(f"{API}/events/countersign", sign(body, SigningKey.generate()))
    other = world.hospital()
    with pytest.raises(BadSignature):
        other.client.post(f"{API}/events/countersign", sign(body, other.key))


@pytest.mark.parametrize("change", ["content", "removed", "rehashed"])
def test_a_changed_log_is_found(tmp_path: Path, change: str) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        world = World(gateway, tmp_path)
        world.study()
        world.study()
        head = Head.model_validate(world.admin.get(f"{API}/events/head")).body
        _tamper(gateway.state_dir / "gateway.db", change)
        rows = all_events(world) if change != "removed" else _rows_around_the_gap(world)
        if change == "rehashed":
            # Whoever rewrites all hashes after the change is found by the head that was signed before.
            number, digest = verify_chain(rows)
            assert number == head.number and digest != head.hash
        else:
            with pytest.raises(BrokenChain) as caught:
                verify_chain(rows)
            assert caught.value.data["number"] == 3 + (change == "removed")
        world.close()


def _rows_around_the_gap(world: World) -> list[EventAnswer]:
    return [EventAnswer.model_validate(row) for row in world.admin.get(f"{API}/events", limit=1000)]


def _tamper(path: Path, change: str) -> None:
    database = sqlite3.connect(path, isolation_level=None, timeout=60)
    if change == "removed":
        database.execute("DELETE FROM events WHERE number = 3")
    else:
        database.execute("UPDATE events SET data = ? WHERE number = 3", (json.dumps({"forged": True}),))
    if change == "rehashed":
        _rehash(database)
    database.close()


def _rehash(database: sqlite3.Connection) -> None:
    previous = ZERO_HASH
    columns = ("number", "at", "kind", "actor", "subject", "study", "run_id", "site", "data")
    for row in database.execute("SELECT * FROM events ORDER BY number").fetchall():
        values = dict(zip(columns, row, strict=False))
        values |= {"at": datetime.fromisoformat(values["at"]).replace(tzinfo=UTC), "data": json.loads(values["data"])}
        digest = event_hash(EventAnswer.model_validate({**values, "previous": previous, "hash": ""}))
        statement = "UPDATE events SET previous = ?, hash = ? WHERE number = ?"
        database.execute(statement, (previous, digest, values["number"]))
        previous = digest

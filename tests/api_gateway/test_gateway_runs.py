"""Requests, consents, leases and ends: who wins, what is refused, and what a dead holder can no longer say."""

import csv
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from gateway_world import Hospital, World
from waiting import until

from medhive.errors import (
    BadSignature,
    Conflict,
    Expired,
    IllegalTransition,
    InvalidInput,
    MedHiveError,
    NotAllowed,
    NotFound,
)
from medhive.signing import SigningKey, sign
from medhive.wire import API, RunAnswer, VersionAnswer


@pytest.fixture(scope="module")
def hospital(world: World) -> Hospital:
    return world.hospital()


@pytest.fixture(scope="module")
def study(world: World, hospital: Hospital) -> str:
    return world.study(hospital)


def at_once(steps: list[Callable[[], Any]]) -> Counter[str]:
    """Do all of these at the same moment; counts the outcomes by name."""
    gate, outcomes, lock = threading.Barrier(len(steps)), Counter[str](), threading.Lock()

    def one(step: Callable[[], Any]) -> None:
        gate.wait()
        try:
            step()
            name = "won"
        except MedHiveError as error:
            name = error.code
        with lock:
            outcomes[name] += 1

    threads = [threading.Thread(target=one, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# ---- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds"),
        ({"rounds": 10**9}, "rounds"),
        ({"strategy": "fedmagic"}, "fedmagic"),
        ({"strategy": "krum", "min_sites": 1}, "min_sites"),
        ({"strategy": "fedadam", "strategy_params": {"beta_1": 2.0}}, "beta_1"),
        ({"lr": -1}, "lr"),
        ({"min_sites": 5}, "could never begin"),
        ({"epochs": 5}, "epochs"),
        ({"privacy": {"dp_epsilon": 1.0}}, "differential privacy"),
        ({"privacy": {"secagg": True}}, "secure aggregation"),
    ],
)
def test_impossible_requests_are_refused(world: World, study: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        world.admin.post(f"{API}/requests", {"study": study, "options": options})


def test_requests_name_what_is_missing(world: World, study: str) -> None:
    with pytest.raises(NotFound, match="no study"):
        world.admin.post(f"{API}/requests", {"study": "nothing"})
    with pytest.raises(NotFound, match="no version 7"):
        world.admin.post(f"{API}/requests", {"study": study, "base_version": 7})


def test_a_request_is_decided_once(world: World, study: str) -> None:
    request = world.admin.post(f"{API}/requests", {"study": study})
    url = f"{API}/requests/{request['id']}"
    assert world.admin.post(f"{url}/reject", {"reason": "not now"})["reason"] == "not now"
    for word in ("approve", "reject", "cancel"):
        with pytest.raises(IllegalTransition, match="rejected"):
            world.admin.post(f"{url}/{word}", {"reason": ""})


def test_a_request_is_taken_back_by_its_sender(world: World, hospital: Hospital, study: str) -> None:
    other = world.hospital(study)
    request = hospital.client.post(f"{API}/requests", {"study": study, "note": "please"})
    with pytest.raises(NotAllowed):
        other.client.post(f"{API}/requests/{request['id']}/cancel", {"reason": ""})
    assert hospital.client.post(f"{API}/requests/{request['id']}/cancel", {"reason": ""})["state"] == "cancelled"
    world.admin.delete(f"{API}/studies/{study}/members/{other.site}")


def test_approving_and_rejecting_at_once_has_one_winner(world: World, study: str) -> None:
    for _ in range(3):
        request = world.admin.post(f"{API}/requests", {"study": study})
        url = f"{API}/requests/{request['id']}"
        clients = [world.gateway.client(world.admin_token) for _ in range(8)]
        words = ("approve", "reject") * 4
        steps = [
            lambda client=client, url=url, word=word: client.post(f"{url}/{word}", {"reason": word})
            for client, word in zip(clients, words, strict=True)
        ]
        outcomes = at_once(steps)
        for client in clients:
            client.close()
        assert outcomes["won"] == 1 and outcomes["illegal-transition"] == 7, outcomes
        decided = world.admin.get(url)
        runs = [run for run in world.admin.get(f"{API}/runs", limit=1000) if run["request_id"] == request["id"]]
        assert len(runs) == (1 if decided["state"] == "approved" else 0)
        for run in runs:
            world.admin.post(f"{API}/runs/{run['id']}/stop", {"reason": ""})


def test_a_run_needs_enough_sites_that_have_joined(world: World, hospital: Hospital) -> None:
    study = world.study(hospital)
    invited = world.name("site")
    world.invite(invited)
    world.admin.put(f"{API}/studies/{study}/members/{invited}")
    request = world.admin.post(f"{API}/requests", {"study": study, "options": {"min_sites": 2}})
    with pytest.raises(Conflict, match="1 of the study"):
        world.admin.post(f"{API}/requests/{request['id']}/approve", {"reason": ""})
    assert world.admin.get(f"{API}/requests/{request['id']}")["state"] == "pending"


# ---- consents ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(world: World, study: str) -> RunAnswer:
    return world.asked(study)


def test_a_consent_by_another_key_is_refused(world: World, hospital: Hospital, run: RunAnswer) -> None:
    forged = sign(hospital.consent_body(run), SigningKey.generate())
    with pytest.raises(BadSignature):
        hospital.client.post(f"{API}/runs/{run.id}/consents", forged)
    named = forged.model_copy(update={"key_id": hospital.key.public.key_id})
    with pytest.raises(BadSignature):
        hospital.client.post(f"{API}/runs/{run.id}/consents", named)
    assert world.run(run.id).consents[0].state == "pending"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"spec_hash": "0" * 64}, BadSignature),
        ({"run_id": "RUN_999999"}, BadSignature),
        ({"site": "somebody"}, BadSignature),
        ({"coordinator_key_id": "0" * 16}, BadSignature),
        ({"max_rounds": 1}, InvalidInput),
        ({"privacy_limits": {"dp_epsilon": 1.0}}, InvalidInput),
        ({"expires_at": datetime(2020, 1, 2, tzinfo=UTC), "issued_at": datetime(2020, 1, 1, tzinfo=UTC)}, Expired),
        ({"expires_at": datetime.now(UTC) + timedelta(days=1000)}, InvalidInput),
    ],
)
def test_a_consent_that_does_not_cover_the_run_is_refused(
    hospital: Hospital, run: RunAnswer, changes: dict[str, Any], error: type[MedHiveError]
) -> None:
    with pytest.raises(error):
        hospital.answer(run, **changes)


def test_a_consent_from_a_clock_ahead_is_refused(hospital: Hospital, run: RunAnswer) -> None:
    with pytest.raises(Expired, match="clock"):
        hospital.answer(run, issued_at=datetime.now(UTC) + timedelta(minutes=10))


def test_a_nonce_counts_once_and_an_answer_too(world: World, hospital: Hospital, study: str, run: RunAnswer) -> None:
    hospital.answer(run, nonce="a" * 32)
    with pytest.raises(Conflict):
        hospital.answer(run)
    again = world.asked(study)
    with pytest.raises(BadSignature, match="used already"):
        hospital.answer(again, nonce="a" * 32)


def test_who_was_not_asked_has_no_say(world: World, study: str, run: RunAnswer) -> None:
    late = world.hospital(study)
    with pytest.raises(NotAllowed, match="was not asked"):
        late.answer(run)
    world.admin.delete(f"{API}/studies/{study}/members/{late.site}")


def test_too_few_consents_let_the_run_expire(world: World) -> None:
    one, two = world.hospital(), world.hospital()
    run = world.asked(world.study(one, two), min_sites=2)
    one.answer(run)
    two.answer(run, "declined", reason="no capacity")
    ended = world.run(run.id)
    assert ended.state == "expired" and "1 consented, 2 are needed" in ended.reason


def test_a_test_set_is_asked_for_consent_and_counts_for_nothing(world: World) -> None:
    hospital, judge = world.hospital(), world.hospital(evaluates_only=True)
    study = world.study(hospital, judge)
    with pytest.raises(InvalidInput, match="1 sites; it could never begin"):
        world.asked(study, min_sites=2)
    run = world.asked(study)
    assert {item.site: item.evaluates_only for item in run.consents} == {hospital.site: False, judge.site: True}
    hospital.answer(run)
    assert world.run(run.id).state == "consenting"
    judge.answer(run)
    assert world.run(run.id).state == "ready"
    alone = world.asked(study)
    judge.answer(alone)
    hospital.answer(alone, "declined", reason="no capacity")
    assert "0 consented, 1 are needed" in world.run(alone.id).reason
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": ""})


def test_a_test_set_s_figures_stand_beside_the_sites_and_decide_nothing(world: World) -> None:
    hospital, judge = world.hospital(), world.hospital(evaluates_only=True)
    study = world.study(hospital, judge)
    run = world.ready(study, hospital, judge)
    lease = world.started(run)
    path, digest = world.weights(7)
    world.server.upload(f"{API}/runs/{run.id}/blobs/{digest}", path)
    rows = {
        "sites": [{"site": hospital.site, "answered": True, "examples": 30}],
        "evaluators": [{"site": judge.site, "answered": True, "examples": 1000, "metrics": {"val_accuracy": 0.8}}],
        "metrics": {"val_accuracy": 0.7, "test_accuracy": 0.8},
    }
    times = {"opened_at": datetime.now(UTC).isoformat(), "closed_at": datetime.now(UTC).isoformat()}
    report = {"fence": lease.fence, "state": "closed", "weights_digest": digest, **times, **rows}
    world.server.put(f"{API}/server/runs/{run.id}/rounds/1", report)
    ended = world.complete(run, lease, digest, **rows)
    version = VersionAnswer.model_validate(world.admin.get(f"{API}/studies/{study}/versions/{ended.version}"))
    assert version.metrics["test_accuracy"] == 0.8
    assert (version.manifest.body.sites, version.manifest.body.examples) == ((hospital.site,), 30)
    assert [item.site for item in version.decisions] == [hospital.site]
    # Each sees the figures of all together and its own; the admin everybody's.
    for who, seen in ((hospital, []), (judge, [judge.site])):
        shown = RunAnswer.model_validate(who.client.get(f"{API}/runs/{run.id}"))
        (first,) = who.client.get(f"{API}/runs/{run.id}/rounds")
        assert [item.site for item in shown.evaluators] == [item["site"] for item in first["evaluators"]] == seen
        assert first["metrics"]["test_accuracy"] == shown.metrics["test_accuracy"] == 0.8
    assert [item.site for item in world.run(run.id).evaluators] == [judge.site]
    with world.gateway.http(world.admin_token) as http:
        table = http.get(f"/runs/{run.id}/rounds.csv")
    assert table.headers["content-type"].startswith("text/csv")
    assert table.headers["content-disposition"] == f'attachment; filename="{run.id}_rounds.csv"'
    trained, final = csv.DictReader(table.text.splitlines())
    assert (trained["round"], trained["asked"], trained["answered"], trained["val_accuracy"]) == ("1", "1", "1", "0.7")
    assert (trained["test_accuracy"], final["state"], final["val_accuracy"]) == ("0.8", "final", "0.7")
    with pytest.raises(NotAllowed, match="decides on no version"):
        judge.client.post(
            f"{API}/studies/{study}/versions/{ended.version}/decisions", judge.decision(version, "accepted")
        )


def test_a_site_keeps_the_role_that_it_was_invited_for(world: World) -> None:
    name = world.name("site")
    world.invite(name, evaluates_only=True)
    with pytest.raises(Conflict, match="to evaluate only"):
        world.invite(name)
    world.invite(name, evaluates_only=True)


def test_the_deadline_decides_without_anybody_asking(world: World) -> None:
    one, two = world.hospital(), world.hospital()
    study = world.study(one, two)
    enough = world.asked(study, min_sites=1, consent_deadline_s=2.0)
    one.answer(enough)
    few = world.asked(study, min_sites=2, consent_deadline_s=1.0)
    until(lambda: world.run(enough.id).state == "ready", "the deadline")
    until(lambda: world.run(few.id).state == "expired", "the deadline")
    with pytest.raises(Conflict, match="no longer waits"):
        two.answer(enough)
    world.admin.post(f"{API}/runs/{enough.id}/stop", {"reason": ""})


def test_a_withdrawal_is_seen_by_the_aggregator(world: World, hospital: Hospital, study: str) -> None:
    run = world.ready(study, hospital)
    lease = world.started(run)
    with pytest.raises(InvalidInput):
        hospital.client.post(f"{API}/runs/{run.id}/withdraw", hospital.consent(run))
    hospital.answer(run, "withdrawn", reason="scanner replaced")
    seen = world.server.post(f"{API}/server/runs/{run.id}/heartbeat", {"fence": lease.fence})
    assert seen["consents"][0]["state"] == "withdrawn"
    with pytest.raises(NotAllowed):
        hospital.client.post(f"{API}/runs/{run.id}/activity", {"round": 1, "activity": "training"})
    world.server.post(f"{API}/server/runs/{run.id}/end", {"fence": lease.fence, "state": "failed", "reason": "too few"})
    assert world.run(run.id).reason == "too few"


# ---- leases --------------------------------------------------------------------------------------------------------


def test_a_stale_holder_is_refused_everywhere(world: World, hospital: Hospital, study: str) -> None:
    run = world.ready(study, hospital)
    old = world.started(run)
    new = world.lease(run)  # after the old lease has run out
    assert new.fence == old.fence + 1
    now = datetime.now(UTC).isoformat()
    url = f"{API}/server/runs/{run.id}"
    stale = {"fence": old.fence}
    with pytest.raises(Conflict) as caught:
        world.server.post(f"{url}/heartbeat", stale)
    assert caught.value.data["cause"] == "stale-fence" and caught.value.data["fence"] == new.fence
    with pytest.raises(Conflict):
        world.server.post(f"{url}/start", stale)
    with pytest.raises(Conflict):
        world.server.put(f"{url}/rounds/1", {**stale, "state": "open", "opened_at": now})
    with pytest.raises(Conflict):
        world.server.post(f"{url}/version-zero", {**stale, "digest": "0" * 64})
    with pytest.raises(Conflict):
        world.server.post(f"{url}/end", {**stale, "state": "failed"})
    assert world.server.post(f"{url}/start", {"fence": new.fence})["state"] == "running"
    world.server.post(f"{url}/end", {"fence": new.fence, "state": "cancelled"})


def test_a_heartbeat_keeps_the_lease(world: World, hospital: Hospital, study: str) -> None:
    run = world.ready(study, hospital)
    lease = world.started(run)
    lease_s = float(world.gateway.environment["MEDHIVE_GATEWAY_LEASE_S"])
    fence, ends = lease.fence, time.monotonic() + 2 * lease_s
    while time.monotonic() < ends:
        began = time.monotonic()
        world.server.post(f"{API}/server/runs/{run.id}/heartbeat", {"fence": fence})
        other = world.server.post(f"{API}/server/lease", {"holder": "other"})
        if other is not None and other["run_id"] == run.id:
            assert time.monotonic() - began > lease_s, (
                "taken within a lease of the heartbeat, not because all stood still"
            )
            fence = other["fence"]
    world.server.post(f"{API}/server/runs/{run.id}/end", {"fence": fence, "state": "failed"})


def test_one_run_is_leased_by_one(world: World, hospital: Hospital, study: str) -> None:
    run = world.ready(study, hospital)
    taken: list[str] = []
    clients = [world.gateway.client(world.gateway.server_token) for _ in range(6)]

    def take(client: Any) -> None:
        for _ in range(4):
            lease = client.post(f"{API}/server/lease", {"holder": "racer"})
            if lease and lease["run_id"] == run.id:
                taken.append(f"{lease['fence']}")

    at_once([lambda client=client: take(client) for client in clients])
    for client in clients:
        client.close()
    assert len(taken) == len(set(taken)) >= 1
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": ""})


def test_stopping_before_and_during_a_run(world: World, hospital: Hospital, study: str) -> None:
    waiting = world.ready(study, hospital)
    lease = world.lease(waiting)
    assert world.admin.post(f"{API}/runs/{waiting.id}/stop", {"reason": "wrong study"})["state"] == "cancelled"
    with pytest.raises(IllegalTransition):
        world.server.post(f"{API}/server/runs/{waiting.id}/start", {"fence": lease.fence})
    running = world.ready(study, hospital)
    lease = world.started(running)
    stopping = world.admin.post(f"{API}/runs/{running.id}/stop", {"reason": "enough"})
    assert stopping["state"] == "running" and stopping["stop_requested"]
    body = {"fence": lease.fence, "state": "cancelled"}
    ended = world.server.post(f"{API}/server/runs/{running.id}/end", body)
    assert ended["state"] == "cancelled" and ended["reason"] == "enough"
    assert world.server.post(f"{API}/server/runs/{running.id}/end", body) == ended
    with pytest.raises(IllegalTransition):
        world.server.post(f"{API}/server/runs/{running.id}/end", {**body, "state": "failed"})


def test_rounds_are_reported_once(world: World, hospital: Hospital, study: str) -> None:
    run = world.ready(study, hospital)
    lease = world.started(run)
    url = f"{API}/server/runs/{run.id}/rounds"
    now = datetime.now(UTC).isoformat()
    report = {
        "fence": lease.fence,
        "state": "open",
        "opened_at": now,
        "sites": [{"site": hospital.site}],
    }
    world.server.put(f"{url}/1", report)
    late = [{"site": hospital.site, "dropped": "the deadline passed"}]
    closed = {**report, "state": "closed", "closed_at": now, "sites": late, "metrics": {"val_accuracy": 0.25}}
    world.server.put(f"{url}/1", closed)
    assert world.run(run.id).round == 1
    world.server.put(f"{url}/1", closed)
    with pytest.raises(Conflict, match="too late"):
        world.server.put(f"{url}/1", {**closed, "metrics": {"val_accuracy": 0.99}})
    with pytest.raises(InvalidInput, match="2 rounds"):
        world.server.put(f"{url}/3", closed)
    with pytest.raises(InvalidInput, match="stranger"):
        world.server.put(f"{url}/2", {**closed, "sites": [{"site": "stranger"}]})
    with pytest.raises(NotFound):
        world.server.put(f"{url}/2", {**closed, "weights_digest": "0" * 64})
    with pytest.raises(InvalidInput):
        world.server.put(f"{url}/2", {**closed, "bytes_up": -1})
    head = world.admin.get(f"{API}/events/head")["body"]["number"]
    rows = [row for row in world.admin.get(f"{API}/events", after=max(0, head - 30)) if row["run_id"] == run.id]
    assert [row["kind"] for row in rows][-3:] == ["round.opened", "site.dropped", "round.closed"]
    assert rows[-2]["data"]["reason"] == "the deadline passed"
    with pytest.raises(NotFound):
        world.complete(run, lease, "0" * 64)
    with pytest.raises(InvalidInput, match="digest"):
        world.server.post(f"{API}/server/runs/{run.id}/end", {"fence": lease.fence, "state": "completed"})
    world.server.post(f"{API}/server/runs/{run.id}/end", {"fence": lease.fence, "state": "failed"})


def test_refused_contributions_are_events_by_code(world: World) -> None:
    hospital, other = world.hospital(), world.hospital()
    run = world.ready(world.study(hospital, other), hospital, other)
    lease = world.started(run)
    url = f"{API}/server/runs/{run.id}"
    report = {
        "fence": lease.fence,
        "state": "closed",
        "opened_at": datetime.now(UTC).isoformat(),
        "sites": [{"site": hospital.site, "answered": True}],
        "refusals": [{"site": hospital.site, "code": "bad-signature"}, {"site": other.site, "code": "not-finite"}],
    }
    with pytest.raises(InvalidInput, match="stranger"):
        world.server.put(f"{url}/rounds/1", {**report, "refusals": [{"site": "stranger", "code": "not-finite"}]})
    for _ in range(2):  # reported again, it is not told again
        world.server.put(f"{url}/rounds/1", report)
    end = {"fence": lease.fence, "state": "failed", "refusals": [{"site": other.site, "code": "bad-signature"}]}
    with pytest.raises(InvalidInput, match="stranger"):
        world.server.post(f"{url}/end", {**end, "refusals": [{"site": "stranger", "code": "not-finite"}]})
    world.server.post(f"{url}/end", end)
    world.server.post(f"{url}/end", {**end, "refusals": []})

    def told(client: Any) -> list[tuple[str, int, str]]:
        after = world.admin.get(f"{API}/events/head")["body"]["number"] - 30
        rows = [row for row in client.get(f"{API}/events", after=max(after, 0)) if row["run_id"] == run.id]
        found = [row for row in rows if row["kind"] == "contribution.refused"]
        assert all(set(row["data"]) == {"round", "reason_code"} for row in found)
        return [(row["site"], row["data"]["round"], row["data"]["reason_code"]) for row in found]

    mine = (hospital.site, 1, "bad-signature")
    assert told(world.admin) == [mine, (other.site, 1, "not-finite"), (other.site, 1, "bad-signature")]
    assert told(hospital.client) == [mine]
    assert hospital.client.get(f"{API}/runs/{run.id}/rounds")[0]["refusals"] == [report["refusals"][0]]
    assert len(world.admin.get(f"{API}/runs/{run.id}/rounds")[0]["refusals"]) == 2


def test_blobs_of_old_rounds_are_let_go(world: World) -> None:
    hospital = world.hospital()
    run = world.ready(world.study(hospital), hospital, rounds=3)
    lease = world.started(run)
    updates = []
    for number in (1, 2, 3):
        opened = datetime.now(UTC).isoformat()
        path, digest = world.weights(seed=400 + number)
        hospital.client.upload(f"{API}/runs/{run.id}/blobs/{digest}", path)
        updates.append(digest)
        report = {"fence": lease.fence, "state": "closed", "opened_at": opened, "sites": [{"site": hospital.site}]}
        report |= {"weights_digest": digest}
        world.server.put(f"{API}/server/runs/{run.id}/rounds/{number}", report)
    found = [hospital.http.head(f"/runs/{run.id}/blobs/{digest}").status_code for digest in updates]
    assert found == [404, 200, 200]
    assert world.complete(run, lease, updates[-1]).version == 1


def test_weights_that_are_none_make_no_version(world: World, hospital: Hospital, study: str) -> None:
    run = world.ready(study, hospital)
    lease = world.started(run)
    path = world.folder / "nonsense"
    path.write_bytes(b"nonsense")
    digest = hashlib.sha256(b"nonsense").hexdigest()
    world.server.upload(f"{API}/runs/{run.id}/blobs/{digest}", path)
    with pytest.raises(MedHiveError) as caught:
        world.complete(run, lease, digest)
    assert caught.value.data["status"] == 422
    assert world.run(run.id).state == "running"
    world.server.post(f"{API}/server/runs/{run.id}/end", {"fence": lease.fence, "state": "failed"})


def test_changed_runs_come_in_the_order_of_their_change(world: World, hospital: Hospital, study: str) -> None:
    first, second = world.asked(study), world.asked(study)
    hospital.answer(first)
    changed = world.admin.get(f"{API}/runs", changed_after=first.updated_at.isoformat(), study=study)
    assert [run["id"] for run in changed][-2:] == [second.id, first.id]
    assert [run["id"] for run in hospital.client.get(f"{API}/runs", study=study, limit=2)] == [second.id, first.id]
    for run in (first, second):
        world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": ""})


# ---- versions ------------------------------------------------------------------------------------------------------


def test_versions_follow_upon_each_other(world: World) -> None:
    hospital, other = world.hospital(), world.hospital()
    study = world.study(hospital)
    first = world.released(study, hospital, seed=300, metrics={"val_accuracy": 0.5, "val_loss": 1.0})
    second = world.released(study, hospital, seed=301, metrics={"val_accuracy": 0.75})
    url = f"{API}/studies/{study}/versions"
    assert [(row["version"], row["state"]) for row in hospital.client.get(url)] == [(2, "candidate"), (1, "released")]
    compared = hospital.client.get(f"{API}/studies/{study}/compare", a=1, b=2)
    assert compared["metric_differences"] == {"val_accuracy": 0.25} and compared["same_architecture"]

    # Roll-back: the older one is offered again; who had accepted it need not say so twice.
    hospital.client.post(f"{url}/1/decisions", hospital.decision(first, "accepted"))
    assert world.admin.post(f"{url}/1/offer")["state"] == "candidate"
    assert world.admin.get(f"{url}/2")["state"] == "released"
    with pytest.raises(Conflict, match="already"):
        world.admin.post(f"{url}/1/offer")

    # A later member is asked for the candidate; an export asks for another version too.
    world.admin.put(f"{API}/studies/{study}/members/{other.site}")
    asked = {row["version"]: [each["state"] for each in row["decisions"]] for row in other.client.get(url)}
    assert asked == {1: ["pending"], 2: []}
    world.admin.post(f"{url}/2/export", {"site": other.site})
    assert [row["state"] for row in other.client.get(f"{url}/2")["decisions"]] == ["pending"]
    with pytest.raises(MedHiveError):
        world.admin.post(f"{url}/2/export", {"site": world.hospital().site})
    assert second.manifest.body.base_version == 1


def test_a_decision_is_the_sites_own(world: World) -> None:
    hospital, other = world.hospital(), world.hospital()
    study = world.study(hospital, other)
    version = world.released(study, hospital, other, seed=310)
    url = f"{API}/studies/{study}/versions/1/decisions"
    mine = hospital.decision(version, "accepted", reason="better", metrics={"accuracy": 0.9})
    for wrong in (
        sign(mine.body, SigningKey.generate()),
        hospital.decision(version, "accepted", site=other.site),
        hospital.decision(version, "accepted", digest="0" * 64),
        hospital.decision(version, "accepted", version=2),
    ):
        with pytest.raises(BadSignature):
            hospital.client.post(url, wrong)
    with pytest.raises(BadSignature):
        other.client.post(url, mine)
    first = hospital.client.post(url, mine)
    assert hospital.client.post(url, mine) == first
    with pytest.raises(Expired, match="older"):
        hospital.client.post(url, hospital.decision(version, "rejected", issued_at=mine.body.issued_at))
    changed = hospital.client.post(url, hospital.decision(version, "rejected", reason="worse in winter"))
    assert [(row["state"], row["reason"]) for row in changed["decisions"]] == [("rejected", "worse in winter")]
    with pytest.raises(Expired, match="older"):
        hospital.client.post(url, mine)
    with pytest.raises(Expired, match="future"):
        later = datetime.now(UTC) + timedelta(hours=1)
        hospital.client.post(url, hospital.decision(version, "accepted", issued_at=later))


def test_statistics_add_up(world: World) -> None:
    hospital = world.hospital()
    before = world.admin.get(f"{API}/statistics")
    world.released(world.study(hospital), hospital, seed=320, metrics={"val_accuracy": 1.0})
    after = world.admin.get(f"{API}/statistics")
    assert after["runs"] == before["runs"] + 1 and after["versions"] == before["versions"] + 1
    assert 0 < after["success_rate"] <= 1 and after["mean_accuracy"] > 0 and after["blob_bytes"] > 0

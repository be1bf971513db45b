"""The main job through the gateway's HTTP, from request to decision, as everybody who takes part sees it."""

import pytest
from gateway_world import World

from medhive.chain import verify_chain
from medhive.errors import NotFound
from medhive.signing import VerifyKey
from medhive.wire import API, EventAnswer, Head, Manifest, VersionAnswer


def test_from_request_to_decision(world: World) -> None:
    one, two, stranger = world.hospital(), world.hospital(), world.hospital()
    study = world.study(one, two, min_sites=2)

    # A hospital asks, the coordinator approves, both consent.
    request = one.client.post(f"{API}/requests", {"study": study, "options": {"rounds": 1}})
    assert request["state"] == "pending" and request["site"] == one.site and request["source_address"] is None
    assert two.client.get(f"{API}/requests/{request['id']}")["id"] == request["id"]
    with pytest.raises(NotFound):
        stranger.client.get(f"{API}/requests/{request['id']}")
    approved = world.admin.post(f"{API}/requests/{request['id']}/approve", {"reason": "fine"})
    assert approved["source_address"] == "127.0.0.1"
    run = world.run(approved["run_id"])
    assert run.state == "consenting" and run.base_digest is None and len(run.consents) == 2
    one.answer(run)
    two.answer(run)
    run = world.run(run.id)
    assert run.state == "ready"

    # The aggregator takes it up; version 0 is what the sites made from the seed.
    lease = world.started(run)
    initial, initial_digest = world.weights(seed=1)
    one.client.upload(f"{API}/runs/{run.id}/blobs/{initial_digest}", initial)
    body = {"fence": lease.fence, "digest": initial_digest}
    zero = world.server.post(f"{API}/server/runs/{run.id}/version-zero", body)
    assert zero["version"] == 0 and zero["state"] == "released" and zero["decisions"] == []
    assert world.server.post(f"{API}/server/runs/{run.id}/version-zero", body) == zero
    assert world.run(run.id).base_digest == initial_digest

    # One round: each site fetches the base and sends an update, which the other cannot read.
    target = world.folder / "fetched.safetensors"
    two.client.download(f"{API}/runs/{run.id}/blobs/{initial_digest}", target, initial_digest, max_bytes=10**6)
    two.client.post(f"{API}/runs/{run.id}/activity", {"round": 1, "activity": "training", "epoch": 1, "epochs": 2})
    seen = world.server.post(f"{API}/server/runs/{run.id}/heartbeat", {"fence": lease.fence})
    assert seen["activity"][0]["site"] == two.site and seen["activity"][0]["started_at"]
    assert seen["consents"][0]["consent"]["body"]["site"] == seen["consents"][0]["site"]
    updates = {}
    for number, hospital in enumerate((one, two), start=2):
        path, digest = world.weights(seed=number)
        hospital.client.upload(f"{API}/runs/{run.id}/blobs/{digest}", path)
        updates[hospital.site] = digest
    with pytest.raises(NotFound):
        one.client.download(
            f"{API}/runs/{run.id}/blobs/{updates[two.site]}", target, updates[two.site], max_bytes=10**6
        )
    world.server.download(f"{API}/runs/{run.id}/blobs/{updates[two.site]}", target, updates[two.site], max_bytes=10**6)
    final, final_digest = world.weights(seed=9)
    world.server.upload(f"{API}/runs/{run.id}/blobs/{final_digest}", final)
    sites = [
        {"site": site.site, "answered": True, "examples": 50, "metrics": {"val_accuracy": 0.5}} for site in (one, two)
    ]
    report = {
        "fence": lease.fence,
        "state": "closed",
        "opened_at": run.created_at.isoformat(),
        "closed_at": run.created_at.isoformat(),
        "sites": sites,
        "metrics": {"val_accuracy": 0.5},
        "weights_digest": final_digest,
        "bytes_down": 800,
        "bytes_up": 800,
    }
    for _ in range(2):
        world.server.put(f"{API}/server/runs/{run.id}/rounds/1", report)
    rounds = one.client.get(f"{API}/runs/{run.id}/rounds")
    assert [site["site"] for site in rounds[0]["sites"]] == [one.site]
    assert len(world.admin.get(f"{API}/runs/{run.id}/rounds")[0]["sites"]) == 2

    # The end makes version 1, the candidate, which both are asked about.
    ended = world.complete(
        run, lease, final_digest, metrics={"val_accuracy": 0.9}, confusion=[[5, 0], [1, 4]], sites=sites
    )
    assert ended.state == "completed" and ended.version == 1
    assert (
        world.complete(
            run, lease, final_digest, metrics={"val_accuracy": 0.9}, confusion=[[5, 0], [1, 4]], sites=sites
        ).version
        == 1
    )
    version = VersionAnswer.model_validate(one.client.get(f"{API}/studies/{study}/versions/1"))
    assert version.state == "candidate" and [row.state for row in version.decisions] == ["pending"]
    manifest = Manifest.model_validate(one.client.get(f"{API}/studies/{study}/versions/1/manifest"))
    assert manifest.verify(VerifyKey.from_text(one.coordinator.public_key)).examples == 100
    model = world.folder / "model.safetensors"
    two.client.download(f"{API}/studies/{study}/versions/1/file", model, version.digest, max_bytes=10**6)
    with pytest.raises(NotFound):
        stranger.client.get(f"{API}/studies/{study}/versions/1")
    one.client.post(f"{API}/studies/{study}/versions/1/decisions", one.decision(version, "accepted"))
    two.client.post(f"{API}/studies/{study}/versions/1/decisions", two.decision(version, "rejected", reason="no gain"))
    decisions = world.admin.get(f"{API}/studies/{study}/versions/1")["decisions"]
    assert {row["site"]: row["state"] for row in decisions} == {one.site: "accepted", two.site: "rejected"}

    # The log tells all of it, in order, and its chain holds.
    rows = [EventAnswer.model_validate(row) for row in _all_events(world)]
    number, digest = verify_chain(rows)
    head = Head.model_validate(world.admin.get(f"{API}/events/head"))
    body = head.verify(VerifyKey.from_text(world.coordinator.public_key))
    assert (body.number, body.hash) == (number, digest)
    kinds = [row.kind for row in rows if row.run_id == run.id]
    for kind in (
        "run.created",
        "consent.granted",
        "run.ready",
        "run.leased",
        "run.started",
        "round.closed",
        "run.completed",
    ):
        assert kind in kinds
    assert kinds.count("round.closed") == 1
    mine = [EventAnswer.model_validate(row) for row in one.client.get(f"{API}/events", limit=1000)]
    assert {row.site for row in mine} <= {one.site, None}
    assert not any("source_address" in row.data for row in mine)


def _all_events(world: World) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    while page := world.admin.get(f"{API}/events", after=len(rows), limit=1000):
        rows += page
    return rows

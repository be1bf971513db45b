"""Versions at the hospital: only what the coordinator signed, decided here, and back again."""

import threading
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from site_data import TABLE, make_table
from site_world import World

from fl_client import consents, updates
from fl_client.consents import DataCheck
from fl_client.events import LogRewritten, NodeEvent
from fl_client.site import Site
from fl_client.store import KnownVersion
from fl_client.trainer import Trainer
from fl_client.watch import Watch
from medhive.errors import (
    BadSignature,
    Conflict,
    DigestMismatch,
    InvalidInput,
    NotAllowed,
    NotFound,
)
from medhive.packing import write_weights
from medhive.signing import SigningKey, sign
from medhive.wire import API, HeadBody, VersionAnswer

CHECK = DataCheck("ab" * 32, 100, {}, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


@pytest.fixture
def study(world: World, request: pytest.FixtureRequest) -> str:
    return world.study(f"heart-{abs(hash(request.node.name)) % 10**8}", "tabular", TABLE)


@pytest.fixture
def site(world: World, study: str) -> Site:
    name = study.replace("heart", "site")
    make_table(world.folder / name)
    return world.join(name, study, data=world.folder / name)


def release(world: World, site: Site, study: str, value: float) -> int:
    """A run that ends with these weights; returns the version's number."""
    run = world.run(study, min_sites=1)
    consents.grant(site, run, person="Dr. North", check=CHECK)
    lease = world.lease(run)
    file = world.folder / f"{run.id}.safetensors"
    write_weights(file, {"w": np.full(4, value, dtype=np.float32)})
    world.end(run, lease, world.put(run, file), metrics={"val_accuracy": value, "val_loss": 1 - value})
    version = world.look(run.id).version
    assert version is not None
    return version


def answer(world: World, study: str, version: int) -> VersionAnswer:
    return VersionAnswer.model_validate(world.admin.get(f"{API}/studies/{study}/versions/{version}"))


def test_versions_are_fetched_once_and_listed(world: World, site: Site, study: str) -> None:
    version = release(world, site, study, 0.5)
    [arrival] = updates.sync_versions(site, study)
    assert arrival.candidate
    assert arrival.version.file.name == f"{site.name}_FinalGlobal_v{version}.safetensors"
    assert updates.sync_versions(site, study) == []
    [listed] = updates.list_updates(site)
    assert (listed.version, listed.accuracy, listed.loss) == (version, 0.5, 0.5)
    assert (listed.state, listed.decision, listed.in_use) == ("candidate", "pending", False)
    assert updates.undecided(site) == [listed]


def test_two_programs_that_fetch_a_version_do_not_mix(
    world: World, site: Site, study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = answer(world, study, release(world, site, study, 0.5))
    begun, fetch = threading.Event(), site.gateway.fetch_version
    beside: list[Future[KnownVersion]] = []
    travelled: list[int] = []

    def slowly(*words: Any, **more: Any) -> int:
        begun.set()
        # The other program has its chance while the first one's bytes are under way.
        futures.wait(beside, 0.5)
        return fetch(*words, **more)

    monkeypatch.setattr(site.gateway, "fetch_version", slowly)
    with Site.open(site.settings) as other, ThreadPoolExecutor(1) as pool:
        second = other.gateway.fetch_version
        monkeypatch.setattr(other.gateway, "fetch_version", lambda *w, **m: travelled.append(second(*w, **m)))

        def fetch_beside() -> KnownVersion:
            begun.wait(10)
            return updates.fetch_version(other, offered)

        beside.append(pool.submit(fetch_beside))
        first = updates.fetch_version(site, offered)
        assert beside[0].result(30) == first
    assert travelled == [0], "it waited, and found the file"


def test_accepting_going_on_and_rolling_back(world: World, site: Site, study: str) -> None:
    first, second = release(world, site, study, 0.5), release(world, site, study, 0.6)
    updates.sync_versions(site, study)
    # Only the newest candidate is offered; the older one is fetched when its decision is still open.
    known = {item.version for item in updates.list_updates(site)}
    assert second in known
    if first not in known:
        updates.fetch_version(site, answer(world, study, first))
    updates.accept(site, study, first, person="Dr. North")
    updates.accept(site, study, second, person="Dr. North", reason="better")
    assert site.store.champion(study) == second
    with pytest.raises(Conflict, match="rollback"):
        updates.accept(site, study, second, person="Dr. North")
    back = updates.rollback(site, study, None, person="Dr. North", reason="misses gliomas")
    assert back.version.version == first
    assert back.delivered
    assert site.store.champion(study) == first
    [own] = [item for item in answer(world, study, second).decisions if item.site == site.name]
    assert (own.state, own.reason) == ("rejected", "misses gliomas")
    with pytest.raises(Conflict, match="in use already"):
        updates.rollback(site, study, first, person="Dr. North")
    forward = updates.rollback(site, study, second, person="Dr. North")
    assert forward.version.decision == "accepted"
    assert site.store.champion(study) == second
    assert [entry.version for entry in updates.history(site, study)] == [second, first, second, first]


def test_a_rejection_needs_a_reason_and_a_person(world: World, site: Site, study: str) -> None:
    version = release(world, site, study, 0.1)
    updates.sync_versions(site, study)
    with pytest.raises(InvalidInput, match="reason"):
        updates.reject(site, study, version, person="Dr. North", reason=" ")
    with pytest.raises(InvalidInput, match="name of the person"):
        updates.reject(site, study, version, person="", reason="worse")
    updates.reject(site, study, version, person="Dr. North", reason="worse")
    with pytest.raises(Conflict, match="rejected before"):
        updates.reject(site, study, version, person="Dr. North", reason="worse")
    with pytest.raises(NotAllowed, match="No earlier version"):
        updates.rollback(site, study, None, person="Dr. North")
    with Trainer() as trainer, pytest.raises(NotFound, match="No version of"):
        updates.predict(site, trainer, site.settings.data_dir)


def test_a_decision_waits_for_a_coordinator_that_is_away(world: World, site: Site, study: str) -> None:
    version = release(world, site, study, 0.5)
    updates.sync_versions(site, study)
    with Site.open(site.settings.model_copy(update={"server_address": "https://localhost:9"})) as cut_off:
        assert not updates.accept(cut_off, study, version, person="Dr. North").delivered
        assert cut_off.store.champion(study) == version
    assert updates.sync_versions(site, study) == []
    assert [error for _item, error in consents.deliver(site)] == [None]
    [own] = [item for item in answer(world, study, version).decisions if item.site == site.name]
    assert own.state == "accepted"


def test_a_version_offered_again_wants_a_new_decision(world: World, site: Site, study: str) -> None:
    first = release(world, site, study, 0.5)
    updates.sync_versions(site, study)
    updates.reject(site, study, first, person="Dr. North", reason="worse")
    second = release(world, site, study, 0.6)
    updates.sync_versions(site, study)
    world.admin.post(f"{API}/studies/{study}/versions/{first}/offer", {"reason": "was better after all"})
    offered = [item.version.version for item in updates.sync_versions(site, study)]
    state = answer(world, study, first)
    own = [item.state for item in state.decisions if item.site == site.name]
    assert (offered, own) == ([first], ["pending"])
    assert second in {item.version for item in updates.list_updates(site)}


def export(world: World, site: Site, study: str, version: int) -> None:
    world.admin.post(f"{API}/studies/{study}/versions/{version}/export", {"site": site.name})


def waiting(site: Site) -> list[int]:
    return [item.version for item in updates.undecided(site)]


def own_state(world: World, site: Site, study: str, version: int) -> str:
    [own] = [item for item in answer(world, study, version).decisions if item.site == site.name]
    return str(own.state)


def test_a_version_exported_to_one_site_is_decided_there(world: World, site: Site, study: str) -> None:
    first, second = release(world, site, study, 0.5), release(world, site, study, 0.6)
    late = world.join(f"late-{study}", study)
    updates.sync_versions(late, study)
    assert waiting(late) == [second]
    export(world, late, study, first)
    [arrival] = updates.sync_versions(late, study)
    assert (arrival.version.version, arrival.version.offered, arrival.candidate) == (first, "released", True)
    assert updates.sync_versions(late, study) == []
    assert waiting(late) == [second, first]
    assert updates.accept(late, study, first, person="Dr. Late").delivered
    assert waiting(late) == [second]
    assert own_state(world, late, study, first) == "accepted"


def test_an_export_of_an_overtaken_candidate_asks_about_it_again(world: World, site: Site, study: str) -> None:
    first = release(world, site, study, 0.5)
    updates.sync_versions(site, study)
    second = release(world, site, study, 0.6)
    updates.sync_versions(site, study)
    assert waiting(site) == [second]
    export(world, site, study, first)
    arrival = updates.note_export(site, study, first)
    assert arrival is not None
    assert arrival.candidate
    assert waiting(site) == [second, first]
    updates.reject(site, study, first, person="Dr. North", reason="worse")
    assert waiting(site) == [second]
    updates.accept(site, study, second, person="Dr. North")
    assert updates.note_export(site, study, second) is None, "it is in use"
    assert updates.note_export(site, study, 99) is None, "it does not lie here"


@pytest.mark.parametrize("wanted", [True, False])
def test_a_roll_back_asks_those_who_have_left_the_version(world: World, site: Site, study: str, wanted: bool) -> None:
    first = release(world, site, study, 0.5)
    updates.sync_versions(site, study)
    updates.accept(site, study, first, person="Dr. North")
    second = release(world, site, study, 0.6)
    updates.sync_versions(site, study)
    updates.accept(site, study, second, person="Dr. North")
    world.admin.post(f"{API}/studies/{study}/versions/{first}/offer", {"reason": "the newer one was a mistake"})
    [arrival] = updates.sync_versions(site, study)
    assert (arrival.version.version, arrival.version.offered, arrival.candidate) == (first, "candidate", True)
    assert updates.sync_versions(site, study) == []
    assert waiting(site) == [first]
    assert site.store.champion(study) == second
    if wanted:
        updates.accept(site, study, first, person="Dr. North")
    else:
        updates.reject(site, study, first, person="Dr. North", reason="no")
    assert site.store.champion(study) == (first if wanted else second)
    assert own_state(world, site, study, first) == ("accepted" if wanted else "rejected")
    assert updates.sync_versions(site, study) == []
    assert waiting(site) == []


def test_a_roll_back_to_what_was_never_decided_is_told_again(world: World, site: Site, study: str) -> None:
    first = release(world, site, study, 0.5)
    updates.sync_versions(site, study)
    release(world, site, study, 0.6)
    updates.sync_versions(site, study)
    world.admin.post(f"{API}/studies/{study}/versions/{first}/offer", {"reason": "the newer one was a mistake"})
    assert [item.version.version for item in updates.sync_versions(site, study)] == [first]
    assert waiting(site) == [first]


def test_a_roll_back_to_the_version_in_use_asks_nothing(world: World, site: Site, study: str) -> None:
    first = release(world, site, study, 0.5)
    updates.sync_versions(site, study)
    updates.accept(site, study, first, person="Dr. North")
    second = release(world, site, study, 0.6)
    updates.sync_versions(site, study)
    world.admin.post(f"{API}/studies/{study}/versions/{first}/offer", {"reason": "the newer one was a mistake"})
    assert updates.sync_versions(site, study) == []
    assert waiting(site) == []
    assert second in {item.version for item in updates.list_updates(site)}


def test_what_the_coordinator_did_not_sign_is_not_fetched(world: World, site: Site, study: str) -> None:
    version = release(world, site, study, 0.5)
    genuine = answer(world, study, version)
    body = genuine.manifest.body
    forged = sign(body.model_copy(update={"digest": "0" * 64}), SigningKey.generate())
    with pytest.raises(BadSignature):
        updates.fetch_version(site, genuine.model_copy(update={"manifest": forged}))
    with pytest.raises(BadSignature, match="not of version 9"):
        updates.fetch_version(site, genuine.model_copy(update={"version": 9}))
    other = sign(body.model_copy(update={"digest": "0" * 64}), world.key)
    with pytest.raises(DigestMismatch):
        updates.fetch_version(site, genuine.model_copy(update={"manifest": other}))
    assert updates.list_updates(site) == []


def test_a_changed_model_file_is_not_used(world: World, site: Site, study: str) -> None:
    version = release(world, site, study, 0.5)
    [arrival] = updates.sync_versions(site, study)
    file = arrival.version.file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DigestMismatch, match="was changed"):
        updates.accept(site, study, version, person="Dr. North")
    file.unlink()
    [again] = updates.sync_versions(site, study)
    assert again.candidate
    updates.accept(site, study, version, person="Dr. North")


def test_a_rewritten_or_shortened_log_is_noticed(world: World, site: Site) -> None:
    events: list[NodeEvent] = []
    with Trainer() as trainer:
        watch = Watch(site, trainer, events.append, lambda _name, work: work())
        watch.look()
        head = site.store.newest_head()
        assert head is not None
        assert head.countersigned
        body = head.signed.body
        later = sign(HeadBody(number=body.number + 1000, hash="1" * 64, at=body.at), world.key)
        site.store.keep_head(later)
        Watch(site, trainer, events.append, lambda _name, work: work()).look()
    [said] = [event for event in events if isinstance(event, LogRewritten)]
    assert "shortened" in said.message
    with pytest.raises(Conflict, match="rewritten"):
        site.store.keep_head(sign(HeadBody(number=body.number, hash="2" * 64, at=body.at), world.key))


def test_files_to_predict(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or folder"):
        updates._files_in(tmp_path / "nowhere")
    with pytest.raises(NotFound, match="holds no file"):
        updates._files_in(tmp_path)
    (tmp_path / "b").mkdir()
    for name in ("b/2.png", "1.png", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in updates._files_in(tmp_path)] == ["1.png", "2.png"]

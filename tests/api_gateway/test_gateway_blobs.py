"""The blob store: resumable, limited, checked, private to whom it concerns, and clean afterwards."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import httpx
import pytest
from gateway_world import Hospital, World, running_gateway
from waiting import until

from api_gateway.blobstore import MAX_BLOB_BYTES, MAX_PART_BYTES, BlobStore, Part
from medhive.errors import Conflict, DigestMismatch, InvalidInput, NoSpace, NotFound, TooLarge
from medhive.wire import API, Lease, RunAnswer


class Store:
    """A run with one consenting hospital, its lease, and blobs to send."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hospital, self.other = world.hospital(), world.hospital()
        self.study = world.study(self.hospital, self.other)
        self.run: RunAnswer = world.asked(self.study)
        self.hospital.answer(self.run)
        self.other.answer(self.run)
        self.lease: Lease = world.started(self.run)

    def path(self, digest: str) -> str:
        return f"/runs/{self.run.id}/blobs/{digest}"


@pytest.fixture(scope="module")
def store(world: World) -> Iterator[Store]:
    made = Store(world)
    yield made
    fence = world.lease(made.run).fence
    world.server.post(f"{API}/server/runs/{made.run.id}/end", {"fence": fence, "state": "failed"})


def content(size: int, seed: str) -> tuple[bytes, str]:
    data = (hashlib.sha256(seed.encode()).digest() * (size // 32 + 1))[:size]
    return data, hashlib.sha256(data).hexdigest()


def put(hospital: Hospital, path: str, data: bytes, start: int, total: int) -> httpx.Response:
    headers = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{total}"}
    return hospital.http.put(path, content=data, headers=headers)


def test_parts_are_resumed_where_they_stopped(store: Store) -> None:
    data, digest = content(3000, store.study + "parts")
    path = store.path(digest)
    assert store.hospital.http.head(path).headers["Upload-Offset"] == "0"
    assert put(store.hospital, path, data[:1000], 0, 3000).status_code == 200
    asked = store.hospital.http.head(path)
    assert asked.status_code == 404 and asked.headers["Upload-Offset"] == "1000"
    wrong = put(store.hospital, path, data[2000:], 2000, 3000)
    assert wrong.status_code == 409 and wrong.json()["data"]["offset"] == 1000
    # The same blob sent by somebody else is an upload of its own.
    assert store.other.http.head(path).headers["Upload-Offset"] == "0"
    assert put(store.hospital, path, data[1000:], 1000, 3000).status_code == 201
    asked = store.hospital.http.head(path)
    assert asked.status_code == 200 and asked.headers["Content-Length"] == "3000"
    whole = store.hospital.http.get(path)
    assert whole.content == data and whole.headers["ETag"] == f'"{digest}"'
    piece = store.hospital.http.get(path, headers={"Range": "bytes=2990-"})
    assert piece.status_code == 206 and piece.content == data[2990:]
    assert store.hospital.http.get(path, headers={"Range": "bytes=9999-"}).status_code == 416


def test_what_is_still_being_checked_is_not_there_yet(store: Store, tmp_path: Path) -> None:
    """A line breaks after the last part: the sender hears of success only when the bytes are a blob."""
    data, digest = content(3000, store.study + "checked")
    path, hospital = store.path(digest), store.hospital
    file = tmp_path / "update"
    file.write_bytes(data)

    def send() -> int:
        hospital.client.upload(API + path, file)
        return hospital.http.get(path).status_code

    with ThreadPoolExecutor() as pool:
        # What an earlier connection waits for while it has all bytes.
        with BlobStore(store.world.gateway.state_dir / "blobs").digest_lock(digest):
            earlier = pool.submit(put, hospital, path, data, 0, 3000)
            until(lambda: hospital.http.head(path).headers["Upload-Offset"] == "3000", "all bytes are there")
            sending = pool.submit(send)
            wait({sending}, timeout=0.5)
        assert sending.result() == 200
        assert earlier.result().status_code == 201


def test_nobody_learns_of_anothers_blob(store: Store) -> None:
    data, digest = content(500, store.study + "secret")
    assert put(store.hospital, store.path(digest), data, 0, 500).status_code == 201
    assert store.other.http.get(store.path(digest)).status_code == 404
    assert store.other.http.head(store.path(digest)).status_code == 404
    server = store.world.folder / "seen"
    store.world.server.download(f"{API}{store.path(digest)}", server, digest, max_bytes=1000)
    # Who has the bytes may send them too, and has them as its own then.
    assert put(store.other, store.path(digest), data, 0, 500).status_code == 201
    assert store.other.http.get(store.path(digest)).content == data


def test_global_weights_are_for_all(store: Store) -> None:
    path, digest = store.world.weights(seed=101)
    store.world.server.upload(f"{API}{store.path(digest)}", path)
    assert store.other.http.get(store.path(digest)).content == path.read_bytes()


def test_what_is_made_for_one_site_is_for_it_alone(store: Store) -> None:
    path, digest = store.world.weights(seed=102)
    place, name = store.path(digest), store.hospital.site
    store.world.server.upload(f"{API}{place}?site={name}", path)
    assert store.hospital.http.get(place).content == path.read_bytes()
    assert store.other.http.get(place).status_code == store.other.http.head(place).status_code == 404
    # The same bytes may be for two, each of whom is asked about by itself.
    store.world.server.upload(f"{API}{place}?site={store.other.site}", path)
    assert store.other.http.get(place).content == path.read_bytes()
    assert put(store.hospital, f"{place}?site={store.other.site}", b"x", 0, 1).status_code == 403


def test_bytes_that_are_something_else_are_refused(store: Store) -> None:
    data, digest = content(100, store.study + "wrong")
    answer = put(store.hospital, store.path(digest), b"x" * 100, 0, 100)
    assert answer.status_code == 422 and answer.json()["type"].endswith("digest-mismatch")
    assert store.hospital.http.head(store.path(digest)).headers["Upload-Offset"] == "0"
    assert put(store.hospital, store.path(digest), data, 0, 100).status_code == 201


def test_sizes_have_limits(store: Store) -> None:
    _, digest = content(10, "limits")
    path = store.path(digest)
    headers = {"Content-Range": f"bytes 0-9/{MAX_BLOB_BYTES + 1}"}
    assert store.hospital.http.put(path, content=b"0123456789", headers=headers).status_code == 413
    assert store.hospital.http.put(path, content=b"x" * (MAX_PART_BYTES + 1)).status_code == 413
    assert store.hospital.http.put(path, content=b"").status_code == 422
    for text in ("bytes 0-8/10", "bytes 5-1/10", "bytes 0-9/5", "bytes=0-9/10", "bytes 0-9/*"):
        answer = store.hospital.http.put(path, content=b"0123456789", headers={"Content-Range": text})
        assert answer.status_code == 422, text
    unannounced = store.hospital.http.put(path, content=iter([b"0123456789"]))
    assert unannounced.status_code == 422
    assert store.hospital.http.put(store.path("../" * 21 + "x"), content=b"x").status_code in (404, 422)


def test_a_whole_body_is_one_part(store: Store) -> None:
    data, digest = content(64, store.study + "whole")
    assert store.hospital.http.put(store.path(digest), content=data).status_code == 201


def test_only_consenting_sites_of_open_runs_may_send(store: Store) -> None:
    world = store.world
    late = world.hospital(store.study)
    data, digest = content(64, store.study + "late")
    assert put(late, store.path(digest), data, 0, 64).status_code == 403
    run = world.ready(store.study, store.hospital, store.other)
    store.hospital.answer(run, "withdrawn")
    path = f"/runs/{run.id}/blobs/{digest}"
    assert put(store.hospital, path, data, 0, 64).status_code == 403
    world.admin.post(f"{API}/runs/{run.id}/stop", {"reason": ""})
    assert put(store.other, path, data, 0, 64).status_code == 409


def test_a_site_has_a_quota(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state", site_quota_bytes="1000") as gateway:
        world = World(gateway, tmp_path)
        hospital = world.hospital()
        run = world.ready(world.study(hospital), hospital)
        first, second = content(600, "first"), content(500, "second")
        assert put(hospital, f"/runs/{run.id}/blobs/{first[1]}", first[0], 0, 600).status_code == 201
        answer = put(hospital, f"/runs/{run.id}/blobs/{second[1]}", second[0], 0, 500)
        assert answer.status_code == 413 and "quota" in answer.json()["detail"]
        world.close()


def test_a_killed_gateway_goes_on_with_the_upload(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        world = World(gateway, tmp_path)
        hospital = world.hospital()
        run = world.ready(world.study(hospital), hospital)
        data, digest = content(20_000, "killed")
        path = f"/runs/{run.id}/blobs/{digest}"
        assert put(hospital, path, data[:9000], 0, 20_000).status_code == 200
        gateway.kill()
        gateway.start()
        assert hospital.http.head(path).headers["Upload-Offset"] == "9000"
        assert put(hospital, path, data[9000:], 9000, 20_000).status_code == 201
        assert hospital.http.get(path).content == data
        world.close()


# ---- the files alone -----------------------------------------------------------------------------------------------


def test_a_full_disk_has_a_name(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    upload = store.upload_path("", "run", "0" * 64)
    with pytest.raises(NoSpace), store.appending(upload, Part(0, 1, 1)):
        raise OSError(28, os.strerror(28))


def test_an_upload_is_one_connections_at_a_time(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.lock("x"), pytest.raises(Conflict), store.lock("x", wait_s=0.05):
        pytest.fail("two connections held one lock")


def test_a_place_is_given_only_to_the_right_bytes(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    digest = hashlib.sha256(b"right").hexdigest()
    upload = store.upload_path("site", "run", digest)
    with store.appending(upload, Part(0, 5, 5)) as write:
        write(b"wrong")
    with pytest.raises(DigestMismatch):
        store.finish(upload, digest)
    assert not upload.exists() and not store.has(digest)
    with store.appending(upload, Part(0, 5, 5)) as write:
        write(b"right")
    assert store.finish(upload, digest) == 5
    assert store.path(digest).read_bytes() == b"right"
    assert list(store.complete_files()) == [store.path(digest)]


def test_part_reads_headers() -> None:
    assert Part.parse("bytes 5-9/20", 5) == Part(5, 10, 20)
    assert Part.parse(None, 7) == Part(0, 7, 7)
    with pytest.raises(InvalidInput):
        Part.parse(None, None)
    with pytest.raises(TooLarge):
        Part.parse(None, MAX_PART_BYTES + 1)


# ---- clean-up ------------------------------------------------------------------------------------------------------


def test_clean_up_keeps_what_is_needed(world: World) -> None:
    hospital = world.hospital()
    study = world.study(hospital)
    versions = [world.released(study, hospital, seed=200 + number) for number in range(4)]
    url = f"{API}/studies/{study}/versions"
    hospital.client.post(f"{url}/1/decisions", hospital.decision(versions[0], "accepted"))
    hospital.client.post(f"{url}/4/decisions", hospital.decision(versions[3], "rejected"))
    based = world.asked(study, rounds=1)
    assert based.spec.base_version == 4
    plan = world.admin.post(f"{API}/cleanup", {"study": study, "keep": 1, "dry_run": True})
    assert set(plan["versions"]) == {f"{study}/2", f"{study}/3"} and plan["bytes_freed"] > 0
    assert all(row["bytes_kept"] for row in world.admin.get(url))
    done = world.admin.post(f"{API}/cleanup", {"study": study, "keep": 1})
    assert set(done["versions"]) == set(plan["versions"])
    states = {row["version"]: (row["state"], row["bytes_kept"]) for row in world.admin.get(url)}
    assert states == {
        1: ("released", True),
        2: ("retired", False),
        3: ("retired", False),
        4: ("candidate", True),
    }
    gone = world.gateway.state_dir / "blobs" / versions[1].digest[:2] / versions[1].digest[2:4] / versions[1].digest
    assert not gone.exists()
    with pytest.raises(NotFound, match="cleaned up"):
        hospital.client.download(f"{url}/2/file", world.folder / "gone", versions[1].digest, max_bytes=10**6)
    with pytest.raises(NotFound):
        world.admin.post(f"{url}/2/offer")
    kept = world.folder / "kept"
    hospital.client.download(f"{url}/1/file", kept, versions[0].digest, max_bytes=10**6)
    world.admin.post(f"{API}/runs/{based.id}/stop", {"reason": ""})

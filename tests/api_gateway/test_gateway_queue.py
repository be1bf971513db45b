"""The contribution queue at the gateway: who may put in what, what is refused and why, and averages exactly once."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway_world import GatewayProcess, Hospital, World, running_gateway
from queue_world import SIZE, Scene, agree, flat, model, open_queue
from waiting import until

from api_gateway.blobstore import MAX_BLOB_BYTES
from medhive.errors import Conflict, Expired, IllegalTransition, InvalidInput, NotAllowed, NotFound
from medhive.packing import sha256_file, write_weights
from medhive.queues import MANIFEST_HEADER, ExecutionTask, QueueStatus, manifest_to_header
from medhive.wire import API


class Averager:
    """Speaks the aggregator's part over HTTP."""

    def __init__(self, scene: Scene, holder: str = "test") -> None:
        self.scene, self.holder = scene, holder
        self.server = scene.world.server

    def lease(self) -> ExecutionTask:
        """The lease on this queue's average."""
        answer = self.server.post(f"{API}/server/queue/lease", {"holder": self.holder})
        assert answer, "no average is due"
        task = ExecutionTask.model_validate(answer)
        assert task.queue_id == self.scene.queue.id
        return task

    def path(self, task: ExecutionTask) -> str:
        return f"{API}/server/queue/executions/{task.execution}"

    def look(self, task: ExecutionTask) -> ExecutionTask:
        answer = self.server.post(f"{self.path(task)}/look", {"fence": task.fence})
        return ExecutionTask.model_validate(answer)

    def send(self, task: ExecutionTask, seed: int = 0) -> str:
        file = self.scene.weights(10_000 + seed)
        self.server.upload(f"{self.path(task)}/blobs/{sha256_file(file)}", file)
        return sha256_file(file)

    def end(self, task: ExecutionTask, **changes: Any) -> Any:
        counted = [item.number for item in task.contributions]
        body = {"fence": task.fence, "state": "done", "newest_version": task.newest_version, "counted": counted}
        return self.server.post(f"{self.path(task)}/end", {**body, **changes})


def own_settings(gateway: GatewayProcess) -> dict[str, str]:
    """What it was given, for another one beside it."""
    return {name.removeprefix("MEDHIVE_GATEWAY_").lower(): value for name, value in gateway.environment.items()}


def test_twelve_uploads_make_one_average_of_ten(world: World) -> None:
    scene = Scene.made(world, hospitals=12, capacity=10)
    sizes = []
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed, examples=seed + 1)
        sizes.append((scene.status().queue_size, str(scene.status().state)))
    assert sizes[0] == (1, "partial") and sizes[9] == (10, "full") and sizes[11] == (12, "overflow")
    averager = Averager(scene)
    task = averager.lease()
    first = [row.number for row in scene.contributions()][:10]
    assert [item.number for item in task.contributions] == first
    digest = averager.send(task)
    done = averager.end(task, digest=digest)
    assert done["version"] == 2 and done["state"] == "done"
    assert averager.end(task, digest=digest) == done
    status = scene.status()
    assert (status.queue_size, status.newest_version, status.averaging) == (2, 2, False)
    version = scene.version(2)
    assert version.digest == digest and version.run_id == scene.queue.id and str(version.state) == "candidate"
    body = version.manifest.body
    assert (body.examples, body.base_version, body.spec_hash) == (55, 1, scene.queue.spec_hash)
    assert set(body.sites) == {hospital.site for hospital in scene.hospitals[:10]}
    assert version.metrics == {"train_loss": 0.5}
    lineage = scene.contributions(version=2)
    assert [row.number for row in lineage] == first and sum(row.weight or 0 for row in lineage) == pytest.approx(1)
    assert [row.weight for row in lineage] == [(n + 1) / 55 for n in range(10)]
    assert {row.staleness for row in lineage} == {0}
    # What was averaged is no longer kept here, and what waits is.
    world.admin.post(f"{API}/cleanup", {"study": scene.study})
    kept = [(world.gateway.state_dir / "blobs").glob(f"*/*/{row.digest}") for row in scene.contributions()]
    assert [len(list(files)) for files in kept] == [0] * 10 + [1] * 2


def test_two_gateways_are_one_queue(world: World) -> None:
    """Each of twelve contributions is sent to both at once, as a hospital does whose first address is slow."""
    scene = Scene.made(world, hospitals=6, capacity=10)
    with running_gateway(world.gateway.state_dir, **own_settings(world.gateway)) as second:

        def send(number: int, gateway: GatewayProcess) -> None:
            hospital, file = scene.hospitals[number % 6], files[number]
            with gateway.client(str(hospital.http.headers["Authorization"]).removeprefix("Bearer ")) as client:

                def acknowledged() -> bool:
                    try:
                        client.upload("/upload", file, method="POST", headers=headers[number])
                    except Conflict:  # the other gateway has just written the same bytes
                        return False
                    return True

                until(acknowledged, f"upload {number}")

        files = [scene.weights(number) for number in range(12)]
        manifests = [scene.manifest(scene.hospitals[number % 6], file) for number, file in enumerate(files)]
        headers = [{MANIFEST_HEADER: manifest_to_header(manifest)} for manifest in manifests]
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(send, number, each) for number in range(12) for each in (world.gateway, second)]
            for job in jobs:
                job.result()
        assert sorted(row.digest for row in scene.contributions()) == sorted(sha256_file(file) for file in files)
        averager = Averager(scene)
        task = averager.lease()
        digest = averager.send(task)
        with second.client(world.gateway.server_token) as server:
            averager.server = server
            done = averager.end(task, digest=digest)
        assert (done["version"], scene.status().queue_size) == (2, 2)
        assert scene.contributions(version=2) == scene.contributions()[:10]


def test_more_than_the_capacity_triggers_the_next_one(world: World) -> None:
    scene = Scene.made(world, hospitals=2, capacity=2)
    for seed in range(5):
        scene.upload(scene.hospitals[seed % 2], seed)
    averager = Averager(scene)
    for version in (2, 3):
        task = averager.lease()
        averager.end(task, digest=averager.send(task, version))
        assert scene.status().newest_version == version
    assert scene.status().queue_size == 1
    stale = [(row.version, row.staleness, row.weight) for row in scene.contributions()]
    assert stale[2:4] == [(3, 1, pytest.approx(0.5 / 2**0.5))] * 2 and stale[4] == (None, None, None)
    # Hospitals decide on a queue's versions as on a run's, and go back to the one before.
    hospital, path = scene.hospitals[0], f"{API}/studies/{scene.study}/versions"
    for number, decision in ((2, "accepted"), (3, "accepted"), (3, "rejected")):
        hospital.client.post(f"{path}/{number}/decisions", hospital.decision(scene.version(number), decision))
    decided = [[str(item.state) for item in scene.version(n).decisions if item.site == hospital.site] for n in (2, 3)]
    assert decided == [["accepted"], ["rejected"]]


def test_the_same_contribution_counts_once(world: World) -> None:
    scene = Scene.made(world)
    file = scene.weights(1)
    first = scene.post(scene.hospitals[0], file)
    again = scene.post(scene.hospitals[0], file)
    assert (first.status_code, again.status_code) == (201, 200) and first.json() == again.json()
    assert scene.status().queue_size == 1
    # The client asks first and sends nothing at all.
    headers = {MANIFEST_HEADER: manifest_to_header(scene.manifest(scene.hospitals[0], file))}
    assert scene.hospitals[0].client.upload("/upload", file, method="POST", headers=headers) == 0
    assert len(_events(scene, "contribution.received")) == 1


def _head(world: World) -> int:
    return int(world.admin.get(f"{API}/events/head")["body"]["number"])


def test_an_upload_goes_on_where_it_stopped(world: World) -> None:
    scene = Scene.made(world)
    hospital, file = scene.hospitals[0], scene.weights(1)
    raw, url = file.read_bytes(), f"{world.gateway.url}/upload"
    headers = {MANIFEST_HEADER: manifest_to_header(scene.manifest(hospital, file))}
    part = {**headers, "Content-Range": f"bytes 0-999/{len(raw)}"}
    assert hospital.http.post(url, content=raw[:1000], headers=part).status_code == 200
    asked = hospital.http.head(url, headers=headers)
    assert (asked.status_code, asked.headers["Upload-Offset"]) == (404, "1000")
    sent = hospital.client.upload("/upload", file, method="POST", headers=headers)
    assert sent == len(raw) - 1000 and scene.status().queue_size == 1


# ---- refusals ------------------------------------------------------------------------------------------------------


def code(answer: Any) -> tuple[int, str]:
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


@pytest.fixture(scope="module")
def refusing(world: World) -> Scene:
    """A queue into which only wrong things are sent."""
    return Scene.made(world, max_norm=1000.0)


def test_wrong_bytes_are_refused(refusing: Scene, tmp_path: Path) -> None:
    hospital, random = refusing.hospitals[0], np.random.default_rng(3)
    values = random.standard_normal(SIZE)
    holes = values.copy()
    holes[500] = np.nan
    nan, huge = model(tmp_path / "nan", holes), model(tmp_path / "huge", values * 1000)
    assert code(refusing.post(hospital, nan)) == (422, "not-finite")
    assert code(refusing.post(hospital, huge)) == (422, "norm-too-large")
    other = tmp_path / "other"
    write_weights(other, {"another": values.astype(np.float32)})
    assert code(refusing.post(hospital, other)) == (422, "wrong-layout")
    pickle = tmp_path / "pickle"
    good = refusing.weights(4).stat().st_size
    pickle.write_bytes((b"\x80\x04\x95" + b"cos\nsystem\n(S'id'\ntR." + b"\0" * good)[:good])
    assert code(refusing.post(hospital, pickle)) == (422, "corrupt-weights")
    truncated = tmp_path / "truncated"
    truncated.write_bytes(refusing.weights(4).read_bytes()[:-4])
    assert code(refusing.post(hospital, truncated)) == (422, "corrupt-weights")
    swapped = refusing.weights(5).read_bytes()
    assert code(refusing.post(hospital, refusing.weights(4), content=swapped)) == (422, "digest-mismatch")
    small = model(tmp_path / "small", np.zeros(600_000))
    assert code(refusing.post(hospital, small)) == (422, "invalid-input")
    assert refusing.status().queue_size == 0
    refused = [row["data"]["reason_code"] for row in _events(refusing, "contribution.refused")]
    assert refused == ["not-finite", "norm-too-large", "wrong-layout", "corrupt-weights", "corrupt-weights"]
    # Nothing of it was left lying about, not even half.
    uploads = refusing.world.gateway.state_dir / "blobs" / "uploads" / f"site-{hospital.site}"
    assert not list(uploads.glob("*.part"))


def _events(scene: Scene, kind: str) -> list[dict[str, Any]]:
    rows = scene.world.admin.get(f"{API}/events", after=max(0, _head(scene.world) - 200), limit=1000)
    return [row for row in rows if row["kind"] == kind and row["study"] == scene.study]


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"study": "heart"}, (404, "not-found")),
        ({"queue_id": "QUEUE_999"}, (403, "bad-signature")),
        ({"spec_hash": "0" * 64}, (403, "bad-signature")),
        ({"site": "another"}, (403, "bad-signature")),
        ({"base_version": 77}, (404, "not-found")),
        ({"base_digest": "0" * 64}, (403, "bad-signature")),
        ({"content_size_bytes": 17}, (422, "invalid-input")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_manifests_are_refused(refusing: Scene, changes: dict[str, Any], refusal: tuple[int, str]) -> None:
    assert code(refusing.post(refusing.hospitals[0], refusing.weights(6), **changes)) == refusal
    assert refusing.status().queue_size == 0


def test_what_was_made_for_another_study_is_refused(world: World, refusing: Scene) -> None:
    """A hospital of both, with a queue open in each: neither may take what was signed for the other."""
    hospital, file = refusing.hospitals[0], refusing.weights(6)
    study = world.study(hospital)
    other = open_queue(world, study)
    agree(hospital, other)
    own = refusing.manifest(hospital, file)
    assert code(refusing.post(hospital, file, study=study)) == (403, "bad-signature"), "that queue is not of this study"
    assert code(refusing.post(hospital, file, queue_id=other.id)) == (403, "bad-signature")
    moved = own.model_copy(update={"body": own.body.model_copy(update={"study": study, "queue_id": other.id})})
    headers = {MANIFEST_HEADER: manifest_to_header(moved)}
    url = f"{world.gateway.url}/upload"
    assert code(hospital.http.post(url, content=file.read_bytes(), headers=headers)) == (403, "bad-signature")
    headers = {MANIFEST_HEADER: manifest_to_header(own)}
    asked = hospital.http.post(f"{url}?study={study}", content=file.read_bytes(), headers=headers)
    assert code(asked) == (422, "invalid-input")
    sizes = [world.admin.get("/status", study=name)["queue_size"] for name in (study, refusing.study)]
    assert sizes == [0, 0]


def test_who_may_upload(refusing: Scene) -> None:
    world, file = refusing.world, refusing.weights(6)
    stranger, silent = world.hospital(), world.hospital(refusing.study)
    assert code(refusing.post(stranger, file)) == (404, "not-found")
    assert code(refusing.post(silent, file)) == (403, "not-allowed")
    assert code(refusing.post(refusing.hospitals[0], file, key=stranger.key)) == (403, "bad-signature")
    url = f"{world.gateway.url}/upload"
    headers = {MANIFEST_HEADER: manifest_to_header(refusing.manifest(silent, file))}
    with world.gateway.http() as nobody:
        assert code(nobody.post(url, content=b"x", headers=headers)) == (401, "not-authenticated")
    assert code(silent.http.post(url, content=b"x")) == (422, "invalid-input")
    assert code(silent.http.post(f"{url}?study=other", content=b"x", headers=headers)) == (422, "invalid-input")


def test_a_hundred_gigabytes_are_refused_unread_and_memory_stays_flat(refusing: Scene) -> None:
    hospital, file = refusing.hospitals[0], refusing.weights(6)
    process = refusing.world.gateway.process
    assert process
    peak = Path(f"/proc/{process.pid}/status")
    before = _peak_kib(peak)
    headers = {MANIFEST_HEADER: manifest_to_header(refusing.manifest(hospital, file))}
    announced = {**headers, "Content-Length": str(10**11), "Authorization": hospital.http.headers["Authorization"]}
    context = refusing.world.gateway.trust.context()
    bare = http.client.HTTPSConnection("localhost", refusing.world.gateway.port, context=context, timeout=30)
    bare.request("POST", "/upload", headers=announced)
    said = bare.getresponse()
    assert said.status == 413 and json.loads(said.read())["type"].endswith("too-large")
    bare.close()
    ranged = {**headers, "Content-Length": "1000", "Content-Range": f"bytes 0-999/{MAX_BLOB_BYTES + 1}"}
    answer = hospital.http.post(f"{refusing.world.gateway.url}/upload", content=b"x" * 1000, headers=ranged)
    assert code(answer) == (413, "too-large")
    assert _peak_kib(peak) - before < 64 * 1024


def _peak_kib(status: Path) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def test_a_consent_covers_so_many_contributions_and_no_longer(world: World) -> None:
    scene = Scene.made(world, hospitals=2, capacity=10)
    one, other = scene.hospitals
    agree(one, scene.queue, max_rounds=1)
    scene.upload(one, 1)
    with pytest.raises(NotAllowed, match="covers 1 contributions"):
        scene.upload(one, 2)
    agree(one, scene.queue, max_rounds=1)
    scene.upload(one, 3)
    scene.upload(other, 4)
    # A withdrawal takes out what waits, and a decline is a no.
    agree(one, scene.queue, "withdrawn", reason="a question of ours")
    assert [str(row.state) for row in scene.contributions()] == ["withdrawn", "withdrawn", "waiting"]
    assert scene.status().queue_size == 1
    with pytest.raises(NotAllowed):
        scene.upload(one, 5)
    # After a new consent the same bytes may come again.
    agree(one, scene.queue)
    scene.upload(one, 1)
    assert [str(row.state) for row in scene.contributions()] == ["waiting", "withdrawn", "waiting"]
    agree(one, scene.queue, "withdrawn")
    now = datetime.now(UTC)
    with pytest.raises(Expired):
        agree(other, scene.queue, issued_at=now - timedelta(days=2), expires_at=now - timedelta(days=1))
    world.admin.delete(f"{API}/studies/{scene.study}/members/{other.site}")
    assert scene.status().queue_size == 0


def test_what_is_too_stale_is_refused(world: World) -> None:
    scene = Scene.made(world, capacity=2, max_staleness=0)
    averager = Averager(scene)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    task = averager.lease()
    averager.end(task, digest=averager.send(task))
    with pytest.raises(Conflict, match="1 versions ago"):
        scene.upload(scene.hospitals[0], 5)


def test_what_a_queue_cannot_do_is_refused(world: World) -> None:
    study = world.study(world.hospital())
    with pytest.raises(InvalidInput, match="exchange keys"):
        open_queue(world, study, privacy={"secagg": True})
    with pytest.raises(InvalidInput, match="differential privacy"):
        open_queue(world, study, privacy={"dp_epsilon": 1.0})
    with pytest.raises(NotFound, match="no open queue"):
        world.admin.get(f"{API}/studies/{study}/queue")
    queue = open_queue(world, study)
    assert open_queue(world, study).id == queue.id
    with pytest.raises(Conflict, match="other options"):
        open_queue(world, study, capacity=3)
    world.admin.post(f"{API}/studies/{study}/queue/close", {"reason": "another capacity"})
    assert open_queue(world, study, capacity=3).id != queue.id


# ---- averages ------------------------------------------------------------------------------------------------------


def test_an_average_by_hand_needs_two_hospitals(world: World) -> None:
    scene = Scene.made(world, capacity=10)
    execute = f"{API}/studies/{scene.study}/queue/execute"
    with pytest.raises(Conflict, match="0 hospitals"):
        world.admin.post(execute)
    scene.upload(scene.hospitals[0], 1)
    scene.upload(scene.hospitals[0], 2)
    with pytest.raises(Conflict, match="1 hospitals"):
        world.admin.post(execute)
    scene.upload(scene.hospitals[1], 3)
    made = world.admin.post(execute)
    assert made["contributions"] == 3 and made["state"] == "due" and made["asked_by"] == "admin:admin"
    assert world.admin.post(execute)["execution"] == made["execution"]
    averager = Averager(scene)
    task = averager.lease()
    assert averager.end(task, digest=averager.send(task))["version"] == 2


def test_a_former_holder_cannot_end_an_average(world: World) -> None:
    scene = Scene.made(world, capacity=2)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    averager = Averager(scene)
    old = averager.lease()
    digest = averager.send(old)
    new = averager.lease()
    assert new.execution == old.execution and new.fence > old.fence
    with pytest.raises(Conflict) as stale:
        averager.end(old, digest=digest)
    assert stale.value.data["cause"] == "stale-fence"
    assert averager.end(new, digest=digest)["version"] == 2
    with pytest.raises(IllegalTransition):
        averager.end(new, digest=digest, state="failed", reason="late")
    assert [row["version"] for row in world.admin.get(f"{API}/studies/{scene.study}/versions")] == [2, 1]


def test_an_average_of_what_has_changed_is_made_anew(world: World) -> None:
    scene = Scene.made(world, hospitals=3, capacity=3)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    averager = Averager(scene)
    task = averager.lease()
    digest = averager.send(task)
    agree(scene.hospitals[0], scene.queue, "withdrawn")
    with pytest.raises(Conflict) as changed:
        averager.end(task, digest=digest)
    assert changed.value.data["cause"] == "execution-changed"
    again = averager.look(task)
    assert [item.contribution.body.site for item in again.contributions] == [h.site for h in scene.hospitals[1:]]
    world.released(scene.study, *scene.hospitals, seed=99)
    with pytest.raises(Conflict):
        averager.end(again, digest=digest)
    newest = averager.look(again)
    assert newest.newest_version == 2
    assert averager.end(newest, digest=digest)["version"] == 3


def agreed_for_a_moment(hospital: Hospital, scene: Scene) -> datetime:
    """When the newest consent of this hospital ends; it lasts no longer than a busy gateway needs to take it."""
    life = timedelta(seconds=0.25)
    while True:
        ends = datetime.now(UTC) + life
        try:
            agree(hospital, scene.queue, expires_at=ends)
        except Expired:
            life *= 2
        else:
            return ends


def test_a_consent_that_ended_holds_up_no_average(world: World) -> None:
    scene = Scene.made(world, hospitals=3, capacity=3)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    ends = agreed_for_a_moment(scene.hospitals[0], scene)
    until(lambda: datetime.now(UTC) > ends, "the end of a consent")
    averager = Averager(scene)
    task = averager.lease()
    assert [item.contribution.body.site for item in task.contributions] == [h.site for h in scene.hospitals[1:]]
    assert [str(row.state) for row in scene.contributions()] == ["withdrawn", "taken", "taken"]
    assert averager.end(task, digest=averager.send(task))["version"] == 2


def test_a_failed_average_gives_back_what_it_had_taken(world: World) -> None:
    scene = Scene.made(world, hospitals=3, capacity=3)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    averager = Averager(scene)
    task = averager.lease()
    one = task.contributions[0].number
    counted = [item.number for item in task.contributions[1:]]
    averager.end(task, state="failed", reason="no luck", counted=counted, refused={one: "norm-outlier"})
    assert [str(row.state) for row in scene.contributions()] == ["refused", "waiting", "waiting"]
    assert not scene.status().averaging


def test_a_queue_is_cleared_with_a_reason(world: World) -> None:
    scene = Scene.made(world, capacity=2)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    averager = Averager(scene)
    task = averager.lease()
    with pytest.raises(InvalidInput, match="reason"):
        world.admin.post(f"{API}/studies/{scene.study}/queue/clear", {"reason": " "})
    world.admin.post(f"{API}/studies/{scene.study}/queue/clear", {"reason": "a wrong scanner"})
    assert scene.status().queue_size == 0
    assert {row.reason for row in scene.contributions()} == {"a wrong scanner"}
    with pytest.raises(IllegalTransition):
        averager.look(task)


# ---- /download and /status -----------------------------------------------------------------------------------------


def test_the_newest_model_is_downloaded(world: World) -> None:
    scene = Scene.made(world)
    hospital, url = scene.hospitals[0], f"{world.gateway.url}/download?study={scene.study}"
    whole = hospital.http.get(url)
    assert whole.status_code == 200 and whole.headers["ETag"] == f'"{scene.base.digest}"'
    assert whole.headers["MedHive-Model-Version"] == "1" and "no-cache" in whole.headers["Cache-Control"]
    piece = hospital.http.get(url, headers={"Range": "bytes=10-19"})
    assert piece.status_code == 206 and piece.content == whole.content[10:20]
    same = hospital.http.get(url, headers={"If-None-Match": whole.headers["ETag"]})
    assert same.status_code == 304 and not same.content
    assert hospital.http.head(url).headers["Content-Length"] == str(len(whole.content))
    assert code(world.hospital().http.get(url)) == (404, "not-found")
    assert hospital.http.get(f"{world.gateway.url}/download").content == whole.content


def test_status_says_to_each_what_he_may_know(world: World) -> None:
    scene = Scene.made(world, hospitals=2, capacity=4)
    scene.upload(scene.hospitals[0], 1)
    with world.gateway.client() as nobody:
        public = scene.status(nobody)
    assert (public.queue_size, public.capacity, str(public.state)) == (1, 4, "partial")
    assert (public.queued_sites, public.model_available, public.newest_version) == (1, True, 1)
    assert public.connected_sites == 2 and public.waiting == () and public.connected == ()
    own = scene.status(scene.hospitals[0].client)
    assert [item.site for item in own.waiting] == [scene.hospitals[0].site]
    assert own.waiting[0].source_address is None
    assert scene.status(scene.hospitals[1].client).waiting == ()
    admin = scene.status()
    assert admin.waiting[0].source_address == "127.0.0.1" and len(admin.connected) == 2
    assert scene.hospitals[0].client.get("/status")["queue_id"] == scene.queue.id
    with pytest.raises(NotFound):
        world.hospital().client.get("/status", study=scene.study)


# ---- version 0 -----------------------------------------------------------------------------------------------------


def test_the_first_hospital_brings_the_initial_weights(world: World) -> None:
    members = [world.hospital(), world.hospital()]
    study = world.study(*members)
    queue = open_queue(world, study)
    zero, other = model(world.folder / f"zero-{study}", np.ones(10)), model(world.folder / f"one-{study}", np.zeros(10))

    def send(hospital: Hospital, file: Path) -> int:
        path = f"{API}/studies/{study}/queue/version-zero/blobs/{sha256_file(file)}"
        return hospital.client.upload(path, file)

    assert QueueStatus.model_validate(world.admin.get("/status", study=study)).model_available is False
    with pytest.raises(NotAllowed):
        send(members[0], zero)
    for member in members:
        agree(member, queue)
    assert send(members[0], zero) == zero.stat().st_size
    assert send(members[1], zero) == 0
    with pytest.raises(Conflict, match="another version 0"):
        send(members[1], other)
    fetched = world.folder / f"fetched-{study}"
    members[1].client.download(f"/download?study={study}", fetched, sha256_file(zero), max_bytes=10**6)
    assert flat(fetched).tolist() == [1.0] * 10


# ---- crashes -------------------------------------------------------------------------------------------------------


def test_a_killed_gateway_forgets_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state") as gateway:
        world = World(gateway, tmp_path)
        scene = Scene.made(world, capacity=2)
        scene.upload(scene.hospitals[0], 1)
        gateway.kill()
        gateway.start()
        scene.upload(scene.hospitals[1], 2)
        task = Averager(scene).lease()
        gateway.kill()
        gateway.start()
        another = world.server.post(f"{API}/server/queue/lease", {"holder": "another"})
        assert another is None, "the lease of the first holder still holds"
        averager = Averager(scene)
        task = averager.lease()
        averager.end(task, digest=averager.send(task))
        gateway.kill()
        gateway.start()
        assert scene.status().newest_version == 2 and scene.status().queue_size == 0
        world.close()

"""The averager with a real gateway: the right mean, nothing twice, whatever is killed."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway_world import Hospital, World, running_gateway
from queue_world import Scene, agree, flat
from waiting import until

from fl_server.queues import Averager, AveragerStopped
from medhive.errors import Conflict, MedHiveError, Unreachable
from medhive.packing import sha256_file, write_weights
from medhive.queues import QueueContributionAnswer
from medhive.wire import API

UPLOADERS, EACH = 20, 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("queues")
    with running_gateway(folder / "state", lease_s="2") as gateway:
        world = World(gateway, folder)
        yield world
        world.close()


class Averaging:
    """An averager in this process, and what it said."""

    def __init__(self, world: World, folder: Path) -> None:
        self.said: list[str] = []
        self.stopped = threading.Event()
        self.averager = Averager(
            gateway=world.server,
            holder="test",
            coordinator_key_ids=lambda: (world.coordinator.key_id,),
            folder=folder,
            say=self.said.append,
            stopped=self.stopped,
        )


@pytest.fixture
def averaging(world: World, tmp_path: Path) -> Averaging:
    return Averaging(world, tmp_path / "files")


def weights_of(scene: Scene, version: int) -> np.ndarray:
    """A version's numbers."""
    answer, path = scene.version(version), scene.world.folder / f"{scene.study}-v{version}"
    url = f"{API}/studies/{scene.study}/versions/{version}/file"
    scene.world.admin.download(url, path, answer.digest, max_bytes=10**7)
    return flat(path)


def test_the_version_is_the_weighted_mean(world: World, averaging: Averaging) -> None:
    scene = Scene.made(world, hospitals=3, capacity=3)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed, examples=10 * (seed + 1))
    assert averaging.averager.step() and not averaging.averager.step()
    independent = np.average([values for _, values, _ in scene.sent], axis=0, weights=[n for _, _, n in scene.sent])
    np.testing.assert_allclose(weights_of(scene, 2), independent, rtol=1e-5, atol=1e-6)
    assert averaging.said == [f"{scene.queue.id}: version 2 of {scene.study} out of 3 contributions"]


def test_twelve_at_once_make_one_version_of_ten(world: World, averaging: Averaging) -> None:
    scene = Scene.made(world, hospitals=12, capacity=10)
    together = threading.Barrier(len(scene.hospitals), timeout=60)

    def upload(seed: int, hospital: Hospital) -> None:
        together.wait()
        scene.upload(hospital, seed, examples=1 + seed)

    with ThreadPoolExecutor(len(scene.hospitals)) as pool:
        list(pool.map(upload, range(12), scene.hospitals))
    assert averaging.averager.step() and not averaging.averager.step()
    lineage = scene.contributions(version=2)
    assert len(lineage) == 10
    assert scene.status().newest_version == 2 and scene.status().queue_size == 2
    sent = {_digest(scene, seed): flat(scene.weights(seed)) for seed in range(12)}
    values, examples = [sent[row.digest] for row in lineage], [row.examples for row in lineage]
    np.testing.assert_allclose(weights_of(scene, 2), np.average(values, axis=0, weights=examples), rtol=1e-5, atol=1e-6)


def test_an_outlier_is_refused_and_the_others_count(world: World, averaging: Averaging) -> None:
    scene = Scene.made(world, hospitals=4, capacity=4)
    for seed, hospital in enumerate(scene.hospitals[:3]):
        scene.upload(hospital, seed)
    huge = scene.weights(3)
    write_weights(huge, {"layer": flat(huge) * np.float32(1e5)})
    assert scene.post(scene.hospitals[3], huge).status_code == 201
    assert averaging.averager.step()
    states = [(str(row.state), row.reason) for row in scene.contributions()]
    assert states == [("counted", "")] * 3 + [("refused", "norm-outlier")]
    assert "1 refused" in averaging.said[0]


def test_too_few_sound_ones_wait_on(world: World, averaging: Averaging) -> None:
    scene = Scene.made(world, hospitals=2, capacity=2)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    damaged = scene.contributions()[0].digest
    blob = world.gateway.state_dir / "blobs" / damaged[:2] / damaged[2:4] / damaged
    blob.write_bytes(blob.read_bytes()[:-4] + b"\0\0\0\0")
    assert averaging.averager.step()
    assert [str(row.state) for row in scene.contributions()] == ["refused", "waiting"]
    assert "no average" in averaging.said[0] and scene.status().newest_version == 1


def test_what_is_withdrawn_while_it_is_averaged_does_not_count(world: World, averaging: Averaging) -> None:
    scene = Scene.made(world, hospitals=3, capacity=3)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    averager, end = averaging.averager, averaging.averager._end

    def withdraw_first(*words: Any) -> None:
        if scene.hospitals:
            agree(scene.hospitals.pop(), scene.queue, "withdrawn")
            scene.hospitals.clear()
        end(*words)

    averager._end = withdraw_first  # type: ignore[method-assign]
    assert averager.step()
    independent = np.mean([values for _, values, _ in scene.sent[:2]], axis=0)
    np.testing.assert_allclose(weights_of(scene, 2), independent, rtol=1e-5, atol=1e-6)


def test_an_expired_consent_does_not_count(world: World, averaging: Averaging) -> None:
    scene = Scene.made(world, hospitals=3, capacity=3)
    scene.upload(scene.hospitals[2], 2)
    now = datetime.now(UTC)
    agree(scene.hospitals[2], scene.queue, issued_at=now, expires_at=now + timedelta(seconds=2))
    until(lambda: datetime.now(UTC) > now + timedelta(seconds=2), "the consent's end")
    for seed, hospital in enumerate(scene.hospitals[:2]):
        scene.upload(hospital, seed)
    assert not averaging.averager.step(), "two of three are not enough"
    assert [str(row.state) for row in scene.contributions()] == ["withdrawn", "waiting", "waiting"]


def test_it_stops_in_the_middle(world: World, averaging: Averaging) -> None:
    scene = Scene.made(world, hospitals=2, capacity=2)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    averaging.stopped.set()
    with pytest.raises(AveragerStopped):
        averaging.averager.step()
    averaging.stopped.clear()
    assert averaging.averager.step() and scene.status().newest_version == 2


# ---- kills ---------------------------------------------------------------------------------------------------------


class Killed:
    """The averager as a process that is killed and started again."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        script = Path(__file__).parents[1] / "support" / "averager_process.py"
        gateway = self.world.gateway
        ca_file = gateway.state_dir / "tls" / "ca.crt"
        words = [gateway.url, str(ca_file), gateway.server_token, self.world.coordinator.key_id]
        log = (self.world.folder / "averager.log").open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, str(script), *words, str(self.world.folder / "averager")], stdout=log, stderr=log
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self) -> None:
        self.kill()
        self.process = self.start()


def upload_all(scene: Scene, hospital: Hospital, seeds: list[int]) -> None:
    """Upload until each is acknowledged, as a hospital's program does while the gateway comes and goes."""
    for seed in seeds:

        def acknowledged(seed: int = seed) -> bool:
            try:
                scene.upload(hospital, seed, examples=1 + seed % 7)
            except (Unreachable, Conflict):
                return False
            return True

        until(acknowledged, f"upload {seed}")


def test_two_hundred_uploads_count_exactly_once_whatever_is_killed(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "state", lease_s="2") as gateway:
        world = World(gateway, tmp_path)
        scene = Scene.made(world, hospitals=UPLOADERS, capacity=10, max_staleness=100)
        averager = Killed(world)
        try:
            seeds = [list(range(n * EACH, (n + 1) * EACH)) for n in range(UPLOADERS)]
            with ThreadPoolExecutor(UPLOADERS) as pool:
                jobs = [pool.submit(upload_all, scene, *each) for each in zip(scene.hospitals, seeds, strict=True)]
                for victim in itertools.cycle((gateway, averager)):
                    before = len(scene.sent)
                    if before >= UPLOADERS * EACH or all(job.done() for job in jobs):
                        break
                    if victim is gateway:
                        gateway.kill()
                        gateway.start()
                    else:
                        averager.again()
                    goal = before + 25
                    until(
                        lambda goal=goal: len(scene.sent) >= goal or all(job.done() for job in jobs), "25 more uploads"
                    )
                for job in jobs:
                    job.result()
            averager.again()
            gateway.kill()
            gateway.start()
            until(lambda: scene.status().queue_size == 0, "everything is averaged")
        finally:
            averager.kill()
        _require_every_one_once(scene)
        world.close()


def _require_every_one_once(scene: Scene) -> None:
    rows = [row for page in range(2, 22) for row in scene.contributions(version=page)]
    assert len(rows) == UPLOADERS * EACH == len({row.number for row in rows})
    assert {str(row.state) for row in rows} == {"counted"}
    values = {_digest(scene, seed): flat(scene.weights(seed)) for seed in range(UPLOADERS * EACH)}
    assert {row.digest for row in rows} == set(values)
    newest = scene.version(21)
    assert newest.version == 21 and scene.status().newest_version == 21
    before = weights_of(scene, 1).astype(np.float64)
    base = before.copy()
    for version in range(2, 22):
        before = before + _change(rows, version, values, base)
        np.testing.assert_allclose(weights_of(scene, version), before, rtol=1e-4, atol=1e-5)


def _digest(scene: Scene, seed: int) -> str:
    return sha256_file(scene.weights(seed))


def _change(
    rows: list[QueueContributionAnswer], version: int, values: dict[str, np.ndarray], base: np.ndarray
) -> np.ndarray:
    """FedBuff's step from the lineage alone: all began from version 1."""
    own = [row for row in rows if row.version == version]
    assert len(own) == 10
    total = sum(row.examples for row in own)
    parts = [row.examples / total / np.sqrt(version - 1) * (values[row.digest] - base) for row in own]
    return np.sum(parts, axis=0)


def test_a_gateway_that_refuses_is_no_end(world: World, tmp_path: Path) -> None:
    averaging = Averaging(world, tmp_path)
    token = world.gateway.server_token
    world.server.use_token("wrong")
    thread = threading.Thread(target=averaging.averager.serve, daemon=True)
    try:
        with pytest.raises(MedHiveError):
            averaging.averager.step()
        thread.start()
    finally:
        world.server.use_token(token)
    scene = Scene.made(world, hospitals=2, capacity=2)
    for seed, hospital in enumerate(scene.hospitals):
        scene.upload(hospital, seed)
    until(lambda: scene.status().newest_version == 2, "an average in the end")
    averaging.stopped.set()
    thread.join(30)
    assert not thread.is_alive()

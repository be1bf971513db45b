"""A contribution queue with hospitals that have agreed to it and upload real weights, for the tests of every side."""

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gateway_world import Hospital, World

from medhive.consent import Consent, ConsentBody
from medhive.packing import read_weights, sha256_file, write_weights
from medhive.queues import (
    MANIFEST_HEADER,
    QueueAnswer,
    QueueContribution,
    QueueContributionAnswer,
    QueueContributionBody,
    QueueStatus,
    manifest_to_header,
)
from medhive.signing import SigningKey, sign
from medhive.wire import API, VersionAnswer

SIZE = 1000


def open_queue(world: World, study: str, **options: Any) -> QueueAnswer:
    """Open a study's queue."""
    return QueueAnswer.model_validate(world.admin.put(f"{API}/studies/{study}/queue", options))


def signed_consent(
    queue: QueueAnswer,
    *,
    site: str,
    key: SigningKey,
    coordinator_key_id: str,
    decision: str = "granted",
    **changes: Any,
) -> Consent:
    """A hospital's statement about a queue."""
    now = datetime.now(UTC)
    values = {
        "decision": decision,
        "coordinator_key_id": coordinator_key_id,
        "site": site,
        "run_id": queue.id,
        "spec_hash": queue.spec_hash,
        "max_rounds": 1000,
        "issued_at": now,
        "expires_at": now + timedelta(days=7),
        "nonce": secrets.token_hex(16),
        "person": "Dr. Test",
    }
    return sign(ConsentBody.model_validate(values | changes), key)


def signed_manifest(
    queue: QueueAnswer, base: VersionAnswer, file: Path, *, site: str, key: SigningKey, **changes: Any
) -> QueueContribution:
    """What goes with a file of weights that a hospital uploads."""
    values = {
        "queue_id": queue.id,
        "study": queue.study,
        "site": site,
        "spec_hash": queue.spec_hash,
        "base_version": base.version,
        "base_digest": base.digest,
        "content_digest": sha256_file(file),
        "content_size_bytes": file.stat().st_size,
        "examples": 10,
        "metrics": {"train_loss": 0.5, "val_accuracy": 0.8},
        "issued_at": datetime.now(UTC),
    }
    return sign(QueueContributionBody.model_validate(values | changes), key)


def agree(hospital: Hospital, queue: QueueAnswer, decision: str = "granted", **changes: Any) -> Any:
    """Send a hospital's signed statement about a queue."""
    who = {"site": hospital.site, "key": hospital.key, "coordinator_key_id": hospital.coordinator.key_id}
    signed = signed_consent(queue, decision=decision, **(who | changes))
    return hospital.client.post(f"{API}/studies/{queue.study}/queue/consents", signed)


def model(path: Path, values: np.ndarray) -> Path:
    """A packed model of one layer."""
    write_weights(path, {"layer": values.astype(np.float32)})
    return path


def flat(path: Path) -> np.ndarray:
    """Its numbers."""
    return read_weights(path)["layer"]


@dataclass
class Scene:
    """A study with version 1, an open queue, and its hospitals, all of which have agreed."""

    world: World
    queue: QueueAnswer
    hospitals: list[Hospital]
    base: VersionAnswer
    sent: list[tuple[Hospital, np.ndarray, int]] = field(default_factory=list)

    @classmethod
    def made(cls, world: World, hospitals: int = 2, **options: Any) -> "Scene":
        """Make one."""
        members = [world.hospital() for _ in range(hospitals)]
        study = world.study(*members)
        path = model(world.folder / f"base-{study}.safetensors", np.random.default_rng(70_000).standard_normal(SIZE))
        run = world.ready(study, *members)
        lease = world.started(run)
        digest = sha256_file(path)
        world.server.upload(f"{API}/runs/{run.id}/blobs/{digest}", path)
        world.complete(run, lease, digest)
        base = VersionAnswer.model_validate(world.admin.get(f"{API}/studies/{study}/versions/1"))
        queue = open_queue(world, study, **options)
        for member in members:
            agree(member, queue)
        return cls(world, queue, members, base)

    @property
    def study(self) -> str:
        """Its name."""
        return self.queue.study

    def weights(self, seed: int) -> Path:
        """What training might make of the base."""
        values = np.random.default_rng(seed).standard_normal(SIZE)
        return model(self.world.folder / f"update-{self.study}-{seed}.safetensors", values)

    def manifest(self, hospital: Hospital, file: Path, **changes: Any) -> QueueContribution:
        """The signed manifest of a file."""
        return signed_manifest(self.queue, self.base, file, **({"site": hospital.site, "key": hospital.key} | changes))

    def upload(self, hospital: Hospital, seed: int, **changes: Any) -> None:
        """Upload as a hospital's program does."""
        file = self.weights(seed)
        manifest = self.manifest(hospital, file, **changes)
        hospital.client.upload("/upload", file, method="POST", headers={MANIFEST_HEADER: manifest_to_header(manifest)})
        self.sent.append((hospital, flat(file), manifest.body.examples))

    def post(self, hospital: Hospital, file: Path, content: bytes | None = None, **changes: Any) -> httpx.Response:
        """POST a file's bytes, or others, under a manifest; nothing is asked before."""
        headers = {MANIFEST_HEADER: manifest_to_header(self.manifest(hospital, file, **changes))}
        raw = file.read_bytes() if content is None else content
        return hospital.http.post(f"{self.world.gateway.url}/upload", content=raw, headers=headers)

    def status(self, client: Any = None) -> QueueStatus:
        """The queue's status as an admin or another sees it."""
        return QueueStatus.model_validate((client or self.world.admin).get("/status", study=self.study))

    def contributions(self, **params: Any) -> list[QueueContributionAnswer]:
        """The contributions as an admin sees them, oldest first."""
        rows = self.world.admin.get(f"{API}/studies/{self.study}/queue/contributions", **params)
        return [QueueContributionAnswer.model_validate(row) for row in reversed(rows)]

    def version(self, number: int) -> VersionAnswer:
        """A version of the study."""
        return VersionAnswer.model_validate(self.world.admin.get(f"{API}/studies/{self.study}/versions/{number}"))

"""A run without a network: hospitals that answer in this process, a gateway of dictionaries, a clock turned by hand.

The round loop cannot tell it from the real thing; what the hospitals compute is simple, seeded, and real enough to be
summed, checked and compared bit for bit.
"""

import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fl_server import collect
from fl_server.collect import Watch
from fl_server.flower import NodeUnknown, Reply, ReplyError
from fl_server.hospitals import Hospitals
from fl_server.rounds import RunLoop
from medhive.consent import Consent, ConsentBody
from medhive.envelope import Contribution, ContributionBody, Task, TaskBody, TaskType, from_bytes, to_bytes
from medhive.errors import Conflict, NotFound, Unreachable
from medhive.packing import read_weights, sha256_file, write_weights
from medhive.signing import SigningKey, VerifyKey, sign
from medhive.spec import RunOptions, RunSpec, StudyData
from medhive.states import Activity, ConsentState, RoundState, RunState
from medhive.version import PROTOCOL
from medhive.wire import ActivityAnswer, ConsentAnswer, RoundAnswer, RoundReport, RunAnswer, RunEnd

CLASSES = ("benign", "malignant")
START = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)
DEADLINE_S = 60.0


class Crash(BaseException):
    """The process is killed: nothing may catch it."""


class HandClock:
    """Time that passes only by waiting, and stands still while work on other threads is under way, however long it takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.work: list[Future[Any]] = []

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        wait(self.work)
        self.work.clear()
        self.seconds += seconds


class HandPool(ThreadPoolExecutor):
    """Threads whose work a clock waits for."""

    def __init__(self, clock: HandClock, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self._clock = clock

    def submit(self, *words: Any, **named: Any) -> "Future[Any]":
        future = super().submit(*words, **named)
        self._clock.work.append(future)
        return future


Change = Callable[["Hospital", TaskBody, ContributionBody], ContributionBody | bytes | ReplyError | None]


@dataclass
class Hospital:
    """One site. `changes` turn its honest answer into another: bytes, an error, or None for silence."""

    name: str
    node_id: int
    folder: Path
    desk: "DictDesk"
    key: SigningKey = field(default_factory=SigningKey.generate)
    changes: dict[tuple[TaskType, int], Change] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    kept: dict[tuple[str, int, str], bytes] = field(default_factory=dict)
    boost: float = 1.0
    initial_seed: int = 42
    statistics: dict[str, list[float]] = field(default_factory=dict)
    rate_sum: float = 0.5

    @property
    def examples(self) -> int:
        return 10 * self.node_id

    def answer(self, raw: bytes) -> bytes | ReplyError | None:
        task = from_bytes(Task, raw).verify(self.desk.coordinator.public)
        kept = self.kept.get((task.type, task.round, task.base_digest))
        if kept is not None:
            return kept
        body: ContributionBody | bytes | ReplyError | None = self._do(task)
        change = self.changes.get((task.type, task.round))
        if change is not None and isinstance(body, ContributionBody):
            body = change(self, task, body)
        if isinstance(body, ContributionBody):
            answer = to_bytes(sign(body, self.key))
            self.kept[task.type, task.round, task.base_digest] = answer
            return answer
        return body

    def _do(self, task: TaskBody) -> ContributionBody:
        content: dict[str, Any] = {}
        if task.type == TaskType.INITIALISE:
            content = self.pack(initial_weights(self.initial_seed))
        elif task.type == TaskType.STATISTICS:
            content = {"statistics": self.statistics}
        elif task.type == TaskType.TRAIN:
            self.trained.append(task.round)
            content = self.pack(self.train(task)) | self.judge()
            content |= {"training_s": 2.0, "rate_sum": self.rate_sum}
        else:
            content = self.judge()
        return ContributionBody(
            protocol=PROTOCOL,
            type=task.type,
            run_id=task.run_id,
            site=self.name,
            round=task.round,
            spec_hash=task.spec_hash,
            base_digest=task.base_digest,
            examples=self.examples,
            issued_at=self.desk.clock.now(),
            **content,
        )

    def train(self, task: TaskBody) -> dict[str, Any]:
        correction = self.read(task.correction_digest) if task.correction_digest else {}
        rng = np.random.default_rng([self.node_id, task.round])
        return {
            name: value
            + np.float32(0.01 * self.boost) * rng.standard_normal(value.shape, np.float32)
            - np.float32(self.rate_sum) * correction.get(name, np.float32(0))
            for name, value in self.read(task.base_digest).items()
        }

    def read(self, digest: str) -> dict[str, Any]:
        path = self.folder / "fetched.safetensors"
        path.write_bytes(self.desk.blobs[digest])
        return read_weights(path)

    def pack(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        path = self.folder / "update.safetensors"
        digest = write_weights(path, weights)
        self.desk.blobs[digest] = path.read_bytes()
        return {"content_digest": digest, "content_size_bytes": path.stat().st_size}

    def judge(self) -> dict[str, Any]:
        right = 5 + self.node_id
        metrics = {"val_accuracy": right / 10, "train_loss": 1 / self.node_id}
        return {"metrics": metrics, "confusion": [[right, 10 - right], [0, 0]]}


def initial_weights(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"layer.weight": rng.standard_normal((8, 4), np.float32), "layer.bias": np.zeros(8, np.float32)}


class DictExchange:
    """Delivers at once. `foreign` are replies that come before the real ones; `unknown` nodes refuse so many messages."""

    def __init__(self, hospitals: Sequence[Hospital]) -> None:
        self.by_node = {hospital.node_id: hospital for hospital in hospitals}
        self.clock = hospitals[0].desk.clock
        self.queue: list[Reply] = []
        self.sent: list[tuple[str, TaskBody]] = []
        self.foreign: dict[tuple[str, int], list[bytes]] = defaultdict(list)
        self.unknown: dict[int, int] = {}

    def send(self, node_id: int, payload: bytes, ttl_s: float) -> str:
        if self.unknown.get(node_id, 0):
            self.unknown[node_id] -= 1
            raise NodeUnknown("The node is not registered.")
        assert ttl_s > 0
        hospital = self.by_node[node_id]
        task = from_bytes(Task, payload).body
        message_id = secrets.token_hex(8)
        self.sent.append((hospital.name, task))
        foreign = self.foreign[hospital.name, task.round]
        answer = foreign.pop(0) if foreign else hospital.answer(payload)
        if isinstance(answer, ReplyError):
            self.queue.append(Reply(message_id, node_id, None, answer))
        elif answer is not None:
            self.queue.append(Reply(message_id, node_id, answer))
        return message_id

    def wait(self, seconds: float) -> list[Reply]:
        if not self.queue:
            self.clock.sleep(seconds)
        replies, self.queue = self.queue, []
        # The last asked answers first: nothing may depend on the order of arrival.
        return replies[::-1]

    def forget(self, message_id: str) -> None:
        self.queue = [reply for reply in self.queue if reply.message_id != message_id]


class DictDesk:
    """The gateway of one run. `crash_before` and `crash_after` kill the caller at a report; `away` counts failed looks."""

    def __init__(self, clock: HandClock, spec: RunSpec, run_id: str = "RUN_1") -> None:
        self.clock = clock
        self.coordinator = SigningKey.generate()
        self.former_key_ids: tuple[str, ...] = ()
        self.blobs: dict[str, bytes] = {}
        self.alone: dict[str, str] = {}  # what one site alone may read, by digest
        self.reported: dict[int, RoundReport] = {}
        self.ended: RunEnd | None = None
        self.statistics: dict[str, list[float]] = {}
        self.crash_before: int | None = None
        self.crash_after: int | None = None
        self.away = 0
        self.hospitals: list[Hospital] = []
        self.revoked: set[str] = set()
        self.offline: set[str] = set()
        self.unfit: dict[str, str] = {}
        self.on_look: Callable[[DictDesk], None] = lambda _: None
        self.run = RunAnswer(
            id=run_id,
            request_id="REQ_1",
            study=spec.study,
            state=RunState.READY,
            spec=spec,
            spec_hash=spec.spec_hash,
            rounds=spec.options.rounds,
            created_at=START,
            consent_deadline=START + timedelta(days=1),
            updated_at=START,
        )

    @property
    def fence(self) -> int:
        return 1

    def change(self, **fields: Any) -> None:
        self.run = self.run.model_copy(update=fields)

    def consent(self, hospital: Hospital, **fields: Any) -> ConsentAnswer:
        body = ConsentBody(
            decision="granted",
            coordinator_key_id=self.coordinator.public.key_id,
            site=hospital.name,
            run_id=self.run.id,
            spec_hash=self.run.spec_hash,
            max_rounds=self.run.rounds,
            issued_at=START,
            expires_at=START + timedelta(days=30),
            nonce=secrets.token_hex(16),
            person="Dr. Noor",
        ).model_copy(update=fields)
        consent: Consent = sign(body, hospital.key)
        return ConsentAnswer(
            site=hospital.name,
            state=ConsentState.GRANTED,
            consent=consent,
            consent_public_key=hospital.key.public.text,
        )

    def withdraw(self, name: str) -> None:
        consents = tuple(
            item.model_copy(update={"state": ConsentState.WITHDRAWN}) if item.site == name else item
            for item in self.run.consents
        )
        self.change(consents=consents)

    def act(self, site: str, round_number: int, activity: Activity) -> None:
        others = tuple(item for item in self.run.activity if item.site != site)
        now = self.clock.now()
        mine = ActivityAnswer(site=site, round=round_number, activity=activity, updated_at=now)
        self.change(activity=(*others, mine))

    def look(self) -> RunAnswer:
        if self.away:
            self.away -= 1
            raise Unreachable("The gateway does not answer.")
        self.on_look(self)
        return self.run

    def start(self) -> RunAnswer:
        self.change(state=RunState.RUNNING)
        return self.run

    def key_ids(self, present: VerifyKey) -> tuple[str, ...]:
        return (present.key_id, *self.former_key_ids)

    def change_key(self) -> None:
        """The coordinator signs with another key from now on, which the present one has named."""
        self.former_key_ids = (self.coordinator.public.key_id, *self.former_key_ids)
        self.coordinator = SigningKey.generate()

    def nodes(self) -> Mapping[str, int]:
        return {item.name: item.node_id for item in self.hospitals if item.name not in self.revoked}

    def outdated(self) -> Mapping[str, str]:
        return dict(self.unfit)

    def online(self) -> frozenset[str]:
        return frozenset(self.nodes()) - self.offline

    def rounds(self) -> list[RoundAnswer]:
        return [
            RoundAnswer(number=number, **report.model_dump(exclude={"fence"}))
            for number, report in self.reported.items()
        ]

    def report_round(self, number: int, report: RoundReport) -> None:
        closing = report.state == RoundState.CLOSED
        if closing and self.crash_before == number:
            self.crash_before = None
            raise Crash
        before = self.reported.get(number)
        if before is not None and before.state == RoundState.CLOSED and before != report:
            raise Conflict("A closed round may only be reported again with the same content.")
        self.reported[number] = report
        if closing and self.crash_after == number:
            self.crash_after = None
            raise Crash

    def version_zero(self, digest: str, statistics: Mapping[str, list[float]]) -> None:
        if self.run.base_digest is None:
            self.statistics = dict(statistics)
            self.change(base_digest=digest)

    def version_statistics(self, _study: str, _version: int) -> dict[str, list[float]]:
        return self.statistics

    def end(self, end: RunEnd) -> None:
        self.ended = end
        self.change(state=RunState(end.state))

    def fetch(self, digest: str, destination: Path, max_bytes: int) -> int:
        if digest not in self.blobs:
            raise NotFound("There is no such blob.")
        if destination.exists() and sha256_file(destination) == digest:
            return 0
        content = self.blobs[digest]
        assert len(content) <= max_bytes
        destination.write_bytes(content)
        return len(content)

    def store(self, source: Path, digest: str, site: str = "") -> int:
        if site:
            self.alone[digest] = site
        self.blobs[digest] = source.read_bytes()
        return source.stat().st_size


@dataclass
class World:
    """Hospitals a, b, c (by default), consenting, and the run that they take part in."""

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ("a", "b", "c")
    data: StudyData = field(default_factory=lambda: StudyData(classes=CLASSES))
    based: bool = True

    def __post_init__(self) -> None:
        self.clock = HandClock()
        chosen = {"rounds": 3, "strategy": "fedavg", "min_sites": 2, "deadline_s": DEADLINE_S, **self.options}
        spec = RunSpec(study="tumours", task="image-folder", data=self.data, options=RunOptions(**chosen))
        self.desk = DictDesk(self.clock, spec)
        for number, name in enumerate(self.names, 1):
            folder = self.folder / "hospitals" / name
            folder.mkdir(parents=True)
            self.desk.hospitals.append(Hospital(name, number, folder, self.desk))
        self.sites = {hospital.name: hospital for hospital in self.desk.hospitals}
        self.desk.change(consents=tuple(self.desk.consent(item) for item in self.desk.hospitals))
        if self.based:
            first = self.desk.hospitals[0]
            self.desk.change(base_digest=first.pack(initial_weights(42))["content_digest"])
        self.exchange = DictExchange(self.desk.hospitals)

    def run(self) -> RunEnd:
        """One life of the process of the run."""
        watch = Watch(self.desk.look, self.clock)
        hospitals = Hospitals(
            desk=self.desk, exchange=self.exchange, key=self.desk.coordinator, watch=watch, clock=self.clock
        )
        folder = self.folder / "runs" / "RUN_1"
        with patch.object(collect, "ThreadPoolExecutor", partial(HandPool, self.clock)):
            return RunLoop(desk=self.desk, sites=hospitals, watch=watch, folder=folder, clock=self.clock).run()

    def dropped(self, round_number: int) -> dict[str, str]:
        """Who was dropped from a round, and why."""
        return {site.site: site.dropped for site in self.desk.reported[round_number].sites if site.dropped}

    def asked(self, kind: TaskType, round_number: int) -> list[str]:
        """Who was asked, each time."""
        return [name for name, task in self.exchange.sent if (task.type, task.round) == (kind, round_number)]


def replayed(hospital: Hospital, kind: TaskType, round_number: int) -> bytes:
    """What a hospital answered to an earlier task."""
    return next(raw for (task, number, _), raw in hospital.kept.items() if (task, number) == (kind, round_number))


def parsed(raw: bytes) -> Contribution:
    """An answer, read back."""
    return from_bytes(Contribution, raw)

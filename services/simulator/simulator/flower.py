"""The sites of a simulated run on Flower's own simulation engine: clients in several processes, which Ray keeps.

The round loop is the ServerApp here as in a deployment, in this process and its main thread; the engine runs beside it in a
thread, and has actors of Ray work off the messages. Each actor reads the data once and does a client's work as
`simulator.clients` does it inline, so that both give the same weights. Messages carry the question and what a client says;
weights and updates lie on the disk that all processes share.

Flower's `run_simulation` is not used: it keeps the main thread for the engine, which then cannot be interrupted while a
client trains. What is taken from Flower here is internal to one exact version, and in this module alone.
"""

import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

# Ray reads these when it is imported. Its ports are on loopback, where other users of the machine are too: so a token.
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
}

import ray
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import RUN_ID_NUM_BYTES, SUPERLINK_NODE_ID, TASK_ID_NUM_BYTES
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.server.superlink.linkstate.utils import generate_rand_int_from_bytes
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid
from pydantic import TypeAdapter

from fl_server.collect import REASON_LENGTH, Collected, Question
from fl_server.flower import RunStopped
from fl_server.rounds import Check, Refuse
from medhive.envelope import ContributionBody, TaskType
from medhive.errors import MedHiveError, NoSpace
from medhive.packing import Flat, read_weights
from medhive.spec import RunOptions
from simulator.clients import ClientStates, InlineSites, Lost, OnClient, counted
from simulator.faults import Fates
from simulator.federation import Federation
from simulator.study import Simulation

FIELD: Final = "medhive"
"""The name of the one record, and of its one value, in a message."""
IN_FLIGHT: Final = 256
"""Messages on their way at once, one a node of Flower: enough for every core, and Flower looks through its nodes ten times a
second, so that a hundred thousand would keep it busy with looking."""
OBJECT_STORE_BYTES: Final = 100_000_000
"""What Ray may keep for objects that processes share; nothing of ours is there, and 75 MB is the least it takes."""
POLL_S: Final = 0.01
"""How soon an answer is seen: Flower's grid in one process can only be asked."""
END_S: Final = 10.0
"""The engine's threads look at each second whether to end."""
LOOPBACK: Final = "127.0.0.1"

QUESTION: Final = TypeAdapter(Question)


class EngineLost(RunStopped):
    """A process of the engine ended, or cannot do its work. The run is open: the same command goes on with it."""

    code = "engine-lost"


# In the actors


@dataclass(frozen=True)
class Work:
    """All that an actor needs: the simulation, where clients keep their states, what the data must be."""

    simulation: Simulation
    states: Path | None
    fingerprint: str


class DataDiffer(MedHiveError):
    """A process reads other data than the one that gives out the work."""

    code = "data-differ"


class _Resident:
    """The clients as one actor has them, with the weights that it read last."""

    def __init__(self, work: Work) -> None:
        federation = work.simulation.read_clients()
        if federation.fingerprint != work.fingerprint:
            raise DataDiffer("The data have changed since the simulation began; give the same command again.")
        options, faults = work.simulation.spec.options, work.simulation.faults
        self._clients = InlineSites(
            federation,
            options,
            Fates(faults, len(federation.names), options.seed),
            ClientStates(work.states) if work.states else None,
            on_client=lambda _done, _asked: None,
        )
        self._base: tuple[tuple[Path | None, str], Mapping[str, Flat]] = ((None, ""), {})

    def answer(self, payload: bytes) -> bytes:
        """Do what a message asks of one client."""
        asked = json.loads(payload)
        question, site = QUESTION.validate_python(asked["question"], strict=False), asked["site"]
        fate = self._clients.fate(question, site)
        try:
            body, path = self._clients.do(question, site, self._weights(question), fate)
        except MedHiveError as error:
            return json.dumps({"code": error.code, "reason": str(error)}).encode()
        said = {"body": body.model_dump(mode="json"), "path": str(path) if path else None}
        return json.dumps(said).encode()

    def _weights(self, question: Question) -> Mapping[str, Flat]:
        if question.base is None:
            return {}
        key = (question.base, question.base_digest)
        if self._base[0] != key:
            self._base = (key, read_weights(question.base))
        return self._base[1]


_residents: dict[str, _Resident] = {}
"""Of this actor's process: one, for it serves one simulation."""


def client_app(work: Work) -> ClientApp:
    """Flower's `ClientApp`: a client's work, by whoever is named in the message."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def query(message: Message, _context: Context) -> Message:
        if work.fingerprint not in _residents:
            _residents[work.fingerprint] = _Resident(work)
        payload = message.content[FIELD][FIELD]
        reply = _residents[work.fingerprint].answer(payload)
        return Message(RecordDict({FIELD: ConfigRecord({FIELD: reply})}), reply_to=message)

    return app


# In the process of the round loop


class _Backend(RayBackend):  # type: ignore[misc]
    """Flower's, whose actors can be ended while they work, and which leaves Ray to the one who began it."""

    def kill(self) -> None:
        """End the actors at once, whatever they do; who waits for them is told."""
        if self.pool is not None:
            for actor in [*self.pool.pool, *self.pool._future_to_actor.values()]:
                ray.kill(actor)

    def terminate(self) -> None:
        """Nothing: `Engine.close` does it."""


class Engine:
    """Flower's simulation engine with its grid; a context, at whose end no process is left.

    Args:
        work: what the actors do.
        workers: how many actors, None for one a core (or a GPU).
        nodes: how many messages may be on their way.
        folder: of Ray's own files, emptied before and removed after.
    """

    def __init__(self, work: Work, workers: int | None, nodes: int, folder: Path) -> None:
        self._work, self._workers, self._folder = work, workers, folder
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._backend: _Backend | None = None
        self.places = nodes
        self._ended = ExitStack()
        self._thread: threading.Thread | None = None
        self._state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        self._run = _registered_run(self._state)
        self._places = vce_api._register_nodes(nodes, self._state)
        self._nodes = list(self._places)
        self._grid = InMemoryGrid(state_factory=self._state)
        self._grid.set_run(self._run)

    def __enter__(self) -> "Engine":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._ended.enter_context(_quiet_flower())
        self._ended.enter_context(_own_folder(self._folder))
        resources = self._ended.enter_context(_ray(self._folder, self._workers, self._work.simulation.device))
        config = {"client_resources": resources}
        stores = vce_api._register_node_info_stores(self._places, self._run)
        app = partial(client_app, self._work)
        self._thread = threading.Thread(target=self._serve, args=(app, config, stores), name="flower-engine")
        self._thread.start()

    def _serve(self, app: Any, config: dict[str, Any], stores: Any) -> None:
        def backend() -> _Backend:
            self._backend = _Backend(config)
            return self._backend

        try:
            vce_api.run_api(app, backend, self._places, self._state, stores, self._stop, VceMetrics())
        except BaseException as error:  # noqa: BLE001 - a thread's own error is the round loop's, which reads it
            self._failure = error

    def send(self, place: int, payload: bytes) -> str:
        """Send to the node at this place; returns the message's id. Raises `EngineLost`."""
        content = RecordDict({FIELD: ConfigRecord({FIELD: payload})})
        sent = list(self._grid.push_messages([Message(content, self._nodes[place], "query")]))
        if not sent:
            raise EngineLost("Flower's simulation engine took no message; give the same command again to go on.")
        return str(sent[0])

    def poll(self, ids: Sequence[str]) -> dict[str, bytes]:
        """The answers that are there, by the ids of what they answer.

        Raises:
            EngineLost: an actor could not do its work, or the engine ended.
        """
        if self._thread is None or not self._thread.is_alive():
            raise EngineLost(f"Flower's simulation engine ended: {self._failure}; the same command goes on.")
        found = {}
        for reply in self._grid.pull_messages(ids):
            if reply.has_error():
                raise EngineLost(
                    f"A process of Ray did not do its work ({str(reply.error.reason)[:REASON_LENGTH]}); with less memory "
                    "than they need, give fewer --workers. The same command goes on."
                )
            found[str(reply.metadata.reply_to_message_id)] = bytes(reply.content[FIELD][FIELD])
        return found

    def close(self) -> None:
        """End all, whatever goes on."""
        self._stop.set()
        if self._backend is not None:
            with suppress(ray.exceptions.RayError):
                self._backend.kill()
        if self._thread is not None:
            self._thread.join(END_S)
        self._ended.close()


def _registered_run(factory: Any) -> Run:
    """A run in the link state, as Flower's own `run_simulation` makes it."""
    run = Run.create_empty(run_id=generate_rand_int_from_bytes(RUN_ID_NUM_BYTES))
    run.primary_task_id = generate_rand_int_from_bytes(TASK_ID_NUM_BYTES)
    run.federation_id = NOOP_FEDERATION_ID
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
    state = factory.state()
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[run.primary_task_id] = Task(task_id=run.primary_task_id, run_id=run.run_id)
    return run


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Have Flower say nothing on the terminal: what it says of errors is in its answers too."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """An empty folder that nobody else can read; what a killed process left in it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ray(folder: Path, workers: int | None, device: str) -> Iterator[dict[str, float]]:
    """Ray on loopback, for this process's actors alone; gives what each of them takes.

    Ray ends its processes with the thread that began them, also where that is killed; so this must be the main thread.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    cores = len(os.sched_getaffinity(0))
    actors = workers or max(1, cores // threads)
    values = {"OMP_NUM_THREADS": str(threads), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    handler = signal.getsignal(signal.SIGTERM)
    with _environment(values):
        try:
            ray.init(
                address="local",
                num_cpus=actors,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder),
            )
            yield _share_of(actors, device)
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, handler)


def _share_of(actors: int, device: str) -> dict[str, float]:
    """What of Ray's resources one actor takes: a core's place, and its part of the GPUs where they are used."""
    gpus = ray.cluster_resources().get("GPU", 0.0) if device != "cpu" else 0.0
    return {"num_cpus": 1, "num_gpus": min(1.0, gpus / actors)}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class FlowerSites(InlineSites):
    """`fl_server.rounds.Sites` whose clients work in the engine's actors; the checks are done here, as answers come."""

    def __init__(
        self, engine: Engine, federation: Federation, options: RunOptions, fates: Fates, *, on_client: OnClient
    ) -> None:
        super().__init__(federation, options, fates, None, on_client=on_client)
        self._engine = engine

    def ask(
        self,
        question: Question,
        sites: Sequence[str],
        check: Check,
        refuse: Refuse,
        on_asked: Callable[[], None],
    ) -> Collected:
        """Have as many at a time as there are actors answer; see `fl_server.rounds.Sites.ask`."""
        on_asked()
        sites = self.those_asked(question, sites)
        fates = {site: self.fate(question, site).lost for site in sites}
        collected = Collected({}, {site: lost for site, lost in fates.items() if lost})
        for site, said in self._answers(question, [site for site in sites if not fates[site]]):
            try:
                collected.answers[site] = counted(site, *_heard(said), check, refuse)
            except NoSpace:
                raise
            except MedHiveError as error:
                collected.dropped[site] = str(error)[:REASON_LENGTH]
            self._on_client(len(collected.answers) + len(collected.dropped), len(sites))
        return collected.sort()

    def _answers(self, question: Question, sites: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Each site's answer, as they come."""
        waiting, free = list(reversed(sites)), list(range(self._engine.places))
        under_way: dict[str, tuple[str, int]] = {}
        while waiting or under_way:
            while waiting and free:
                site, place = waiting.pop(), free.pop()
                message = self._engine.send(place, _asked(question, site))
                under_way[message] = site, place
            for message, said in self._engine.poll(list(under_way)).items():
                site, place = under_way.pop(message)
                free.append(place)
                yield site, said
            time.sleep(POLL_S)


def _asked(question: Question, site: str) -> bytes:
    """The question to one client, with files as another process finds them."""
    base, updates, correction = question.base, question.updates, question.corrections.get(site)
    alone = replace(
        question,
        base=base and base.absolute(),
        updates=updates and updates.absolute(),
        corrections={site: replace(correction, path=correction.path.absolute())} if correction else {},
    )
    return json.dumps({"site": site, "question": QUESTION.dump_python(alone, mode="json")}).encode()


def _heard(said: bytes) -> tuple[ContributionBody, Path | None]:
    """What an actor says of one client. Raises `Lost` or `NoSpace` where it could not do its work."""
    told = json.loads(said)
    if told.get("code") == NoSpace.code:
        raise NoSpace(told["reason"])
    if "code" in told:
        raise Lost(f"failed ({told['code']}): {told['reason']}")
    body = told["body"]
    # Taken as it is, as inline: these processes are one program.
    changes = {"type": TaskType(body["type"]), "issued_at": datetime.fromisoformat(body["issued_at"])}
    return ContributionBody.model_construct(**{**body, **changes}), Path(told["path"]) if told["path"] else None


@contextmanager
def flower_sites(
    simulation: Simulation, out: Path, federation: Federation, states: Path | None, on_client: OnClient
) -> Iterator[FlowerSites]:
    """The clients of a simulation on Flower's engine, which ends with the context.

    Args:
        simulation: what is simulated; `workers` says over how many processes.
        out: its result folder, which names Ray's folder, so that a next life finds what a killed one left.
        federation: the clients, as this process has read them.
        states: where clients keep what they remember; None lets them forget.
        on_client: told of progress.

    Raises:
        EngineLost: the engine cannot start, or ends.
    """
    options = simulation.spec.options
    fates = Fates(simulation.faults, len(federation.names), options.seed)
    there = replace(simulation, data=simulation.data.absolute())
    work = Work(there, states.absolute() if states else None, federation.fingerprint)
    # Not in `out`: the names of sockets may have 107 characters.
    folder = Path(tempfile.gettempdir()) / f"medhive-{sha256(str(out.absolute()).encode()).hexdigest()[:12]}"
    with Engine(work, simulation.workers, min(IN_FLIGHT, len(federation.names)), folder) as engine:
        yield FlowerSites(engine, federation, options, fates, on_client=on_client)

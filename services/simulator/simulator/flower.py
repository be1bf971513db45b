"""The sites of a simulated run on Flower's own simulation engine: clients in several processes, which Ray keeps.

The round loop is the ServerApp here as in a deployment, in this process and its main thread; the engine runs beside it in a
thread, and has actors of Ray work off the messages. Each actor reads the data once and does a client's work as
`simulator.clients` does it inline, so that both give the same weights. Messages carry the question and what a client says;
weights and updates lie on the disk that all processes share. Ray is this command's own, or a cluster of several machines
that runs already. Each actor shows, before it is given work, that it is the same program and finds the same files.

Flower's `run_simulation` is not used: it keeps the main thread for the engine, which then cannot be interrupted while a
client trains. What is taken from Flower here is internal to one exact version, and in this module alone.
"""

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

# Ray reads these when it is imported. Other users reach its ports, on loopback too: so a token. Unless it is told that this
# machine is no part of a cluster it puts another address in the place of loopback, and listens on all there are.
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
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
from flwr.simulation.ray_transport.ray_actor import BasicActorPool, ClientAppActor, pool_size_from_resources
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid
from pydantic import TypeAdapter
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader  # type: ignore[attr-defined]

from fl_server.checkpoint import write_durably
from fl_server.collect import REASON_LENGTH, Collected, Question
from fl_server.flower import RunStopped
from fl_server.rounds import Check, Refuse
from medhive import __version__
from medhive.envelope import ContributionBody, TaskType
from medhive.errors import Conflict, MedHiveError, NoSpace, Unreachable
from medhive.leftovers import temporary_beside
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
CONNECT_S: Final = 5.0
"""How long a cluster's address may take to answer; Ray itself would try for minutes."""
START_S: Final = 120.0
"""How long actors may take to come up; a busy machine needs seconds for each, and without a free core they never do."""
ORPHANED_S: Final = 15
"""How long Ray's processes look for the rest of it when that is gone, because the command was killed: longer than a busy
machine hesitates. By themselves they would look for a minute."""
LOOPBACK: Final = "127.0.0.1"

QUESTION: Final = TypeAdapter(Question)


class EngineLost(RunStopped):
    """A process of the engine ended, or cannot do its work. The run is open: the same command goes on with it."""

    code = "engine-lost"


class ClusterUnreachable(Unreachable):
    """The Ray cluster that was named does not answer, or not to this command."""

    code = "ray-unreachable"


class NoRoom(Conflict):
    """The Ray cluster has no place for as many actors."""

    code = "ray-no-room"


class MachineUnfit(Conflict):
    """A machine of the Ray cluster cannot do this work; the text names it."""

    code = "ray-machine-unfit"


# In the actors


@dataclass(frozen=True)
class Work:
    """All that an actor needs for one simulation: what it is, where clients keep their states, what the data must be."""

    simulation: Simulation
    states: Path | None
    fingerprint: str


class DataDiffer(MedHiveError):
    """A process reads other data than the one that gives out the work."""

    code = "data-differ"


class _Resident:
    """The data as one actor has them, the clients of the simulation that is under way, and the weights that it read last."""

    def __init__(self, work: Work) -> None:
        self._federation = work.simulation.read_clients()
        if self._federation.fingerprint != work.fingerprint:
            raise DataDiffer(
                f"{work.simulation.data} holds other data than where the command runs; share that folder, or copy it there. "
                "Where the data have changed since the simulation began, give the same command again."
            )
        self.take_up(work)

    def take_up(self, work: Work) -> None:
        """Be the clients of this simulation, which is on the same data."""
        options, faults = work.simulation.spec.options, work.simulation.faults
        self._clients = InlineSites(
            self._federation,
            options,
            Fates(faults, len(self._federation.names), options.seed),
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
"""Of this actor's process: one, for it serves simulations on the same data, one after the other."""


@dataclass(frozen=True)
class Seen:
    """What an actor says of its machine: how it is called, whose program and which text it found there, and whether Ray asks
    for a token."""

    machine: str
    version: str
    text: str
    is_guarded: bool


def look_at(path: Path) -> Callable[[Any], tuple[str, str, str, bool]]:
    """What an actor is asked first, answered by the values of `Seen`. A closure, so that Ray sends its code: MedHive may be
    missing there.

    Args:
        path: a file that the round loop has just written, by a name that nobody has heard before.
    """
    name, guarded = str(path), int(AuthenticationMode.TOKEN)

    def look(_actor: Any) -> tuple[str, str, str, bool]:
        import socket  # noqa: PLC0415 - on another machine
        from pathlib import Path  # noqa: PLC0415

        import ray  # noqa: PLC0415
        from ray._raylet import get_authentication_mode  # type: ignore[attr-defined]  # noqa: PLC0415

        try:
            import simulator  # noqa: F401, PLC0415
            from medhive import __version__ as version  # noqa: PLC0415
        except ImportError:
            version = ""
        try:
            text = Path(name).read_text("utf-8")
        except OSError:
            text = ""
        machine = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        return machine, version, text, int(get_authentication_mode()) == guarded

    return look


def read_data(_actor: Any, work: Work) -> str:
    """Have an actor read its data; returns why it cannot."""
    try:
        _residents[work.fingerprint] = _Resident(work)
    except MedHiveError as error:
        return str(error)
    return ""


def take_up(_actor: Any, work: Work) -> None:
    """Have an actor, which has its data, go over to this simulation."""
    _residents[work.fingerprint].take_up(work)


def client_app(fingerprint: str) -> ClientApp:
    """Flower's `ClientApp`: a client's work on the data with this fingerprint, by whoever is named in the message."""
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def query(message: Message, _context: Context) -> Message:
        payload = message.content[FIELD][FIELD]
        reply = _residents[fingerprint].answer(payload)
        return Message(RecordDict({FIELD: ConfigRecord({FIELD: reply})}), reply_to=message)

    return app


# In the process of the round loop


@dataclass(frozen=True)
class Room:
    """How many actors there may be, and what of Ray's resources each of them takes."""

    actors: int
    each: Mapping[str, float]


class _Backend(RayBackend):  # type: ignore[misc]
    """Flower's, whose actors can be ended while they work, and which leaves Ray to the one who began it."""

    def __init__(self, room: Room) -> None:
        """Begin the actors, spread over the machines."""
        super().__init__({"client_resources": dict(room.each)})
        self.pool = BasicActorPool(ClientAppActor, self.client_resources, self.actor_kwargs)
        spread = ClientAppActor.options(scheduling_strategy="SPREAD", **self.client_resources)
        self.pool.create_actor_fn = spread.remote
        self.pool.add_actors_to_pool(room.actors)
        self._actors = tuple(self.pool.pool)

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """Take what the actors, which are there already, shall run."""
        self.app_fn = app_fn

    def prepare(self, work: Work, meeting: Path) -> None:
        """Have every actor show that it is fit for the work, and read its data.

        Args:
            work: what they will do.
            meeting: a new file's name in the result folder.

        Raises:
            NoRoom: not all of them have come up.
            MachineUnfit: one is another program, has no token, or does not find the same files.
            EngineLost: one ended.
        """
        text = secrets.token_hex(32)
        write_durably(meeting, text.encode())
        try:
            for seen in self._seen(meeting):
                require_fit(seen, text, meeting)
        finally:
            meeting.unlink(missing_ok=True)
        for machine, reason in zip(self._machines, _gathered(self._ask(read_data, work)), strict=True):
            if reason:
                raise MachineUnfit(f"{machine} cannot read the data: {reason}")

    def take_up(self, work: Work) -> None:
        """Have every actor go over to another simulation on the same data. Raises `EngineLost`."""
        _gathered(self._ask(take_up, work))

    def _ask(self, function: Callable[..., Any], *values: Any) -> list[Any]:
        return [actor.__ray_call__.remote(function, *values) for actor in self._actors]

    def _seen(self, meeting: Path) -> list[Seen]:
        asked = self._ask(look_at(meeting))
        ready, waiting = ray.wait(asked, num_returns=len(asked), timeout=START_S)
        if waiting:
            raise NoRoom(
                f"Only {len(ready)} of {len(asked)} processes of Ray have come up in {START_S:g} s: the cluster has other "
                f"work, or too little memory. Wait for it, or give --workers {max(1, len(ready))}."
            )
        seen = [Seen(*told) for told in _gathered(asked)]
        self._machines = tuple(item.machine for item in seen)
        return seen

    def kill(self) -> None:
        """End the actors at once, whatever they do; who waits for them is told."""
        for actor in self._actors:
            ray.kill(actor)

    def terminate(self) -> None:
        """Nothing: `Engine.close` does it."""


def _gathered(asked: Sequence[Any]) -> list[Any]:
    """What actors answer. Raises `EngineLost`."""
    try:
        return list(ray.get(list(asked)))
    except ray.exceptions.RayError as error:
        raise EngineLost(
            f"A process of Ray did not come up, or is lost ({' '.join(str(error).split())[:REASON_LENGTH]}); each machine "
            "needs the same Python with medhive-simulator[ray], and memory for its processes. The same command goes on."
        ) from error


def require_fit(seen: Seen, text: str, meeting: Path) -> None:
    """Have a machine's word for it that it can do the work.

    Args:
        seen: what an actor there says.
        text: what stands in the file that was named to it.
        meeting: that file.

    Raises:
        MachineUnfit: it cannot; the text says why.
    """
    if not seen.is_guarded:
        raise MachineUnfit(
            f"Ray on {seen.machine} asks for no token, so that anybody who reaches its ports can have it run anything; "
            "start the cluster with RAY_AUTH_MODE=token."
        )
    wanted = f"install medhive-simulator[ray] {__version__} for the Python that runs Ray there."
    if not seen.version:
        raise MachineUnfit(f"{seen.machine} has no MedHive, and this one {__version__}; {wanted}")
    if seen.version != __version__:
        raise MachineUnfit(f"{seen.machine} has MedHive {seen.version}, and this one {__version__}; {wanted}")
    if seen.text != text:
        raise MachineUnfit(
            f"{seen.machine} does not see the result folder {meeting.parent}; put --out on a disk that all machines of the "
            "cluster have under the same path."
        )


class Engine:
    """Flower's simulation engine with its grid; a context, at whose end no process is left.

    It begins with the first simulation that it takes up, and serves one after the other, all on the same data.

    Args:
        room: Ray, as a context, with the room that it has.
        nodes: how many messages may be on their way, and actors at work.
        meeting: a new file's name in the result folder, where the actors must find it.
    """

    def __init__(self, room: AbstractContextManager[Room], nodes: int, meeting: Path) -> None:
        self._room, self._meeting = room, meeting
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
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_begun(self) -> bool:
        """Whether its processes are there."""
        return self._backend is not None

    def take_up(self, work: Work) -> None:
        """Have the actors work for this simulation; the one before it, if there was one, is over.

        Raises:
            ClusterUnreachable, NoRoom, MachineUnfit: the cluster cannot be used, or one of its machines.
            EngineLost: the engine cannot start, or lost an actor.
        """
        if self._backend is None:
            self._start(work)
        else:
            self._backend.take_up(work)

    def _start(self, work: Work) -> None:
        self._ended.enter_context(_quiet_flower())
        room = self._ended.enter_context(self._room)
        room = replace(room, actors=min(room.actors, self.places))
        self._ended.enter_context(_a_thread_for_each(room.actors))
        self._backend = _Backend(room)
        self._backend.prepare(work, self._meeting)
        stores = vce_api._register_node_info_stores(self._places, self._run)
        app = partial(client_app, work.fingerprint)
        self._thread = threading.Thread(target=self._serve, args=(app, self._backend, stores), name="flower-engine")
        self._thread.start()

    def _serve(self, app: Any, backend: _Backend, stores: Any) -> None:
        try:
            vce_api.run_api(app, lambda: backend, self._places, self._state, stores, self._stop, VceMetrics())
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
def _a_thread_for_each(actors: int) -> Iterator[None]:
    """Have Flower wait for every actor at once: by itself it takes one for each core here and four more, 32 at most."""
    before = vce_api.ThreadPoolExecutor
    vce_api.ThreadPoolExecutor = partial(ThreadPoolExecutor, max_workers=actors)
    try:
        yield
    finally:
        vce_api.ThreadPoolExecutor = before


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
def _own_ray(folder: Path, workers: int | None, device: str) -> Iterator[Room]:
    """Ray on loopback, for this process's actors alone, with a token of its own.

    Ray ends its processes with the thread that began them, also where that is killed; so this must be the main thread.

    Args:
        folder: of Ray's own files, emptied before and removed after.
        workers: how many actors, None for one a core.
        device: whether they use GPUs.
    """
    actors = workers or max(1, len(os.sched_getaffinity(0)) // _threads())
    values = {**_of_actors(), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    values["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(ORPHANED_S)
    arguments = {
        "num_cpus": actors,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": LOOPBACK,
        "_temp_dir": str(folder),
    }
    with _own_folder(folder), _environment(values):
        AuthenticationTokenLoader.instance().reset_cache()
        with _joined("local", **arguments):
            yield Room(actors, _share_of(actors, 1, device))


@contextmanager
def _cluster(address: str, workers: int | None, device: str) -> Iterator[Room]:
    """A Ray cluster that runs already, and goes on; what was begun there ends with this process, however it ends.

    The token is its operator's, which Ray finds by itself.

    Args:
        address: HOST:PORT of its head; this machine must be one of its machines.
        workers: how many actors, None for one a core of the cluster.
        device: whether they use GPUs.

    Raises:
        ClusterUnreachable: it does not answer, or refuses.
        NoRoom: it has not that many cores.
    """
    host, _, port = address.rpartition(":")
    with _environment(_of_actors()), ExitStack() as joined:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            joined.enter_context(_joined(address, runtime_env={"env_vars": _of_actors()}))
        except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterUnreachable(
                f"The Ray cluster at {address} cannot be used from here ({_cause(error)}); give the HOST:PORT that `ray "
                "start` named, on a machine of the cluster, with the cluster's token in RAY_AUTH_TOKEN_PATH."
            ) from error
        yield _room_of(address, workers, device)


@contextmanager
def _joined(address: str, **arguments: Any) -> Iterator[None]:
    """Be a driver of Ray, which says nothing on the terminal."""
    handler = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        ray.init(address=address, **quiet, **arguments)
        # Ray's own answer is to abort; this ends in order, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)


def _cause(error: BaseException) -> str:
    """The first line of what is at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:REASON_LENGTH]


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or 1)


def _of_actors() -> dict[str, str]:
    """Their environment: the same threads everywhere give the same bits."""
    return {"OMP_NUM_THREADS": str(_threads()), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def _room_of(address: str, workers: int | None, device: str) -> Room:
    """The cores of a cluster, and their parts of its GPUs. Raises `NoRoom`."""
    threads = _threads()
    actors = workers or max(1, int(ray.cluster_resources().get("CPU", 0)) // threads)
    each = _share_of(actors, threads, device)
    try:
        places = pool_size_from_resources(each)
    except ValueError:  # none
        places = 0
    if places < (workers or 1):
        raise NoRoom(
            f"The Ray cluster at {address} has room for {places} processes; give fewer --workers, or start Ray with more "
            "--num-cpus."
        )
    return Room(min(actors, places), each)


def _share_of(actors: int, cores: int, device: str) -> dict[str, float]:
    """What of Ray's resources one actor takes: its cores, and its part of the GPUs where they are used."""
    gpus = ray.cluster_resources().get("GPU", 0.0) if device != "cpu" else 0.0
    return {"num_cpus": cores, "num_gpus": min(1.0, gpus / actors)}


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


def engine_of(simulation: Simulation, out: Path, clients: int) -> Engine:
    """Flower's engine for simulations on the same data, which `flower_sites` begins; a context that ends it.

    Args:
        simulation: one of them; `workers` says over how many processes, `ray_address` in which cluster.
        out: the folder of their results, which names the folder of a Ray of its own, so that a next life finds what a killed
            one left. Its lock must be held.
        clients: how many there are.
    """
    meeting = temporary_beside(out.absolute() / "engine")
    return Engine(_ray(simulation, out), min(IN_FLIGHT, clients), meeting)


def flower_sites(
    engine: Engine, simulation: Simulation, federation: Federation, states: Path | None, on_client: OnClient
) -> FlowerSites:
    """The clients of a simulation on Flower's engine.

    Args:
        engine: within its context.
        simulation: what is simulated.
        federation: the clients, as this process has read them.
        states: where clients keep what they remember; None lets them forget.
        on_client: told of progress.

    Raises:
        ClusterUnreachable, NoRoom, MachineUnfit, EngineLost: see `Engine.take_up`.
    """
    options = simulation.spec.options
    engine.take_up(Work(_absolute(simulation), states.absolute() if states else None, federation.fingerprint))
    fates = Fates(simulation.faults, len(federation.names), options.seed)
    return FlowerSites(engine, federation, options, fates, on_client=on_client)


def _ray(simulation: Simulation, out: Path) -> AbstractContextManager[Room]:
    if simulation.ray_address is not None:
        return _cluster(simulation.ray_address, simulation.workers, simulation.device)
    # Not in `out`: the names of sockets may have 107 characters.
    folder = Path(tempfile.gettempdir()) / f"medhive-{sha256(str(out.absolute()).encode()).hexdigest()[:12]}"
    return _own_ray(folder, simulation.workers, simulation.device)


def _absolute(simulation: Simulation) -> Simulation:
    """With the files that actors read as they find them from anywhere."""
    partition = simulation.partition
    if partition.path is not None:
        partition = replace(partition, path=partition.path.absolute())
    return replace(simulation, data=simulation.data.absolute(), partition=partition)

"""The aggregator's only door to Flower, so that the internals of one exact flwr version live in one place.

Three processes stand behind it, each a subcommand of this module. The *superlink* is Flower's own. The *superexec* is
ours, because flower-superexec starts whatever bundle it is handed, puts the task's token on a command line, and never
looks at the process again: a ServerApp that was killed would count as running for another minute. Ours starts nothing
but the bundle of this package, passes the token through a pipe, and reports the end of a process at once. The
*serverapp* is the process of one run, in which Flower loads the bundle and the bundle loads the round loop.

Weights never pass through Flower: a message carries one small signed envelope, opaque to this module.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from hashlib import sha256
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any, cast

import httpx
import structlog
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.common.serde import user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import (
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
)
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fl_server.holding import Asked, Board, Happened, Holding, News, closing
from fl_server.logs import log_json
from medhive.envelope import MAX_ENVELOPE_BYTES
from medhive.errors import Conflict, InvalidInput, MedHiveError, NotAllowed, NotFound, TooLarge, Unreachable
from medhive.version import HOLD_HEADER

LOOPBACK = "127.0.0.1"
"""The SuperLink's control and runtime APIs have no authentication worth the name: nobody else may reach them."""

RECORD, FIELD = "medhive", "envelope"
"""Names inside the Flower message; the hospital's adapter uses the same two."""

MESSAGE_TYPE = "query"
"""Flower knows train, evaluate and query; what is asked stands in the envelope."""

ROUND_LOOP_VARIABLE = "MEDHIVE_SERVER_ROUND_LOOP"
"""Names the `module:function` that a ServerApp process runs; inherited from the superexec, never from a run."""

DEFAULT_ROUND_LOOP = "fl_server.app:main"

BUNDLE_DATE = (2024, 10, 1, 0, 0, 0)
"""A fixed date and no compression make the bundle's bytes, and so its hash, the same on every machine."""

BUNDLE_FILES = (
    "pyproject.toml",
    "medhive_bundle/__init__.py",
    "medhive_bundle/client_app.py",
    "medhive_bundle/server_app.py",
)

CONTROL_TIMEOUT_S = 10.0
"""Control calls take tens of milliseconds; ten seconds is a SuperLink in trouble."""

LISTED_RUNS = 1000
"""Flower lists twenty runs unless told otherwise; more than a thousand at once is not a coordinator's day."""

TASK_HOLD_S = 0.5
"""The SuperLink holds a look for a run so long. A process that has ended is noticed between two looks."""

TASK_POLL_S = 0.25
"""Between two looks for a run where the last one was not held: something had come, or the SuperLink is away."""

REPLY_POLL_S = 0.1
"""Between two looks for a reply that is announced, but whose content has not come yet."""

A_RUN = "a run"
"""What the superexec looks for."""

OPEN_UPLOADS = 1000
"""Announced messages whose pieces are on their way; the oldest is one whose sender is gone, and is found by a later look."""

RETRY_S = 1.0
"""Longest wait between two attempts of a ServerApp to reach a SuperLink that is away."""

UPLOAD_WAIT_S = 30.0
"""A reply is announced before its content is uploaded; a node that vanishes between counts as silent after this."""

GRACE_S = 10.0
"""How long a ServerApp may take to write its last state when the superexec ends."""

PARENT_LOOK_S = 0.2
"""How soon a process notices that its parent is gone."""

ORPHAN_GRACE_S = 3.0
"""How long a process whose parent is gone may take to end."""

log = structlog.get_logger()


class _Hold:
    """Says with each look how long the SuperLink may hold it (`fl_server.holding`)."""

    def __init__(self, look: str) -> None:
        self._look = look
        self.seconds = 0.0

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        if context.rpc_method == self._look and self.seconds > 0:
            context.request.headers[HOLD_HEADER] = f"{self.seconds:.3f}"
        return call_next(context)


class SuperLinkUnreachable(Unreachable):
    """The SuperLink does not answer."""

    code = "superlink-unreachable"


class SuperLinkRefused(Conflict):
    """The SuperLink answered, but not with what was asked for."""

    code = "superlink-refused"


class FlowerRunNotFound(NotFound):
    """The SuperLink knows no run of this number."""

    code = "flower-run-not-found"


class NodeKeySpent(NotAllowed):
    """A node key that was once unregistered can never be registered again: Flower keeps it."""

    code = "node-key-spent"


class NodeUnknown(NotFound):
    """No such node is registered."""

    code = "node-unknown"


class RunStopped(Conflict):
    """The run of this process was stopped, or given up as dead by the SuperLink."""

    code = "run-stopped"


# The bundle


def bundle_bytes() -> bytes:
    """The Flower app bundle, built from this package's own files; the same bytes for the same release everywhere."""
    files = {name: _bundle_file(name).read_bytes() for name in BUNDLE_FILES}
    manifest = "\n".join(f"{name},{sha256(data).hexdigest()},{len(data) * 8}" for name, data in files.items())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {**files, ".info/CONTENT": manifest.encode()}.items():
            entry = zipfile.ZipInfo(name, BUNDLE_DATE)
            entry.create_system = 3
            archive.writestr(entry, data)
    return buffer.getvalue()


def bundle_digest() -> str:
    """SHA-256 of `bundle_bytes()`, in hex: the one hash that the superexec starts."""
    return sha256(bundle_bytes()).hexdigest()


def _bundle_file(name: str) -> Traversable:
    return resources.files("fl_server.bundle").joinpath(*name.split("/"))


# The processes


@dataclass(frozen=True)
class Command:
    """What to start: a list of arguments and the whole environment."""

    argv: list[str]
    env: dict[str, str]


def superlink_command(
    *, port: int, database: Path, cert: Path, key: Path, ca: Path, secret_file: Path, home: Path
) -> Command:
    """Flower's SuperLink on loopback: TLS, node authentication, runs in processes of their own, one SQLite file.

    `secret_file` (at least 32 random bytes, shared with the superexec) keeps strangers on this machine from taking tasks;
    `home` is a writable folder for Flower. The process ends when the one that started it does.
    """
    argv = [
        *_this_module("superlink", os.getpid()),
        "--host",
        LOOPBACK,
        "--port",
        str(port),
        "--database",
        str(database),
        "--ssl-certfile",
        str(cert),
        "--ssl-keyfile",
        str(key),
        "--ssl-ca-certfile",
        str(ca),
        "--superexec-auth-secret-file",
        str(secret_file),
        "--enable-supernode-auth",
        "--isolation",
        "process",
        "--disable-runtime-dependency-installation",
    ]
    return Command(argv, _flower_environment(home, keep_own=False))


def superexec_command(
    *, port: int, ca: Path, secret_file: Path, home: Path, round_loop: str = DEFAULT_ROUND_LOOP
) -> Command:
    """The superexec that starts one process a run, of this package's bundle and no other.

    `ca` verifies the SuperLink; `round_loop` is the `module:function` that each process hands its run to. The environment
    is passed on to those processes. The process ends when the one that started it does, and its children with it.
    """
    argv = [
        *_this_module("superexec", os.getpid()),
        "--port",
        str(port),
        "--ca",
        str(ca),
        "--secret-file",
        str(secret_file),
    ]
    return Command(argv, {**_flower_environment(home, keep_own=True), ROUND_LOOP_VARIABLE: round_loop})


def _this_module(subcommand: str, parent: int) -> list[str]:
    return [sys.executable, "-m", "fl_server.flower", subcommand, "--parent-pid", str(parent)]


def _flower_environment(home: Path, *, keep_own: bool) -> dict[str, str]:
    """The environment of a Flower process; the SuperLink has no need of MedHive's own settings and secrets."""
    inherited = {key: value for key, value in os.environ.items() if keep_own or not key.startswith("MEDHIVE_")}
    return {
        **inherited,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOG_LEVEL": inherited.get("FLWR_LOG_LEVEL", "WARNING"),
    }


# The control side


class RunPhase(StrEnum):
    """Where a Flower run stands."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def is_over(self) -> bool:
        return self in {RunPhase.COMPLETED, RunPhase.FAILED, RunPhase.STOPPED}


@dataclass(frozen=True)
class FlowerRun:
    """A run as the SuperLink sees it; `config` is what it was started with, `details` why it failed."""

    flower_run: int
    phase: RunPhase
    details: str
    config: Mapping[str, str | int | float]


@dataclass(frozen=True)
class NodeState:
    """A registered node; its id is for the aggregator alone and is never shown to sites."""

    node_id: int
    online: bool
    public_key: bytes


class SuperLink:
    """The SuperLink's control API, for the dispatcher beside it.

    `address` is `https://127.0.0.1:port`, `ca` the file of the CAs that may have issued its certificate, read again at a
    change. Every method raises `SuperLinkUnreachable` when there is no answer and
    `SuperLinkRefused` when there is an unexpected one.
    """

    def __init__(self, *, address: str, ca: Path, timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        self._address = address
        self._ca, self._ca_read = ca, ca.read_bytes()
        self._tls = ssl.create_default_context(cafile=str(ca))
        self._control = ControlHttpClient(
            address,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="MedHive")],
            verify=self._tls,
            timeout=timeout_s,
        )

    def close(self) -> None:
        self._control.close()

    def is_ready(self) -> bool:
        """Whether the SuperLink answers at all."""
        try:
            self.nodes()
        except SuperLinkUnreachable:
            return False
        return True

    def start_run(self, config: Mapping[str, str | int | float]) -> int:
        """Submit a run of the bundle; keys of `config` must be the bundle's. Returns Flower's number of it."""
        known = tomllib.loads(_bundle_file("pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
        if unknown := sorted(set(config) - set(known)):
            raise InvalidInput(f"The bundle knows no setting {', '.join(unknown)}.", unknown=unknown)
        content = bundle_bytes()
        request = StartRunRequest(
            fab=Fab(hash_str=sha256(content).hexdigest(), content=content),
            override_config=user_config_to_proto(dict(config)),
        )
        answer = self._call(self._control.StartRun, request)
        if not answer.run_id:
            raise SuperLinkRefused("The SuperLink did not accept MedHive's bundle.")
        return int(answer.run_id)

    def runs(self, newest: int = LISTED_RUNS) -> dict[int, FlowerRun]:
        """The newest runs, so many at most, by Flower's number."""
        answer = self._call(self._control.ListRuns, ListRunsRequest(limit=newest))
        return {number: _flower_run(run) for number, run in answer.run_dict.items()}

    def run(self, flower_run: int) -> FlowerRun:
        """One run. Raises `FlowerRunNotFound`."""
        answer = self._call(self._control.ListRuns, ListRunsRequest(run_id=flower_run))
        return _flower_run(answer.run_dict[flower_run])

    def stop_run(self, flower_run: int) -> bool:
        """Stop a run; False when it was over already. Raises `FlowerRunNotFound`."""
        try:
            return bool(self._call(self._control.StopRun, StopRunRequest(run_id=flower_run)).success)
        except SuperLinkRefused as error:
            if error.data.get("flower_code") == ApiErrorCode.RUN_ALREADY_FINISHED:
                return False
            raise

    def register_node(self, public_key_pem: bytes) -> int:
        """Register a node's public key (NIST P-384, PEM) and return its id; the same id for a key that is registered.

        Raises `NodeKeySpent` for a key that was unregistered before, `InvalidInput` for what is no such key.
        """
        try:
            return int(self._call(self._control.RegisterNode, RegisterNodeRequest(public_key=public_key_pem)).node_id)
        except SuperLinkRefused as error:
            return self._explain_refused_key(public_key_pem, error)

    def _explain_refused_key(self, public_key_pem: bytes, error: SuperLinkRefused) -> int:
        if error.data.get("flower_code") == ApiErrorCode.PUBLIC_KEY_NOT_VALID:
            raise InvalidInput("This is not the public half of a NIST elliptic-curve key in PEM.") from error
        if error.data.get("flower_code") != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
            raise error
        for node in self.nodes():
            if node.public_key == public_key_pem:
                return node.node_id
        raise NodeKeySpent("This node key was revoked before. The hospital must join again with a new key.") from error

    def unregister_node(self, node_id: int) -> None:
        """Refuse this node from now on. Raises `NodeUnknown` when it is not registered."""
        try:
            self._call(self._control.UnregisterNode, UnregisterNodeRequest(node_id=node_id))
        except SuperLinkRefused as error:
            if error.data.get("flower_code") == ApiErrorCode.NODE_NOT_FOUND:
                raise NodeUnknown("This node is not registered.") from error
            raise

    def nodes(self) -> list[NodeState]:
        """All registered nodes."""
        answer = self._call(self._control.ListNodes, ListNodesRequest())
        return [
            NodeState(node_id=info.node_id, online=info.status == NodeStatus.ONLINE, public_key=info.public_key)
            for info in answer.nodes_info
            if info.status != NodeStatus.UNREGISTERED
        ]

    def _follow_ca(self) -> None:
        """Trust a new CA from the next connection on; a former one until this process ends, as only its child is asked."""
        with contextlib.suppress(OSError):
            found = self._ca.read_bytes()
            if found != self._ca_read:
                self._tls.load_verify_locations(cafile=self._ca)
                self._ca_read = found

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        self._follow_ca()
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            raise _refusal(error.response) from error
        except (httpx.TransportError, ValueError) as error:
            raise SuperLinkUnreachable(
                f"The SuperLink at {self._address} does not answer ({error}). It is restarted by medhive-server; "
                "if this lasts, read that service's log.",
                address=self._address,
            ) from error


def _refusal(response: httpx.Response) -> MedHiveError:
    refused = FlowerError.from_json(response.text)
    if refused is None:
        if response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            return SuperLinkUnreachable(f"The SuperLink fails with HTTP {response.status_code}.")
        return SuperLinkRefused(f"The SuperLink refused with HTTP {response.status_code}.", status=response.status_code)
    if refused.code == ApiErrorCode.RUN_ID_NOT_FOUND:
        return FlowerRunNotFound("The SuperLink knows no such run.")
    return SuperLinkRefused(f"The SuperLink refused: {refused.message}", flower_code=int(refused.code))


def _flower_run(run: Any) -> FlowerRun:
    status = run.status
    phase = RunPhase(status.sub_status if status.status == Status.FINISHED else status.status)
    return FlowerRun(
        flower_run=run.run_id,
        phase=phase,
        details=status.details,
        config=cast("dict[str, str | int | float]", user_config_from_proto(run.override_config)),
    )


# The exchange of one run


class ReplyError(StrEnum):
    """Why a message has no answer; the aggregator may send it again as long as the round lasts."""

    NODE_OFFLINE = "node-offline"  # the node's heartbeat has lapsed; it may come back
    LOST = "lost"  # the message expired, or an answer got lost when the SuperLink went down
    INCOMPLETE = "incomplete"  # the answer was announced, but its content never came
    MALFORMED = "malformed"  # the content is no envelope
    REFUSED = "refused"  # the node answered with an error of Flower's own


@dataclass(frozen=True)
class Reply:
    """The answer to one message: either `payload` or `error`.

    Flower does not check that the node that sent the payload is `node_id`; the envelope's signature must.
    """

    message_id: str
    node_id: int
    payload: bytes | None
    error: ReplyError | None = None


@dataclass(frozen=True)
class _Upload:
    """An announced reply whose content is still to be fetched, before `deadline` (monotonic seconds)."""

    message_id: str
    node_id: int
    reply_id: str
    object_id: str
    deadline: float


class GridExchange:
    """Sends envelopes to nodes and collects the answers, inside a ServerApp process.

    Goes on through a restart of the SuperLink: every call waits for it. Every call raises `RunStopped` when the run is
    over. One thread only.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._waiting: dict[str, int] = {}
        self._uploads: list[_Upload] = []
        self._hold = _Hold("/flwr.proto.Runtime/PullMessages")
        grid._runtime_client._interceptors += (self._hold,)
        # Flower's own judgement sends SIGINT to this process, and gives up on any TLS error of a dying SuperLink.
        grid._retry_invoker.should_giveup = _is_final
        # Its waits double up to 20 s: meant for a network, not for a service beside this process that is back in two.
        grid._retry_invoker.wait_gen_factory = partial(itertools.repeat, RETRY_S)

    def send(self, node_id: int, payload: bytes, ttl_s: float) -> str:
        """Send an envelope to a node and return the message's id; the node may take it within `ttl_s` seconds.

        Raises `NodeUnknown` when the node is not registered (any more), or has never connected so far.
        """
        if len(payload) > MAX_ENVELOPE_BYTES:
            raise TooLarge(f"A message of {len(payload)} bytes is above the limit of {MAX_ENVELOPE_BYTES}.")
        content = RecordDict({RECORD: ConfigRecord({FIELD: payload})})
        message = Message(content, dst_node_id=node_id, message_type=MESSAGE_TYPE, ttl=ttl_s)
        with _run_stopped_translated():
            try:
                message_id = next(iter(self._grid.push_messages([message])), None)
            except ObjectPushError:
                # A node that knows its answer already can take the message and confirm it before the last piece of it is
                # uploaded; the SuperLink then refuses that piece. The message was announced, and its answer counts.
                message_id = message.metadata.message_id
        if not message_id:
            raise NodeUnknown("The node is not registered, or has never connected.")
        self._waiting[message_id] = node_id
        return str(message_id)

    def wait(self, seconds: float) -> list[Reply]:
        """Wait for at least one answer, at most `seconds`; none is an empty list."""
        deadline = time.monotonic() + seconds
        while not (replies := self._look(deadline - time.monotonic())):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(REPLY_POLL_S, left))
        return replies

    def _look(self, seconds: float) -> list[Reply]:
        """The answers that have come since the last look. The SuperLink holds it where none is on its way already."""
        self._hold.seconds = 0.0 if self._uploads else max(0.0, seconds)
        failed = self._pull_announcements() if self._waiting else []
        return failed + self._pull_uploads()

    def forget(self, message_id: str) -> None:
        """Ask no more for the answer to a message; one that still comes is dropped."""
        self._waiting.pop(message_id, None)
        self._uploads = [upload for upload in self._uploads if upload.message_id != message_id]

    @property
    def waiting(self) -> Mapping[str, int]:
        """Message ids without an answer yet, and the nodes they went to."""
        return {**self._waiting, **{upload.message_id: upload.node_id for upload in self._uploads}}

    def _pull_announcements(self) -> list[Reply]:
        """Turn announced answers into uploads to fetch, and Flower's error answers into replies."""
        request = PullAppMessagesRequest(message_ids=list(self._waiting))
        with _run_stopped_translated():
            answer = self._grid._runtime_client.PullMessages(request)
        failed = []
        for announced, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            message_id = announced.metadata.reply_to_message_id
            node_id = self._waiting.pop(message_id, None)
            if node_id is None:
                continue
            error = _error_of(announced)
            object_id = None if error else _leaf_of(tree)
            if object_id is None:
                failed.append(Reply(message_id, node_id, None, error or ReplyError.MALFORMED))
            else:
                deadline = time.monotonic() + UPLOAD_WAIT_S
                self._uploads.append(_Upload(message_id, node_id, announced.metadata.message_id, object_id, deadline))
        return failed

    def _pull_uploads(self) -> list[Reply]:
        """Fetch what has been uploaded; one node's missing upload never holds up another's."""
        replies, unfinished = [], []
        for upload in self._uploads:
            reply = self._pull_upload(upload)
            if reply is None:
                unfinished.append(upload)
            else:
                replies.append(reply)
        self._uploads = unfinished
        return replies

    def _pull_upload(self, upload: _Upload) -> Reply | None:
        grid = self._grid
        flower_run = grid.run.run_id
        request = PullObjectRequest(node=grid.node, run_id=flower_run, object_id=upload.object_id)
        with _run_stopped_translated():
            answer = grid._runtime_client.PullObject(request)
            if not answer.object_available:
                if answer.object_found and time.monotonic() < upload.deadline:
                    return None
                return Reply(upload.message_id, upload.node_id, None, ReplyError.INCOMPLETE)
            grid._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=grid.node, run_id=flower_run, message_object_id=upload.reply_id)
            )
        payload = _envelope_in(answer.object_content)
        return Reply(upload.message_id, upload.node_id, payload, None if payload else ReplyError.MALFORMED)


def _error_of(announced: Any) -> ReplyError | None:
    if not announced.HasField("error"):
        return None
    known = {
        ErrorCode.NODE_UNAVAILABLE: ReplyError.NODE_OFFLINE,
        ErrorCode.MESSAGE_UNAVAILABLE: ReplyError.LOST,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE: ReplyError.LOST,
    }
    return known.get(announced.error.code, ReplyError.REFUSED)


def _leaf_of(tree: Any) -> str | None:
    """The id of the one record in a message built as message, dictionary, record; None for any other shape."""
    for _level in ("dictionary", "record"):
        if len(tree.children) != 1:
            return None
        tree = tree.children[0]
    return None if tree.children else str(tree.object_id)


def _envelope_in(content: bytes) -> bytes | None:
    """The payload of a record that a node made; None when it holds none."""
    if len(content) > MAX_ENVELOPE_BYTES + 1024:
        return None
    try:
        payload = ConfigRecord.inflate(content)[FIELD]
    except (ValueError, KeyError, TypeError, AttributeError, DecodeError):  # of what a stranger made
        return None
    return payload if isinstance(payload, bytes) else None


@contextlib.contextmanager
def _run_stopped_translated() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RunStopped("The run was stopped, or the SuperLink gave this process up as dead.") from error
        raise _refusal(error.response) from error


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use: a refusal or a wrong certificate, but not a SuperLink that is away."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def serverapp_entry() -> Any:
    """Flower's `ServerApp` for the bundle: hands the run to the round loop that the environment names.

    The round loop is called with the run's `GridExchange` and its configuration; an exception out of it fails the run.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        module, _, name = os.environ.get(ROUND_LOOP_VARIABLE, DEFAULT_ROUND_LOOP).partition(":")
        try:
            getattr(importlib.import_module(module), name)(GridExchange(grid), dict(context.run_config))
        finally:
            _let_the_last_word_out()

    return app


def _let_the_last_word_out() -> None:
    """Ignore signals from here on: Flower's handler would cut off the report of how the run ended, which is all that is
    left to do and takes at most `FORCE_EXIT_TIMEOUT_SECONDS`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# The superexec


@dataclass(frozen=True)
class _Child:
    """A ServerApp process and the token that speaks for its run."""

    process: subprocess.Popen[bytes]
    token: str
    flower_run: int


class Superexec:
    """Takes runs from the SuperLink, starts a process for each, and reports how each one ended."""

    def __init__(self, *, port: int, ca: Path, secret: bytes) -> None:
        self._port, self._ca = port, ca
        self._tls = ssl.create_default_context(cafile=str(ca))
        self._digest = bundle_digest()
        self._hold = _Hold("/flwr.proto.Runtime/AcquireTask")
        self._hold.seconds = TASK_HOLD_S
        signature = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        self._runtime = self._client(signature)
        self._children: list[_Child] = []
        self._ended: list[tuple[_Child, str]] = []
        self._away = False
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the loop of `run`, from any thread or a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop`, then end the children."""
        while not self._stop.is_set():
            looked = time.monotonic()
            self._reap()
            self._report()
            self._note_absence(self._take_one)
            self._stop.wait(0.0 if time.monotonic() - looked >= TASK_HOLD_S else TASK_POLL_S)
        self._end_children()

    def _note_absence(self, look: Callable[[], None]) -> None:
        """Look for work; a SuperLink that is away is logged once, and once when it is back."""
        try:
            look()
        except httpx.HTTPError as error:
            if not self._away:
                log.warning("superexec.superlink-away", reason=str(error) or type(error).__name__)
            self._away = True
        else:
            if self._away:
                log.info("superexec.superlink-back")
            self._away = False

    def _take_one(self) -> None:
        answer = self._runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if not answer.token:
            return
        task = answer.task
        if task.fab_hash != self._digest:
            log.error("superexec.foreign-bundle-refused", flower_run=task.run_id, bundle=task.fab_hash)
            self._push_failure(answer.token, "Only MedHive's own bundle may run here.")
            return
        self._start(answer.token, task.run_id)

    def _start(self, token: str, flower_run: int) -> None:
        argv = [*_this_module("serverapp", os.getpid()), "--port", str(self._port), "--ca", str(self._ca)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE)
        with contextlib.suppress(BrokenPipeError):  # It died at once; its exit code is reported like any other.
            _hand_over(process, token)
        self._children.append(_Child(process, token, flower_run))
        log.info("superexec.serverapp-started", flower_run=flower_run, pid=process.pid)

    def _reap(self) -> None:
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._children.remove(child)
            code = child.process.returncode
            log.info("superexec.serverapp-ended", flower_run=child.flower_run, exit_code=code)
            self._ended.append((child, _how_it_ended(code)))

    def _report(self) -> None:
        """Report ended processes as failed; what a process said itself before it ended stands, and this is refused.

        So a completed run whose last word was lost with the SuperLink counts as failed in Flower: whether a run is
        completed is for the gateway to say.
        """
        unheard = []
        for child, details in self._ended:
            try:
                self._push_failure(child.token, details)
            except httpx.TransportError:
                unheard.append((child, details))
        self._ended = unheard

    def _push_failure(self, token: str, details: str) -> None:
        request = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details)
        with self._client(RuntimeTokenHttpInterceptor(token=token)) as runtime:
            try:
                runtime.PushTaskOutput(request)
            except httpx.HTTPStatusError as error:
                log.debug("superexec.outcome-known", status=error.response.status_code)

    def _client(self, credentials: Any) -> Any:
        return RuntimeHttpClient(
            f"https://{LOOPBACK}:{self._port}",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), self._hold, credentials],
            verify=self._tls,
            timeout=CONTROL_TIMEOUT_S,
        )

    def _end_children(self) -> None:
        for child in self._children:
            child.process.terminate()
        deadline = time.monotonic() + GRACE_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _hand_over(process: subprocess.Popen[bytes], token: str) -> None:
    """Pass the token through a pipe: a command line can be read by every user of the machine."""
    if process.stdin is not None:
        with process.stdin as pipe:
            pipe.write(token.encode("ascii") + b"\n")


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"The ServerApp process was ended by {signal.Signals(-code).name}."
    return f"The ServerApp process ended with exit code {code}; its log has the reason."


# Process entries


def main(argv: list[str] | None = None) -> None:
    """`python -m fl_server.flower superlink|superexec|serverapp`: what the commands above start."""
    parser = argparse.ArgumentParser(prog="fl_server.flower", description=main.__doc__)
    parser.add_argument("subcommand", choices=["superlink", "superexec", "serverapp"])
    parser.add_argument("--parent-pid", type=int, required=True)
    options, rest = parser.parse_known_args(argv)
    log_json()
    _end_with_parent(options.parent_pid)
    {"superlink": _superlink_process, "superexec": _superexec_process, "serverapp": _serverapp_process}[
        options.subcommand
    ](rest)


def _superlink_process(arguments: list[str]) -> None:
    # A web server that the other processes do not need.
    from flwr.superlink import extensions  # noqa: PLC0415
    from flwr.superlink.cli import flower_superlink  # noqa: PLC0415
    from starlette.middleware import Middleware  # noqa: PLC0415

    board = _board()
    extensions.get_middleware = lambda: (Middleware(Holding, board=board),)
    extensions.get_lifespan_contexts = lambda: (lambda _app: closing(board, _before_the_end),)
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


def _before_the_end(act: Callable[[], object]) -> None:
    """Have SIGTERM and SIGINT do this first: the web server ends only when every request has its answer."""
    for number in (signal.SIGTERM, signal.SIGINT):
        end = signal.getsignal(number)

        def handle(number: int, frame: Any, end: Any = end) -> None:
            act()
            if callable(end):
                end(number, frame)

        signal.signal(number, handle)


def _board() -> Board:
    """What is looked for at the SuperLink, and which of its requests bring that about."""
    uploads = _Uploads()
    return Board(
        looks={
            "/v1/fleet/pull-messages": _reading(PullMessagesRequest, lambda look: {_node(look.node.node_id)}),
            "/v1/runtime/pull-messages": _reading(
                PullAppMessagesRequest, lambda look: {_answer_to(message_id) for message_id in look.message_ids}
            ),
            "/v1/runtime/acquire-task": _reading(AcquireTaskRequest, lambda _look: {A_RUN}),
        },
        news={
            "/v1/runtime/push-messages": uploads.announced(
                PushAppMessagesRequest, PushAppMessagesResponse, lambda about: _node(about.dst_node_id)
            ),
            "/v1/fleet/push-messages": uploads.announced(
                PushMessagesRequest, PushMessagesResponse, lambda about: _answer_to(about.reply_to_message_id)
            ),
            "/v1/runtime/push-object": uploads.stored,
            "/v1/fleet/push-object": uploads.stored,
            "/v1/control/start-run": lambda _request, _answer: News(told=frozenset({A_RUN})),
            "/v1/control/unregister-node": lambda request, _answer: News(
                told=frozenset({_node(UnregisterNodeRequest.FromString(request).node_id)})
            ),
            # A node that leaves may be waiting for the answer to a look of its own.
            "/v1/fleet/deactivate-node": lambda request, _answer: News(
                dismissed=frozenset({_node(DeactivateNodeRequest.FromString(request).node_id)})
            ),
        },
    )


def _node(node_id: int) -> str:
    return f"node {node_id}"


def _answer_to(message_id: str) -> str:
    return f"answer to {message_id}"


def _reading(kind: Any, names: Callable[[Any], set[str]]) -> Asked:
    def read(body: bytes) -> frozenset[str]:
        try:
            return frozenset(names(kind.FromString(body)))
        except DecodeError:
            return frozenset()  # Flower refuses it

    return read


class _Uploads:
    """Messages that are announced, until the last piece of them is there: then there is something to fetch."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, tuple[frozenset[str], set[str]]] = OrderedDict()

    def announced(self, request_kind: Any, answer_kind: Any, name: Callable[[Any], str]) -> Happened:
        """Read an announcement, which tells those whom it concerns at once where no piece is missing."""

        def happened(request: bytes, answer: bytes) -> News:
            messages, taken = request_kind.FromString(request).messages_list, answer_kind.FromString(answer)
            names = frozenset(name(message.metadata) for message in messages)
            missing = set(taken.objects_to_push)
            if not missing:
                return News(told=names)
            self._sessions[taken.session_id] = names, missing
            while len(self._sessions) > OPEN_UPLOADS:
                self._sessions.popitem(last=False)
            return News()

        return happened

    def stored(self, request: bytes, _answer: bytes) -> News:
        """Read one piece's upload."""
        piece = PushObjectRequest.FromString(request)
        names, missing = self._sessions.get(piece.session_id, (frozenset(), set()))
        missing.discard(piece.object_id)
        if missing or not names:
            return News()
        del self._sessions[piece.session_id]
        return News(told=names)


def _superexec_process(arguments: list[str]) -> None:
    parser = _runtime_arguments()
    parser.add_argument("--secret-file", type=Path, required=True)
    options = parser.parse_args(arguments)
    superexec = Superexec(port=options.port, ca=options.ca, secret=options.secret_file.read_bytes())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: superexec.stop())
    superexec.run()


def _serverapp_process(arguments: list[str]) -> None:
    # Flower's own simulation, which the package of grids imports as well: it brings the SuperLink and its database along,
    # a third of the time that this process takes to start.
    simulation = ModuleType("flwr.superlink.grid.inmemory_grid")
    simulation.InMemoryGrid = None  # type: ignore[attr-defined]
    sys.modules[simulation.__name__] = simulation
    from flwr.superlink.runtime import run_serverapp  # noqa: PLC0415 - only this process runs one

    options = _runtime_arguments().parse_args(arguments)
    run_serverapp(
        runtime_api_address=f"{LOOPBACK}:{options.port}",
        log_queue=Queue(),
        token=sys.stdin.readline().strip(),
        insecure=False,
        certificates=options.ca.read_bytes(),
        runtime_dependency_install=False,
    )


def _runtime_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ca", type=Path, required=True)
    return parser


def _end_with_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent is gone, even killed, so that nothing is left behind.

    What is still there after `ORPHAN_GRACE_S` ends without further ado: a SuperLink waits for its nodes' open connections
    first, and holds the port that its successor needs. It loses nothing, its state is on disk after every answer.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=look, name="parent-monitor", daemon=True).start()


if __name__ == "__main__":
    main()

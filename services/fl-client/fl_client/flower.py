"""The hospital's only door to Flower, so that the internals of one exact flwr version live in one place.

flwr's own connection (`flwr.supernode.fleet_http_connection`) is made for a process of its own: it swallows exceptions,
answers a 401 with SIGINT to its own process, ends the process when a node is still marked online, and signs whatever
time the local clock shows. This module therefore talks through flwr's HTTP client one level below, where none of that
happens, and turns every refusal into an error that says what to do. Weights never pass here: a message carries one small
signed envelope, opaque to Flower and to this module.
"""

import random
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from medhive.envelope import MAX_ENVELOPE_BYTES
from medhive.errors import (
    ClockSkew,
    Conflict,
    IncompatibleVersion,
    InvalidInput,
    MedHiveError,
    NotAllowed,
    TooLarge,
    Unreachable,
)
from medhive.version import HOLD_HEADER

MAX_ANSWER_BYTES = 1024 * 1024
"""The proxy caps requests at the same size; no answer that this node asks for comes near."""

RECORD, FIELD = "medhive", "envelope"
"""Names inside the Flower message; the aggregator's adapter uses the same two."""

SUPERLINK_NODE = 1
"""Flower's fixed id of the SuperLink, to which every reply goes."""

LONGEST_WAIT_S = 5.0
"""Cap of the back-off, so that a node is back within seconds of the SuperLink."""

HEARTBEAT_LAPSE_S = HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE + 15.0
"""How long a node that died without a goodbye can be kept from activating again, with a margin."""

OBJECT_WAIT_S = 30.0
"""A message is announced before its content is uploaded; an aggregator that died between must send it again."""

SLOW_CLOCK_S, FAST_CLOCK_S = 300.0, 4.0
"""Flower takes signatures up to 305 s old and 5 s ahead; one second less, since the Date header counts seconds."""

GOODBYE_TIMEOUT_S = 3.0
"""Leaving tells the SuperLink, but never holds up the end of the process."""

PUSH_ATTEMPTS = 3
"""An upload that is interrupted by a restart of the SuperLink is complete at the second attempt."""

LOOK = "/flwr.proto.Fleet/PullMessages"
"""The one call that may be held, by the name that flwr gives it."""

_RETRYABLE = frozenset({404, 408, 429, 500, 502, 503, 504})
"""Answers of a proxy without its SuperLink, or of a SuperLink in trouble: they pass. 404 is a proxy being set up."""

log = structlog.get_logger()


class NodeRevoked(NotAllowed):
    """The coordinator no longer knows this node's key, or the key was never registered."""

    code = "node-revoked"


class RunGone(Conflict):
    """The run was stopped or is over: its work here is of no more use."""

    code = "run-gone"


class FleetUnreachable(Unreachable):
    """The fleet address does not answer."""

    code = "fleet-unreachable"


class FleetUntrusted(Unreachable):
    """The fleet address answers with a certificate that the invite's authority did not sign."""

    code = "fleet-untrusted"


class FleetClosed(MedHiveError):
    """The connection was closed by its own process while it waited."""

    code = "fleet-closed"


@dataclass(frozen=True)
class Inbound:
    """One message for this node; plain data, so that it may be stored and answered after a restart.

    `flower_run` is Flower's number of the run, `created_at` and `ttl` (seconds, server's clock) end its life.
    """

    message_id: str
    flower_run: int
    payload: bytes
    created_at: float
    ttl: float
    message_type: str


@dataclass(frozen=True)
class Outage:
    """The fleet address has not answered for `seconds`, over `attempts`, last because of `reason`."""

    seconds: float
    attempts: int
    reason: str


class _NodeSignature:
    """Signs each request as Flower wants it, with a corrected clock, and never ends the process on a refusal."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, clock_offset: Callable[[], float]) -> None:
        self._key = key
        self._public = b64encode(public_key_to_bytes(key.public_key())).decode("ascii")
        self._clock_offset = clock_offset
        self._version = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
        self.hold_s = 0.0  # how long the next look for messages may be held

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        moment = (now() + timedelta(seconds=self._clock_offset())).isoformat()
        signature = b64encode(sign_message(self._key, moment.encode("ascii"))).decode("ascii")
        context.request.headers.update(
            {
                **self._version,
                FLEET_HTTP_PUBLIC_KEY_HEADER: self._public,
                TIMESTAMP_HEADER: moment,
                FLEET_HTTP_SIGNATURE_HEADER: signature,
            }
        )
        if self.hold_s > 0 and context.rpc_method == LOOK:
            context.request.headers[HOLD_HEADER] = f"{self.hold_s:.3f}"
        return call_next(context)


class FleetConnection:
    """A node's connection to the SuperLink, for as long as the `with` block lasts.

    Messages may be received while earlier ones are unanswered, and answered in any order, from any thread. Every call
    keeps trying while the SuperLink is away, for `patience_s` (None: for ever); `on_outage` hears of each failed attempt,
    and None when the SuperLink is back. `address` is `https://host:port`. `clock_offset` gives the seconds to add to this
    machine's clock. `node_file` remembers the node's id, so that a node that crashed goes on at once instead of waiting
    for its heartbeat to lapse.

    Raises, from every call: `NodeRevoked`, `ClockSkew`, `FleetUntrusted`, `FleetUnreachable`, `IncompatibleVersion`,
    `FleetClosed` (after `close`).
    """

    def __init__(
        self,
        *,
        address: str,
        tls: ssl.SSLContext,
        node_key: Path,
        node_file: Path | None = None,
        clock_offset: Callable[[], float] = lambda: 0.0,
        on_outage: Callable[[Outage | None], None] = lambda _outage: None,
        patience_s: float | None = None,
    ) -> None:
        self._address = address
        self._key = _read_node_key(node_key)
        self._node_file = node_file
        self._clock_offset = clock_offset
        self._on_outage = on_outage
        self._patience_s = patience_s
        self._closed = threading.Event()
        self._failure: MedHiveError | None = None
        self._signature = _NodeSignature(self._key, clock_offset)
        self._fleet = FleetHttpClient(address, interceptors=[self._signature], verify=tls)
        self._fleet._client.event_hooks = {"response": [_refuse_large_answer]}
        self._node_id = 0
        self._heartbeats = threading.Thread(target=self._send_heartbeats, name="fleet-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._node_id = self._resume() or self._activate()
        except BaseException:
            self._fleet.close()
            raise
        self._remember()
        self._heartbeats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._heartbeats.join(timeout=2 * GOODBYE_TIMEOUT_S)
        self._fleet.close()

    def close(self) -> None:
        """End every wait; calls in progress raise `FleetClosed`. Safe from any thread and more than once."""
        self._closed.set()

    def receive(self, hold_s: float = 0.0) -> Inbound | None:
        """Take the next message, or None when there is none now. The caller sets the pace of asking.

        A coordinator that can (`fl_server.holding`) keeps the question open for up to `hold_s` seconds, until there is a
        message, or until this connection is closed; another one answers at once.

        A message of a run that was stopped meanwhile is dropped, and so is one whose content never comes or is not an
        envelope: the aggregator sends what is still wanted again. What is returned is not confirmed yet: the caller first
        makes it durable, then calls `confirm`.
        """
        # flwr's linkstate sets `delivered_at` in the very statement that reads a message for this answer, and never hands
        # it out again, confirmed or not; a node cannot ask for it anew. So a node that is killed between this answer and
        # its own disk has lost the message, and the aggregator alone can close that gap, by asking again after silence.
        self._signature.hold_s = hold_s
        answer = self._call(self._fleet.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        announced, tree = answer.messages_list[0].metadata, answer.message_object_trees[0]
        try:
            payload = self._pull_payload(announced, tree)
        except (RunGone, InvalidInput, TooLarge) as error:
            log.warning("fleet.message-dropped", flower_run=announced.run_id, reason=str(error))
            return None
        return Inbound(
            message_id=announced.message_id,
            flower_run=announced.run_id,
            payload=payload,
            created_at=announced.created_at,
            ttl=announced.ttl,
            message_type=announced.message_type,
        )

    def confirm(self, inbound: Inbound) -> None:
        """Say that a message is kept here, so that the SuperLink may forget its content; saying it again does no harm.

        A run that is over meanwhile has been forgotten with all its messages.
        """
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=inbound.flower_run, message_object_id=inbound.message_id
        )
        try:
            self._call(self._fleet.ConfirmMessageReceived, request)
        except RunGone:
            log.info("fleet.confirmed-too-late", flower_run=inbound.flower_run)

    def reply(self, inbound: Inbound, payload: bytes) -> bool:
        """Answer a message; False when the SuperLink no longer wants it (expired, or answered before).

        Raises `RunGone` when the run is over, `TooLarge` when the payload is above `MAX_ENVELOPE_BYTES`.
        """
        if len(payload) > MAX_ENVELOPE_BYTES:
            raise TooLarge(
                f"An answer of {len(payload)} bytes is above the limit of {MAX_ENVELOPE_BYTES}.", size=len(payload)
            )
        created_at = now().timestamp() + self._clock_offset()
        ttl = inbound.created_at + inbound.ttl - created_at
        if ttl <= 0:
            return False
        return self._push(inbound.flower_run, self._compose(inbound, payload, created_at, ttl))

    def check_run(self, flower_run: int) -> None:
        """Ask whether a run still goes on, since nothing tells a training that its run was stopped.

        Raises `RunGone` when it does not.
        """
        self._call(self._fleet.GetRun, GetRunRequest(node=self._node, run_id=flower_run))

    @property
    def _node(self) -> Any:
        return Node(node_id=self._node_id)

    # Coming and going

    def _resume(self) -> int | None:
        """Go on under the remembered id: a heartbeat revives a node that is still registered, online or not."""
        remembered = self._remembered()
        if remembered is None:
            return None
        request = SendNodeHeartbeatRequest(node=Node(node_id=remembered), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            answer = self._call(self._fleet.SendNodeHeartbeat, request)
        except NodeRevoked:
            return None  # The id may have changed with a new registration of the same key: activation decides.
        return remembered if answer.success else None

    def _activate(self) -> int:
        """Activate the node; one that is still marked online after a crash is refused until its heartbeat lapses."""
        request = ActivateNodeRequest(
            public_key=public_key_to_bytes(self._key.public_key()), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        deadline = time.monotonic() + HEARTBEAT_LAPSE_S
        while True:
            try:
                return int(self._call(self._fleet.ActivateNode, request).node_id)
            except _ActivationRefused as error:
                if time.monotonic() >= deadline:
                    raise NodeRevoked(
                        "The coordinator does not accept this hospital's node key. Ask for a new invite and join again, "
                        "or end the other process that uses the same state folder."
                    ) from error
                self._wait(LONGEST_WAIT_S)

    def _remembered(self) -> int | None:
        if self._node_file is None or not self._node_file.is_file():
            return None
        text = self._node_file.read_text("ascii", errors="replace").strip()
        return int(text) if text.isdecimal() else None

    def _remember(self) -> None:
        if self._node_file is None:
            return
        self._node_file.touch(mode=0o600)
        self._node_file.write_text(f"{self._node_id}\n", "ascii")

    def _say_goodbye(self) -> None:
        self._fleet._client.timeout = httpx.Timeout(GOODBYE_TIMEOUT_S)
        try:
            self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node_id))
        except (httpx.HTTPError, ValueError) as error:
            log.info("fleet.goodbye-unheard", reason=str(error))

    def _send_heartbeats(self) -> None:
        """Keep the node online, in a thread of its own; a refusal is kept for the next call of the owner.

        At the end it says goodbye, beside whatever call is still under way: a look that is held has its answer with that.
        """
        self._beat()
        self._closed.wait()
        self._say_goodbye()

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not self._closed.wait(HEARTBEAT_DEFAULT_INTERVAL * random.uniform(0.6, 0.8)):  # noqa: S311
            try:
                self._call(self._fleet.SendNodeHeartbeat, request)
            except FleetClosed:
                return
            except FleetUnreachable:
                continue
            except MedHiveError as error:
                self._failure = error
                return

    # Messages

    def _pull_payload(self, announced: Any, tree: Any) -> bytes:
        content = self._pull_object(announced.run_id, _leaf_of(tree))
        return _envelope_in(content)

    def _pull_object(self, flower_run: int, object_id: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=flower_run, object_id=object_id)
        deadline = time.monotonic() + OBJECT_WAIT_S
        for wait in _back_off():
            answer = self._call(self._fleet.PullObject, request)
            if answer.object_available:
                return bytes(answer.object_content)
            if not answer.object_found or time.monotonic() >= deadline:
                break
            self._wait(wait)
        raise InvalidInput("The content of a message was never uploaded.", flower_run=flower_run)

    def _compose(self, inbound: Inbound, payload: bytes, created_at: float, ttl: float) -> Any:
        """A reply with this node as its source and the corrected time, which `Message(reply_to=...)` cannot give."""
        metadata = Metadata(
            run_id=inbound.flower_run,
            message_id="",
            src_node_id=self._node_id,
            dst_node_id=SUPERLINK_NODE,
            reply_to_message_id=inbound.message_id,
            group_id="",
            created_at=created_at,
            ttl=ttl,
            message_type=inbound.message_type,
        )
        return make_message(metadata=metadata, content=RecordDict({RECORD: ConfigRecord({FIELD: payload})}))

    def _push(self, flower_run: int, message: Any) -> bool:
        """Announce the reply and upload what the SuperLink lacks, again when an upload was interrupted."""
        contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
        announcement = message_to_proto(remove_content_from_message(message))
        announcement.metadata.message_id = message.object_id
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[announcement],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=[0.0],
        )
        wanted = False
        for _attempt in range(PUSH_ATTEMPTS):
            answer = self._call(self._fleet.PushMessages, request)
            if not answer.objects_to_push:
                break
            wanted = True
            if self._push_objects(flower_run, answer, contents):
                break
        return wanted

    def _push_objects(self, flower_run: int, answer: Any, contents: dict[str, bytes]) -> bool:
        stored = [
            self._call(
                self._fleet.PushObject,
                PushObjectRequest(
                    node=self._node,
                    run_id=flower_run,
                    session_id=answer.session_id,
                    object_id=object_id,
                    object_content=contents[object_id],
                ),
            ).stored
            for object_id in answer.objects_to_push
        ]
        return all(stored)

    # One call, with its refusals and its patience

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        started = time.monotonic()
        for attempt, wait in enumerate(_back_off(), start=1):
            self._raise_if_over()
            try:
                answer = method(request)
            except httpx.HTTPStatusError as error:
                self._raise_if_refused(error)
                reason = f"HTTP {error.response.status_code}"
            except httpx.TransportError as error:
                self._raise_if_untrusted(error)
                reason = str(error) or type(error).__name__
            except ValueError:
                reason = "the answer was not Flower's"
            else:
                if attempt > 1:
                    self._on_outage(None)
                return answer
            outage = Outage(seconds=time.monotonic() - started, attempts=attempt, reason=reason)
            self._on_outage(outage)
            self._raise_if_impatient(outage)
            self._wait(wait)
        raise AssertionError("the back-off never ends")

    def _wait(self, seconds: float) -> None:
        self._closed.wait(seconds)
        self._raise_if_over()

    def _raise_if_over(self) -> None:
        if self._closed.is_set():
            raise FleetClosed("The connection to the coordinator was closed.")
        if self._failure is not None and threading.current_thread() is not self._heartbeats:
            raise self._failure

    def _raise_if_impatient(self, outage: Outage) -> None:
        if self._patience_s is not None and outage.seconds >= self._patience_s:
            raise FleetUnreachable(
                f"{self._address} has not answered for {outage.seconds:.0f} s ({outage.reason}). "
                "Check the network, the proxy and the coordinator's services.",
                address=self._address,
                reason=outage.reason,
            )

    def _raise_if_refused(self, error: httpx.HTTPStatusError) -> None:
        """Raise the refusal as what it means; return when trying again may help."""
        response = error.response
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise self._unauthorised(response) from error
        if response.status_code == httpx.codes.FORBIDDEN:
            raise RunGone("The run is over or was stopped; its work is dropped here.") from error
        if response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            raise TooLarge("The coordinator's proxy refuses the size of this message.") from error
        if response.status_code == httpx.codes.PRECONDITION_FAILED and error.request.url.path.endswith(
            "/activate-node"
        ):
            raise _ActivationRefused from error
        if response.status_code not in _RETRYABLE:
            raise IncompatibleVersion(
                f"The coordinator's Flower refuses this node's ({response.status_code}). Bring both sides to the same "
                "version of MedHive.",
                status=response.status_code,
            ) from error

    def _unauthorised(self, response: httpx.Response) -> MedHiveError:
        """A 401 is a wrong clock when the server's own time says so, else a key that is no longer registered."""
        ahead = self._seconds_ahead(response)
        if ahead is not None and not -SLOW_CLOCK_S < ahead < FAST_CLOCK_S:
            direction = "ahead of" if ahead > 0 else "behind"
            return ClockSkew(
                f"This machine's clock is {abs(ahead):.0f} s {direction} the coordinator's. Set it right (NTP), then "
                "start again.",
                seconds_ahead=ahead,
            )
        return NodeRevoked(
            "The coordinator no longer accepts this hospital's node key. Ask for a new invite and join again."
        )

    def _seconds_ahead(self, response: httpx.Response) -> float | None:
        try:
            served = parsedate_to_datetime(response.headers["date"])
        except (KeyError, ValueError):
            return None
        return float(now().timestamp()) + self._clock_offset() - served.timestamp()

    def _raise_if_untrusted(self, error: httpx.TransportError) -> None:
        """Only a certificate that fails verification is final; a TLS error of a dying server is not."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise FleetUntrusted(
                    f"{self._address} does not show the certificate that the invite announced ({cause.verify_message}). "
                    "Check the address, and EXTRA_CA_FILE when a proxy of the hospital opens TLS.",
                    address=self._address,
                ) from error
            cause = cause.__cause__ or cause.__context__


class _ActivationRefused(MedHiveError):
    """The SuperLink answers alike for a node that is still online and for one that it does not know."""

    def __init__(self) -> None:
        super().__init__("The SuperLink does not activate this node.")


def _read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"{path.name} holds no elliptic-curve key. Join again to make one.", file=path.name)
    return key


def _back_off() -> Iterator[float]:
    wait = 0.25
    while True:
        yield wait * random.uniform(0.5, 1.0)  # noqa: S311 - spreads the nodes after an outage, guards no secret
        wait = min(wait * 2, LONGEST_WAIT_S)


def _refuse_large_answer(response: httpx.Response) -> None:
    announced = response.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_ANSWER_BYTES:
        raise TooLarge(f"The coordinator answered with {announced} bytes, above {MAX_ANSWER_BYTES}.")


def _leaf_of(tree: Any) -> str:
    """The id of the one record in a message that is built as message, dictionary, record; the rest need no fetching."""
    for _level in ("dictionary", "record"):
        if len(tree.children) != 1:
            raise InvalidInput("A message does not hold exactly one record.")
        tree = tree.children[0]
    if tree.children:
        raise InvalidInput("The record of a message is nested.")
    return str(tree.object_id)


def _envelope_in(content: bytes) -> bytes:
    if len(content) > MAX_ENVELOPE_BYTES + 1024:
        raise TooLarge(f"A message of {len(content)} bytes is above the limit of {MAX_ENVELOPE_BYTES}.")
    try:
        payload = ConfigRecord.inflate(content)[FIELD]
    except (ValueError, KeyError, TypeError, DecodeError) as error:
        raise InvalidInput("A message holds no envelope.") from error
    if not isinstance(payload, bytes):
        raise InvalidInput("The envelope of a message is not bytes.")
    return payload

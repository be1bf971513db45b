"""A hospital's standing connection to the coordinator's gateway: several addresses, fresh tokens, a corrected clock.

Node loop and commands call methods named after what they want; that a token has run out, that the first address is down
or that this machine's clock is off is dealt with here, once.
"""

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel, TypeAdapter, ValidationError

from medhive.client import GatewayClient, Progress, RemoteError, Trust
from medhive.errors import (
    BadSignature,
    ClockSkew,
    MedHiveError,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    SealBroken,
    SealedOnly,
    Unreachable,
)
from medhive.introduction import new_nonce
from medhive.queues import (
    MANIFEST_HEADER,
    UPLOAD,
    QueueAnswer,
    QueueContribution,
    QueueContributionAnswer,
    QueueStatus,
    manifest_to_header,
)
from medhive.sealing import SiteSealing
from medhive.signing import Signed
from medhive.version import require_compatible
from medhive.wire import (
    API,
    ActivityReport,
    ConsentAnswer,
    CoordinatorAnswer,
    EventAnswer,
    Head,
    NewRequest,
    RequestAnswer,
    RoundAnswer,
    RunAnswer,
    SiteAnswer,
    SiteTokenProof,
    StudyAnswer,
    TokenAnswer,
    VersionAnswer,
)

# A token is renewed this long before it runs out, so that a long upload does not lose it half-way.
RENEW_BEFORE = timedelta(minutes=5)
# After so long on another address the first one is tried again.
BACK_TO_FIRST_S = 60.0
# Below this, network delay and clock error cannot be told apart, and no protocol here minds.
SMALLEST_OFFSET_S = 2.0

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
MakeSealing = Callable[[CoordinatorAnswer, Callable[[], datetime]], SiteSealing]
TokenProof = Callable[[datetime], Signed[SiteTokenProof]]


log = structlog.get_logger()


class SiteRevoked(NotAllowed):
    """The coordinator no longer works with this site: it was revoked, or it has left."""

    code = "site-revoked"


class WrongAuthority(BadSignature):
    """The server that answers is not the one that made the invite."""

    code = "wrong-authority"


class Gateway:
    """One hospital's view of the gateway. Safe to use from several threads.

    Every method raises `MedHiveError` subclasses that the gateway named, and `Unreachable` when no address answers. An
    address where nobody answers, where another coordinator does, or where this hospital is not known is passed over.
    """

    def __init__(
        self,
        addresses: tuple[str, ...],
        trust: Trust,
        prove: TokenProof,
        *,
        token: str | None = None,
        expires_at: datetime | None = None,
        clock_offset_s: float = 0.0,
        on_token: Callable[[TokenAnswer], None] = lambda _token: None,
        on_clock: Callable[[float], None] = lambda _offset: None,
        on_address: Callable[[str, bool], None] = lambda _address, _first: None,
        sealing: MakeSealing | None = None,
        sealed: bool = False,
        trust_anew: Callable[[str], tuple[Trust, bool]] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect lazily.

        Args:
            addresses: tried in order; the one that answered last is tried first the next time, and after a minute on
                another one the first again.
            prove: makes a fresh signed proof, dated as told, against which the gateway gives a token.
            clock_offset_s: seconds to add to this machine's clock, as learnt earlier.
            on_token, on_clock, on_address: told what should survive this process; of the address that answers, whether it
                is the first.
            sealing: makes what seals weights, of the coordinator's answer and the clock.
            sealed: weights pass sealed; without it only once the gateway asks for it.
            trust_anew: lets the coordinator introduce itself at an address, and says whose certificates count there and
                whether somebody else ends TLS; raises what is not to be trusted.
            monotonic: seconds that never jump.
        """
        self._met: set[str] = set()
        self._clients = [GatewayClient(address, trust, token) for address in addresses]
        self._first = self._clients[0] if self._clients else None
        self._back_at = 0.0
        self._monotonic = monotonic
        self._trust_anew = trust_anew
        self._prove = prove
        self._expires_at = expires_at if token else None
        self._offset_s = clock_offset_s
        self._on_token = on_token
        self._on_clock = on_clock
        self._on_address = on_address
        self._told: GatewayClient | None = None
        self._make_sealing = sealing
        self._sealed = sealed
        self._sealing: SiteSealing | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.close()

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def clock_offset_s(self) -> float:
        """Seconds that the coordinator's clock is ahead of this machine's."""
        return self._offset_s

    def now(self) -> datetime:
        """The present by the coordinator's clock."""
        return datetime.now(UTC) + timedelta(seconds=self._offset_s)

    # ---- exchange ------------------------------------------------------------------------------------------------

    def _each(
        self, exchange: Callable[[GatewayClient], Result], unknown: tuple[type[MedHiveError], ...] = (NotAuthenticated,)
    ) -> Result:
        """Make an exchange at the first address that answers and knows this hospital.

        Args:
            exchange: raises one of `unknown` where this hospital is not known.
            unknown: for these the next address is tried too.

        Raises:
            NotAuthenticated: the token is not known; a fresh one may help.
            MedHiveError: why the first address could not be used when none could; that the hospital is not known only where
                all that answer say so, since one that is away may know it.
        """
        unusable: MedHiveError | None = None
        strange: MedHiveError | None = None
        for client in self._in_order():
            try:
                self._meet(client)
            except MedHiveError as error:
                # Whatever is wrong with who answers there, the next address may be the coordinator.
                unusable = unusable or error
                self._pass_over(client, error)
                continue
            try:
                result = self._trusting(client, exchange)
            except Unreachable as error:
                unusable = unusable or error
                self._pass_over(client, error)
            except unknown as error:
                strange = strange or error
                self._pass_over(client, error)
            else:
                self._stay_at(client)
                return result
        if isinstance(strange, NotAuthenticated):
            raise strange
        raise unusable or strange or Unreachable("No address of the coordinator is known; set SERVER_ADDRESS.")

    def _pass_over(self, client: GatewayClient, reason: MedHiveError) -> None:
        """Leave an address for now; who answered there without knowing this hospital must introduce himself again."""
        if not isinstance(reason, Unreachable):
            self._met.discard(client.address)
        if client is self._first:
            self._back_at = self._monotonic() + BACK_TO_FIRST_S
        if len(self._clients) > 1:
            log.info("gateway.passed-over", address=client.address, reason=reason.code)

    def _meet(self, client: GatewayClient) -> None:
        """Let the coordinator introduce itself before the first exchange at an address, which may be somebody's tunnel.

        Raises:
            Unreachable: nobody answers.
            WrongAuthority: it is not this hospital's coordinator.
        """
        if self._trust_anew is None or client.address in self._met:
            return
        trust, sealed = self._trust_anew(client.address)
        if trust != client.trust:
            # Not else: what is under way keeps its connection, so that each meeting would leave one open.
            client.use_trust(trust)
        self._sealed = self._sealed or sealed
        self._met.add(client.address)

    def _trusting(self, client: GatewayClient, exchange: Callable[[GatewayClient], Result]) -> Result:
        """Make an exchange; where the certificate is unknown, let the coordinator introduce itself, and try once more."""
        try:
            return exchange(client)
        except Unreachable as error:
            if self._trust_anew is None or not _is_untrusted(error):
                raise
            try:
                trust, sealed = self._trust_anew(client.address)
            except MedHiveError:
                raise error from None
        client.use_trust(trust)
        self._sealed = self._sealed or sealed
        return exchange(client)

    def use_trust(self, trust: Trust, *, sealed: bool = False) -> None:
        """Count these certificates from now on, and seal weights where somebody else ends TLS."""
        self._sealed = self._sealed or sealed
        for client in self._clients:
            client.use_trust(trust)

    def _in_order(self) -> tuple[GatewayClient, ...]:
        """The one that answered last, then the others; now and then the first address before it."""
        with self._lock:
            if self._monotonic() < self._back_at:
                return tuple(self._clients)
            return tuple(sorted(self._clients, key=lambda client: client is not self._first))

    def _stay_at(self, client: GatewayClient) -> None:
        """Prefer the address that has answered, and say so when it is another one than before."""
        if client is self._told:
            return
        with self._lock:
            changed = client is not self._clients[0]
            self._clients.sort(key=lambda other: other is not client)
            self._told = client
        first = client is self._first
        if changed:
            log.warning("gateway.address-changed", address=client.address, first=first)
        self._on_address(client.address, first)

    @property
    def address(self) -> str:
        """The address in use: the one that answered last."""
        return self._clients[0].address if self._clients else ""

    def _call(self, exchange: Callable[[GatewayClient], Result]) -> Result:
        """Make one exchange with a valid token; a token that was revoked meanwhile is replaced once."""
        if self._expires_at is None or self._expires_at - self.now() < RENEW_BEFORE:
            self.renew()
        try:
            return self._each(exchange)
        except NotAuthenticated:
            self.renew()
            return self._each(exchange)

    def renew(self) -> None:
        """Get a fresh token by signing for it.

        Raises:
            SiteRevoked: the site was revoked or has left.
            ClockSkew: this machine's clock is off, and the gateway did not say by how much.
        """
        try:
            token = self._ask_token()
        except ClockSkew as error:
            self._learn_clock(error)
            token = self._ask_token()
        for client in self._clients:
            client.use_token(token.token)
        self._expires_at = token.expires_at
        self._on_token(token)

    def _ask_token(self) -> TokenAnswer:
        def ask(client: GatewayClient) -> TokenAnswer:
            # Signed for each address anew: a gateway behind the first may have used the proof up before it died.
            return _read(TokenAnswer, client.post(f"{API}/site-token", self._prove(self.now())))

        try:
            return self._each(ask, unknown=(NotFound, BadSignature))
        except NotAllowed as error:
            raise SiteRevoked(
                f"The coordinator no longer works with this hospital: {error} Ask the coordinator; to take part again, "
                "join with a new invite and a fresh STATE_DIR."
            ) from error

    def _learn_clock(self, error: ClockSkew) -> None:
        try:
            server_time = datetime.fromisoformat(str(error.data["server_time"]))
        except (KeyError, ValueError):
            raise error from None
        self.set_server_time(server_time)

    def set_server_time(self, server_time: datetime) -> None:
        """Correct the clock by what the coordinator's says."""
        offset = (server_time - datetime.now(UTC)).total_seconds()
        self._offset_s = offset if abs(offset) >= SMALLEST_OFFSET_S else 0.0
        self._on_clock(self._offset_s)

    # ---- reading -------------------------------------------------------------------------------------------------

    def coordinator(self) -> CoordinatorAnswer:
        """Who the coordinator is; raises as `introduction`."""
        return self.introduction()[0]

    def introduction(self) -> tuple[CoordinatorAnswer, str]:
        """Who the coordinator is, and the nonce that it was asked over; sets the clock by it.

        Raises:
            IncompatibleVersion: one side must be upgraded; the text says which.
        """

        def ask(client: GatewayClient) -> tuple[CoordinatorAnswer, str]:
            nonce = new_nonce(client.address)
            return _read(CoordinatorAnswer, client.get(f"{API}/coordinator", nonce=nonce)), nonce

        answer, nonce = self._each(ask)
        require_compatible(answer.protocol, "this hospital", "the coordinator", answer.version)
        self.set_server_time(answer.time)
        return answer, nonce

    def site(self, name: str) -> SiteAnswer:
        """The own entry."""
        return self._get(SiteAnswer, f"/sites/{name}")

    def studies(self) -> list[StudyAnswer]:
        """The studies that this site is a member of."""
        return self._get_list(StudyAnswer, "/studies")

    def study(self, name: str) -> StudyAnswer:
        """One study."""
        return self._get(StudyAnswer, f"/studies/{name}")

    def requests(self) -> list[RequestAnswer]:
        """Requests of this site and its studies, newest first as the gateway orders them."""
        return self._get_list(RequestAnswer, "/requests")

    def request(self, request_id: str) -> RequestAnswer:
        """One request."""
        return self._get(RequestAnswer, f"/requests/{request_id}")

    def runs(self, **params: Any) -> list[RunAnswer]:
        """Runs of this site's studies; parameters are `study`, `state`, `changed_after`, `limit`."""
        return self._get_list(RunAnswer, "/runs", **params)

    def run(self, run_id: str) -> RunAnswer:
        """One run."""
        return self._get(RunAnswer, f"/runs/{run_id}")

    def rounds(self, run_id: str) -> list[RoundAnswer]:
        """The rounds of a run so far."""
        return self._get_list(RoundAnswer, f"/runs/{run_id}/rounds")

    def consents(self, run_id: str) -> list[ConsentAnswer]:
        """The answers to a run that this site may see: its own."""
        return self._get_list(ConsentAnswer, f"/runs/{run_id}/consents")

    def versions(self, study: str) -> list[VersionAnswer]:
        """All versions of a study's model."""
        return self._get_list(VersionAnswer, f"/studies/{study}/versions")

    def version(self, study: str, version: int) -> VersionAnswer:
        """One version."""
        return self._get(VersionAnswer, f"/studies/{study}/versions/{version}")

    def queue(self, study: str) -> QueueAnswer:
        """A study's open queue. Raises `NotFound` when it has none."""
        return self._get(QueueAnswer, f"/studies/{study}/queue")

    def queue_status(self, study: str) -> QueueStatus:
        """How full a study's queue is."""
        return _read(QueueStatus, self._call(lambda client: client.get("/status", study=study)))

    def contributions(self, study: str) -> list[QueueContributionAnswer]:
        """What this site has sent to a study's queues, newest first."""
        return self._get_list(QueueContributionAnswer, f"/studies/{study}/queue/contributions")

    def head(self) -> Head:
        """The signed newest row of the event log."""
        return self._get(Head, "/events/head")

    def events(self, after: int, timeout_s: float) -> Iterator[EventAnswer]:
        """Rows of the live event stream, until the gateway or the time-out ends it."""
        self._call(lambda client: client.get(f"{API}/events", after=after, limit=1))
        for row in self._clients[0].events(after, timeout_s=timeout_s):
            yield _read(EventAnswer, row)

    # ---- writing -------------------------------------------------------------------------------------------------

    def send_request(self, request: NewRequest) -> RequestAnswer:
        """Ask for a run."""
        return _read(RequestAnswer, self.post("/requests", request))

    def report_activity(self, run_id: str, report: ActivityReport) -> None:
        """Say what this site does about a round right now."""
        self.post(f"/runs/{run_id}/activity", report)

    def post(self, path: str, body: Any) -> Any:
        """POST a body to a path below the API."""
        return self._call(lambda client: client.post(API + path, body))

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def _move(self, move: Callable[[GatewayClient, SiteSealing | None], int]) -> int:
        """Move bytes, sealed where somebody else ends TLS; never unsealed again once it is known that somebody does."""
        try:
            # Asked for at each address: the second one may be a tunnel where the first is none.
            return self._call(lambda client: move(client, self._ensure_sealing() if self._sealed else None))
        except SealedOnly:
            if self._sealed or self._make_sealing is None:
                raise
            self._sealed = True
            return self._move(move)
        except (SealBroken, BadSignature):
            if not self._sealed_for_another():
                raise
            return self._move(move)

    def _sealed_for_another(self) -> bool:
        """Whether the coordinator has another key by now than the one that was sealed for; the new one is taken."""
        former, self._sealing = self._sealing, None
        fresh = self._ensure_sealing()
        return former is not None and fresh is not None and former.coordinator != fresh.coordinator

    def _ensure_sealing(self) -> SiteSealing | None:
        if self._sealing is None and self._make_sealing is not None:
            self._sealing = self._make_sealing(self.coordinator(), self.now)
        return self._sealing

    def fetch_blob(
        self, run_id: str, digest: str, destination: Path, size_bytes: int, on_progress: Progress | None = None
    ) -> int:
        """Fetch a run's weights, resuming; returns the bytes that travelled.

        Raises:
            DigestMismatch: the bytes are not what was announced.
        """
        path = f"{API}/runs/{run_id}/blobs/{digest}"
        return self._download(path, destination, digest, size_bytes, on_progress)

    def send_blob(self, run_id: str, source: Path, digest: str, on_progress: Progress | None = None) -> int:
        """Send an update, resuming; returns the bytes that travelled."""
        path = f"{API}/runs/{run_id}/blobs/{digest}"
        return self._move(lambda client, sealing: client.upload(path, source, on_progress, sealing))

    def send_contribution(
        self, contribution: QueueContribution, source: Path, on_progress: Progress | None = None
    ) -> int:
        """Send a contribution to a queue, resuming at whichever address answers; returns the bytes that travelled.

        Raises:
            MedHiveError: the queue does not take it, for the reason that the text gives.
        """
        headers = {MANIFEST_HEADER: manifest_to_header(contribution)}
        return self._move(
            lambda client, sealing: client.upload(UPLOAD, source, on_progress, sealing, method="POST", headers=headers)
        )

    def send_version_zero(self, study: str, source: Path, digest: str) -> int:
        """Send a study's initial weights; returns the bytes that travelled.

        Raises:
            Conflict: it has others.
        """
        path = f"{API}/studies/{study}/queue/version-zero/blobs/{digest}"
        return self._move(lambda client, sealing: client.upload(path, source, None, sealing))

    def fetch_version(
        self,
        study: str,
        version: int,
        destination: Path,
        *,
        digest: str,
        size_bytes: int,
        on_progress: Progress | None = None,
    ) -> int:
        """Fetch a version's weights, resuming; returns the bytes that travelled.

        Raises:
            DigestMismatch: the bytes are not what was announced.
        """
        path = f"{API}/studies/{study}/versions/{version}/file"
        return self._download(path, destination, digest, size_bytes, on_progress)

    def _download(
        self, path: str, destination: Path, digest: str, size_bytes: int, on_progress: Progress | None
    ) -> int:
        return self._move(
            lambda client, sealing: client.download(
                path, destination, digest, max_bytes=size_bytes, on_progress=on_progress, sealing=sealing
            )
        )

    def _get(self, model: type[Model], path: str, **params: Any) -> Model:
        return _read(model, self._call(lambda client: client.get(API + path, **params)))

    def _get_list(self, model: type[Model], path: str, **params: Any) -> list[Model]:
        answer = self._call(lambda client: client.get(API + path, **params))
        try:
            return TypeAdapter(list[model]).validate_python(answer)  # type: ignore[valid-type]
        except ValidationError as error:
            raise _unreadable(path, error) from error


def _is_untrusted(error: BaseException) -> bool:
    """Whether a certificate was the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _read(model: type[Model], answer: Any) -> Model:
    try:
        return model.model_validate(answer)
    except ValidationError as error:
        raise _unreadable(model.__name__, error) from error


def _unreadable(what: str, error: ValidationError) -> RemoteError:
    count = error.error_count()
    return RemoteError(
        f"The coordinator's answer ({what}) does not have the form that this version knows ({count} fields differ); "
        "upgrade this hospital.",
        what=what,
    )

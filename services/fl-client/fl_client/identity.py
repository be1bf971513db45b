"""Who this hospital is: its keys, made here and never sent, and its one-time joining of a coordinator.

The invite's token carries the coordinator's Ed25519 key. Nothing else is trusted at the start: the coordinator introduces
itself over an unverified connection, its signature over a fresh nonce must fit that key, and only a connection that the
introduction vouches for is used. The invite is a key too: it signs the join and never travels, so that whoever may stand in
between cannot join in the hospital's place. From then on the consent key proves who is speaking, for ever.

Joining again with the same state folder continues as the same site: nothing is made anew, no invite is used up.
"""

import base64
import secrets
import ssl
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from fl_client.gateway import Gateway, WrongAuthority
from fl_client.store import Store
from medhive import __version__
from medhive.client import GatewayClient, Trust, introduce
from medhive.errors import (
    BadSignature,
    ClockSkew,
    Conflict,
    IncompatibleVersion,
    InvalidInput,
    MedHiveError,
    NotFound,
    Unreachable,
)
from medhive.introduction import Introduced, introduced, new_nonce, present_key
from medhive.sealing import SiteSealing, checked_sealing_key
from medhive.signing import Signed, SigningKey, VerifyKey, canonical_json, sign, write_secret
from medhive.spec import explain
from medhive.version import PROTOCOL, require_compatible
from medhive.wire import (
    API,
    AddressTrust,
    CoordinatorAnswer,
    Join,
    JoinAnswer,
    JoinProof,
    LeaveBody,
    SiteTokenProof,
    TokenAnswer,
)

TOKEN_PREFIX = "mh2"  # noqa: S105 - the form's name, not a secret
TOKEN_PARTS = 4
# The aggregator takes a new key within seconds, and what it had asked with the former one is under way for minutes at most.
FORMER_KEY_GRACE = timedelta(minutes=10)
SECRET_BYTES = 32
IDENTITY, TOKEN, CLOCK, DETOUR = "identity", "token", "clock_offset_s", "detour"


class NotJoined(NotFound):
    """This state folder belongs to no site yet."""

    code = "not-joined"


class AlreadyJoined(Conflict):
    """This state folder belongs to another site already."""

    code = "already-joined"


@dataclass(frozen=True)
class Keys:
    """The hospital's own secrets, as files of mode 0600."""

    folder: Path

    @property
    def node_file(self) -> Path:
        """NIST P-384 key, PEM: Flower's node authentication."""
        return self.folder / "node.pem"

    @property
    def consent_file(self) -> Path:
        """Ed25519 key, PEM: everything that the hospital signs."""
        return self.folder / "consent.pem"

    @property
    def secret_file(self) -> Path:
        """Key of the HMACs that sort examples into parts and fingerprint the data."""
        return self.folder / "data.secret"

    def make(self) -> None:
        """Make what is missing; what is there is never touched."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.node_file.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            pem = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_secret(self.node_file, pem)
        if not self.consent_file.exists():
            SigningKey.generate().save(self.consent_file)
        if not self.secret_file.exists():
            write_secret(self.secret_file, secrets.token_bytes(SECRET_BYTES))

    def consent_key(self) -> SigningKey:
        """The key that signs.

        Raises:
            InvalidInput: it is missing or damaged.
        """
        return SigningKey.load(self.consent_file)

    def node_key(self) -> ec.EllipticCurvePrivateKey:
        """The key that Flower knows.

        Raises:
            InvalidInput: it is missing or damaged.
        """
        try:
            key = serialization.load_pem_private_key(self.node_file.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"Cannot read the node key from {self.node_file}: {error}.") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidInput(f"{self.node_file} holds another kind of key than NIST P-384.")
        return key


@dataclass(frozen=True)
class Invite:
    """A JOIN_TOKEN, taken apart."""

    key: SigningKey
    coordinator_key: VerifyKey
    address_trust: AddressTrust

    @classmethod
    def parse(cls, token: str) -> Self:
        """Read `mh2.<seed of the invite's key>.<coordinator's public key>.<pinned, public or tunnel>`.

        Raises:
            InvalidInput: it is no invite; the text does not repeat it.
        """
        parts = token.strip().split(".")
        problem = "The join token is not one of MedHive's; copy the whole line that `medhive-admin invite` printed."
        if len(parts) != TOKEN_PARTS or parts[0] != TOKEN_PREFIX:
            raise InvalidInput(problem)
        try:
            seed, raw = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in parts[1:3])
            coordinator_key = VerifyKey.from_text(base64.b64encode(raw).decode())
            return cls(SigningKey.from_seed(seed), coordinator_key, AddressTrust(parts[3]))
        except (ValueError, InvalidInput) as error:
            raise InvalidInput(problem) from error


@dataclass(frozen=True)
class Identity:
    """What a site knows of itself and its coordinator after joining."""

    site: str
    addresses: tuple[str, ...]
    fleet_address: str
    coordinator_name: str
    coordinator_key: str
    ca_pem: str
    joined_at: str
    left: bool = False
    address_trust: str = AddressTrust.PINNED
    evaluates_only: bool = False
    # The coordinator's keys before the present one, the newest last, and when the present one was followed.
    former_keys: tuple[str, ...] = ()
    key_since: str = ""

    @property
    def verify_key(self) -> VerifyKey:
        """The coordinator's key: tasks, manifests and heads are signed with it."""
        return VerifyKey.from_text(self.coordinator_key)

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Whom an own statement may name: the coordinator by its present key, first, or by one that it had before."""
        former = (VerifyKey.from_text(key).key_id for key in reversed(self.former_keys))
        return (self.verify_key.key_id, *former)

    def task_key(self, key_id: str, now: datetime) -> VerifyKey:
        """The key by which a task is judged that names this one.

        The key before the present one counts for `FORMER_KEY_GRACE` more: the aggregator gets the new one a moment later
        than the hospitals, and must not lose a round by that.
        """
        if self.former_keys and now - datetime.fromisoformat(self.key_since) < FORMER_KEY_GRACE:
            former = VerifyKey.from_text(self.former_keys[-1])
            if former.key_id == key_id:
                return former
        return self.verify_key

    @property
    def fleet_url(self) -> str:
        """Where Flower's fleet API answers."""
        return self.fleet_address if "://" in self.fleet_address else f"https://{self.fleet_address}"

    def trust(self, extra_ca_file: Path | None = None) -> Trust:
        """Whose certificates count: the coordinator's own, and public ones where it says that it shows one."""
        public = self.address_trust != AddressTrust.PINNED
        return Trust(ca_pem=self.ca_pem, extra_ca_file=extra_ca_file, system=public)

    @property
    def way(self) -> tuple[object, ...]:
        """How the coordinator is reached and trusted; who opens a connection by it opens a new one when it changes."""
        return (self.addresses, self.fleet_address, self.ca_pem, self.address_trust)

    def tls(self, extra_ca_file: Path | None = None) -> ssl.SSLContext:
        """The TLS context for the fleet address."""
        return self.trust(extra_ca_file).context()

    def after(self, found: Introduced) -> "Identity":
        """The same site, as the coordinator has now introduced itself."""
        return replace(
            self,
            former_keys=(*self.former_keys, *(key.text for key in found.former)),
            key_since=datetime.now(UTC).isoformat() if found.former else self.key_since,
            fleet_address=found.fleet_address,
            coordinator_key=found.key.text,
            ca_pem="".join(found.authorities),
            address_trust=found.address_trust,
        )

    def save(self, store: Store) -> None:
        """Keep it."""
        store.set_fact(IDENTITY, asdict(self))

    @classmethod
    def load(cls, store: Store) -> Self:
        """Read what `save` kept.

        Raises:
            NotJoined: nothing was kept yet.
        """
        kept = store.fact(IDENTITY)
        if kept is None:
            raise NotJoined("This hospital has not joined yet; run `medhive-site join` with the coordinator's invite.")
        lists = {name: tuple(kept.get(name, ())) for name in ("addresses", "former_keys")}
        return cls(**{**kept, **lists})


@dataclass(frozen=True)
class JoinOutcome:
    """`fresh` is False when this state folder was joined before and nothing was done."""

    identity: Identity
    fresh: bool
    studies: tuple[str, ...]


def connect(identity: Identity, keys: Keys, store: Store, extra_ca_file: Path | None = None) -> Gateway:
    """Open the site's connection to the gateway, with the kept token and clock."""
    kept = store.fact(TOKEN)
    token = TokenAnswer.model_validate(kept) if kept else None
    return Gateway(
        identity.addresses,
        identity.trust(extra_ca_file),
        token_prover(identity.site, lambda: Identity.load(store).verify_key.key_id, keys),
        token=token.token if token else None,
        expires_at=token.expires_at if token else None,
        clock_offset_s=store.fact(CLOCK) or 0.0,
        on_token=lambda fresh: store.set_fact(TOKEN, fresh.model_dump(mode="json")),
        on_clock=lambda offset: _keep_clock(store, offset),
        on_address=lambda address, first: _keep_detour(store, address, first),
        sealing=sealing_maker(lambda: Identity.load(store), keys),
        sealed=identity.address_trust == AddressTrust.TUNNEL,
        trust_anew=lambda address: _trust_anew(store, address, extra_ca_file),
    )


def sealing_maker(
    identity: Callable[[], Identity], keys: Keys
) -> Callable[[CoordinatorAnswer, Callable[[], datetime]], SiteSealing]:
    """Return the function that makes what seals weights for this coordinator, and opens what it has sealed."""

    def make(answer: CoordinatorAnswer, now: Callable[[], datetime]) -> SiteSealing:
        known = identity()
        coordinator = present_key(known.verify_key, answer.successions)
        key = checked_sealing_key(answer.sealing_key, coordinator)
        return SiteSealing(known.site, keys.consent_key(), coordinator, key, now)

    return make


def _trust_anew(store: Store, address: str, extra_ca_file: Path | None) -> tuple[Trust, bool]:
    """What to trust at an address, as the coordinator says there once it has proved its key; and whether it is a tunnel."""
    kept = Identity.load(store)
    identity = kept.after(discover((address,), kept.verify_key))
    if identity != kept:
        identity.save(store)
    return identity.trust(extra_ca_file), identity.address_trust == AddressTrust.TUNNEL


def _keep_clock(store: Store, offset_s: float) -> None:
    if (store.fact(CLOCK) or 0.0) != offset_s:
        store.set_fact(CLOCK, offset_s)


def _keep_detour(store: Store, address: str, first: bool) -> None:
    """Keep at which other address the coordinator is reached, and since when the first one has been left."""
    kept = store.fact(DETOUR)
    if first and kept:
        store.set_fact(DETOUR, None)
    elif not first and (not kept or kept["address"] != address):
        since = kept["since"] if kept else datetime.now(UTC).isoformat()
        store.set_fact(DETOUR, {"address": address, "since": since})


def detour_since(store: Store, address: str) -> datetime | None:
    """Since when the coordinator is reached at this address because the first one could not be used; None at the first."""
    kept = store.fact(DETOUR)
    return datetime.fromisoformat(kept["since"]) if kept and kept["address"] == address else None


def token_prover(
    site: str, coordinator_key_id: Callable[[], str], keys: Keys
) -> Callable[[datetime], Signed[SiteTokenProof]]:
    """Return the function that signs for a fresh token, dated as it is told."""

    def prove(now: datetime) -> Signed[SiteTokenProof]:
        proof = SiteTokenProof(
            site=site, coordinator_key_id=coordinator_key_id(), issued_at=now, nonce=secrets.token_hex(16)
        )
        return sign(proof, keys.consent_key())

    return prove


def join(
    addresses: tuple[str, ...],
    token: str,
    client_id: str,
    *,
    keys: Keys,
    store: Store,
    extra_ca_file: Path | None = None,
) -> JoinOutcome:
    """Join a coordinator with its invite, or continue as the site that this state folder already is.

    Raises:
        AlreadyJoined: the state folder is another site's.
        InvalidInput: token, name or address are no such thing.
        WrongAuthority: another server than the inviting one answers.
        IncompatibleVersion: one side must be upgraded.
        MedHiveError: the gateway's refusal (expired, used or forged invite, name taken), by cause.
    """
    known = _known(store, client_id)
    if known is not None:
        return _continue(known, keys, store, extra_ca_file)
    if not addresses:
        raise InvalidInput("The coordinator's address is missing; set SERVER_ADDRESS.")
    invite = Invite.parse(token)
    keys.make()
    address, found = _found(addresses, invite.coordinator_key)
    with GatewayClient(address, trust_in(found, extra_ca_file)) as client:
        answer = _ask_to_join(client, found.key, invite, client_id, keys)
    identity = _identity_from(answer, found, addresses)
    _keep_clock(store, (answer.coordinator.time - datetime.now(UTC)).total_seconds())
    store.set_fact(TOKEN, answer.token.model_dump(mode="json"))
    identity.save(store)
    return JoinOutcome(identity, True, _own_studies(identity, keys, store, extra_ca_file))


def leave(identity: Identity, keys: Keys, gateway: Gateway, store: Store, reason: str) -> None:
    """Leave the coordinator for good; keys, models and database stay on disk.

    Raises:
        MedHiveError: the gateway's refusal.
    """
    to = identity.verify_key.key_id
    body = LeaveBody(site=identity.site, coordinator_key_id=to, reason=reason, issued_at=gateway.now())
    gateway.post(f"/sites/{identity.site}/leave", sign(body, keys.consent_key()))
    store.set_fact(IDENTITY, {**asdict(identity), "left": True})
    store.set_fact(TOKEN, None)


def _known(store: Store, client_id: str) -> Identity | None:
    try:
        identity = Identity.load(store)
    except NotJoined:
        return None
    if client_id and client_id != identity.site:
        raise AlreadyJoined(
            f"This state folder belongs to the site {identity.site}; use another STATE_DIR for {client_id}.",
            site=identity.site,
        )
    if identity.left:
        raise AlreadyJoined(
            f"The site {identity.site} has left; use a fresh STATE_DIR and a new invite to join again.",
            site=identity.site,
        )
    return identity


def _continue(identity: Identity, keys: Keys, store: Store, extra_ca_file: Path | None) -> JoinOutcome:
    return JoinOutcome(identity, False, _own_studies(identity, keys, store, extra_ca_file))


def _own_studies(identity: Identity, keys: Keys, store: Store, extra_ca_file: Path | None) -> tuple[str, ...]:
    with connect(identity, keys, store, extra_ca_file) as gateway:
        return tuple(study.name for study in gateway.studies())


def discover(addresses: tuple[str, ...], pinned: VerifyKey) -> Introduced:
    """Let the coordinator with this key introduce itself at the first address where it answers.

    Raises the reason of the first address when it answers at none:
        WrongAuthority: somebody else answers.
        InvalidInput: who answers is no coordinator.
        IncompatibleVersion: one side must be upgraded.
        Unreachable: nobody answers.
    """
    return _found(addresses, pinned)[1]


def _found(addresses: tuple[str, ...], pinned: VerifyKey) -> tuple[str, Introduced]:
    """The first address where this coordinator answers, and its introduction there; raises as `discover`."""
    problem: MedHiveError | None = None
    for address in addresses:
        try:
            return address, _introduced_at(address, pinned)
        except (Unreachable, InvalidInput, WrongAuthority, IncompatibleVersion) as error:
            problem = problem or error
    raise problem or Unreachable("No address of the coordinator is known; set SERVER_ADDRESS.")


def _introduced_at(address: str, pinned: VerifyKey) -> Introduced:
    nonce = new_nonce(address)
    answer = introduce(address, nonce)
    require_compatible(answer.protocol, "this hospital", "the coordinator", answer.version)
    return checked(answer, pinned, nonce)


def checked(answer: CoordinatorAnswer, pinned: VerifyKey, nonce: str) -> Introduced:
    """What an answer says, if it is the one of the coordinator with this key.

    Raises:
        WrongAuthority: it is somebody else's.
    """
    try:
        return introduced(answer, pinned, nonce)
    except (BadSignature, InvalidInput) as error:
        raise WrongAuthority(
            "The server that answers is not the one that made this invite; check SERVER_ADDRESS, and ask the "
            "coordinator for a new invite if it was set up anew."
        ) from error


def trust_in(known: Introduced, extra_ca_file: Path | None) -> Trust:
    """Whose certificates count: the coordinator's own, and public ones where it says that it shows one."""
    public = known.address_trust is not AddressTrust.PINNED
    return Trust(ca_pem="".join(known.authorities), extra_ca_file=extra_ca_file, system=public)


def _ask_to_join(
    client: GatewayClient, coordinator_key: VerifyKey, invite: Invite, client_id: str, keys: Keys
) -> JoinAnswer:
    """The same join may be sent again when its answer was lost: the gateway knows the keys by then."""
    offset = CoordinatorAnswer.model_validate(client.get(f"{API}/coordinator")).time - datetime.now(UTC)
    body = _join_body(coordinator_key, invite, client_id, keys, datetime.now(UTC) + offset)
    return JoinAnswer.model_validate(client.post(f"{API}/join", body))


def _join_body(coordinator_key: VerifyKey, invite: Invite, client_id: str, keys: Keys, now: datetime) -> Join:
    node_key, consent_key = keys.node_key(), keys.consent_key()
    public_pem = node_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    try:
        proof = JoinProof(
            site=client_id,
            invite_public_key=invite.key.public.text,
            coordinator_key_id=coordinator_key.key_id,
            node_public_key=public_pem.decode(),
            consent_public_key=consent_key.public.text,
            issued_at=now,
        )
    except ValidationError as error:
        raise InvalidInput(f"CLIENT_ID cannot be a site's name: {explain(error)}.") from error
    signature = node_key.sign(node_signed_bytes(proof), ec.ECDSA(hashes.SHA384()))
    return Join(
        protocol=PROTOCOL,
        software=__version__,
        invite_signature=invite.key.sign(proof.INVITE_DOMAIN, proof.body()),
        proof=sign(proof, consent_key),
        node_signature=base64.b64encode(signature).decode(),
    )


def node_signed_bytes(proof: JoinProof) -> bytes:
    """The bytes under a join that the node key signs: the same that the consent key signs."""
    return proof.DOMAIN.encode() + b"\0" + canonical_json(proof.body())


def _identity_from(answer: JoinAnswer, found: Introduced, addresses: tuple[str, ...]) -> Identity:
    """Whom to trust from now on comes from the introduction alone, which was signed."""
    if abs((answer.coordinator.time - datetime.now(UTC)).days) > 365:
        raise ClockSkew("This machine's clock is more than a year off the coordinator's; set it, then join again.")
    return Identity(
        site=answer.site,
        addresses=addresses,
        fleet_address=found.fleet_address,
        coordinator_name=answer.coordinator.name,
        coordinator_key=found.key.text,
        ca_pem="".join(found.authorities),
        joined_at=datetime.now(UTC).isoformat(),
        address_trust=found.address_trust,
        evaluates_only=answer.evaluates_only,
    )

"""The gateway's state folder: what is made at the first start, and who may make it.

The folder holds keys, certificates, the aggregator's token, the blobs and, without another setting, the database. Several
gateway processes may share it (beside one PostgreSQL); so only the making is under a lock, never the serving.
"""

import contextlib
import datetime
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field

from api_gateway import signing_key
from api_gateway.settings import PREFIX, Settings
from api_gateway.tls import BUNDLE, Authority, load_certificate
from medhive.errors import InvalidInput
from medhive.introduction import known_key_ids
from medhive.sealing import SealingKey
from medhive.signing import SigningKey, write_secret
from medhive.wire import AddressTrust, Succession

MAX_TUNNEL_BYTES = 4096  # an address
TOKEN_BYTES = 32  # of every random secret: beyond guessing

# Certificates, and the name by which each one's service is reached inside a deployment; besides localhost.
LEAVES = {"server": "gateway", "proxy": "proxy", "superlink": "fl-server", "mlflow": "mlflow"}
PUBLIC_LEAVES = ("server", "proxy")  # the others are reached from inside alone


class Tunnel(BaseModel):
    """What the tunnel service says of itself: the address that hospitals use, and whether TLS ends at somebody else's."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    address: str = Field(pattern=r"^https://[a-z0-9.-]{1,253}(:[0-9]{1,5})?$")
    ends_tls: bool

    @property
    def host(self) -> str:
        """Its host name."""
        return self.address.removeprefix("https://").partition(":")[0]

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        rest = self.address.removeprefix("https://")
        return rest if ":" in rest else f"{rest}:443"


def read_tunnel(settings: Settings) -> Tunnel | None:
    """The tunnel that is open now; None without one."""
    if settings.tunnel_file is None:
        return None
    try:
        with settings.tunnel_file.open("rb") as file:
            return Tunnel.model_validate_json(file.read(MAX_TUNNEL_BYTES))
    except (OSError, ValueError):  # no tunnel service, none open, or nothing that it wrote
        return None


@dataclass(frozen=True)
class State:
    """What the state folder holds, loaded."""

    folder: Path
    authority: Authority
    coordinator_key: SigningKey
    server_token_sha256: str
    sealing_key: SealingKey
    successions: tuple[Succession, ...] = ()
    # Who ends TLS at the coordinator's own address; at a tunnel's it may be somebody else (`Gateway.address_trust`).
    address_trust: AddressTrust = AddressTrust.PINNED
    tunnel: Tunnel | None = None
    # What the files of CA and key held, by which a step that another process has taken is seen.
    read: tuple[bytes, bytes] = (b"", b"")
    # The certificates that were made just now.
    made: tuple[str, ...] = ()

    def with_present_key(self) -> "State":
        """The same with the coordinator's key as it is in the folder now; itself when that has not changed.

        Raises:
            InvalidInput: a file cannot be read.
        """
        found = signing_key.present(self.folder / "secrets", self.read[1])
        if found is None:
            return self
        key, successions, read = found
        return replace(self, coordinator_key=key, successions=successions, read=(self.read[0], read))

    @property
    def authorities(self) -> tuple[str, ...]:
        """The CAs to trust here, in PEM; the first one issues."""
        return self.authority.pems

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of the coordinator's keys, the present one first."""
        return known_key_ids(self.coordinator_key.public, self.successions)

    @property
    def certificate_file(self) -> Path:
        """The gateway's own certificate."""
        return self.folder / "tls" / "server.crt"

    @property
    def key_file(self) -> Path:
        """The gateway's own key."""
        return self.folder / "tls" / "server.key"

    @property
    def blobs(self) -> Path:
        """The blob store's folder."""
        return self.folder / "blobs"


@contextlib.contextmanager
def locked(settings: Settings) -> Iterator[Path]:
    """Make the state folder (mode 0700) and hold its lock: one process at a time makes keys and migrates.

    Raises:
        InvalidInput: the folder cannot be made or written.
    """
    folder = settings.state_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        descriptor = os.open(folder / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InvalidInput(
            f"MEDHIVE_GATEWAY_STATE_DIR names {folder}, which cannot be made or written: {error}."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


def open_state(settings: Settings, folder: Path, former: State | None = None) -> State:
    """Load the folder's content, making whatever is missing; call under `locked`.

    While an own certificate cannot be read, `former` says whether hospitals trust public roots for it; nothing else waits.

    Raises:
        InvalidInput: a file cannot be read, an own certificate without a former state among them.
    """
    tls = folder / "tls"
    tls.mkdir(mode=0o700, exist_ok=True)
    (folder / "blobs").mkdir(mode=0o700, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    authority = open_authority(settings, folder, now)
    key, successions = signing_key.open_key(folder / "secrets")
    validity = datetime.timedelta(days=settings.certificate_days)
    made = []
    tunnel = read_tunnel(settings)
    # Through a tunnel that passes TLS on, hospitals see the proxy's certificate under the tunnel's name.
    passed_on = (tunnel.host,) if tunnel and not tunnel.ends_tls else ()
    for leaf, own_name in LEAVES.items():
        names = (own_name, *(settings.public_names if leaf in PUBLIC_LEAVES else ()))
        names += passed_on if leaf == "proxy" else ()
        if authority.ensure_leaf(tls, leaf, names, now, validity):
            made.append(leaf)
    token = _ensure_secret(folder / "secrets" / "server-token")
    return State(
        folder,
        authority,
        key,
        hashlib.sha256(token.encode()).hexdigest(),
        SealingKey.load_or_make(folder / "secrets" / "sealing.key"),
        successions=successions,
        address_trust=_address_trust(settings, authority, former),
        tunnel=tunnel,
        read=read_keys(folder),
        made=tuple(made),
    )


def open_authority(settings: Settings, folder: Path, now: datetime.datetime) -> Authority:
    """The CA, after every step that is due in its life; call under `locked`."""
    tls, name = folder / "tls", settings.coordinator_name
    authority = Authority.open(tls, name, settings.ca_validity)
    while step := authority.due(now, settings.ca_overlap):
        authority = authority.take(step, tls, name, now, settings.ca_validity)
    return authority


def read_keys(folder: Path) -> tuple[bytes, bytes]:
    """What tells that CA or coordinator's key have changed: public files alone."""
    bundle = folder / "tls" / BUNDLE
    return bundle.read_bytes() if bundle.exists() else b"", signing_key.reading(folder / "secrets")


def _address_trust(settings: Settings, authority: Authority, former: State | None) -> AddressTrust:
    try:
        own = own_certificate(settings)
    except InvalidInput:
        if former is None:
            raise
        return former.address_trust
    return AddressTrust.PINNED if own is None or authority.issued(own) else AddressTrust.PUBLIC


def own_certificate(settings: Settings) -> x509.Certificate | None:
    """The certificate that the proxy shows, where it is not MedHive's.

    Raises:
        InvalidInput: the file that should hold it does not; the text names the variable.
    """
    if settings.own_cert_file is None:
        return None
    try:
        return load_certificate(settings.own_cert_file)
    except InvalidInput as error:
        raise InvalidInput(f"{PREFIX}OWN_CERT_FILE: {error}") from error


def _ensure_secret(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_secret(path, secrets.token_urlsafe(TOKEN_BYTES).encode())
    return path.read_text().strip()

"""Who is logged in where: one small file, readable by its owner alone, with the coordinator's CA and a token.

The coordinator signs with its own CA, so trust is fixed at the login: by the CA's file, or by its fingerprint, which a
person compares. Its signing key is kept too: `audit verify` then notices one that the former key has not named.
"""

import hashlib
import json
import os
import ssl
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from medhive.client import GatewayClient, Trust
from medhive.errors import InvalidInput, NotAuthenticated
from medhive.follow import ClientSource, Source

CONFIG_VARIABLE: Final = "MEDHIVE_ADMIN_CONFIG"
DEFAULT_CONFIG: Final = Path("~/.config/medhive/admin.json")
MAX_CONFIG_BYTES: Final = 256 * 1024  # a certificate and a token; a larger file is not ours


@dataclass(frozen=True)
class Session:
    """A login that is remembered."""

    address: str
    ca_pem: str
    coordinator_key: str
    name: str
    role: str
    token: str
    expires_at: str
    public: bool = False

    def open(self) -> GatewayClient:
        """Make a connection to the coordinator in this person's name."""
        return GatewayClient(self.address, Trust(ca_pem=self.ca_pem, system=self.public), token=self.token)

    def save(self) -> Path:
        """Write the session file whole or not at all, mode 0600; returns its path."""
        path = config_path()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # made with mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        Path(temporary).replace(path)
        return path


def config_path() -> Path:
    """Where the session is kept."""
    return Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG).expanduser()


def load_session() -> Session:
    """Read the session.

    Raises:
        NotAuthenticated: nobody has logged in here.
        InvalidInput: the file is damaged.
    """
    path = config_path()
    try:
        with path.open("rb") as file:
            return Session(**json.loads(file.read(MAX_CONFIG_BYTES)))
    except FileNotFoundError as error:
        raise NotAuthenticated(f"Nobody is logged in ({path} does not exist).") from error
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"{path} cannot be read as a login ({error}); delete it and log in again.") from error


def connect() -> GatewayClient:
    """A connection in the name of whoever is logged in."""
    return load_session().open()


def open_source() -> Source:
    """A connection of its own for a follower's event stream."""
    return ClientSource(connect())


def fingerprint(ca_pem: str) -> str:
    """SHA-256 of the CA certificate's DER form, in hexadecimal.

    Raises:
        InvalidInput: it is no certificate.
    """
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca_pem.strip())).hexdigest()
    except ValueError as error:
        raise InvalidInput("The CA certificate is not in PEM form.") from error


def confirmed(ca_pem: str, expected: str) -> None:
    """Refuse a CA whose fingerprint is another one than expected.

    Raises:
        InvalidInput: they differ.
    """
    wanted = expected.lower().replace(":", "").replace(" ", "")
    found = fingerprint(ca_pem)
    if found != wanted:
        raise InvalidInput(
            f"The coordinator's CA has fingerprint {found}, not {wanted}: this is another server, or somebody is in between."
        )


def full_address(text: str) -> str:
    """`https://HOST:PORT` out of what a person types.

    Raises:
        InvalidInput: it is http, or nothing.
    """
    address = text.strip().rstrip("/")
    if "://" not in address:
        address = f"https://{address}"
    if not address.startswith("https://") or len(address) <= len("https://"):
        raise InvalidInput(f"{text!r} is not an https address, such as https://coordinator.example:8443.")
    return address

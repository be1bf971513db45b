"""Ed25519 signatures over canonical JSON, each under a domain tag.

Everything that one institution must be able to hold against another (tasks, contributions, consents, decisions, heads of
the event log) is signed with the functions of this module, and with nothing else. The signed bytes are the domain tag, a
zero byte, and the body in the JSON Canonicalization Scheme (RFC 8785); the tag keeps a signature of one kind from being
shown as one of another kind. Keys are Ed25519 (RFC 8032).
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field

from medhive.errors import BadSignature, InvalidInput
from medhive.leftovers import sync_folder, temporary_beside


def canonical_json(body: Any) -> bytes:
    """Return the one byte string of a JSON value (RFC 8785).

    Raises:
        InvalidInput: the value holds what JSON cannot carry exactly (NaN, infinities, integers above 2**53).
    """
    try:
        return bytes(rfc8785.dumps(body))
    except (rfc8785.CanonicalizationError, ValueError) as error:
        raise InvalidInput(f"The value cannot be written as canonical JSON: {error}.") from error


def digest_of(body: Any) -> str:
    """Return the SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(body)).hexdigest()


def _signed_bytes(domain: str, body: Mapping[str, Any]) -> bytes:
    return domain.encode() + b"\0" + canonical_json(dict(body))


@dataclass(frozen=True)
class VerifyKey:
    """The public half of an Ed25519 key, as 32 raw bytes."""

    raw: bytes

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read the base64 form.

        Raises:
            InvalidInput: it is not 32 bytes of base64.
        """
        try:
            raw = base64.b64decode(text, validate=True)
            Ed25519PublicKey.from_public_bytes(raw)
        except ValueError as error:
            raise InvalidInput("The public key is not an Ed25519 key in base64.") from error
        return cls(raw)

    @property
    def text(self) -> str:
        """The base64 form."""
        return base64.b64encode(self.raw).decode()

    @property
    def key_id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the raw key."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def verify(self, domain: str, body: Mapping[str, Any], signature: str) -> None:
        """Check a signature that `SigningKey.sign` made.

        Raises:
            BadSignature: another key, another body, another domain, or no signature at all.
        """
        try:
            raw = base64.b64decode(signature, validate=True)
            Ed25519PublicKey.from_public_bytes(self.raw).verify(raw, _signed_bytes(domain, body))
        except (InvalidSignature, ValueError) as error:
            raise BadSignature(
                f"The signature of this {domain} does not fit key {self.key_id}; it was made with another key or over "
                "other content.",
                domain=domain,
                key_id=self.key_id,
            ) from error


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 key pair that never leaves the machine that made it."""

    private: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Self:
        """Make a new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The key that 32 random bytes are (RFC 8032, 5.1.5).

        Raises:
            InvalidInput: it is another number of bytes.
        """
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(seed))
        except ValueError as error:
            raise InvalidInput("The seed of an Ed25519 key has 32 bytes.") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a key that `save` wrote.

        Raises:
            InvalidInput: the file is missing or holds no Ed25519 private key.
        """
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"Cannot read a signing key from {path}: {error}.") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise InvalidInput(f"{path} holds another kind of key than Ed25519.")
        return cls(private)

    def save(self, path: Path) -> None:
        """Write the key as PKCS#8 PEM, readable by the owner alone.

        Raises:
            FileExistsError: there is a file already; a key is never overwritten.
        """
        pem = self.private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_secret(path, pem)

    @property
    def public(self) -> VerifyKey:
        """The public half."""
        return VerifyKey(self.private.public_key().public_bytes_raw())

    def sign(self, domain: str, body: Mapping[str, Any]) -> str:
        """Return the base64 signature of the body under the domain tag."""
        return base64.b64encode(self.private.sign(_signed_bytes(domain, body))).decode()


def write_secret(path: Path, content: bytes) -> None:
    """Create a file of mode 0600, durable, and whole or not at all: a process killed on the way leaves no half a key.

    Raises:
        FileExistsError: there is a file already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary_beside(path)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, never takes another file's place.
        os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


class SignedBody(BaseModel):
    """Base of every statement that is signed; `DOMAIN` is its tag and carries the format's version."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    DOMAIN: ClassVar[str]

    def body(self) -> dict[str, Any]:
        """The JSON object that is signed."""
        return self.model_dump(mode="json")


Body = TypeVar("Body", bound=SignedBody)


class Signed(BaseModel, Generic[Body]):
    """A statement with the key and the signature that vouch for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    body: Body
    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    signature: str = Field(max_length=128)

    def verify(self, key: VerifyKey) -> Body:
        """Return the body once its signature is checked.

        Raises:
            BadSignature: it does not fit this key.
        """
        if self.key_id != key.key_id:
            raise BadSignature(
                f"This {self.body.DOMAIN} names key {self.key_id}, but key {key.key_id} is the one on record.",
                domain=self.body.DOMAIN,
                key_id=self.key_id,
            )
        key.verify(self.body.DOMAIN, self.body.body(), self.signature)
        return self.body


def sign(body: Body, key: SigningKey) -> Signed[Body]:
    """Sign a statement."""
    # The concrete class, not the bare generic, so that the container can be read back with its body's own fields.
    container: type[Signed[Body]] = Signed.__class_getitem__(type(body))  # type: ignore[assignment]
    return container(body=body, key_id=key.public.key_id, signature=key.sign(body.DOMAIN, body.body()))

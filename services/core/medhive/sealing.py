"""Weights that only their reader can open, for a way on which somebody else ends TLS.

One transfer (the answer to a GET, or one part of a PUT) is one sealed stream with a key of its own. That key is sealed for
the reader with HPKE (RFC 9180: DHKEM X25519, HKDF-SHA256, ChaCha20-Poly1305), whose `info` is the transfer's context: who,
whose coordinator, which path, which bytes. The sender signs context and sealed key (Ed25519), since HPKE alone says nothing
of its sender. The bytes follow in chunks under ChaCha20-Poly1305 with the STREAM construction (Hoang, Reyhanitabar,
Rogaway, Vizár 2015): the nonce counts the chunks and marks the last one, so that none can be changed, cut off, left out,
moved or repeated.

A transfer that was cut is continued by another one, with another key, from the last whole chunk: no chunk has two keys.
"""

import base64
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Self, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from pydantic import AwareDatetime, Field, ValidationError

from medhive.errors import IncompatibleVersion, InvalidInput, SealBroken
from medhive.signing import Signed, SignedBody, SigningKey, VerifyKey, canonical_json, sign, write_secret
from medhive.spec import Frozen, Name

CHUNK_BYTES: Final = 1024 * 1024
"""What is sealed at a time and lost at most when a connection breaks: large, since each costs a hop between threads."""
TAG_BYTES: Final = 16
KEY_BYTES: Final = 32
MAX_HEADER: Final = 4096  # of a signed statement in base64: about a third of it is used
WANTED: Final = "wanted"
"""In the seal's place where there are no bytes yet: the asker would send them sealed."""
REQUEST_HEADER: Final = "MedHive-Seal-Request"
SEAL_HEADER: Final = "MedHive-Seal"
Statement = TypeVar("Statement", bound="Signed[Any]")
SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class SealContext(Frozen):
    """Everything that one sealed transfer is bound to. For a GET `stop` is 0: to the end."""

    method: Literal["GET", "PUT", "POST"]
    path: str = Field(max_length=300)
    site: Name
    coordinator_key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    reader_public_key: str = Field(max_length=100)
    start: int = Field(ge=0)
    stop: int = Field(ge=0)
    issued_at: AwareDatetime
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")

    @property
    def info(self) -> bytes:
        """What the transfer's key is bound to."""
        return b"medhive.sealed.v1\0" + canonical_json(self.model_dump(mode="json"))


class SealRequest(SignedBody):
    """A reader asks for bytes sealed for a key that it made for this one answer."""

    DOMAIN = "medhive.seal-request.v1"
    context: SealContext


class Seal(SignedBody):
    """What the sender says of a sealed stream: what it is bound to, and its key, sealed for the reader (base64)."""

    DOMAIN = "medhive.seal.v1"
    context: SealContext
    sealed_key: str = Field(max_length=200)


class SealingKeyBody(SignedBody):
    """The coordinator's key says for which key uploads are sealed."""

    DOMAIN = "medhive.sealing-key.v1"
    public_key: str = Field(max_length=100)


@dataclass(frozen=True)
class SealingKey:
    """An X25519 key pair, for which others seal."""

    private: X25519PrivateKey

    @classmethod
    def generate(cls) -> Self:
        """Make a new one."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def load_or_make(cls, path: Path) -> Self:
        """Read a key, or make and keep it (PKCS#8 PEM, mode 0600).

        Raises:
            InvalidInput: the file holds something else.
        """
        if not path.exists():
            made = X25519PrivateKey.generate()
            form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            write_secret(path, made.private_bytes(*form))
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"Cannot read a sealing key from {path}: {error}.") from error
        if not isinstance(key, X25519PrivateKey):
            raise InvalidInput(f"{path} holds another kind of key than X25519.")
        return cls(key)

    @property
    def public(self) -> str:
        """The public half, in base64."""
        return base64.b64encode(self.private.public_key().public_bytes_raw()).decode()


# ---- one stream ----------------------------------------------------------------------------------------------------


def sealed_length(plain: int) -> int:
    """Bytes of a sealed stream of so many bytes."""
    return plain + TAG_BYTES * max(1, -(-plain // CHUNK_BYTES))


def plain_length(sealed: int) -> int:
    """Bytes in a sealed stream of this length.

    Raises:
        SealBroken: no stream has this length.
    """
    plain = sealed - TAG_BYTES * max(1, -(-sealed // (CHUNK_BYTES + TAG_BYTES)))
    if plain < 0 or sealed_length(plain) != sealed:
        raise SealBroken("The sealed stream has a length that none has: it was cut.")
    return plain


def _nonce(number: int, last: bool) -> bytes:
    return bytes(7) + number.to_bytes(4, "big") + bytes([last])


class Sealer:
    """Seals one stream for the reader that its context names.

    Args:
        context: what it is bound to.
        key: the sender's.

    Raises:
        InvalidInput: the reader's key is none.
    """

    def __init__(self, context: SealContext, key: SigningKey) -> None:
        stream_key = os.urandom(KEY_BYTES)
        self._cipher = ChaCha20Poly1305(stream_key)
        sealed_key = SUITE.encrypt(stream_key, _public_key(context.reader_public_key), context.info)
        self.seal = sign(Seal(context=context, sealed_key=base64.b64encode(sealed_key).decode()), key)

    def chunks(self, source: BinaryIO, size: int) -> Iterator[bytes]:
        """Seal the next `size` bytes of a file, a chunk at a time; call it once."""
        for number in range(max(1, -(-size // CHUNK_BYTES))):
            last = (number + 1) * CHUNK_BYTES >= size
            plain = source.read(min(CHUNK_BYTES, size - number * CHUNK_BYTES))
            yield self._cipher.encrypt(_nonce(number, last), plain, None)


class Opener:
    """Opens one stream; what it gives out is authentic, in order, and from this stream.

    Args:
        seal: as it came with the stream.
        context: of the transfer that this side means.
        sender: whose signature it must bear.
        key: the reader's.

    Raises:
        BadSignature: another sender.
        SealBroken: it was made for another transfer or another reader.
    """

    def __init__(self, seal: Signed[Seal], context: SealContext, sender: VerifyKey, key: SealingKey) -> None:
        body = seal.verify(sender)
        if body.context != context:
            raise SealBroken("The seal was made for another transfer than this one.")
        try:
            stream_key = SUITE.decrypt(base64.b64decode(body.sealed_key, validate=True), key.private, context.info)
            self._cipher = ChaCha20Poly1305(stream_key)
        except (InvalidTag, ValueError) as error:
            raise SealBroken("The seal was made for another reader's key.") from error
        self._number = 0
        self._pending = bytearray()

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Take bytes as they come; yields whole chunks, opened, but for the last one, of which `finish` knows.

        Raises:
            SealBroken: a chunk was changed, left out, moved or repeated.
        """
        self._pending += piece
        while len(self._pending) > CHUNK_BYTES + TAG_BYTES:
            chunk = bytes(self._pending[: CHUNK_BYTES + TAG_BYTES])
            del self._pending[: CHUNK_BYTES + TAG_BYTES]
            yield self._open(chunk, last=False)

    def finish(self) -> bytes:
        """The last chunk, opened.

        Raises:
            SealBroken: it is not the last one: the stream was cut.
        """
        return self._open(bytes(self._pending), last=True)

    def _open(self, chunk: bytes, *, last: bool) -> bytes:
        try:
            plain = self._cipher.decrypt(_nonce(self._number, last), chunk, None)
        except InvalidTag as error:
            raise SealBroken("The sealed stream was changed or cut on its way.", chunk=self._number) from error
        self._number += 1
        return plain

    def opened(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The whole stream, opened, in chunks.

        Raises:
            SealBroken: see `feed` and `finish`.
        """
        for piece in pieces:
            yield from self.feed(piece)
        yield self.finish()


def _public_key(text: str) -> X25519PublicKey:
    try:
        return X25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise InvalidInput("The reader's key is not an X25519 key in base64.") from error


# ---- statements in headers -----------------------------------------------------------------------------------------


def to_header(statement: "Signed[Seal] | Signed[SealRequest]") -> str:
    """A signed statement as a header's value."""
    return base64.b64encode(statement.model_dump_json().encode()).decode()


def seal_from(header: str | None) -> Signed[Seal]:
    """Read a stream's seal.

    Raises:
        SealBroken: there is none.
    """
    return _from_header(Signed[Seal], header)


def request_from(header: str | None) -> Signed[SealRequest]:
    """Read a reader's request.

    Raises:
        SealBroken: there is none.
    """
    return _from_header(Signed[SealRequest], header)


def _from_header(kind: type[Statement], header: str | None) -> Statement:
    try:
        return kind.model_validate_json(base64.b64decode((header or "")[: MAX_HEADER + 1], validate=True))
    except (ValueError, ValidationError) as error:
        raise SealBroken("The bytes come without a seal that can be read.") from error


# ---- a site's side -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteSealing:
    """What a site needs to move sealed bytes.

    Args:
        site: its name.
        key: its consent key.
        coordinator: whose seals and sealing key count.
        coordinator_sealing_key: for which uploads are sealed; checked.
        now: the coordinator's clock.
    """

    site: str
    key: SigningKey
    coordinator: VerifyKey
    coordinator_sealing_key: str
    now: Callable[[], datetime]

    def _context(
        self, method: Literal["GET", "PUT", "POST"], path: str, reader: str, start: int, stop: int
    ) -> SealContext:
        return SealContext(
            method=method,
            path=path,
            site=self.site,
            coordinator_key_id=self.coordinator.key_id,
            reader_public_key=reader,
            start=start,
            stop=stop,
            issued_at=self.now(),
            nonce=secrets.token_hex(16),
        )

    def ask(self, path: str, start: int) -> tuple[dict[str, str], Callable[[str | None], Opener]]:
        """Headers that ask for the bytes from `start` on, and what makes the opener of the answer from its seal."""
        reader = SealingKey.generate()
        context = self._context("GET", path, reader.public, start, 0)
        headers = {REQUEST_HEADER: to_header(sign(SealRequest(context=context), self.key))}
        return headers, lambda header: Opener(seal_from(header), context, self.coordinator, reader)

    def part(
        self, path: str, file: BinaryIO, start: int, stop: int, method: Literal["PUT", "POST"] = "PUT"
    ) -> tuple[dict[str, str], bytes]:
        """Header and body of a part: the next `stop - start` bytes of the file, sealed for the coordinator."""
        sealer = Sealer(self._context(method, path, self.coordinator_sealing_key, start, stop), self.key)
        return {SEAL_HEADER: to_header(sealer.seal)}, b"".join(sealer.chunks(file, stop - start))


def checked_sealing_key(statement: Signed[SealingKeyBody] | None, coordinator: VerifyKey) -> str:
    """The key for which uploads are sealed, once the coordinator's signature under it is checked.

    Raises:
        BadSignature: somebody else signed it.
        IncompatibleVersion: the coordinator has none.
    """
    if statement is None:
        raise IncompatibleVersion(
            "The address leads through a tunnel that others can read, and this coordinator cannot seal weights: "
            "upgrade the coordinator."
        )
    return statement.verify(coordinator).public_key

"""How a coordinator is known again: by its Ed25519 key, which an invite carries and a hospital keeps for ever.

Certificates come and go: they end, a public one may be used, a tunnel may stand in between. So a hospital does not hold on
to a certificate but to the coordinator's key. With it the coordinator signs, over a nonce of the asker, which CAs to trust
and who ends TLS at its address. A new key is vouched for by the one before it.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from medhive.errors import BadSignature
from medhive.signing import VerifyKey
from medhive.wire import AddressTrust, CoordinatorAnswer, Succession

NONCE_BYTES = 16
ADDRESS_DIGITS = 32  # of a nonce: the first half of the SHA-256 of the address that is asked
HTTPS_PORT = 443


@dataclass(frozen=True)
class Introduced:
    """A coordinator that has proved who it is.

    Its present key, the CAs to trust (PEM), who ends TLS at the address that was asked, Flower's address; and the keys that
    were followed from the one on record to the present one, oldest first, without it.
    """

    key: VerifyKey
    authorities: tuple[str, ...]
    address_trust: AddressTrust
    fleet_address: str
    former: tuple[VerifyKey, ...] = ()


def new_nonce(address: str = "") -> str:
    """A nonce for one question.

    It also says, unreadable and under the coordinator's signature, at which address (`https://HOST:PORT`) is asked: a tunnel
    that ends TLS, and may write what it likes into a request, cannot have it answered as if it had come another way.
    """
    return secrets.token_hex(NONCE_BYTES) + (_digits(authority_of(address)) if address else "")


def asks_at(nonce: str, authority: str) -> bool:
    """Whether a nonce was made to ask at this HOST:PORT."""
    return len(nonce) > ADDRESS_DIGITS and nonce.endswith(_digits(authority))


def authority_of(address: str) -> str:
    """HOST:PORT, in small letters and with HTTPS's own port where none is named, of an address or a Host header.

    Empty where it is neither.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        return f"{parts.hostname}:{parts.port or HTTPS_PORT}" if parts.hostname else ""
    except ValueError:
        return ""


def _digits(authority: str) -> str:
    return hashlib.sha256(authority.encode()).hexdigest()[:ADDRESS_DIGITS]


def introduced(answer: CoordinatorAnswer, pinned: VerifyKey, nonce: str) -> Introduced:
    """Check an answer against the key that is on record, or one that this key has named as its successor.

    Raises:
        BadSignature: another coordinator answers, or an old answer is shown again.
    """
    *former, key = followed(pinned, answer.successions)
    body = answer.introduction.verify(key)
    if body.nonce != nonce or answer.public_key != key.text or answer.ca_certificate != body.authorities[0]:
        raise BadSignature(f"This {body.DOMAIN} was not signed for this question.", domain=body.DOMAIN)
    return Introduced(key, body.authorities, body.address_trust, body.fleet_address, tuple(former))


def present_key(pinned: VerifyKey, successions: Sequence[Succession]) -> VerifyKey:
    """Follow the successions, oldest first, from a key on record to the newest one.

    Raises:
        BadSignature: a succession of this key was not signed by it.
    """
    return followed(pinned, successions)[-1]


def followed(pinned: VerifyKey, successions: Sequence[Succession]) -> tuple[VerifyKey, ...]:
    """The keys on the way from the one on record to the present one, both included; raises as `present_key`."""
    keys = [pinned]
    for succession in successions:
        if succession.body.old_public_key == keys[-1].text:
            keys.append(VerifyKey.from_text(succession.verify(keys[-1]).new_public_key))
    return tuple(keys)


def known_key_ids(present: VerifyKey, successions: Sequence[Succession]) -> tuple[str, ...]:
    """The present key's id, and those of the keys before it that named it their successor, newest first.

    For whoever holds the present key: what was signed to a former one (a consent, a token's proof) was signed to the same
    coordinator. Raises as `present_key`.
    """
    keys = [present]
    for succession in reversed(successions):
        if succession.body.new_public_key == keys[-1].text:
            former = VerifyKey.from_text(succession.body.old_public_key)
            succession.verify(former)
            keys.append(former)
    return tuple(key.key_id for key in keys)

"""How a coordinator is known again: by its Ed25519 key, which an invite carries and a hospital keeps for ever.

Certificates come and go: they end, a public one may be used, a tunnel may stand in between. So a hospital does not hold on
to a certificate but to the coordinator's key. With it the coordinator signs, over a nonce of the asker, which CAs to trust
and who ends TLS at its address. A new key is vouched for by the one before it.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from medhive.errors import BadSignature
from medhive.signing import VerifyKey
from medhive.wire import AddressTrust, CoordinatorAnswer, Succession

NONCE_BYTES = 16


@dataclass(frozen=True)
class Introduced:
    """A coordinator that has proved who it is: its present key, the CAs to trust (PEM), who ends TLS, Flower's address."""

    key: VerifyKey
    authorities: tuple[str, ...]
    address_trust: AddressTrust
    fleet_address: str


def new_nonce() -> str:
    """A nonce for one question."""
    return secrets.token_hex(NONCE_BYTES)


def introduced(answer: CoordinatorAnswer, pinned: VerifyKey, nonce: str) -> Introduced:
    """Check an answer against the key that is on record, or one that this key has named as its successor.

    Raises:
        BadSignature: another coordinator answers, or an old answer is shown again.
    """
    key = present_key(pinned, answer.successions)
    body = answer.introduction.verify(key)
    if body.nonce != nonce or answer.public_key != key.text or answer.ca_certificate != body.authorities[0]:
        raise BadSignature(f"This {body.DOMAIN} was not signed for this question.", domain=body.DOMAIN)
    return Introduced(key, body.authorities, body.address_trust, body.fleet_address)


def present_key(pinned: VerifyKey, successions: Sequence[Succession]) -> VerifyKey:
    """Follow the successions, oldest first, from a key on record to the newest one.

    Raises:
        BadSignature: a succession of this key was not signed by it.
    """
    key = pinned
    for succession in successions:
        if succession.body.old_public_key == key.text:
            key = VerifyKey.from_text(succession.verify(key).new_public_key)
    return key

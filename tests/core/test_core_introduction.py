"""A coordinator is known by its key, whatever certificates come and go; old or foreign introductions count for nothing."""

from datetime import UTC, datetime
from typing import Any

import pytest

from medhive.errors import BadSignature
from medhive.introduction import introduced, new_nonce, present_key
from medhive.signing import SigningKey, sign
from medhive.wire import AddressTrust, CoordinatorAnswer, IntroductionBody, Succession, SuccessionBody

NOW = datetime(2026, 11, 1, tzinfo=UTC)


def answer(key: SigningKey, nonce: str, *successions: Succession, **changes: Any) -> CoordinatorAnswer:
    body = IntroductionBody(
        authorities=("NEW", "OLD"),
        address_trust=AddressTrust.PUBLIC,
        fleet_address="here:8443",
        nonce=nonce,
        issued_at=NOW,
    )
    values = {
        "name": "Here",
        "version": "1.0",
        "protocol": 1,
        "oldest_protocol": 1,
        "key_id": key.public.key_id,
        "public_key": key.public.text,
        "ca_certificate": "NEW",
        "time": NOW,
        "introduction": sign(body, key),
        "successions": successions,
    }
    return CoordinatorAnswer.model_validate(values | changes)


def succession(old: SigningKey, new: SigningKey, signer: SigningKey | None = None) -> Succession:
    body = SuccessionBody(old_public_key=old.public.text, new_public_key=new.public.text, issued_at=NOW)
    return sign(body, signer or old)


def test_an_introduction_says_whom_to_trust() -> None:
    key, nonce = SigningKey.generate(), new_nonce()
    found = introduced(answer(key, nonce), key.public, nonce)
    assert found.authorities == ("NEW", "OLD") and found.address_trust is AddressTrust.PUBLIC
    assert found.key == key.public and found.fleet_address == "here:8443"


def test_what_was_not_signed_for_this_question_counts_for_nothing() -> None:
    key, nonce = SigningKey.generate(), new_nonce()
    for given in (
        answer(key, new_nonce()),
        answer(SigningKey.generate(), nonce),
        answer(key, nonce, public_key=SigningKey.generate().public.text),
        answer(key, nonce, ca_certificate="OTHER"),
    ):
        with pytest.raises(BadSignature):
            introduced(given, key.public, nonce)


def test_a_new_key_is_vouched_for_by_the_one_before() -> None:
    first, second, third = (SigningKey.generate() for _ in range(3))
    chain = (succession(first, second), succession(second, third))
    nonce = new_nonce()
    for pinned in (first, second, third):
        assert introduced(answer(third, nonce, *chain), pinned.public, nonce).key == third.public
    with pytest.raises(BadSignature):
        introduced(answer(second, nonce, *chain), first.public, nonce)
    with pytest.raises(BadSignature):
        present_key(first.public, [succession(first, second, signer=second)])

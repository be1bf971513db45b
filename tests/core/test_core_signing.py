"""Signatures: what fits is accepted, anything else is refused by name."""

import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medhive.consent import Consent, ConsentBody
from medhive.errors import BadSignature, InvalidInput
from medhive.leftovers import remove_leftovers
from medhive.signing import Signed, SigningKey, VerifyKey, canonical_json, digest_of, sign

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def consent_body(**changes: object) -> ConsentBody:
    values: dict[str, object] = {
        "decision": "granted",
        "coordinator_key_id": "c" * 16,
        "site": "hospital-a",
        "run_id": "RUN_1",
        "spec_hash": "a" * 64,
        "max_rounds": 3,
        "issued_at": NOW,
        "expires_at": NOW + timedelta(days=30),
        "nonce": "0" * 32,
        "person": "Radiology",
    }
    return ConsentBody.model_validate({**values, **changes})


def test_signature_survives_the_wire() -> None:
    key = SigningKey.generate()
    signed = sign(consent_body(), key)
    read_back = Consent.model_validate_json(signed.model_dump_json())
    assert read_back.verify(key.public) == consent_body()


@pytest.mark.parametrize("change", [{"run_id": "RUN_2"}, {"max_rounds": 4}, {"expires_at": NOW + timedelta(days=31)}])
def test_changed_content_is_refused(change: dict[str, object]) -> None:
    key = SigningKey.generate()
    signed = sign(consent_body(), key)
    forged = Signed[ConsentBody](body=consent_body(**change), key_id=signed.key_id, signature=signed.signature)
    with pytest.raises(BadSignature, match="consent"):
        forged.verify(key.public)


def test_other_key_is_refused_even_under_the_right_key_id() -> None:
    right, wrong = SigningKey.generate(), SigningKey.generate()
    signed = sign(consent_body(), wrong)
    with pytest.raises(BadSignature, match="on record"):
        signed.verify(right.public)
    relabelled = signed.model_copy(update={"key_id": right.public.key_id})
    with pytest.raises(BadSignature):
        relabelled.verify(right.public)


@pytest.mark.parametrize("signature", ["", "AAAA", "not base64!", "A" * 88])
def test_missing_or_malformed_signature_is_refused(signature: str) -> None:
    key = SigningKey.generate()
    with pytest.raises(BadSignature):
        key.public.verify("medhive.consent.v1", {"a": 1}, signature)


def test_a_signature_of_one_domain_is_none_of_another() -> None:
    key = SigningKey.generate()
    signature = key.sign("medhive.task.v1", {"a": 1})
    key.public.verify("medhive.task.v1", {"a": 1}, signature)
    with pytest.raises(BadSignature):
        key.public.verify("medhive.contribution.v1", {"a": 1}, signature)


def test_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "consent.pem"
    key = SigningKey.generate()
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public == key.public
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(path)
    assert SigningKey.load(path).public == key.public


def test_a_process_killed_while_it_writes_a_key_leaves_no_half_a_key(tmp_path: Path) -> None:
    path = tmp_path / "consent.pem"
    script = "import os, signal, sys; from pathlib import Path; import medhive.signing as s\n"
    script += "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "s.write_secret(Path(sys.argv[1]), b'half')\n"
    killed = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    SigningKey.generate().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    SigningKey.load(path)
    assert remove_leftovers(tmp_path, age_s=0.0) == 1


def test_unreadable_key_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.pem"
    with pytest.raises(InvalidInput, match="broken"):
        SigningKey.load(path)
    path.write_text("-----BEGIN NOTHING-----")
    with pytest.raises(InvalidInput, match="broken"):
        SigningKey.load(path)


def test_public_key_text_round_trip() -> None:
    key = SigningKey.generate().public
    assert VerifyKey.from_text(key.text) == key
    for text in ("", "AAAA", "?"):
        with pytest.raises(InvalidInput):
            VerifyKey.from_text(text)


@given(st.dictionaries(st.text(max_size=8), st.integers(-(2**53) + 1, 2**53 - 1) | st.booleans() | st.text(max_size=8)))
def test_canonical_json_does_not_depend_on_order(body: dict[str, object]) -> None:
    backwards = dict(reversed(list(body.items())))
    assert canonical_json(body) == canonical_json(backwards)
    assert digest_of(body) == digest_of(backwards)


def test_what_json_cannot_carry_is_refused() -> None:
    for value in (float("nan"), float("inf"), 2**60):
        with pytest.raises(InvalidInput):
            canonical_json({"x": value})

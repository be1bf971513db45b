"""What the protocol's number stands for, and what two versions say to each other that do not fit."""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import medhive
from medhive import __version__
from medhive.envelope import (
    Contribution,
    ContributionBody,
    Task,
    TaskBody,
    TaskType,
    from_bytes,
    head_of,
    to_bytes,
)
from medhive.errors import IncompatibleVersion, InvalidInput
from medhive.signing import SignedBody, SigningKey, digest_of, sign
from medhive.spec import RunSpec
from medhive.version import OLDEST_PROTOCOL, PROTOCOL, require_compatible

ROOT = Path(__file__).parents[2]
RELEASE = re.compile(
    r"""^(?:version\ =\ "|ARG\ VERSION=|appVersion:\ ")([\d.]+)"?$  # packages, images, chart
        |MEDHIVE_TAG:-([\d.]+)\}|medhive/[\w$-]+:([\d.]+)""",  # composed images, guides
    re.MULTILINE | re.VERBOSE,
)
FORMATS = {2: "df41d199c7f4db466c4847bf91857c3e51b122d4af00774b1ec0e097fc5663dd"}
"""For each protocol the digest of all fields that are signed or hashed. A new field is a new protocol: add a line."""

NOW = datetime(2026, 11, 1, tzinfo=UTC)
TASK = TaskBody(
    protocol=PROTOCOL, type=TaskType.TRAIN, run_id="RUN_1", study="brain", site="north", round=1, rounds=3,
    spec_hash="a" * 64, base_digest="b" * 64, deadline_s=60, issued_at=NOW, nonce="0" * 32,
)  # fmt: skip
ANSWER = ContributionBody(
    protocol=PROTOCOL, type=TaskType.TRAIN, run_id="RUN_1", site="north", round=1, spec_hash="a" * 64, issued_at=NOW
)


def signed_bodies() -> Iterator[type[BaseModel]]:
    for module in pkgutil.iter_modules(medhive.__path__):
        importlib.import_module(f"medhive.{module.name}")
    yield RunSpec
    yield from (kind for kind in SignedBody.__subclasses__() if kind.__module__.startswith("medhive."))


def fields_of(schema: dict[str, Any]) -> Any:
    """Names of fields with the names of theirs, without the words of the documentation."""
    found = {name: sorted(part.get("properties", {})) for name, part in schema.get("$defs", {}).items()}
    return {**found, "": sorted(schema["properties"])}


def test_a_change_of_what_is_signed_is_a_new_protocol() -> None:
    formats = {kind.__name__: fields_of(kind.model_json_schema()) for kind in signed_bodies()}
    assert digest_of(formats) == FORMATS[PROTOCOL], (
        "a field was changed: raise PROTOCOL, and write its digest down here"
    )
    assert "correction_digest" in formats["TaskBody"][""]


@pytest.mark.parametrize(
    ("theirs", "side", "newer"),
    [(PROTOCOL + 1, "the coordinator", "the hospital"), (OLDEST_PROTOCOL - 1, "the hospital", "the coordinator")],
)
def test_both_versions_and_the_side_to_upgrade_are_named(theirs: int, side: str, newer: str) -> None:
    with pytest.raises(IncompatibleVersion) as caught:
        require_compatible(theirs, "the coordinator", "the hospital", "9.8.7")
    text = str(caught.value)
    assert f"the hospital (MedHive 9.8.7) speaks protocol {theirs}" in text
    assert f"the coordinator (MedHive {__version__}) {PROTOCOL}: upgrade {side}, {newer} is newer" in text


@pytest.mark.parametrize(
    ("protocol", "side"), [(PROTOCOL + 1, "this hospital"), (OLDEST_PROTOCOL - 1, "the coordinator")]
)
def test_a_task_of_another_version_says_so_though_its_fields_are_unknown(protocol: int, side: str) -> None:
    raw = changed(to_bytes(sign(TASK, SigningKey.generate())), protocol=protocol, invented="later")
    with pytest.raises(IncompatibleVersion, match=f"upgrade {side}"):
        from_bytes(Task, raw)
    head = head_of(raw)
    assert (head.run_id, head.round, head.type, head.base_digest) == ("RUN_1", 1, "train", "b" * 64)


@pytest.mark.parametrize(
    ("protocol", "side"), [(PROTOCOL + 1, "the coordinator"), (OLDEST_PROTOCOL - 1, "the hospital")]
)
def test_a_contribution_of_another_version_says_so_before_its_signature_is_looked_at(protocol: int, side: str) -> None:
    raw = changed(to_bytes(sign(ANSWER, SigningKey.generate())), protocol=protocol, rate_sum=None)
    with pytest.raises(IncompatibleVersion, match=f"upgrade {side}"):
        from_bytes(Contribution, raw)


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"body": 1}', b'{"body": {"protocol": "two"}}', b"[" * 100_000])
def test_what_is_no_envelope_is_only_unreadable(raw: bytes) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        from_bytes(Task, raw)
    with pytest.raises(InvalidInput, match="cannot be read"):
        head_of(raw)


def test_all_that_names_a_release_names_the_one_that_programs_and_pages_show() -> None:
    """Packages, images and chart cannot import it; programs import it from here, and say no other."""
    files = [
        *ROOT.glob("services/*/pyproject.toml"),
        *ROOT.glob("services/*/Dockerfile"),
        *ROOT.glob("deploy/*/Dockerfile"),
        *ROOT.glob("deploy/*.yaml"),
        *ROOT.glob("deploy/*.sh"),
        ROOT / "docker-compose.yml",
        ROOT / "deploy/helm/medhive/Chart.yaml",
        ROOT / "docs/kubernetes.md",
    ]
    named = {path: {"".join(found) for found in RELEASE.findall(path.read_text("utf-8"))} for path in files}
    assert {path: found for path, found in named.items() if found not in ({__version__}, set())} == {}
    assert len([path for path, found in named.items() if found]) >= 2 * len(list(ROOT.glob("services/*")))
    packages = ROOT.glob("services/*/*/__init__.py")
    assert [path for path in packages if "__version__" in path.read_text("utf-8")] == [Path(medhive.__file__)]


def changed(raw: bytes, **fields: object) -> bytes:
    """An envelope as another version would write it: with these fields, and without those that are None."""
    envelope = json.loads(raw)
    body = {**envelope["body"], **fields}
    return json.dumps({**envelope, "body": {name: value for name, value in body.items() if value is not None}}).encode()

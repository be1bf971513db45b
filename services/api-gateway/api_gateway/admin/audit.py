"""Checking the coordinator's event log against itself, its signature, and what the hospitals have countersigned.

Each row carries the hash of the row before, the coordinator signs the newest, and every hospital signs the heads that it
sees. A row that was changed breaks the chain; a log that was shortened or written anew no longer contains what a hospital
has signed. What is checked here comes over HTTP, so that an admin can do it on a machine of another institution.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TextIO

import click

from api_gateway.admin.session import Session, load_session
from medhive.chain import BrokenChain, verify_chain
from medhive.client import GatewayClient
from medhive.errors import BadSignature, InvalidInput, MedHiveError, NotAllowed
from medhive.introduction import present_key
from medhive.signing import VerifyKey
from medhive.states import Role
from medhive.terminal import Group, Terminal, moment, pass_terminal
from medhive.wire import (
    API,
    CoordinatorAnswer,
    Countersignature,
    CountersignBody,
    EventAnswer,
    Head,
    HeadBody,
    SiteAnswer,
)

PAGE: Final = 500


class AuditFailed(MedHiveError):
    """The event log is not what was signed."""

    code = "audit-failed"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    what: str
    right: bool
    detail: str


@click.group(cls=Group)
def audit() -> None:
    """The event log: verify it, export it."""


@audit.command("verify")
@pass_terminal
def verify(terminal: Terminal) -> None:
    """Recompute the log's hash chain and compare it with every signature on it."""
    session = _admin_session()
    with session.open() as client:
        # The signatures first: rows that are appended meanwhile do no harm to older ones.
        signatures = fetch_countersignatures(client)
        keys = fetch_site_keys(client)
        head: Head = Head.model_validate(client.get(f"{API}/events/head"))
        coordinator = fetch_coordinator_key(client, VerifyKey.from_text(session.coordinator_key))
        with terminal.progress("events") as advance:
            rows = list(fetch_rows(client, lambda done: advance(done, head.body.number)))
    findings = check_log(rows, head, coordinator, signatures, keys)
    value = {"right": all(item.right for item in findings), "findings": [asdict(item) for item in findings]}
    table = [[item.what, "right" if item.right else "WRONG", item.detail] for item in findings]
    terminal.result(value, lambda: terminal.table(["checked", "result", "detail"], table))
    wrong = [item.what for item in findings if not item.right]
    if wrong:
        raise AuditFailed(f"The event log is not what was signed; wrong: {', '.join(wrong)}.", wrong=wrong)


def _admin_session() -> Session:
    session = load_session()
    if session.role != Role.ADMIN:
        # Source addresses are hashed with their rows and shown to admins alone; nobody else can recompute the chain.
        raise NotAllowed(f"{session.name} is {session.role}; only an admin sees all of the log that is hashed.")
    return session


def fetch_rows(client: GatewayClient, on_page: Callable[[int], None] = lambda _number: None) -> Iterator[EventAnswer]:
    """Every row of the event log, in order."""
    after = 0
    while page := [EventAnswer.model_validate(row) for row in client.get(f"{API}/events", after=after, limit=PAGE)]:
        yield from page
        after = page[-1].number
        on_page(after)


def fetch_countersignatures(client: GatewayClient) -> list[Countersignature]:
    """What the hospitals have signed."""
    rows = client.get(f"{API}/events/countersignatures")
    return [Countersignature.model_validate(row) for row in rows]


def fetch_site_keys(client: GatewayClient) -> dict[str, VerifyKey]:
    """Site → its consent key; a revoked site's signatures stay valid."""
    sites = [SiteAnswer.model_validate(row) for row in client.get(f"{API}/sites")]
    return {item.name: VerifyKey.from_text(item.consent_public_key) for item in sites if item.consent_public_key}


def fetch_coordinator_key(client: GatewayClient, known: VerifyKey) -> VerifyKey:
    """The coordinator's present key, as far as the one that was known at the login leads to it.

    Raises:
        BadSignature: a succession of this key was not signed by it.
    """
    answer = CoordinatorAnswer.model_validate(client.get(f"{API}/coordinator"))
    return present_key(known, answer.successions)


def check_log(
    rows: Sequence[EventAnswer],
    head: Head,
    coordinator: VerifyKey,
    signatures: Sequence[Countersignature],
    keys: Mapping[str, VerifyKey],
) -> list[Finding]:
    """Check a log against itself and against everybody's signatures; says what was right and what was not."""
    hashes = {row.number: row.hash for row in rows}
    findings = [_check_chain(rows), _check_head(head, coordinator, hashes)]
    for site in sorted({item.body.site for item in signatures}):
        own = [item for item in signatures if item.body.site == site]
        findings.append(_check_site(site, own, keys.get(site), hashes))
    return findings


def _check_chain(rows: Sequence[EventAnswer]) -> Finding:
    try:
        number, _ = verify_chain(rows)
    except BrokenChain as error:
        return Finding("hash chain", False, str(error))
    return Finding("hash chain", True, f"{number} rows, unbroken")


def _check_head(head: Head, coordinator: VerifyKey, hashes: Mapping[int, str]) -> Finding:
    try:
        body: HeadBody = head.verify(coordinator)
    except BadSignature as error:
        return Finding("coordinator's signature", False, str(error))
    problem = _missing(body.number, body.hash, hashes)
    if problem:
        return Finding("coordinator's signature", False, problem)
    return Finding("coordinator's signature", True, f"row {body.number}, signed {moment(body.at)} by key {head.key_id}")


def _check_site(
    site: str, signatures: Sequence[Countersignature], key: VerifyKey | None, hashes: Mapping[int, str]
) -> Finding:
    what = f"countersignatures of {site}"
    if key is None:
        return Finding(what, False, "the coordinator no longer names the site's key")
    for item in signatures:
        try:
            body: CountersignBody = item.verify(key)
        except BadSignature as error:
            return Finding(what, False, str(error))
        problem = _missing(body.number, body.hash, hashes)
        if problem:
            return Finding(what, False, f"{problem}, but {site} has seen it at {moment(body.seen_at)}")
    newest = max(item.body.number for item in signatures)
    return Finding(what, True, f"{len(signatures)} heads, up to row {newest}")


def _missing(number: int, digest: str, hashes: Mapping[int, str]) -> str:
    if number == 0:
        return ""  # the head of a log without rows
    if number not in hashes:
        return f"row {number} was signed and is gone"
    return "" if hashes[number] == digest else f"row {number} is another than the one that was signed"


@audit.command("export")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write; it must not exist.")
@pass_terminal
def export_log(terminal: Terminal, out: Path | None) -> None:
    """Write the log, its signed head and all countersignatures to a file of JSON lines."""
    session = _admin_session()
    target = Path(terminal.ask(None if out is None else str(out), "File", "--out", "events.jsonl"))
    if target.exists():
        raise InvalidInput(f"{target} exists already; name another file.")
    part = target.with_name(f"{target.name}.part")
    with session.open() as client, part.open("w", encoding="utf-8") as file:
        count = write_log(client, file)
    part.replace(target)
    value = {"file": str(target), "events": count}
    terminal.result(value, lambda: terminal.line(f"{count} events are in {target}."))


def write_log(client: GatewayClient, file: TextIO) -> int:
    """Write the log with what was signed of it as JSON lines; returns the number of rows."""
    # As in `verify` the signatures come first: they must not be of rows that were appended after the last that is written.
    signatures, head = fetch_countersignatures(client), client.get(f"{API}/events/head")
    count = 0
    for row in fetch_rows(client):
        file.write(row.model_dump_json() + "\n")
        count += 1
    file.write(json.dumps({"head": head}) + "\n")
    for signature in signatures:
        file.write(json.dumps({"countersignature": signature.model_dump(mode="json")}) + "\n")
    return count

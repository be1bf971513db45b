"""Model versions: what there is, how they compare, handing them out, taking one back, tidying up."""

from pathlib import Path
from typing import Final

import click

from api_gateway.admin.runs import ask_study
from api_gateway.admin.session import connect
from medhive.client import GatewayClient
from medhive.errors import InvalidInput
from medhive.signing import canonical_json
from medhive.terminal import Command, Terminal, build, pass_terminal, share, size
from medhive.views import comparison, version_details, versions_table
from medhive.wire import (
    API,
    Cleanup,
    CleanupAnswer,
    Comparison,
    Export,
    Statistics,
    StudyAnswer,
    VersionAnswer,
)

DEFAULT_KEEP: Final = 5


@click.command(cls=Command)
@click.argument("study", required=False)
@pass_terminal
def models(terminal: Terminal, study: str | None) -> None:
    """List the versions of STUDY, or of all studies."""
    with connect() as client:
        found = fetch_versions(client, study)
    terminal.result(found, lambda: versions_table(terminal, found))


def fetch_versions(client: GatewayClient, study: str | None = None) -> list[VersionAnswer]:
    """The versions of one study, or of all, the oldest first."""
    studies = [study] if study else [StudyAnswer.model_validate(row).name for row in client.get(f"{API}/studies")]
    found = [
        VersionAnswer.model_validate(row) for name in studies for row in client.get(f"{API}/studies/{name}/versions")
    ]
    return sorted(found, key=lambda item: (item.study, item.version))


@click.command(cls=Command)
@click.argument("study")
@click.argument("version", type=int)
@pass_terminal
def model(terminal: Terminal, study: str, version: int) -> None:
    """Show one version: metrics, confusion matrix, what the hospitals say."""
    with connect() as client:
        found = fetch_version(client, study, version)
    terminal.result(found, lambda: version_details(terminal, found))


def fetch_version(client: GatewayClient, study: str, version: int) -> VersionAnswer:
    """One version."""
    return VersionAnswer.model_validate(client.get(f"{API}/studies/{study}/versions/{version}"))


@click.command(cls=Command)
@click.argument("study")
@click.argument("a", type=int)
@click.argument("b", type=int)
@pass_terminal
def compare(terminal: Terminal, study: str, a: int, b: int) -> None:
    """Compare versions A and B of STUDY."""
    with connect() as client:
        both = Comparison.model_validate(client.get(f"{API}/studies/{study}/compare", a=a, b=b))
    terminal.result(both, lambda: comparison(terminal, both))


@click.command(cls=Command)
@click.argument("study", required=False)
@click.argument("version", type=int, required=False)
@click.option("--site", help="Offer the version to this one hospital.")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write [STUDY_v<N>.safetensors].")
@pass_terminal
def export(terminal: Terminal, study: str | None, version: int | None, site: str | None, out: Path | None) -> None:
    """Write a version of STUDY with its signed manifest to a file, or offer it to one hospital.

    A broken download goes on where it stopped; the file gets its name only when its SHA-256 is right.
    """
    if site and out:
        raise click.UsageError("--site offers a version to a hospital, --out writes a file: give one of them.")
    with connect() as client:
        study = ask_study(terminal, client, study)
        if version is None:
            newest = StudyAnswer.model_validate(client.get(f"{API}/studies/{study}")).newest_version
            version = int(terminal.ask(None, "Version", "VERSION", None if newest is None else str(newest)))
        if site:
            client.post(f"{API}/studies/{study}/versions/{version}/export", build(Export, site=site))
            value = {"study": study, "version": version, "site": site}
            terminal.result(value, lambda: terminal.line(f"Version {version} of {study} is offered to {site}."))
            return
        _export_file(terminal, client, fetch_version(client, study, version), out)


def _export_file(terminal: Terminal, client: GatewayClient, version: VersionAnswer, out: Path | None) -> None:
    target = out or Path(f"{version.study}_v{version.version}.safetensors")
    if target.is_dir():
        raise InvalidInput(f"{target} is a folder; name a file.")
    manifest = target.with_name(f"{target.stem}.manifest.json")
    path = f"{API}/studies/{version.study}/versions/{version.version}/file"
    with terminal.progress(f"version {version.version}", bytes_=True) as advance:
        client.download(path, target, version.digest, max_bytes=version.size_bytes, on_progress=advance)
    manifest.write_bytes(canonical_json(version.manifest.model_dump(mode="json")))
    value = {
        "study": version.study,
        "version": version.version,
        "file": str(target),
        "manifest": str(manifest),
        "sha256": version.digest,
        "size_bytes": version.size_bytes,
    }
    terminal.result(value, lambda: terminal.fields(value.items()))


@click.command(cls=Command)
@click.argument("study")
@click.argument("version", type=int)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def rollback(terminal: Terminal, study: str, version: int, yes: bool) -> None:
    """Offer an older VERSION of STUDY to all hospitals as the candidate again."""
    terminal.confirm(f"Offer version {version} of {study} to all its hospitals again?", yes)
    with connect() as client:
        client.post(f"{API}/studies/{study}/versions/{version}/offer")
        offered = fetch_version(client, study, version)
    text = f"Version {version} of {study} is the candidate again; each hospital decides."
    terminal.result(offered, lambda: terminal.line(text))


@click.command(cls=Command)
@click.option("--study", help="Only this study's versions.")
@click.option("--keep", type=click.IntRange(1, 1000), default=DEFAULT_KEEP, show_default=True, help="Newest to keep.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def cleanup(terminal: Terminal, study: str | None, keep: int, dry_run: bool, yes: bool) -> None:
    """Retire old versions and delete bytes that nothing refers to; never what a hospital has accepted."""
    wanted = build(Cleanup, study=study, keep=keep, dry_run=True)
    with connect() as client:
        found = CleanupAnswer.model_validate(client.post(f"{API}/cleanup", wanted))
        if not dry_run:
            terminal.confirm(f"{_cleanup_line(found, 'would go')} Do it?", yes)
            found = CleanupAnswer.model_validate(
                client.post(f"{API}/cleanup", wanted.model_copy(update={"dry_run": False}))
            )
    text = _cleanup_line(found, "would go" if dry_run else "are gone")
    terminal.result(found, lambda: terminal.line(text))


def _cleanup_line(found: CleanupAnswer, ending: str) -> str:
    names = f" ({', '.join(found.versions)})" if found.versions else ""
    return f"{len(found.versions)} versions{names} and {found.blobs} blobs, {size(found.bytes_freed)}, {ending}."


@click.command(cls=Command)
@pass_terminal
def stats(terminal: Terminal) -> None:
    """Show runs, success rate, mean accuracy, sites, images and bytes."""
    with connect() as client:
        found = Statistics.model_validate(client.get(f"{API}/statistics"))
    terminal.result(found, lambda: show_statistics(terminal, found))


def show_statistics(terminal: Terminal, found: Statistics) -> None:
    """Print the coordinator's figures."""
    by_state = ", ".join(f"{count} {state}" for state, count in sorted(found.runs_by_state.items()) if count)
    terminal.fields(
        [
            ("runs", f"{found.runs}{f' ({by_state})' if by_state else ''}"),
            ("success rate", "" if found.success_rate is None else f"{found.success_rate:.0%}"),
            ("mean accuracy", share(found.mean_accuracy)),
            ("sites", found.sites),
            ("images", found.images),
            ("versions", found.versions),
            ("sent to sites", size(found.bytes_down)),
            ("received", size(found.bytes_up)),
            ("blob store", size(found.blob_bytes)),
        ]
    )

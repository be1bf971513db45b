"""Fetching scans from the hospital's PACS, so that nobody copies files by hand."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import click
from pydantic import TypeAdapter, ValidationError

from fl_client.cli.installation import load_settings, unusable
from fl_client.consents import runs_counting_on
from fl_client.identity import NotJoined
from fl_client.pacs import Pacs
from fl_client.pull import (
    MAX_STUDIES,
    MODALITY,
    Outcome,
    Plan,
    PullIncomplete,
    Selection,
    fetch,
    only_pull,
    plan,
    read_list,
)
from fl_client.settings import Settings
from fl_client.site import Site, open_state
from medhive.errors import Conflict, InvalidInput
from medhive.spec import Name
from medhive.terminal import Command, Terminal, pass_terminal
from medhive.terminal import size as in_units

FILTERS: Final = ("list_file", "since", "until", "description", "max_studies")
SHOWN_LINES: Final = 20
DAY: Final = click.DateTime(["%Y-%m-%d"])


class DataInUse(Conflict):
    """A run that this hospital agreed to counts on the data as they are."""

    code = "data-in-use"


@click.command(cls=Command)
@click.option("--study", help="The study that the scans are for; they land in STATE_DIR/pulled/STUDY.")
@click.option("--out", type=click.Path(path_type=Path), help="Another folder, which can be the study's data folder.")
@click.option(
    "--list",
    "list_file",
    type=click.Path(path_type=Path),
    help="Only those in a CSV with a column accession, patient, study or series; - is standard input.",
)
@click.option("--since", type=DAY, metavar="YYYY-MM-DD", help="The first day of the studies.")
@click.option("--until", type=DAY, metavar="YYYY-MM-DD", help="The last day of the studies.")
@click.option("--description", help="The studies' description, with * and ? for anything.")
@click.option("--modality", default=MODALITY, show_default=True, help="Of the series that are fetched.")
@click.option("--max-studies", type=int, help=f"How many studies at most [{MAX_STUDIES}].")
@click.option("--dry-run", is_flag=True, help="Only say what there is; fetch nothing.")
@click.option("--yes", is_flag=True, help="Fetch without asking again.")
@pass_terminal
def pull(terminal: Terminal, /, study: str | None, out: Path | None, dry_run: bool, yes: bool, **given: Any) -> None:
    """Fetch scans from the PACS at PACS_URL; what lies here already is not fetched again.

    Patients and studies are named in a file alone, since others on the machine can read command lines.
    """
    selection = _selection(given)
    settings = load_settings()
    site = _site(settings)
    folder = _folder(terminal, settings, study, out)
    with site or nullcontext(), Pacs(settings) as pacs:
        with terminal.progress("asking the PACS for studies") as advance:
            found = plan(pacs, selection, folder, lambda count: advance(count, 0))
        value = {"study": study, "folder": str(folder), "dry_run": dry_run, **found.to_json()}
        if dry_run or found.here == found.files:
            terminal.result(value, lambda: _show_plan(terminal, found, folder))
            return
        _require_idle(site, study, folder)
        if terminal.interactive and not yes:
            _show_plan(terminal, found, folder)
        terminal.confirm(f"Fetch {found.files - found.here} files into {folder}?", yes)
        with only_pull(folder), terminal.progress("fetching files") as advance:
            outcome = fetch(pacs, found.series, folder, advance)
    _tell(terminal, {**value, **outcome.to_json()}, found, outcome, folder)
    _say_next(terminal, site, study, folder)


def _selection(given: Mapping[str, Any]) -> Selection:
    if all(given[name] is None for name in FILTERS):
        raise click.UsageError(
            "Say which studies: --list, --since, --until, --description, or how many by --max-studies."
        )
    return Selection(
        modality=given["modality"].upper(),
        since=given["since"].date() if given["since"] else None,
        until=given["until"].date() if given["until"] else None,
        description=given["description"] or "",
        listed=read_list(given["list_file"]) if given["list_file"] else None,
        max_studies=MAX_STUDIES if given["max_studies"] is None else given["max_studies"],
    )


def _site(settings: Settings) -> Site | None:
    """The site, where it has joined; pulling needs no coordinator."""
    try:
        return Site.open(settings)
    except NotJoined:
        return None


def _folder(terminal: Terminal, settings: Settings, study: str | None, out: Path | None) -> Path:
    if out is not None:
        return out.expanduser().resolve()
    name = terminal.ask(study, "Study that the scans are for", "--study, or --out")
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise InvalidInput("A study's name is made of letters, digits, dots, dashes and underscores.") from error
    try:
        open_state(settings)
    except OSError as error:
        raise unusable(settings, error) from error
    return settings.state_dir / "pulled" / name


def _require_idle(site: Site | None, study: str | None, folder: Path) -> None:
    used = runs_counting_on(site, folder, study) if site is not None else []
    if used:
        raise DataInUse(
            f"{', '.join(used)} counts on the data as they are, which this hospital has agreed to; pull when it has ended, "
            "or withdraw from it.",
            runs=used,
        )


def _tell(terminal: Terminal, value: dict[str, Any], found: Plan, outcome: Outcome, folder: Path) -> None:
    if not outcome.is_complete:
        if not terminal.json:
            _show_outcome(terminal, found, outcome, folder)
        raise PullIncomplete(
            f"{outcome.failed.total()} files could not be had; pull again, nothing comes twice.", **value
        )
    terminal.result(value, lambda: _show_outcome(terminal, found, outcome, folder))


def _show_plan(terminal: Terminal, found: Plan, folder: Path) -> None:
    terminal.fields(
        [
            ("studies", f"{found.studies}{', and the PACS has more (--max-studies)' if found.more else ''}"),
            ("series", len(found.series)),
            ("files", found.files),
            ("here already", found.here),
            ("to fetch", found.files - found.here),
            ("left out", _left_out(found)),
            ("not found", _lines(found.not_found)),
            ("folder", folder),
        ]
    )


def _left_out(found: Plan) -> str:
    return (
        f"{found.left_out} studies that the PACS offered and that are not what was asked for" if found.left_out else ""
    )


def _lines(numbers: tuple[int, ...]) -> str:
    if not numbers:
        return ""
    more = f" and {len(numbers) - SHOWN_LINES} more" if len(numbers) > SHOWN_LINES else ""
    return f"lines {', '.join(map(str, numbers[:SHOWN_LINES]))}{more} of the list"


def _show_outcome(terminal: Terminal, found: Plan, outcome: Outcome, folder: Path) -> None:
    _show_plan(terminal, found, folder)
    terminal.fields(
        [
            ("fetched", f"{outcome.fetched} files, {in_units(outcome.fetched_bytes)}"),
            *((f"not had, {reason}", count) for reason, count in sorted(outcome.failed.items())),
        ]
    )


def _say_next(terminal: Terminal, site: Site | None, study: str | None, folder: Path) -> None:
    if site is None or study is None:
        return
    if site.data_dir(study).resolve() == folder.resolve():
        terminal.note(f"Next: medhive-site check-data --study {study}")
    else:
        terminal.note(
            f"The study's data folder is another one, {site.data_dir(study)}; to use this one: "
            f"medhive-site settings --study {study} --data-dir {folder}"
        )

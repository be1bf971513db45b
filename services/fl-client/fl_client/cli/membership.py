"""Who this hospital is: joining, status, and what it sets for itself."""

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from fl_client import updates
from fl_client.cli.installation import load_settings, open_site, unusable
from fl_client.cli.queues import queue_line, queue_lines
from fl_client.consents import open_runs
from fl_client.identity import Identity, JoinOutcome, NotJoined, detour_since
from fl_client.limits import Limits
from fl_client.queues import unanswered_queues
from fl_client.settings import Settings
from fl_client.site import Site, join_site, open_state
from fl_client.store import StudySettings
from medhive import __version__
from medhive.errors import IncompatibleVersion, InvalidInput, Unreachable
from medhive.states import FINAL_RUN_STATES
from medhive.terminal import Command, Terminal, moment, pairs, pass_terminal, plain, read_secret
from medhive.version import PROTOCOL


@click.command(cls=Command)
@click.option("--server-address", help="The coordinator's address [SERVER_ADDRESS].")
@click.option("--client-id", help="This hospital's name [CLIENT_ID].")
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="A file with the JOIN_TOKEN [JOIN_TOKEN, else asked]."
)
@pass_terminal
def join(terminal: Terminal, server_address: str | None, client_id: str | None, token_file: Path | None) -> None:
    """Join a coordinator with its invite (JOIN_TOKEN); keys are made here and never leave.

    Run again with the same STATE_DIR, it continues as the same hospital.
    """
    settings = load_settings(server_address=server_address, client_id=client_id)
    outcome = join_with(terminal, settings, read_secret(token_file) if token_file else None)
    identity = outcome.identity
    value = {
        "site": identity.site,
        "coordinator": identity.coordinator_name,
        "addresses": identity.addresses,
        "studies": outcome.studies,
        "fresh": outcome.fresh,
    }
    terminal.result(value, lambda: _show_join(terminal, outcome))


def join_with(terminal: Terminal, settings: Settings, token: str | None = None) -> JoinOutcome:
    """Join with what the environment gives; ask for the rest; continue where this state folder has joined already."""
    known = known_identity(settings)
    if known is not None:
        return join_site(settings, "", settings.client_id)
    address = terminal.ask(settings.server_address or None, "Address of the coordinator", "SERVER_ADDRESS")
    name = terminal.ask(settings.client_id or None, "Name of this hospital", "CLIENT_ID")
    token = token or settings.read_join_token() or terminal.ask_secret(None, "JOIN_TOKEN", "JOIN_TOKEN")
    return join_site(load_settings(server_address=address), token, name)


def known_identity(settings: Settings) -> Identity | None:
    """Who the state folder belongs to, or None before the first join."""
    try:
        store, _ = open_state(settings)
        return Identity.load(store)
    except NotJoined:
        return None
    except OSError as error:
        raise unusable(settings, error) from error


def _show_join(terminal: Terminal, outcome: JoinOutcome) -> None:
    identity = outcome.identity
    done = "has joined" if outcome.fresh else "had joined already"
    terminal.line(f"{identity.site} {done} {identity.coordinator_name} at {identity.addresses[0]}.")
    terminal.line(f"Studies: {', '.join(outcome.studies) or 'none yet'}")
    terminal.note("Next: medhive-site check-data, then medhive-site run.")


@click.command(cls=Command)
@pass_terminal
def status(terminal: Terminal) -> None:
    """Who this hospital is, what waits for a person, what goes on; works without the coordinator too."""
    with open_site() as site:
        value: dict[str, Any] = {
            "site": site.name,
            "coordinator": site.identity.coordinator_name,
            "address": site.gateway.address,
            "software": __version__,
            "protocol": PROTOCOL,
            "limits": plain(vars(site.limits())),
            "champions": champions(site),
            "undecided": undecided(site),
            "unsent": len(site.store.outbox()),
        }
        try:
            value |= _remote_status(site)
        except (Unreachable, IncompatibleVersion) as error:
            value |= {"connected": False, "problem": str(error)}
    terminal.result(value, lambda: _show_status(terminal, value))


def champions(site: Site) -> dict[str, int]:
    """Study → the version in use here."""
    studies = {item.study for item in site.store.versions()}
    found = {study: site.store.champion(study) for study in sorted(studies)}
    return {study: version for study, version in found.items() if version is not None}


def undecided(site: Site) -> list[str]:
    """Versions that wait for this hospital's decision, as STUDY/n."""
    return [f"{item.study}/{item.version}" for item in updates.undecided(site)]


def _remote_status(site: Site) -> dict[str, Any]:
    own = site.gateway.site(site.name)
    since = detour_since(site.store, site.gateway.address)
    runs = [run for run in site.gateway.runs() if run.state not in FINAL_RUN_STATES]
    return {
        "connected": True,
        "state": str(own.state),
        "node_online": own.node_online,
        "studies": list(own.studies),
        "waiting_for_consent": [item.run.id for item in open_runs(site)] + unanswered_queues(site),
        "address": site.gateway.address,
        "first_address": site.identity.addresses[0],
        "first_address_left_at": since.isoformat() if since else None,
        "queues": queue_lines(site),
        "runs": [{"run": run.id, "state": str(run.state), "round": run.round, "rounds": run.rounds} for run in runs],
    }


def _show_status(terminal: Terminal, value: dict[str, Any]) -> None:
    connection = "connected" if value["connected"] else f"not connected: {value['problem']}"
    limits = value["limits"]
    terminal.fields(
        [
            ("site", value["site"]),
            ("coordinator", f"{value['coordinator']} at {value['address']}, {connection}"),
            ("first address", _detour_line(value)),
            ("software", f"MedHive {value['software']}, protocol {value['protocol']}"),
            ("standing", value.get("state")),
            ("node", _node_line(value)),
            ("studies", ", ".join(value.get("studies", ()))),
            ("runs", ", ".join(f"{r['run']} {r['state']} {r['round']}/{r['rounds']}" for r in value.get("runs", ()))),
            *(("queue", queue_line(line)) for line in value.get("queues", ())),
            ("consent asked", ", ".join(value.get("waiting_for_consent", ()))),
            ("in use", ", ".join(f"{study} version {number}" for study, number in value["champions"].items())),
            ("decide on", ", ".join(value["undecided"])),
            ("not sent yet", value["unsent"] or ""),
            ("training", "paused" if limits["paused"] else ", ".join(limits["hours"]) or "at any hour"),
        ]
    )


def _detour_line(value: dict[str, Any]) -> str:
    left_at = value.get("first_address_left_at")
    if left_at is None:
        return ""
    since = moment(datetime.fromisoformat(left_at))
    return f"{value['first_address']} does not serve this hospital since {since}; it is tried again every minute"


def _node_line(value: dict[str, Any]) -> str:
    if not value["connected"]:
        return ""
    return "online" if value["node_online"] else "offline; start it with: medhive-site run"


@click.command(cls=Command)
@click.option(
    "--hours", multiple=True, metavar="HH:MM-HH:MM", help="When training may run; may be repeated; 'any' lifts it."
)
@click.option("--cpu-threads", type=int, help="Threads of the trainer; 0 is no limit.")
@click.option("--memory-mb", type=int, help="Memory of the trainer, in MB; 0 is no limit.")
@click.option("--gpu-memory-fraction", type=float, help="Share of a GPU's memory; 0 is no limit.")
@click.option("--device", help="auto, cpu, cuda or cuda:<n>.")
@click.option("--pause/--resume", "paused", default=None, help="Hold all training, or go on.")
@click.option("--study", help="The study that the options below are for.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="The study's data folder or file [DATA_DIR].")
@click.option(
    "--class", "classes", multiple=True, metavar="LOCAL=STUDY", help="What a local class is called in the study."
)
@click.option("--groups-csv", type=click.Path(path_type=Path), help="CSV: file, patient group.")
@click.option("--labels-csv", type=click.Path(path_type=Path), help="Scans: CSV of labels [labels.csv with the data].")
@click.option("--weights-file", type=click.Path(path_type=Path), help="Local weights of a pretrained backbone.")
@pass_terminal
def settings(terminal: Terminal, /, **given: Any) -> None:
    """Show what this hospital sets for itself, or change what is given; nothing of it is sent."""
    study_given = any(given[name] for name in ("data_dir", "classes", "groups_csv", "labels_csv", "weights_file"))
    if study_given and not given["study"]:
        raise click.UsageError("--data-dir, --class, --groups-csv, --labels-csv and --weights-file need --study.")
    with open_site() as site:
        old = site.limits()
        limits = _changed_limits(old, given)
        if limits != old:
            limits.save(site.store)
        if study_given:
            site.store.set_study(_changed_study(site.store.study(given["study"]), given))
        names = [given["study"]] if given["study"] else known_studies(site)
        found = [site.store.study(name) for name in names]
    value = {"limits": vars(limits), "studies": [_study_value(item) for item in found]}
    terminal.result(value, lambda: _show_settings(terminal, limits, found))


def _changed_limits(limits: Limits, given: dict[str, Any]) -> Limits:
    changes: dict[str, Any] = {}
    if given["hours"]:
        changes["hours"] = () if given["hours"] == ("any",) else given["hours"]
    if given["memory_mb"] is not None:
        changes["memory_bytes"] = given["memory_mb"] * 1_000_000 or None
    for name in ("cpu_threads", "gpu_memory_fraction"):
        if given[name] is not None:
            changes[name] = given[name] or None
    for name in ("device", "paused"):
        if given[name] is not None:
            changes[name] = given[name]
    return limits.with_changes(**changes)


def _changed_study(old: StudySettings, given: dict[str, Any]) -> StudySettings:
    def path(name: str) -> Path | None:
        if given[name] is None:
            return getattr(old, name)  # type: ignore[no-any-return]
        chosen: Path = given[name].expanduser().resolve()
        if not chosen.exists():
            raise InvalidInput(f"{chosen} does not exist.")
        return chosen

    return StudySettings(
        study=old.study,
        data_dir=path("data_dir"),
        class_map={**old.class_map, **pairs(given["classes"], "--class")},
        groups_csv=path("groups_csv"),
        weights_file=path("weights_file"),
        labels_csv=path("labels_csv"),
    )


def known_studies(site: Site) -> list[str]:
    """The studies that this hospital belongs to, or, without the coordinator, those whose models lie here."""
    try:
        return [study.name for study in site.gateway.studies()]
    except Unreachable:
        return sorted({item.study for item in site.store.versions()})


def _study_value(item: StudySettings) -> dict[str, Any]:
    return {
        "study": item.study,
        "data_dir": str(item.data_dir) if item.data_dir else None,
        "class_map": dict(item.class_map),
        "groups_csv": str(item.groups_csv) if item.groups_csv else None,
        "weights_file": str(item.weights_file) if item.weights_file else None,
        "labels_csv": str(item.labels_csv) if item.labels_csv else None,
    }


def _show_settings(terminal: Terminal, limits: Limits, studies: list[StudySettings]) -> None:
    terminal.fields(
        [
            ("training", "paused" if limits.paused else "on"),
            ("hours", ", ".join(limits.hours) or "any"),
            ("CPU threads", limits.cpu_threads or "no limit"),
            ("memory", f"{limits.memory_bytes // 1_000_000} MB" if limits.memory_bytes else "no limit"),
            ("GPU memory", f"{limits.gpu_memory_fraction:.0%}" if limits.gpu_memory_fraction else "no limit"),
            ("device", limits.device),
        ]
    )
    if studies:
        terminal.line()
        rows = [
            [
                item.study,
                item.data_dir or "from DATA_DIR",
                ", ".join(f"{local}={name}" for local, name in item.class_map.items()),
                item.groups_csv,
                item.labels_csv,
                item.weights_file,
            ]
            for item in studies
        ]
        terminal.table(["study", "data", "class names", "patient groups", "labels", "weights"], rows)

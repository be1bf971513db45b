"""Model versions at a hospital: what came, how good it is here, deciding, going back, using."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from fl_client import updates as versions_here
from fl_client.cli.installation import open_site, signing_person
from fl_client.cli.runs import reading_listener
from fl_client.site import AlreadyRunning, Site, only_node
from fl_client.store import KnownVersion
from fl_client.updates import Decided, Update
from medhive.errors import InvalidInput, NotFound, Unreachable
from medhive.packing import sha256_file
from medhive.terminal import Command, Terminal, moment, pass_terminal, plain, share, size
from medhive.views import confusion_table


class NothingPredicted(InvalidInput):
    """Not one of the named files could be read."""

    code = "nothing-predicted"


# What a judgement's models are called on a screen.
MODELS: Final = {"candidate": "this version", "champion": "in use", "local_only": "own data alone"}


@click.command(cls=Command)
@click.argument("version", type=int, required=False)
@click.option("--study", help="The study; needed only when there are several.")
@click.option("--evaluate", is_flag=True, help="Judge it on the own held-out data now, beside the version in use.")
@click.option("--own-model", is_flag=True, help="Also beside a model trained here alone: what did we gain?")
@pass_terminal
def updates(terminal: Terminal, version: int | None, study: str | None, evaluate: bool, own_model: bool) -> None:
    """List the versions that were offered, or show VERSION and how good it is on this hospital's own data.

    With --evaluate and no VERSION it is the one that waits for a decision.
    """
    with open_site() as site:
        fetch_offered(terminal, site, study)
        if version is None and (evaluate or own_model):
            study, version = ask_version(terminal, site, study, None)
        if version is None:
            found = versions_here.list_updates(site, study)
            terminal.result([_update_value(item) for item in found], lambda: show_updates(terminal, found))
            return
        name = versions_here.only_study(site, study)
        if evaluate or own_model:
            with terminal.progress("judging") as advance, site.trainer() as trainer:
                listener = reading_listener(advance)
                versions_here.judge(site, trainer, name, version, local_only=own_model, listener=listener)
        known = _known(site, name, version)
    value = {**_version_value(known), "evaluation": known.evaluation}
    terminal.result(value, lambda: _show_version(terminal, known))


def fetch_offered(terminal: Terminal, site: Site, study: str | None = None) -> None:
    """Fetch what is offered and does not lie here yet, unless the running node does it or nobody answers."""
    try:
        with only_node(site.settings.state_dir):
            for name in [study] if study else [item.name for item in site.gateway.studies()]:
                with terminal.progress(f"versions of {name}", bytes_=True) as advance:
                    versions_here.sync_versions(site, name, advance)
    except AlreadyRunning:
        return
    except Unreachable as error:
        terminal.note(f"Only what lies here: {error}")


def _known(site: Site, study: str, version: int) -> KnownVersion:
    known = site.store.version(study, version)
    if known is None:
        raise NotFound(f"Version {version} of {study} does not lie here; medhive-site updates lists those that do.")
    return known


def _update_value(item: Update) -> dict[str, Any]:
    return {**asdict(item), "file": str(item.file), "received_at": item.received_at.isoformat()}


def show_updates(terminal: Terminal, found: Sequence[Update]) -> None:
    """Offered versions, one a line."""
    terminal.table(
        ["study", "version>", "received", "rounds>", "accuracy>", "loss>", "state", "decision", "in use", "file"],
        [
            [
                item.study,
                item.version,
                moment(item.received_at),
                item.rounds,
                share(item.accuracy),
                share(item.loss),
                item.state,
                f"{item.decision}: {item.reason}" if item.reason else item.decision,
                "yes" if item.in_use else "",
                item.file,
            ]
            for item in found
        ],
        empty="no versions yet",
    )


def _version_value(known: KnownVersion) -> dict[str, Any]:
    return {
        "study": known.study,
        "version": known.version,
        "state": known.offered,
        "decision": known.decision,
        "reason": known.reason,
        "person": known.person,
        "file": str(known.file),
        "size_bytes": known.size_bytes,
        "sha256": known.digest,
        "received_at": known.received_at.isoformat(),
        "manifest": plain(known.manifest),
    }


def _show_version(terminal: Terminal, known: KnownVersion) -> None:
    body = known.manifest.body
    terminal.fields(
        [
            ("study", known.study),
            ("version", known.version),
            ("state", known.offered),
            ("decision", f"{known.decision}{f' by {known.person}' if known.person else ''}"),
            ("reason", known.reason),
            ("received", moment(known.received_at)),
            ("run", body.run_id),
            ("rounds", body.rounds),
            ("sites", ", ".join(body.sites)),
            ("examples", body.examples),
            ("file", known.file),
            ("SHA-256", known.digest),
        ]
    )
    terminal.line()
    if known.evaluation is None:
        terminal.line("Not judged here yet; do it with:")
        terminal.line(f"  medhive-site updates {known.version} --study {known.study} --evaluate")
        return
    show_judgement(terminal, known.evaluation)


def show_judgement(terminal: Terminal, judgement: Mapping[str, Any]) -> None:
    """What the own held-out data say of a version, beside the one in use and the one trained here alone."""
    evaluations: Mapping[str, Any] = judgement["evaluations"]
    names = [name for name in MODELS if name in evaluations]
    examples = evaluations[names[0]]["examples"]
    terminal.line(f"On {examples} held-out examples of this hospital (95% intervals):")
    terminal.line()
    rows: list[list[object]] = [
        ["accuracy", *(_estimate(evaluations[name]["accuracy"]) for name in names)],
        ["macro F1", *(_estimate(evaluations[name]["macro_f1"]) for name in names)],
        ["loss", *(share(evaluations[name]["loss"]) for name in names)],
        ["calibration error", *(share(evaluations[name]["ece"]) for name in names)],
        ["Brier score", *(share(evaluations[name]["brier"]) for name in names)],
    ]
    # The task's own figures; a judgement that an older version kept has none.
    for figure in sorted({figure for name in names for figure in evaluations[name].get("own", {})}):
        rows.append([figure, *(share(evaluations[name].get("own", {}).get(figure)) for name in names)])
    for label in evaluations[names[0]]["classes"]:
        for measure, title in (("sensitivity", "sensitivity"), ("specificity", "specificity"), ("auc", "AUC")):
            cells = (_estimate(evaluations[name]["per_class"][label][measure]) for name in names)
            rows.append([f"{title}, {label}", *cells])
    terminal.table(["", *(f"{MODELS[name]}>" for name in names)], rows)
    for name, item in judgement["comparisons"].items():
        difference = item["difference"]
        terminal.line(
            f"accuracy minus that of the one {_beside(name)}: {difference['value']:+.4f} "
            f"({difference['low']:+.4f} to {difference['high']:+.4f}), p = {item['p_value']:.3f}"
        )
    terminal.line()
    first = evaluations[names[0]]
    confusion_table(terminal, first["classes"], first["confusion"])


def _beside(name: str) -> str:
    return {"champion": "in use", "local_only": "trained here alone"}.get(name, name)


def _estimate(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['value']:.3f} ({value['low']:.3f}-{value['high']:.3f})"


def ask_version(terminal: Terminal, site: Site, study: str | None, version: int | None) -> tuple[str, int]:
    """The version that is meant: the one given, the only undecided one, or the one that the person names."""
    waiting = [item for item in versions_here.undecided(site) if study in (None, item.study)]
    if version is None and len({(item.study, item.version) for item in waiting}) == 1:
        if terminal.interactive:
            show_updates(terminal, waiting)
        return waiting[0].study, waiting[0].version
    if version is None and not waiting:
        raise InvalidInput("No version waits for a decision; name one.")
    name = versions_here.only_study(site, study)
    if version is None:
        numbers = [str(item.version) for item in waiting if item.study == name]
        version = int(terminal.ask(None, "Version", "VERSION", numbers[0] if terminal.interactive else None, numbers))
    return name, version


def _decided(terminal: Terminal, decided: Decided, text: str) -> None:
    known = decided.version
    value = {**_version_value(known), "delivered": decided.delivered}
    late = "" if decided.delivered else " The coordinator does not answer; the running node delivers the decision."
    terminal.result(value, lambda: terminal.line(f"{text}{late}"))


@click.command(cls=Command)
@click.argument("version", type=int, required=False)
@click.option("--study", help="The study; needed only when there are several.")
@click.option("--reason", default="", help="Why.")
@click.option("--person", help="Who decides; stands under the signature.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def accept(
    terminal: Terminal, /, version: int | None, study: str | None, *, reason: str, person: str | None, yes: bool
) -> None:
    """Accept VERSION, or the one that waits: predict uses it from now on."""
    with open_site() as site:
        fetch_offered(terminal, site)
        name, number = ask_version(terminal, site, study, version)
        known = _known(site, name, number)
        if known.evaluation is not None and terminal.interactive and not terminal.json:
            show_judgement(terminal, known.evaluation)
        who = signing_person(terminal, site, person)
        terminal.confirm(f"Put version {number} of {name} in use at {site.name}?", yes)
        decided = versions_here.accept(site, name, number, person=who, reason=reason)
    _decided(terminal, decided, f"Version {number} of {name} is accepted and in use: {decided.version.file}")


@click.command(cls=Command)
@click.argument("version", type=int, required=False)
@click.option("--study", help="The study; needed only when there are several.")
@click.option("--reason", help="Why; the coordinator reads it.")
@click.option("--person", help="Who decides; stands under the signature.")
@pass_terminal
def reject(terminal: Terminal, version: int | None, study: str | None, reason: str | None, person: str | None) -> None:
    """Reject VERSION, or the one that waits, with a reason; if it is in use, the one before takes its place."""
    with open_site() as site:
        fetch_offered(terminal, site)
        name, number = ask_version(terminal, site, study, version)
        why = terminal.ask(reason, "Reason", "--reason")
        decided = versions_here.reject(site, name, number, person=signing_person(terminal, site, person), reason=why)
        in_use = site.store.champion(name)
    text = f"Version {number} of {name} is rejected; in use is {'none' if in_use is None else f'version {in_use}'}."
    _decided(terminal, decided, text)


@click.command(cls=Command)
@click.argument("version", type=int, required=False)
@click.option("--study", help="The study; needed only when there are several.")
@click.option("--reason", default="", help="Why; the coordinator reads it.")
@click.option("--person", help="Who decides; stands under the signature.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def rollback(
    terminal: Terminal, /, version: int | None, study: str | None, *, reason: str, person: str | None, yes: bool
) -> None:
    """Go back to VERSION, or to the one that was in use before; the present one is rejected."""
    with open_site() as site:
        name = versions_here.only_study(site, study)
        who = signing_person(terminal, site, person)
        target = "the version before" if version is None else f"version {version}"
        terminal.confirm(f"Go back to {target} of {name} at {site.name}?", yes)
        decided = versions_here.rollback(site, name, version, person=who, reason=reason)
    _decided(terminal, decided, f"Version {decided.version.version} of {name} is in use again.")


@click.command(cls=Command)
@click.option("--study", help="Only this study's.")
@pass_terminal
def history(terminal: Terminal, study: str | None) -> None:
    """Which versions came, what was decided, and which was in use when; needs no coordinator."""
    with open_site() as site:
        known = site.store.versions(study)
        studies = sorted({item.study for item in known})
        used = [entry for name in studies for entry in versions_here.history(site, name)]
    value = {
        "versions": [_version_value(item) for item in known],
        "in_use": [{**asdict(entry), "at": entry.at.isoformat()} for entry in used],
    }

    def show() -> None:
        rows = [
            [k.study, k.version, moment(k.received_at), k.decision, moment(k.decided_at), k.person, k.reason]
            for k in known
        ]
        columns = ["study", "version>", "received", "decision", "decided", "person", "reason"]
        terminal.table(columns, rows, "no versions yet")
        if used:
            terminal.line()
            in_use = [[entry.study, entry.version, moment(entry.at), entry.person, entry.reason] for entry in used]
            terminal.table(["study", "version>", "in use from", "person", "reason"], in_use)

    terminal.result(value, show)


@click.command(cls=Command)
@click.option("--study", help="Only this study's.")
@pass_terminal
def models(terminal: Terminal, study: str | None) -> None:
    """List the model files in this hospital, and whether each is still what the coordinator signed."""
    with open_site() as site:
        known = site.store.versions(study)
        in_use = {item.study: site.store.champion(item.study) for item in known}
    rows = [(item, _condition(item), in_use[item.study] == item.version) for item in known]
    value = [
        {
            "study": item.study,
            "version": item.version,
            "file": str(item.file),
            "size_bytes": item.size_bytes,
            "sha256": item.digest,
            "condition": condition,
            "in_use": used,
        }
        for item, condition, used in rows
    ]
    table = [
        [item.study, item.version, "yes" if used else "", condition, size(item.size_bytes), item.digest[:16], item.file]
        for item, condition, used in rows
    ]
    columns = ["study", "version>", "in use", "condition", "size>", "SHA-256", "file"]
    terminal.result(value, lambda: terminal.table(columns, table, "no models yet"))


def _condition(known: KnownVersion) -> str:
    if not known.file.exists():
        return "missing"
    return "intact" if sha256_file(known.file) == known.digest else "changed"


@click.command(cls=Command)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--study", help="The study whose model is to be used.")
@click.option("--version", type=int, help="A version other than the one in use.")
@pass_terminal
def predict(terminal: Terminal, path: Path, study: str | None, version: int | None) -> None:
    """Class probabilities for the file or folder PATH, by the version in use; nothing leaves the hospital.

    What cannot be read is named with the reason, and the rest is predicted; the exit code is 1 when nothing could be.
    """
    with open_site() as site, terminal.progress("predicting") as advance, site.trainer() as trainer:
        listener = reading_listener(advance)
        found = versions_here.predict(site, trainer, path, study=study, version=version, listener=listener)
    value = [_prediction_value(item) for item in found]
    terminal.result(value, lambda: _show_predictions(terminal, value))
    skipped = sum("skipped" in item for item in value)
    if skipped == len(value):
        raise NothingPredicted(f"Nothing in {path} could be read; the reasons stand beside the names.")
    if skipped:
        terminal.note(f"{skipped} of {len(value)} could not be read; the reasons stand beside the names.")


def _prediction_value(item: Mapping[str, Any]) -> dict[str, Any]:
    if "skipped" in item:
        return {"path": item["path"], "name": item["name"], "skipped": item["skipped"]}
    return {
        "path": item["path"],
        "name": item["name"],
        "class": item["label"],
        "probabilities": item["probabilities"],
    }


def _show_predictions(terminal: Terminal, found: Sequence[Mapping[str, Any]]) -> None:
    classes = list(next((item["probabilities"] for item in found if "probabilities" in item), {}))
    rows = [
        [item["name"], item["class"], *(f"{item['probabilities'][name]:.4f}" for name in classes)]
        if "probabilities" in item
        else [item["name"], f"not read: {item['skipped']}", *("" for _ in classes)]
        for item in found
    ]
    terminal.table(["name", "class", *(f"{name}>" for name in classes)], rows, "nothing to predict")

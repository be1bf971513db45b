"""Looking at data before anything is sent, and dividing a dataset for trials."""

import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from fl_client.check import check_data as read_and_check
from fl_client.check import read_study, study_of_folder
from fl_client.cli.installation import load_settings
from fl_client.cli.runs import ask_study
from fl_client.identity import NotJoined
from fl_client.partition import DEFAULT_SEED, SitePart, split_dataset
from fl_client.site import Site
from fl_client.tasks.base import PARTS, DataReport, LocalOptions
from medhive.errors import InvalidInput
from medhive.spec import StudyData
from medhive.terminal import Command, Terminal, pairs, pass_terminal

FOLDER_TASKS: Final = frozenset({"image-folder", "ct-volume"})  # whose classes are told by folders alone
SHOWN: Final = 20  # skipped files named on a screen; --all names every one


@dataclass(frozen=True)
class _Subject:
    """What is to be checked, against what."""

    task: str
    path: Path
    data: StudyData
    secret: bytes
    local: LocalOptions
    study: str | None


@click.command("check-data", cls=Command)
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--study", help="The study that the data are for; known once this hospital has joined.")
@click.option("--task", help="Before joining: image-folder, ct-volume or tabular.")
@click.option(
    "--study-file", type=click.Path(path_type=Path), help="Before joining: JSON with the study's task and data."
)
@click.option(
    "--class", "classes", multiple=True, metavar="LOCAL=STUDY", help="What a local class is called in the study."
)
@click.option("--all", "everything", is_flag=True, help="Name every skipped file.")
@pass_terminal
def check_data(terminal: Terminal, /, path: Path | None, everything: bool, **given: Any) -> None:
    """Read the data at PATH as training would, and say what is wrong with them; nothing is sent.

    Without PATH it is the study's folder as in DATA_DIR or the settings.
    """
    subject = _subject(terminal, path, given)
    with terminal.progress("reading the data") as advance:
        report = read_and_check(
            subject.task, subject.path, subject.data, subject.secret, on_progress=advance, local=subject.local
        )
    value = {"study": subject.study, "path": str(subject.path), **report.to_json()}
    terminal.result(
        value, lambda: _show_report(terminal, subject, report, len(report.skipped) if everything else SHOWN)
    )


def _subject(terminal: Terminal, path: Path | None, given: dict[str, Any]) -> _Subject:
    class_map = pairs(given["classes"], "--class")
    if given["study"] is None and (given["task"] or given["study_file"]):
        return _unjoined(path, given, class_map)
    try:
        site = Site.open(load_settings())
    except NotJoined:
        if path is None and given["study"] is None:
            raise click.UsageError("Give PATH and --task, or join a coordinator first.") from None
        return _unjoined(path, given, class_map)
    with site:
        return _joined(terminal, site, path, given["study"], class_map)


def _joined(terminal: Terminal, site: Site, path: Path | None, name: str | None, class_map: dict[str, str]) -> _Subject:
    study = ask_study(terminal, site, name)
    own, only_judged = site.store.study(study.name), site.identity.evaluates_only
    local = LocalOptions(
        {**own.class_map, **class_map},
        own.groups_csv,
        own.weights_file,
        own.labels_csv,
        site.folder("cache"),
        site.settings.cache_bytes,
        "judge" if only_judged else "train",
    )
    secret = site.keys.secret_file.read_bytes()
    data = study.data.as_test_set() if only_judged else study.data
    return _Subject(study.task, path or site.data_dir(study.name), data, secret, local, study.name)


def _unjoined(path: Path | None, given: dict[str, Any], class_map: dict[str, str]) -> _Subject:
    if given["study"]:
        raise NotJoined(
            "This hospital has not joined yet, so its studies are not known; give --task instead of --study."
        )
    path = path or load_settings().data_dir
    # No key yet: this fingerprint and these parts are for looking only.
    secret = secrets.token_bytes(32)
    local = LocalOptions(class_map)
    if given["study_file"]:
        task, data = read_study(given["study_file"])
        return _Subject(given["task"] or task, path, data, secret, local, None)
    task = given["task"] or "image-folder"
    if task not in FOLDER_TASKS:
        raise click.UsageError(f"Give --study-file: {task} needs the study's description.")
    if not path.exists():
        raise InvalidInput(f"There is nothing at {path}; give the data folder.")
    return _Subject(task, path, study_of_folder(path), secret, local, None)


def _show_report(terminal: Terminal, subject: _Subject, report: DataReport, shown: int) -> None:
    against = f"study {subject.study}" if subject.study else "its own classes"
    terminal.line(f"{subject.path} against {against}: {report.examples} examples")
    terminal.line()
    rows = [
        [name, *(report.parts.get(part, {}).get(name, 0) for part in PARTS), count]
        for name, count in report.classes.items()
    ]
    terminal.table(["class", *(f"{part}>" for part in PARTS), "all>"], rows)
    for reason, count in report.counts_by_reason().items():
        terminal.line(f"not used, {reason}: {count}")
    for item in report.skipped[:shown]:
        terminal.line(f"  {item.name}: {item.reason}")
    if len(report.skipped) > shown:
        terminal.line(f"  and {len(report.skipped) - shown} more; --all names them")
    for name, kept in report.duplicates[:shown]:
        terminal.line(f"  {name}: the same as {kept}")
    if report.groups is not None:
        terminal.line(f"patient groups: {report.groups}")
    for remark, count in report.remarks.items():
        terminal.line(f"to know, {remark}: {count}")


@click.command(cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder; gets one folder a site.")
@click.option("--sites", type=int, help="How many sites [3].")
@click.option("--names", help="The sites' names, separated by commas.")
@click.option("--shares", help="How much each site gets of every class, such as 500,300,400.")
@click.option(
    "--dirichlet", "alpha", type=float, help="Draw each class's shares; the smaller, the less alike the sites."
)
@click.option("--seed", type=int, default=DEFAULT_SEED, show_default=True, help="The same seed divides the same way.")
@click.option("--label", help="A table's label column, by name or position from 0.")
@click.option("--no-header", is_flag=True, help="A table without a header line.")
@click.option("--delimiter", default=",", show_default=True, help="What separates a table's columns.")
@pass_terminal
def split(terminal: Terminal, /, source: Path, out: Path, **given: Any) -> None:
    """Copy SOURCE (a folder of class folders, or a CSV) into one folder a site.

    Every class is divided on its own; without --shares or --dirichlet evenly. CT scans are divided, and counted, by
    patient. SOURCE is only read, and nothing that exists is overwritten.
    """
    shares = _numbers(given["shares"]) if given["shares"] else None
    sites = _sites(given["names"], given["sites"], shares)
    label = given["label"]
    parts = split_dataset(
        source,
        out,
        sites,
        shares=shares,
        alpha=given["alpha"],
        seed=given["seed"],
        label_column=int(label) if label and label.lstrip("-").isdecimal() else label,
        has_header=not given["no_header"],
        delimiter=given["delimiter"],
    )
    value = [{**asdict(part), "folder": str(part.folder)} for part in parts]
    terminal.result(value, lambda: _show_parts(terminal, parts))


def _sites(names: str | None, count: int | None, shares: list[float] | None) -> int | list[str]:
    """The names, or the number: the one given, else as many as there are shares, else three."""
    if names and count is not None:
        raise click.UsageError("Give --sites or --names, not both.")
    if names:
        return [name.strip() for name in names.split(",")]
    if count is not None:
        return count
    return len(shares) if shares else 3


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--shares takes numbers separated by commas, not {text!r}.") from error


def _show_parts(terminal: Terminal, parts: list[SitePart]) -> None:
    names = list(parts[0].classes)
    rows: list[list[object]] = [
        [part.site, *(part.classes[name] for name in names), part.examples, f"{part.percent:.1f}%"] for part in parts
    ]
    total = sum(part.examples for part in parts)
    sums = [sum(part.classes[name] for part in parts) for name in names]
    rows.append(["all", *sums, total, "100.0%"])
    terminal.table(["site", *(f"{name}>" for name in names), "all>", "share>"], rows)
    terminal.line()
    terminal.line(f"The parts are in {parts[0].folder.parent}")

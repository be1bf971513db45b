"""Studies: what they are about, who belongs to them."""

import csv
import json
from pathlib import Path
from typing import Any, Final

import click

from api_gateway.admin.queues import study_queue
from api_gateway.admin.session import connect
from medhive.errors import InvalidInput
from medhive.spec import StudyData
from medhive.terminal import Group, Terminal, build, pass_terminal, values
from medhive.views import studies_table
from medhive.wire import API, NewStudy, StudyAnswer

MAX_FILE_BYTES: Final = 8 * 1024 * 1024  # ten thousand columns with their categories are below


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def studies(context: click.Context) -> None:
    """Studies; alone, list them."""
    if context.invoked_subcommand is None:
        context.invoke(list_studies)


@studies.command("list")
@pass_terminal
def list_studies(terminal: Terminal) -> None:
    """List the studies."""
    with connect() as client:
        found = [StudyAnswer.model_validate(row) for row in client.get(f"{API}/studies")]
    terminal.result(found, lambda: studies_table(terminal, found))


@studies.command("show")
@click.argument("name")
@pass_terminal
def show_study(terminal: Terminal, name: str) -> None:
    """Show one study."""
    with connect() as client:
        study = StudyAnswer.model_validate(client.get(f"{API}/studies/{name}"))
    terminal.result(study, lambda: _show(terminal, study))


def _show(terminal: Terminal, study: StudyAnswer) -> None:
    data = study.data
    terminal.fields(
        [
            ("study", study.name),
            ("title", study.title),
            ("task", study.task),
            ("classes", ", ".join(data.classes)),
            ("members", ", ".join(study.members)),
            ("newest version", study.newest_version),
            ("task options", ", ".join(f"{key}={value}" for key, value in data.options.items())),
            ("run defaults", ", ".join(f"{key}={value}" for key, value in study.defaults.items())),
            ("shares", f"validation {data.validation_share:g}, held-out {data.heldout_share:g}"),
            ("columns", len(data.table.columns) if data.table else None),
            ("label", data.table.label.name if data.table else None),
        ]
    )
    if data.table:
        terminal.line()
        rows = [[column.name, column.type, ", ".join(column.categories)] for column in data.table.columns]
        terminal.table(["column", "type", "categories"], rows)


@studies.command("create")
@click.argument("name", required=False)
@click.option("--file", "study_file", type=click.Path(path_type=Path), help="A JSON file with the fields of a study.")
@click.option("--title", help="One line for people.")
@click.option("--task", help="image-folder, ct-volume or tabular; or one of your own.")
@click.option("--classes", help="The classes, separated by commas, in the order of the model's outputs.")
@click.option("--member", "members", multiple=True, help="A hospital that takes part; may be repeated.")
@click.option(
    "--option", "options", multiple=True, metavar="NAME=VALUE", help="An option of the task, such as image_size=96."
)
@click.option(
    "--default", "defaults", multiple=True, metavar="NAME=VALUE", help="A default of its runs, such as rounds=20."
)
@click.option(
    "--columns-file",
    type=click.Path(path_type=Path),
    help="Tables: JSON (a list of columns, or all of the format), or CSV lines: name,type,category|category.",
)
@click.option("--label", help="Tables: the column to predict.")
@click.option("--positive-above", type=float, help="Tables: a label above this is the second class.")
@click.option("--no-header", is_flag=True, help="Tables: the files have no header line.")
@click.option("--delimiter", help="Tables: what separates columns [,].")
@click.option("--missing", "missing", multiple=True, help="Tables: a mark of a missing value; may be repeated.")
@click.option("--validation-share", type=float, help="Share of each site's data for validation [0.2].")
@click.option("--heldout-share", type=float, help="Share kept for the decision on a version [0.1].")
@click.option("--initial-seed", type=int, help="Seed of version 0 [42].")
@pass_terminal
def create_study(terminal: Terminal, /, name: str | None, study_file: Path | None, **flags: Any) -> None:
    """Make a study called NAME, out of flags, a file, or both (flags win)."""
    fields = _read_json_object(study_file) if study_file else {}
    name = terminal.ask(name or fields.get("name"), "Name of the study", "NAME")
    task = terminal.ask(
        flags["task"] or fields.get("task"), "Task", "--task", "image-folder" if terminal.interactive else None
    )
    data = _data_fields(terminal, dict(fields.get("data", {})), flags)
    given: dict[str, Any] = {**fields, "name": name, "task": task, "data": data}
    if flags["title"] is not None:
        given["title"] = flags["title"]
    given["members"] = [*fields.get("members", ()), *flags["members"]]
    given["defaults"] = {**fields.get("defaults", {}), **values(flags["defaults"], "--default")}
    with connect() as client:
        study = StudyAnswer.model_validate(client.post(f"{API}/studies", build(NewStudy, **given)))
    terminal.result(study, lambda: _show(terminal, study))


def _data_fields(terminal: Terminal, data: dict[str, Any], flags: dict[str, Any]) -> StudyData:
    if flags["classes"] or "classes" not in data:
        text = terminal.ask(flags["classes"], "Classes, separated by commas", "--classes")
        data["classes"] = [word.strip() for word in text.split(",")]
    data["options"] = {**data.get("options", {}), **values(flags["options"], "--option")}
    for share_or_seed in ("validation_share", "heldout_share", "initial_seed"):
        if flags[share_or_seed] is not None:
            data[share_or_seed] = flags[share_or_seed]
    table = _table_fields(dict(data.get("table") or {}), flags)
    return build(StudyData, **{**data, "table": table or None})


def _table_fields(table: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    if flags["columns_file"]:
        table = {**table, **_read_columns(flags["columns_file"])}
    label = dict(table.get("label") or {})
    if flags["label"]:
        label["name"] = flags["label"]
    if flags["positive_above"] is not None:
        label["positive_above"] = flags["positive_above"]
    given = {
        "label": label or None,
        "has_header": False if flags["no_header"] else None,
        "delimiter": flags["delimiter"],
        "missing": flags["missing"] or None,
    }
    return {**table, **{key: value for key, value in given.items() if value is not None}}


def _read_columns(path: Path) -> dict[str, Any]:
    """Columns of a table, or its whole format, out of a JSON or CSV file."""
    text = _read_text(path)
    if text.lstrip().startswith(("{", "[")):
        value = _parse_json(path, text)
        return value if isinstance(value, dict) else {"columns": value}
    columns = []
    for row in csv.reader(text.splitlines()):
        if row and not row[0].startswith("#"):
            name, kind, categories = (*(cell.strip() for cell in row[:3]), "", "")[:3]
            columns.append(
                {"name": name, "type": kind or "numeric", "categories": [c for c in categories.split("|") if c]}
            )
    return {"columns": columns}


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise InvalidInput(f"{path} is larger than {MAX_FILE_BYTES} bytes.")
        return raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"Cannot read {path}: {error}.") from error


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}.") from error


def _read_json_object(path: Path) -> dict[str, Any]:
    value = _parse_json(path, _read_text(path))
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} does not hold a JSON object with the fields of a study.")
    return value


@studies.command("members")
@click.argument("name")
@click.option("--add", "added", multiple=True, metavar="SITE", help="A hospital to take in; may be repeated.")
@click.option("--remove", "removed", multiple=True, metavar="SITE", help="A hospital to take out; may be repeated.")
@pass_terminal
def members(terminal: Terminal, name: str, added: tuple[str, ...], removed: tuple[str, ...]) -> None:
    """List a study's members, or change them."""
    with connect() as client:
        for site in added:
            client.put(f"{API}/studies/{name}/members/{site}")
        for site in removed:
            client.delete(f"{API}/studies/{name}/members/{site}")
        study = StudyAnswer.model_validate(client.get(f"{API}/studies/{name}"))
    value = {"study": study.name, "members": study.members}
    terminal.result(value, lambda: terminal.table(["member"], [[site] for site in study.members], "no members"))


studies.add_command(study_queue)

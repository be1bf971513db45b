"""How MedHive's command lines speak to people and to programs, decided once for the coordinator and the hospital.

Results go to standard output, as tables or with `--json` as one JSON value; progress, messages and questions go to standard
error. Exit codes: 0 done, 1 failed (`error: <sentence>`), 2 wrong use. What is missing is asked for only when a person sits
at a terminal and `--no-input` is not given. Commands are loaded when they are called, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from medhive import __version__
from medhive.errors import InvalidInput, MedHiveError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

FAILED: Final = 1
WRONG_USE: Final = 2
INTERRUPTED: Final = 130  # the shell's convention for a program ended by Ctrl-C
# A pipe has no width; a table in a file must not be folded, and no table of ours is wider.
PIPE_WIDTH: Final = 240
# A row of a narrow table that is folded into more lines is easier to read as names and values.
MOST_FOLDS: Final = 4
UNLIMITED_WIDTH: Final = 100_000
MAX_SECRET_BYTES: Final = 64 * 1024  # a password, token or policy file is never larger
GUIDE: Final = "docs/troubleshooting.md"
# Errors whose cause is seldom in the command itself, with the section that says where to look.
GUIDE_SECTIONS: Final[Mapping[str, str]] = {
    "unreachable": "The coordinator does not answer",
    "wrong-authority": "Another server answers",
    "clock-skew": "The clock is off",
    "incompatible-version": "The versions do not fit",
    "site-revoked": "The hospital is revoked",
    "no-space": "The disk is full",
    "out-of-memory": "Out of memory",
    "trainer-stuck": "Out of memory",
    "run-unsuccessful": "A run fails or expires",
    "audit-failed": "The event log does not verify",
    "pacs-unreachable": "The PACS does not answer",
    "pacs-busy": "The PACS does not answer",
    "pacs-refuses": "The PACS refuses",
    "not-dicomweb": "It is no DICOMweb",
    "pull-incomplete": "Scans could not be pulled",
}

Model = TypeVar("Model", bound="BaseModel")
Command_ = TypeVar("Command_", bound=Callable[..., Any])
Advance = Callable[[int, int], None]


def printable(text: object) -> str:
    """Text that cannot move a terminal's cursor or colour it: others' notes and names are shown to an administrator."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in str(text))


def moment(value: datetime | None) -> str:
    """A time as the reader's own clock shows it, to the second; empty when there is none."""
    return value.astimezone().strftime("%Y-%m-%d %H:%M:%S") if value else ""


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def share(value: float | None) -> str:
    """A metric to four places; empty when there is none."""
    return "" if value is None else f"{value:.4f}"


def build(kind: type[Model], **fields: Any) -> Model:
    """Make a value for the wire out of what was typed.

    Raises:
        InvalidInput: a value does not fit; the text names it.
    """
    from medhive.spec import explain  # noqa: PLC0415  pydantic is not loaded for --help

    try:
        return kind.model_validate(fields)
    except ValueError as error:
        raise InvalidInput(f"{explain(error)}.") from error


def plain(value: Any) -> Any:
    """A JSON value out of wire models and containers of them."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read_secret(path: Path) -> str:
    """The first line of a small file that holds a password or a token.

    Raises:
        InvalidInput: it is missing, empty or too large.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
        text = raw.decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"Cannot read {path}: {error}.") from error
    if not text or len(raw) > MAX_SECRET_BYTES:
        raise InvalidInput(f"{path} is empty or larger than {MAX_SECRET_BYTES} bytes.")
    return text.splitlines()[0]


@dataclass(frozen=True)
class Terminal:
    """One command's way to its caller.

    Attributes:
        json: results are for a program.
        no_input: never ask, even when a person could answer.
    """

    json: bool = False
    no_input: bool = False

    @property
    def interactive(self) -> bool:
        """Whether a person can be asked."""
        return not self.no_input and sys.stdin.isatty() and sys.stderr.isatty()

    def note(self, text: object = "") -> None:
        """Say something beside the result."""
        click.echo(printable(text), err=True)

    def line(self, text: object = "") -> None:
        """Print one line of the result."""
        click.echo(printable(text))

    def result(self, value: Any, show: Callable[[], None]) -> None:
        """Print the result: `value` for a program, what `show` prints for a person."""
        if self.json:
            click.echo(json.dumps(plain(value), ensure_ascii=False, indent=2))
        else:
            show()

    def record(self, value: Any, text: str) -> None:
        """Print one piece of a result that comes bit by bit: a JSON line, or a line of text."""
        if self.json:
            click.echo(json.dumps(plain(value), ensure_ascii=False))
        else:
            self.line(text)
        sys.stdout.flush()

    def fail(self, error: MedHiveError, hint: str = "") -> None:
        """Say why the command failed, and to a program also under which name."""
        click.echo(f"error: {printable(error)}{' ' + hint if hint else ''}", err=True)
        if self.json:
            value = {"error": error.code, "detail": str(error), "data": error.data}
            click.echo(json.dumps(value, ensure_ascii=False, default=str))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str = "nothing") -> None:
        """Print a table, or `empty` when it has no row. A column whose name ends in '>' is aligned to the right.

        Where the terminal is too narrow for it, empty columns are left out and long texts folded; where that does not do,
        each row is printed as names and values under each other.
        """
        texts = [[printable("" if cell is None else cell) for cell in row] for row in rows]
        if not texts:
            self.line(empty)
            return
        for compact in (False, True):
            text = _drawn(columns, texts, compact)
            if text is not None:
                click.echo(text)
                return
        for number, row in enumerate(texts):
            if number:
                self.line()
            self.fields(zip((name.removesuffix(">") for name in columns), row, strict=True))

    def fields(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Print names and values under each other; what is None or empty is left out."""
        kept = [(name, printable(value)) for name, value in pairs if value is not None and value != ""]
        width = max((len(name) for name, _ in kept), default=0)
        for name, value in kept:
            click.echo(f"{name:<{width}}  {value}")

    def ask(
        self, value: str | None, what: str, flag: str, default: str | None = None, choices: Sequence[str] = ()
    ) -> str:
        """The value, or the person's answer, or the default.

        Raises:
            click.UsageError: it is missing and there is nobody to ask.
        """
        if value is not None:
            return value
        if not self.interactive:
            if default is not None:
                return default
            raise click.UsageError(f"Missing {flag} ({what}); there is no terminal to ask on.")
        kind = click.Choice(choices) if choices else click.STRING
        return str(click.prompt(what, default=default, type=kind, err=True))

    def ask_secret(self, path: Path | None, what: str, flag: str, twice: bool = False) -> str:
        """A secret out of a file, or typed unseen; never a command-line value, which every process can read.

        Raises:
            click.UsageError: no file is given and there is nobody to ask.
        """
        if path is not None:
            return read_secret(path)
        if not self.interactive:
            raise click.UsageError(f"Missing {flag} ({what}); there is no terminal to ask on.")
        return str(click.prompt(what, hide_input=True, confirmation_prompt=twice, err=True))

    def confirm(self, what: str, yes: bool) -> None:
        """Go on only when `yes` was given or a person says so; without a person a command does what it was told.

        Raises:
            click.Abort: the person says no.
        """
        if not yes and self.interactive:
            click.confirm(what, abort=True, err=True)

    @contextmanager
    def progress(self, what: str, bytes_: bool = False) -> Iterator[Advance]:
        """A bar on standard error while long work goes on; yields a function to call with (done, total)."""
        if not sys.stderr.isatty():
            yield lambda _done, _total: None
            return
        from rich import progress  # noqa: PLC0415  only where there is something to wait for

        columns: list[progress.ProgressColumn] = [progress.TextColumn("{task.description}"), progress.BarColumn()]
        columns.append(progress.DownloadColumn() if bytes_ else progress.MofNCompleteColumn())
        with progress.Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            task = bar.add_task(printable(what), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)


def _drawn(columns: Sequence[str], rows: Sequence[Sequence[str]], compact: bool) -> str | None:
    """A table as text, or None where it does not fit the terminal.

    Args:
        columns: names, with '>' behind those aligned to the right.
        rows: cells without control characters.
        compact: leave out columns without any value, and fold what is aligned to the left.
    """
    from rich import box  # noqa: PLC0415  a tenth of a second that --help need not pay
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    kept = [place for place in range(len(columns)) if not compact or any(row[place] for row in rows)]
    padding = (0, 0, 0, 1) if compact else (0, 1)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=padding)
    for name in (columns[place] for place in kept):
        right = name.endswith(">")
        table.add_column(
            name.removesuffix(">"), justify="right" if right else "left", no_wrap=right or not compact, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(row[place]) for place in kept))
    console = _console(sys.stdout)
    # Measured without the terminal's own limit, to which every measure would be cut.
    width = console.measure(table, options=console.options.update(width=UNLIMITED_WIDTH))
    if (width.minimum if compact else width.maximum) > console.width and len(kept) > 1:
        return None
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return None if compact and len(lines) > MOST_FOLDS * (len(rows) + 1) else "\n".join(lines)


def _console(file: IO[str]) -> "Console":
    from rich.console import Console  # noqa: PLC0415  loaded when something is printed

    return Console(file=file, width=None if file.isatty() else PIPE_WIDTH, highlight=False, markup=False)


# ---- commands ------------------------------------------------------------------------------------------------------


def _remember(context: click.Context, option: click.Parameter, value: bool) -> None:
    # Click shares `meta` between a program and its commands, so the options may stand before or after the command's name.
    if value and option.name:
        context.meta[option.name] = True


def _common_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--json"], is_flag=True, expose_value=False, callback=_remember, help="Print the result as JSON."
        ),
        click.Option(
            ["--no-input"],
            is_flag=True,
            expose_value=False,
            callback=_remember,
            help="Never ask; missing values are errors.",
        ),
    ]


def _enter(context: click.Context, invoke: Callable[[click.Context], Any]) -> Any:
    """Run a command with its terminal; turn a MedHive error into its sentence and exit code 1."""
    context.obj = Terminal(json=context.meta.get("json", False), no_input=context.meta.get("no_input", False))
    try:
        return invoke(context)
    except MedHiveError as error:
        root = context.find_root().command
        context.obj.fail(error, _hint(root, error))
        context.exit(FAILED)


def _hint(root: click.Command, error: MedHiveError) -> str:
    """What to do about an error in this program, else the guide's section for it or for what it says was its cause."""
    own = root.hints.get(error.code) if isinstance(root, Program) else None
    if own is not None or GUIDE in str(error):
        return own or ""
    section = GUIDE_SECTIONS.get(error.code) or GUIDE_SECTIONS.get(str(error.data.get("cause")))
    return f"See {GUIDE}, '{section}'." if section else ""


class Command(click.Command):
    """A command with the options that all share; its function gets a `Terminal` through `pass_terminal`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, and say what went wrong."""
        return _enter(ctx, super().invoke)


class Group(click.Group):
    """A noun with commands of its own; called alone it does what its function does, usually list."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())

    def invoke(self, ctx: click.Context) -> Any:
        """Run what its function does, or the command that follows."""
        return _enter(ctx, super().invoke)


class Program(Group):
    """A program whose commands are imported when they are called.

    Args:
        commands: name → (`module:attribute`, one line for `--help`).
        hints: error code → what to do about it in this program.
    """

    def __init__(
        self, name: str, about: str, commands: Mapping[str, tuple[str, str]], hints: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(name=name, help=about, no_args_is_help=True)
        self.lazy = commands
        self.hints = hints or {}
        click.version_option(__version__, message="%(prog)s %(version)s")(self)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """The commands in the order of the table."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command."""
        if cmd_name not in self.lazy:
            return None
        module, attribute = self.lazy[cmd_name][0].split(":")
        return cast(click.Command, getattr(import_module(module), attribute))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the commands' lines from the table, without importing a single one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in self.lazy.items()])


pass_terminal = click.make_pass_decorator(Terminal)


def main(program: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a program, of many commands or of one, and return its exit code."""
    try:
        code = program.main(args=arguments, prog_name=program.name, standalone_mode=False)
    except click.UsageError as error:
        if error.ctx:
            click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"error: {printable(error.format_message())}", err=True)
        return WRONG_USE
    except click.ClickException as error:
        click.echo(f"error: {printable(error.format_message())}", err=True)
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        return FAILED
    return code if isinstance(code, int) else 0


# ---- the options of a run, shared by every command that asks for one ------------------------------------------------

_RUN_OPTIONS: Final[tuple[tuple[tuple[str, ...], dict[str, Any]], ...]] = (
    (("--rounds",), {"type": int, "help": "Rounds [study's default, else 10; tabular 5]."}),
    (("--local-epochs",), {"type": int, "help": "Epochs at each site and round [5]."}),
    (("--batch-size",), {"type": int, "help": "Examples a step [32; ct-volume 4]."}),
    (("--lr",), {"type": float, "help": "Learning rate [the task's own]."}),
    (
        ("--strategy",),
        {"help": "fedavg, fedprox, fedbn, scaffold, fedavgm, fedadam, fedyogi, fedmedian, fedtrimmedavg or krum."},
    ),
    (("--strategy-param",), {"multiple": True, "metavar": "NAME=NUMBER", "help": "A parameter of the strategy."}),
    (("--mu",), {"type": float, "help": "FedProx' pull to the global weights [0.1]."}),
    (("--min-sites",), {"type": int, "help": "Fewest sites that must consent and answer [2]."}),
    (("--fraction",), {"type": float, "help": "Share of the consenting sites in a round [1.0]."}),
    (("--seed",), {"type": int, "help": "Seed of everything random [42]."}),
    (("--deadline-s",), {"type": float, "help": "Seconds a site may train in a round [3600]."}),
    (("--consent-deadline-s",), {"type": float, "help": "Seconds to wait for consents [604800]."}),
    (("--penalty",), {"type": click.Choice(["l2", "none"]), "help": "Tabular: penalty [l2]."}),
    (("--C", "C"), {"type": float, "help": "Tabular: inverse strength of the penalty [1.0]."}),
    (("--dp-epsilon",), {"type": float, "help": "Differential privacy: bound on epsilon (refused by this version)."}),
    (("--dp-delta",), {"type": float, "help": "Differential privacy: delta (refused by this version)."}),
    (("--dp-clip",), {"type": float, "help": "Differential privacy: clipping norm (refused by this version)."}),
    (("--secagg",), {"is_flag": True, "default": None, "help": "Secure aggregation (refused by this version)."}),
    (("--compress",), {"type": click.Choice(["none"]), "help": "Compression of updates [none]."}),
)
PRIVACY_FLAGS: Final = ("dp_epsilon", "dp_delta", "dp_clip", "secagg")


def run_options(command: Command_) -> Command_:
    """Give a command the options of a run; it gets them as keyword arguments, for `chosen_options`."""
    for names, settings in reversed(_RUN_OPTIONS):
        command = click.option(*names, **settings)(command)
    return command


def chosen_options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `RunOptions` out of the flags that were given; what was not given is left to the study.

    Raises:
        click.UsageError: a strategy's parameter is not NAME=NUMBER.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    privacy = {name: given.pop(name) for name in PRIVACY_FLAGS if name in given}
    params = pairs(given.pop("strategy_param", ()), "--strategy-param")
    if params:
        given["strategy_params"] = {name: _number(value, "--strategy-param") for name, value in params.items()}
    return {**given, "privacy": privacy} if privacy else given


def pairs(values: Iterable[str], flag: str) -> dict[str, str]:
    """NAME=VALUE words as a mapping.

    Raises:
        click.UsageError: a word has no '='.
    """
    found = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator or not name:
            raise click.UsageError(f"{flag} takes NAME=VALUE, not {value!r}.")
        found[name] = text
    return found


def values(words: Iterable[str], flag: str) -> dict[str, Any]:
    """NAME=VALUE words as a mapping; a value that reads as a JSON number, boolean or object is one. Raises as `pairs`."""
    found: dict[str, Any] = {}
    for name, text in pairs(words, flag).items():
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[name] = value if isinstance(value, (bool, int, float, dict)) else text
    return found


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise click.UsageError(f"{flag} takes NAME=NUMBER, not {text!r}.") from error

"""What the documents show really exists: commands and their flags, make targets, settings, files, links and anchors.

A newcomer copies a line, and it works or the document is wrong. So every command is compared with the `--help` of the
program itself, every target with the Makefile, every setting with the settings code in both directions, and every path and
link with the files that are there.
"""

import ast
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

import click
import pytest
from pydantic import AliasChoices

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGURATION: Final = ROOT / "docs" / "configuration.md"
# Two printed pages: what a person reads before opening the code.
MAX_ARCHITECTURE_LINES: Final = 120
MAX_ARCHITECTURE_WORDS: Final = 1100

CLICK_PROGRAMS: Final = {
    "medhive-admin": "api_gateway.admin.__main__",
    "medhive-site": "fl_client.__main__",
    "medhive-simulate": "simulator.__main__",
}
ARGPARSE_PROGRAMS: Final = {"medhive-gateway": "api_gateway.__main__", "medhive-server": "fl_server.__main__"}
PROGRAMS: Final = (*CLICK_PROGRAMS, *ARGPARSE_PROGRAMS)
HOSPITAL_IMAGE: Final = re.compile(r"(.*/)?fl-client(:.*)?")  # the image is the hospital's command line
IN_FRONT: Final = ("sudo", "nice", "exec", "time", "env")
OF_OTHERS: Final = {"HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "NO_COLOR", "SSL_CERT_FILE"}  # read by libraries
LEFT_OUT: Final = ("...", "…")
SOURCES: Final = (
    "*.py",
    "*.yaml",
    "*.yml",
    "*.sh",
    "*.toml",
    "*.conf",
    "*.template",
    "*.tpl",
    "Dockerfile*",
    "entrypoint*",
)


# ---- reading documents -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of code in a document, of a block or between backticks."""

    place: str
    text: str


def code_in(path: Path) -> Iterator[Line]:
    """The lines of a document's blocks, continued ones joined, and what stands between backticks elsewhere."""
    name, fenced, before, begun = path.relative_to(ROOT), False, "", ""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (not before.strip() or before.startswith("    "))):
            begun += line.strip()
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            yield Line(f"{name}:{number}", begun)
        else:
            yield from (Line(f"{name}:{number}", found) for found in re.findall(r"`([^`]+)`", line))
        before, begun = line, ""


def commands_in(text: str) -> Iterator[list[str]]:
    """The commands of a line of shell, without its prompt, each as its words; nothing where it is no shell."""
    lexer = shlex.shlex(re.sub(r"^(?:[\w-]+ )?\$ ", "", text), posix=True, punctuation_chars="|;&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    try:
        for word in lexer:
            if set(word) <= set("|;&"):
                yield words
                words = []
            else:
                words.append(word)
    except ValueError:  # an apostrophe in a program's output
        return
    yield words


def without_front(words: list[str]) -> list[str]:
    """A command without the variables and helpers before it, and out of its container."""
    while words and (words[0] in IN_FRONT or re.match(r"^[A-Za-z_]+=", words[0])):
        words = words[1:]
    if words[:1] == ["docker"]:
        for place, word in enumerate(words):
            if word in PROGRAMS:
                return words[place:]
            if HOSPITAL_IMAGE.fullmatch(word) and words[1] == "run":
                return ["medhive-site", *_after_settings(words[place + 1 :])]
        return []
    return [Path(words[0]).name, *words[1:]] if words else []


def _after_settings(words: list[str]) -> list[str]:
    """What follows the `-e NAME=VALUE` that users write behind the image's name."""
    while words[:1] in (["-e"], ["--env"]):
        words = words[2:]
    return words or ["run"]


@cache
def all_code() -> tuple[Line, ...]:
    return tuple(line for path in DOCUMENTS for line in code_in(path))


# ---- commands ----------------------------------------------------------------------------------------------------------


@cache
def help_of(program: str, *path: str) -> str:
    """What `program path --help` prints."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            if program in CLICK_PROGRAMS:
                click_program(program).main([*path, "--help"], prog_name=program)
            else:
                import_module(ARGPARSE_PROGRAMS[program]).main([*path, "--help"])
        except SystemExit as end:
            assert end.code in (0, None), out.getvalue()
    return out.getvalue()


def click_program(name: str) -> click.Command:
    program = import_module(CLICK_PROGRAMS[name]).program
    assert isinstance(program, click.Command)
    return program


def wrong_with(words: Sequence[str]) -> str | None:
    """What a documented command has that does not exist; None when all of it does."""
    words = [word for word in words if word not in LEFT_OUT]
    if words[0] in CLICK_PROGRAMS:
        return wrong_with_click(words[0], words[1:])
    if words[0] in ARGPARSE_PROGRAMS:
        return wrong_with_argparse(words[0], words[1:])
    if words[0] == "make":
        return wrong_with_make(words[1:])
    if words[0].startswith("python") and words[1:] and words[1].endswith(".py"):
        return wrong_with_script(words[1], words[2:])
    return None


def wrong_with_click(program: str, words: list[str]) -> str | None:
    command: click.Command = click_program(program)
    path: list[str] = []
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0].isupper():
            return None  # COMMAND
        found = command.get_command(click.Context(command), rest[0])
        if found is None:
            return f"{' '.join([program, *path])} has no command {rest[0]}"
        path.append(rest.pop(0))
        command = found
    missing = missing_flags(rest, help_of(program, *path))
    if missing or isinstance(command, click.Group):
        return missing
    if rest and rest[-1].startswith("--"):
        rest = rest[:-1]  # an option is only named
    try:
        _, left, _ = command.make_parser(click.Context(command)).parse_args(rest)
    except click.UsageError as error:
        return error.format_message()
    return f"too many words: {left}" if left else None


def wrong_with_argparse(program: str, words: list[str]) -> str | None:
    if not words or words[0].startswith("-"):
        return missing_flags(words, help_of(program))
    if not re.search(rf"(?m)^ +{re.escape(words[0])} ", help_of(program)):
        return f"{program} has no command {words[0]}"
    return missing_flags(words[1:], help_of(program, words[0]))


def missing_flags(words: Sequence[str], text: str) -> str | None:
    flags = [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    gone = [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)]
    return f"no option {', '.join(gone)}" if gone else None


def wrong_with_make(words: Sequence[str]) -> str | None:
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"(?m)^([a-z][a-z-]*):(?!=)", text))
    # The benchmarks read theirs from the environment, where make puts what stands on its command line.
    known = text + "".join(path.read_text("utf-8") for path in (ROOT / "bench").glob("*.py"))
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"\b{name}\b", known):
            return f"the Makefile knows no variable {name}"
        if not equals and not word.startswith("-") and word not in targets:
            return f"the Makefile has no target {word}"
    return None


def wrong_with_script(path: str, words: Sequence[str]) -> str | None:
    script = ROOT / path
    if not script.is_file():
        return f"there is no {path}"
    return missing_flags(words, script.read_text("utf-8"))


def documented_commands() -> Iterator[tuple[Line, list[str]]]:
    for line in all_code():
        for words in map(without_front, commands_in(line.text)):
            if words and (words[0] in (*PROGRAMS, "make") or words[0].startswith("python")):
                yield line, words


def test_every_command_that_the_documents_show_exists() -> None:
    shown = list(documented_commands())
    assert {words[0] for _, words in shown} >= {*PROGRAMS, "make", "python"}
    assert len(shown) > 80
    wrong = [f"{line.place}: {line.text}: {problem}" for line, words in shown if (problem := wrong_with(words))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "medhive-admin reticulate",
        "medhive-admin accounts reticulate",
        "medhive-admin approve REQ_1 --splines",
        "hospital-a $ medhive-site accept 1 2 3",
        "CLIENT_ID=a medhive-site predict --splines DATA",
        "medhive-simulate --splines",
        "medhive-gateway reticulate",
        "medhive-server serve --splines",
        "sudo medhive-gateway --splines",
        "docker exec hospital medhive-site reticulate",
        "docker run -v state:/state fl-client -e CLIENT_ID=a reticulate",
        "make setup && make reticulate",
        "make demo SPLINES=3",
        "python bench/reticulate.py",
        "python bench/run.py --splines",
    ],
)
def test_what_does_not_exist_is_noticed(line: str) -> None:
    found = [words for words in map(without_front, commands_in(line)) if words]
    assert any(wrong_with(words) for words in found)


def test_blocks_and_backticks_are_read(tmp_path: Path) -> None:
    page = ROOT / "docs" / "configuration.md"
    assert any("MEDHIVE_ADMIN_CONFIG" in line.text for line in code_in(page))
    lines = [line.text for line in all_code()]
    assert "make demo" in lines
    assert [words for words in commands_in("a --b 'c d' # e") if words] == [["a", "--b", "c d"]]


# ---- settings ----------------------------------------------------------------------------------------------------------


@cache
def settings() -> dict[str, object]:
    """Every setting of every program by its (shorter) variable, with its default."""
    from api_gateway.admin.session import CONFIG_VARIABLE  # noqa: PLC0415 - late: heavy
    from api_gateway.settings import PREFIX as GATEWAY  # noqa: PLC0415
    from api_gateway.settings import Settings as GatewaySettings  # noqa: PLC0415
    from api_gateway.tunnel import PREFIX as TUNNEL  # noqa: PLC0415
    from api_gateway.tunnel import TunnelSettings  # noqa: PLC0415
    from fl_client.settings import Settings as SiteSettings  # noqa: PLC0415
    from fl_server.settings import PREFIX as SERVER  # noqa: PLC0415
    from fl_server.settings import ServerSettings  # noqa: PLC0415

    found: dict[str, object] = {CONFIG_VARIABLE: None}
    for prefix, kind in ((GATEWAY, GatewaySettings), (SERVER, ServerSettings), (TUNNEL, TunnelSettings)):
        found |= {
            str(field.validation_alias or prefix + name.upper()): field.default
            for name, field in kind.model_fields.items()
        }
    for field in SiteSettings.model_fields.values():
        alias = field.validation_alias
        names = [str(name) for name in alias.choices] if isinstance(alias, AliasChoices) else [str(alias)]
        found[min(names, key=len)] = field.default
    tracking = (ROOT / "services/mlflow/serve.py").read_text("utf-8")
    of_tracking = re.findall(r"\{PREFIX\}([A-Z_]*[A-Z])\b", tracking) + re.findall(r"\"([A-Z_]+_FILE)\"", tracking)
    return found | {f"MEDHIVE_MLFLOW_{name}": None for name in of_tracking}


def described_settings() -> dict[str, str]:
    """Every variable in the first column of the tables of docs/configuration.md, with the rest of its row."""
    found, prefix = {}, ""
    for line in CONFIGURATION.read_text("utf-8").splitlines():
        if line.startswith("## "):
            given = re.search(r"`(MEDHIVE_[A-Z]+_)\.\.\.`", line)
            prefix = given[1] if given else ""
        cells = line.strip("|").split("|")
        if line.startswith("|"):
            for name in re.findall(r"`([A-Z_]+)`", cells[0]):
                found[
                    name if name.startswith(("MEDHIVE_", "NGROK_")) or prefix == "MEDHIVE_SITE_" else prefix + name
                ] = line
    return found


def test_every_setting_is_described() -> None:
    known = settings()
    assert len(known) > 40
    text = CONFIGURATION.read_text("utf-8")
    missing = [name for name in known if name not in described_settings() and name not in text]
    assert not missing, f"not in {CONFIGURATION.name}: {', '.join(missing)}"


def test_every_described_setting_exists() -> None:
    invented = set(described_settings()) - set(settings()) - OF_OTHERS
    assert not [name for name in invented if not in_sources(name)]
    assert not [
        name for name in invented if name.startswith(("MEDHIVE_GATEWAY_", "MEDHIVE_SERVER_", "MEDHIVE_MLFLOW_"))
    ]


def test_described_defaults_are_the_real_ones() -> None:
    wrong = []
    for name, row in described_settings().items():
        value = settings().get(name)
        if isinstance(value, float | int) and not isinstance(value, bool):
            text = f"{value:g}"
        elif isinstance(value, str | Path):
            text = str(value)
        else:
            continue
        # Bytes are described with a unit.
        if text and not name.endswith("_BYTES") and not re.search(rf"(?<![\w.]){re.escape(text)}(?![\w.])", row):
            wrong.append(f"{name} is {text}")
    assert not wrong


def test_every_variable_that_the_documents_name_exists() -> None:
    named = {
        (path.name, name)
        for path in DOCUMENTS
        for name in re.findall(r"\bMEDHIVE_[A-Z0-9_]*[A-Z0-9]\b", path.read_text("utf-8"))
    }
    named |= {
        (line.place, found[1])
        for line in all_code()
        if (found := re.fullmatch(r"([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?:=.*)?", line.text))
    }
    assert len(named) > 30
    # A table leaves the prefix to its heading.
    known = {*settings(), *OF_OTHERS, *(re.sub(r"^MEDHIVE_[A-Z]+_", "", name) for name in settings())}
    assert not sorted(item for item in named if item[1] not in known and not in_sources(item[1]))


@cache
def source_text() -> str:
    folders = [ROOT / name for name in ("services", "deploy", "bench", "tests") if (ROOT / name).is_dir()]
    files = [path for folder in folders for kind in SOURCES for path in folder.rglob(kind) if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in ("", ".yml", ".yaml", ".example")]
    return "\n".join(path.read_text("utf-8", "replace") for path in files if path != Path(__file__))


def in_sources(name: str) -> bool:
    return re.search(rf"\b{name}\b", source_text()) is not None


# ---- links, files ------------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")


@cache
def headings(path: Path) -> tuple[str, ...]:
    prose = re.sub(r"(?ms)^```.*?^```", "", path.read_text("utf-8"))
    return tuple(re.findall(r"(?m)^#{1,6} (.+?)\s*$", prose))


def broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]*)\)", text):
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (fragment and fragment not in map(anchor, headings(file))):
            broken.append(f"{path.relative_to(ROOT)}: {target}")
    return broken


def test_every_local_link_and_anchor_resolves() -> None:
    assert not [item for path in DOCUMENTS for item in broken_links(path, path.read_text("utf-8"))]
    page = ROOT / "README.md"
    assert len(broken_links(page, "[a](nowhere.md) [b](#nowhere) [c](docs/glossary.md#nowhere) [d](README.md)")) == 3


def test_every_file_that_the_documents_name_is_there() -> None:
    gone = []
    for path in DOCUMENTS:
        named = re.findall(r"(?<![\w/.-])(?:services|deploy|tests|docs|bench|\.ci)/[\w./-]*\w", path.read_text("utf-8"))
        gone += [f"{path.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()]
    assert not gone


def texts_of(path: Path) -> Iterator[str]:
    """The texts in a source file; adjacent ones are one, and values that are filled in are gaps."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_document_that_the_code_points_to_has_what_it_promises() -> None:
    pointers = {
        found
        for path in (ROOT / "services").rglob("*.py")
        for text in texts_of(path)
        for found in re.findall(r"(docs/[\w/-]+\.md)(?:#([\w-]+)|, '([^']+)')?", text)
    }
    assert pointers
    for name, fragment, heading in pointers:
        assert (ROOT / name).is_file(), name
        assert not fragment or fragment in map(anchor, headings(ROOT / name)), f"{name}#{fragment}"
        assert not heading or heading in headings(ROOT / name), f"{name}, {heading}"


# ---- what a document must be -------------------------------------------------------------------------------------------


def test_the_architecture_has_at_most_two_pages() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert len(text.splitlines()) <= MAX_ARCHITECTURE_LINES
    assert len(text.split()) <= MAX_ARCHITECTURE_WORDS


def bad_inputs() -> list[str]:
    """Every kind of bad input that the integration tests know."""
    tree = ast.parse((ROOT / "tests/integration/test_bad_input.py").read_text("utf-8"))
    rows = next(node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ROWS")
    assert isinstance(rows.value, ast.Dict)
    return [str(ast.literal_eval(key)) for key in rows.value.keys if key is not None]


def test_every_bad_input_leads_to_its_section() -> None:
    guide = ROOT / "docs" / "troubleshooting.md"
    found = re.findall(r"(?m)^\| ([^|]+?) \| [^|]*\]\(#([^)]+)\)[^|]* \|$", guide.read_text("utf-8"))
    assert set(bad_inputs()) <= {cause for cause, _ in found}
    assert {section for _, section in found} <= set(map(anchor, headings(guide)))

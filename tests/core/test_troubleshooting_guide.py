"""The guide quotes what the programs really print, and the programs name sections that the guide really has."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from medhive.terminal import GUIDE, GUIDE_SECTIONS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / GUIDE).read_text("utf-8")
SECTIONS = re.findall(r"(?m)^#{2,3} (.+)$", TEXT)
QUOTES = re.findall(r"(?m)^> (.+)$", TEXT)
GAP = "…"
PROGRAMS = ("medhive-site", "medhive-admin")


@cache
def printed() -> tuple[str, ...]:
    """Every text in the programs' sources, with a gap for each value that is filled in."""
    return tuple(
        text
        for folder in ("services", "deploy")
        for path in sorted((ROOT / folder).rglob("*"))
        if (read := READERS.get(path.suffix))
        for text in read(path.read_text("utf-8"))
    )


def texts_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def echoed(script: str) -> Iterator[str]:
    """What a shell script says between double quotes."""
    for text in re.findall(r'echo "([^"]+)"', script):
        yield re.sub(r"\$\{?\w+\}?", GAP, text)


READERS: Mapping[str, Callable[[str], Iterable[str]]] = {
    ".py": lambda text: texts_of(ast.parse(text)),
    ".sh": echoed,
}


def test_gaps_stand_for_values() -> None:
    assert next(texts_of(ast.parse(r"""f"port {a} of " f"{b}" "!" """))) == f"port {GAP} of {GAP}!"
    assert list(echoed('echo "port $A of ${B}!" >&2')) == [f"port {GAP} of {GAP}!"]


def test_there_is_something_to_check() -> None:
    assert len(SECTIONS) > 20
    assert len(QUOTES) > 30
    assert len(printed()) > 1000


@pytest.mark.parametrize("quote", QUOTES)
def test_every_quoted_line_is_printed_by_a_program(quote: str) -> None:
    wanted = quote.strip().strip(GAP)
    assert len(wanted) > 8, "too short to be told from any other text"
    assert any(wanted in text for text in printed())


def test_every_section_that_a_program_names_is_there() -> None:
    named = {found for text in printed() for found in re.findall(re.escape(GUIDE) + r", '([^']+)'", text)}
    assert named
    assert named | set(GUIDE_SECTIONS.values()) <= set(SECTIONS)


def test_every_command_in_the_guide_exists() -> None:
    from api_gateway.admin.__main__ import COMMANDS as ADMIN  # noqa: PLC0415 - only here
    from fl_client.__main__ import COMMANDS as SITE  # noqa: PLC0415

    known = dict(zip(PROGRAMS, (SITE, ADMIN), strict=True))
    used = re.findall(r"(medhive-site|medhive-admin) ([a-z][a-z-]+)", TEXT)
    assert len(used) > 20
    assert not [(program, command) for program, command in used if command not in known[program]]


def test_every_reason_for_a_skipped_example_is_explained() -> None:
    folder = ROOT / "services/fl-client/fl_client/tasks"
    sources = "".join(path.read_text("utf-8") for path in folder.glob("*.py"))
    given = set(re.findall(r"""(?:UnreadableExample|Skipped)\((?:[\w.]+, )?"([a-z-]+)\"""", sources))
    assert len(given) > 8
    assert not [reason for reason in given if f"`{reason}`" not in TEXT]

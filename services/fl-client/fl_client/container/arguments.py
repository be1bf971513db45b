"""What stands after the image's name in `docker run`, and what becomes of the environment.

People write `docker run fl-client -e CLIENT_ID=...` as often as `docker run -e CLIENT_ID=... fl-client`. Docker hands the
first form to the container as arguments, so they are understood here; everything else that belongs before the image's name
is refused with a sentence that says so, instead of being lost.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from medhive.errors import InvalidInput

VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PREFIX: Final = "MEDHIVE_SITE_"
SETTINGS: Final = (
    "SERVER_ADDRESS",
    "CLIENT_ID",
    "JOIN_TOKEN",
    "JOIN_TOKEN_FILE",
    "DATA_DIR",
    "STATE_DIR",
    "EXTRA_CA_FILE",
    "PACS_URL",
    "PACS_USER",
    "PACS_PASSWORD",
    "PACS_PASSWORD_FILE",
    "PACS_TOKEN",
    "PACS_TOKEN_FILE",
    "PACS_CA_FILE",
    "PACS_CERT_FILE",
    "PACS_KEY_FILE",
)
PROXY: Final = "HTTPS_PROXY"
PROXY_FILE: Final = "HTTPS_PROXY_FILE"
MAX_PROXY_BYTES: Final = 4096  # an address with a name and a password is never longer
OWN_OPTIONS: Final = frozenset({"--help", "--version", "--json", "--no-input"})
"""Options of `medhive-site` that may stand before its command."""
PROGRAM: Final = "medhive-site"


class WrongUse(InvalidInput):
    """The arguments after the image's name cannot be what the caller meant."""

    code = "wrong-use"


class WrongSetting(InvalidInput):
    """A setting is missing or wrong; the text begins with the variable's name."""

    code = "wrong-setting"


@dataclass(frozen=True)
class CommandLine:
    """Variables that were given after the image's name, and the command of `medhive-site`; none means to serve."""

    given: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


def parse(arguments: Sequence[str]) -> CommandLine:
    """Take the arguments after the image's name apart.

    Raises:
        WrongUse: an option of `docker run`, or a variable without its value.
    """
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        assignment = _assignment(rest)
        if assignment is None:
            break
        name, separator, value = assignment.partition("=")
        if not separator or not VARIABLE.fullmatch(name):
            # Not repeated: what was meant as a name may be a token.
            raise WrongUse("-e after the image's name takes NAME=VALUE; a bare NAME works only before it.")
        given[name] = value
    _refuse_docker_options(rest)
    if rest[:1] == [PROGRAM]:
        del rest[0]
    return CommandLine(given, tuple(rest))


def _assignment(rest: list[str]) -> str | None:
    """Take one `-e NAME=VALUE`, in any of its four forms, off the front."""
    first = rest[0]
    if first in ("-e", "--env"):
        if len(rest) == 1:
            raise WrongUse(f"{first} at the end of the line has no NAME=VALUE after it.")
        del rest[0]
        return rest.pop(0)
    if first.startswith("--env="):
        return rest.pop(0).removeprefix("--env=")
    if first.startswith("-e") and not first.startswith("--"):
        return rest.pop(0).removeprefix("-e").removeprefix("=")
    return None


def _refuse_docker_options(rest: Sequence[str]) -> None:
    if rest and rest[0].startswith("-") and rest[0] not in OWN_OPTIONS:
        option = rest[0].partition("=")[0]
        raise WrongUse(
            f"{option} stands after the image's name; options of docker run come before it, only -e NAME=VALUE may follow."
        )


def prepared(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment as the programs should see it.

    An empty variable counts as none, since compose files and env files cannot leave one out; spaces and the carriage return
    of an env file from Windows are cut off. A proxy's address may hold a password, so it is read from a file too.

    Raises:
        WrongSetting: the file with the proxy's address cannot be read.
    """
    known = {*SETTINGS, *(PREFIX + name for name in SETTINGS), PROXY, PROXY_FILE}
    clean = {name: value.strip() if name in known else value for name, value in environ.items()}
    clean = {name: value for name, value in clean.items() if value or name not in known}
    if PROXY_FILE in clean:
        clean[PROXY] = _proxy_in(Path(clean.pop(PROXY_FILE)))
    return clean


def _proxy_in(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_PROXY_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSetting(f"{PROXY_FILE}: cannot read the proxy's address from {file}: {error}.") from error
    if not text:
        raise WrongSetting(f"{PROXY_FILE}: {file} is empty.")
    return text

"""What every command of a hospital starts from: its settings, the opened site, and the name of who signs."""

import getpass
import logging
import sys
from typing import Any, Final

import structlog
from pydantic import ValidationError

from fl_client.identity import connect
from fl_client.settings import PREFIX, Settings
from fl_client.site import Site
from medhive.errors import InvalidInput
from medhive.follow import Source
from medhive.terminal import Terminal

PERSON: Final = "person"  # the fact that remembers who signed last


def load_settings(**given: Any) -> Settings:
    """Read the environment; what is given on the command line wins.

    Raises:
        InvalidInput: one sentence that names the variable.
    """
    _warn_on_stderr()
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "the settings"
        variable = name.removeprefix(PREFIX).upper()
        raise InvalidInput(f"{variable}: {first['msg'].removeprefix('Value error, ')}.") from error


def _warn_on_stderr() -> None:
    """Keep the log off standard output, which is for results; the resident node has set up its own already."""
    if not structlog.is_configured():
        structlog.configure(
            logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        )


def open_site() -> Site:
    """Open the state folder of this hospital.

    Raises:
        NotJoined: it has not joined yet.
        InvalidInput: the folder cannot be used.
    """
    settings = load_settings()
    try:
        return Site.open(settings)
    except OSError as error:
        raise unusable(settings, error) from error


def unusable(settings: Settings, error: OSError) -> InvalidInput:
    """Say what is wrong with a state folder."""
    return InvalidInput(f"Cannot use the state folder {settings.state_dir} ({error.strerror}); set STATE_DIR.")


def open_source(site: Site) -> Source:
    """A connection of its own for a follower's event stream."""
    return connect(site.identity, site.keys, site.store, site.settings.extra_ca_file)


def signing_person(terminal: Terminal, site: Site, given: str | None) -> str:
    """The name that stands under a signature: the one given, or the one that the person confirms.

    The last one is proposed, at first the machine's user. Without a terminal a name must be given or known.
    """
    known = site.store.fact(PERSON)
    proposed = known or (getpass.getuser() if terminal.interactive else None)
    name = terminal.ask(given, "Your name, for the signature", "--person", proposed).strip()
    if not name:
        raise InvalidInput("A signature needs a person's name.")
    if name != known:
        site.store.set_fact(PERSON, name)
    return name

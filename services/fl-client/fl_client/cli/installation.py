"""What every command of a hospital starts from: its settings, its database, its keys, and the way to the coordinator."""

import getpass
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from fl_client.gateway import Gateway
from fl_client.identity import Identity, Keys, connect
from fl_client.settings import PREFIX, Settings
from fl_client.store import Store
from medhive.errors import InvalidInput
from medhive.follow import Source
from medhive.terminal import Terminal

PERSON: Final = "person"  # the fact that remembers who signed last


@dataclass(frozen=True)
class Installation:
    """One hospital's installation on this machine."""

    settings: Settings
    store: Store
    keys: Keys

    @property
    def identity(self) -> Identity:
        """Who this hospital is.

        Raises:
            NotJoined: it has not joined yet.
        """
        return Identity.load(self.store)

    def connect(self) -> Gateway:
        """A connection to the coordinator in this hospital's name."""
        return connect(self.identity, self.keys, self.store, self.settings.extra_ca_file)

    def open_source(self) -> Source:
        """A connection of its own for a follower's event stream."""
        return self.connect()

    def person(self, terminal: Terminal, given: str | None) -> str:
        """The name that stands under a signature: the one given, or the one that the person confirms.

        The last one is proposed, then the machine's user; without a terminal a name must be given or known.
        """
        known = self.store.fact(PERSON)
        proposed = known or (getpass.getuser() if terminal.interactive else None)
        name = terminal.ask(given, "Your name, for the signature", "--person", proposed).strip()
        if name != known:
            self.store.set_fact(PERSON, name)
        return name


def load_settings(**given: Any) -> Settings:
    """Read the environment; what is given on the command line wins.

    Raises:
        InvalidInput: one sentence that names the variable.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "the settings"
        variable = name.removeprefix(PREFIX).upper()
        raise InvalidInput(f"{variable}: {first['msg'].removeprefix('Value error, ')}.") from error


def open_installation(settings: Settings | None = None) -> Installation:
    """Open the state folder.

    Raises:
        InvalidInput: it cannot be made or written.
    """
    settings = settings or load_settings()
    folder: Path = settings.state_dir
    try:
        store = Store(folder / "site.db")
    except OSError as error:
        raise InvalidInput(f"Cannot use the state folder {folder} ({error.strerror}); set STATE_DIR.") from error
    return Installation(settings, store, Keys(folder / "keys"))

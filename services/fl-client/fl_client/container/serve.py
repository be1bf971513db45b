"""What the container does without a command: join once, then be the hospital's node.

Everything that a person must put right is asked first and ends the container with its own exit code; everything that passes
by itself is waited for. An invite is used only when the folders are known to be good.
"""

import sqlite3
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Final

import httpx
from pydantic import TypeAdapter, ValidationError

from fl_client.cli.installation import load_settings, open_site
from fl_client.cli.membership import known_identity
from fl_client.cli.report import Reporter
from fl_client.cli.run import ended_by_signals, log_to_stderr
from fl_client.container.arguments import PROXY, WrongSetting
from fl_client.container.device import device_line, gpus, torch_version
from fl_client.container.folders import StateUnusable, is_mounted, require_data, require_state
from fl_client.container.health import Pulse
from fl_client.container.waiting import Patience, Voice
from fl_client.gateway import WrongAuthority
from fl_client.identity import AlreadyJoined, Identity, Invite, JoinOutcome
from fl_client.monitoring import Figures
from fl_client.node import Node
from fl_client.settings import Settings
from fl_client.site import join_site
from medhive.client import Trust
from medhive.errors import (
    BadSignature,
    Conflict,
    Expired,
    InvalidInput,
    MedHiveError,
    NotAllowed,
    NotFound,
    TooManyAttempts,
    Unreachable,
)
from medhive.leftovers import remove_leftovers
from medhive.spec import Name
from medhive.terminal import Terminal

RETRY_S: Final = 5.0
"""Between two tries to join: soon enough for a person who watches, and twelve requests a minute to a coordinator."""

EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - of the container, whose ports nobody reaches until one is published
COORDINATOR: Final = "coordinator"
JoinOnce = Callable[[Settings, str], JoinOutcome]


class InviteRefused(NotAllowed):
    """The coordinator does not let this hospital in with this JOIN_TOKEN."""

    code = "invite-refused"


def serve(terminal: Terminal) -> None:
    """Join if that is still to be done, and serve until stopped.

    Raises:
        MedHiveError: something that a person must put right; `fl_client.container.exits` names the exit code.
    """
    log_to_stderr()
    pulse = Pulse()
    pulse.beat("starting")
    settings = wanted_settings()
    identity = open_folders(terminal, settings)
    patience = Patience(terminal.note, pulse)
    if identity is None:
        token = require_settings(settings)
        outcome = join_when_it_answers(settings, token, patience, terminal.note)
        terminal.note(f"{outcome.identity.site} has joined {outcome.identity.coordinator_name}.")
    else:
        continue_as(terminal, settings, identity)
    with open_site() as site:
        remove_leftovers(settings.state_dir)
        terminal.note(device_line(site.limits().device, gpus(), torch_version()))
        figures = Figures(site.settings, Voice(Reporter(terminal), patience))
        node = Node(site, figures, on_tick=patience.tick)
        with figures.served_for(node, site.store, EVERYWHERE), ended_by_signals(node.stop):
            node.run()


# ---- what a person must put right ------------------------------------------------------------------------------------


def wanted_settings() -> Settings:
    """The environment, as far as it can be judged before anything is opened.

    Raises:
        WrongSetting: a variable is wrong; the text begins with its name.
    """
    try:
        settings = load_settings()
    except InvalidInput as error:
        raise WrongSetting(str(error)) from error
    try:
        Trust(extra_ca_file=settings.extra_ca_file).context()
    except (OSError, ssl.SSLError) as error:
        reason = "it holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise WrongSetting(f"EXTRA_CA_FILE: cannot use {settings.extra_ca_file}: {reason}.") from error
    _require_proxy()
    return settings


def _require_proxy() -> None:
    # The address is not repeated: it may hold a password.
    try:
        httpx.Client().close()
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise WrongSetting(f"{PROXY}: this is no proxy's address; write http://HOST:PORT.") from error


def open_folders(terminal: Terminal, settings: Settings) -> Identity | None:
    """Make sure that state and data can be used; returns who the state belongs to, if anybody.

    Raises:
        StateUnusable, NoSpace, DataUnusable: one of them cannot be.
    """
    require_state(settings.state_dir)
    if not is_mounted(settings.state_dir):
        terminal.note(
            f"No volume is mounted at {settings.state_dir}: this hospital's keys and models go with the container. "
            f"Add -v state:{settings.state_dir}"
        )
    identity = _identity_in(settings)
    if not settings.pacs_url:  # with one the data may all be pulled, also later
        require_data(settings.data_dir)
    return identity


def _identity_in(settings: Settings) -> Identity | None:
    try:
        return known_identity(settings)
    except sqlite3.DatabaseError as error:
        raise StateUnusable(
            f"The database site.db in {settings.state_dir} cannot be read ({error}); put back a backup of the volume."
        ) from error
    except Conflict as error:  # written by a newer version
        raise StateUnusable(str(error)) from error


def continue_as(terminal: Terminal, settings: Settings, identity: Identity) -> None:
    """Go on as the hospital that the state folder belongs to; an invite is no longer needed.

    Raises:
        AlreadyJoined: CLIENT_ID names another hospital, or this one has left.
    """
    if settings.client_id and settings.client_id != identity.site:
        raise AlreadyJoined(
            f"The state folder {settings.state_dir} belongs to {identity.site}, and CLIENT_ID is {settings.client_id}; "
            "use another volume for another hospital.",
            site=identity.site,
        )
    if identity.left:
        raise AlreadyJoined(
            f"The hospital {identity.site} has left; use a fresh state volume and a new invite to join again.",
            site=identity.site,
        )
    if settings.join_token or settings.join_token_file:
        terminal.note(f"{identity.site} has joined {identity.coordinator_name} already; JOIN_TOKEN is ignored.")


def require_settings(settings: Settings) -> str:
    """Make sure that what a first start needs is there; returns the invite's token.

    Raises:
        WrongSetting: something is missing or cannot be.
        InviteRefused: the token is none.
    """
    try:
        token = settings.read_join_token()
    except InvalidInput as error:
        raise WrongSetting(f"JOIN_TOKEN_FILE: {error}") from error
    needed = {"SERVER_ADDRESS": settings.server_address, "CLIENT_ID": settings.client_id, "JOIN_TOKEN": token}
    missing = [name for name, value in needed.items() if not value]
    if missing or token is None:
        raise WrongSetting(
            f"{', '.join(missing)}: missing; this state volume has not joined a coordinator yet, which takes "
            "-e SERVER_ADDRESS=https://HOST:8443 -e CLIENT_ID=NAME -e JOIN_TOKEN=INVITE.",
            missing=missing,
        )
    _require_name(settings.client_id)
    try:
        Invite.parse(token)
    except InvalidInput as error:
        raise InviteRefused(str(error)) from error
    return token


def _require_name(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise WrongSetting(
            "CLIENT_ID: a hospital's name is made of letters, digits, dots, dashes and underscores, at most 63."
        ) from error


# ---- what is waited for ----------------------------------------------------------------------------------------------


def join_when_it_answers(
    settings: Settings,
    token: str,
    patience: Patience,
    say: Callable[[str], None],
    *,
    join: JoinOnce = join_site,
    pause: Callable[[float], None] = time.sleep,
) -> JoinOutcome:
    """Join, however long it takes until the coordinator is up.

    Raises:
        InviteRefused: the coordinator does not let this hospital in.
        WrongAuthority: another server answers.
        MedHiveError: another reason that does not pass by itself.
    """
    while True:
        try:
            outcome = join(settings, token)
        except MedHiveError as error:
            if not passes_by_itself(error):
                raise refusal(error) from error
            if patience.away(COORDINATOR):
                say(f"the coordinator is not up yet, waiting for it and trying again: {error}")
        else:
            patience.back(COORDINATOR)
            return outcome
        patience.tick()
        pause(RETRY_S)


def passes_by_itself(error: MedHiveError) -> bool:
    """Whether waiting can help: nobody answers, or only a proxy does whose gateway is still to come."""
    if isinstance(error, Unreachable):
        return certificate_problem(error) is None
    return isinstance(error, TooManyAttempts)


def certificate_problem(error: BaseException) -> str | None:
    """What TLS did not like about a server's certificate, if that was the cause."""
    found = (each.verify_message for each in _causes(error) if isinstance(each, ssl.SSLCertVerificationError))
    return next(found, None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def refusal(error: MedHiveError) -> MedHiveError:
    """The error that names which of the hospital's settings was refused."""
    problem = certificate_problem(error)
    if problem is not None:
        return WrongAuthority(
            f"The server at SERVER_ADDRESS shows a certificate that is not the inviting coordinator's ({problem}); check "
            "the address. EXTRA_CA_FILE is for a proxy of the hospital that opens TLS."
        )
    if isinstance(error, (WrongAuthority, AlreadyJoined)):
        return error
    if isinstance(error, InvalidInput):
        return WrongAuthority(f"{error} SERVER_ADDRESS is this one.")
    if isinstance(error, (NotAllowed, NotFound, Expired, Conflict, BadSignature)):
        return InviteRefused(f"JOIN_TOKEN is refused: {error}", cause=error.code)
    return error

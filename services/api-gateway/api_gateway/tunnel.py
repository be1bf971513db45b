"""`medhive-gateway tunnel`: keeps one ngrok tunnel open to the proxy, so that hospitals have one public address.

A service of its own, which holds ngrok's token and nothing of MedHive's: what it knows, the present address and where TLS
ends, it writes into one file, which the gateway reads (`api_gateway.state`). pyngrok drives ngrok's agent. Its own way to
pass the token is the agent's command line, which every process on the machine can read; so the token stands in the agent's
configuration file instead, mode 0600.
"""

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pyngrok import ngrok
from pyngrok.conf import PyngrokConfig
from pyngrok.exception import PyngrokError

from medhive.errors import InvalidInput, Unreachable
from medhive.signing import write_secret

PREFIX = "MEDHIVE_TUNNEL_"
TOKEN = "NGROK_AUTHTOKEN"  # noqa: S105 - the variable's name
LOOK_S = 3.0  # how soon a lost tunnel is noticed
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between two tries to open it: ngrok counts them
REQUEST_S = 15.0
NO_TOKEN = f"no tunnel: {TOKEN} is not set"
Say = Callable[[str], None]


class TunnelSettings(BaseSettings):
    """Every setting of the tunnel service, each the variable of its name in capitals with `MEDHIVE_TUNNEL_` before it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    state_dir: Path = Path("tunnel-state")
    # HOST:PORT of the proxy, as seen from here.
    upstream: Annotated[str, StringConstraints(pattern=r"^[^\s:/]+:[0-9]{1,5}$")] = "proxy:8443"
    # A domain that is reserved at ngrok; without one the address changes whenever the tunnel is opened anew.
    domain: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]*$")] = ""
    # auto: TLS ends at the proxy where the plan allows it, else at ngrok.
    protocol: Literal["auto", "tls", "http"] = "auto"
    # ngrok's agent; where it is not there, pyngrok fetches it from ngrok.
    agent: Path | None = None
    token: SecretStr | None = Field(None, validation_alias=TOKEN)
    token_file: Path | None = Field(None, validation_alias=f"{TOKEN}_FILE")

    @classmethod
    def load(cls) -> Self:
        """Read the environment, and take the token out of it, so that the agent does not inherit it.

        Raises:
            InvalidInput: one sentence that names the variable.
        """
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = str(first["loc"][0])
            raise InvalidInput(
                f"{name if name.startswith(TOKEN) else PREFIX + name.upper()}: {first['msg']}."
            ) from error
        finally:
            os.environ.pop(TOKEN, None)

    def read_token(self) -> str | None:
        """ngrok's token; None when there is none.

        Raises:
            InvalidInput: its file cannot be read.
        """
        if self.token_file is None or not self.token_file.name:
            return (self.token.get_secret_value().strip() if self.token else None) or None
        try:
            return self.token_file.read_text("utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{TOKEN}_FILE names {self.token_file}, which cannot be read.") from error


@dataclass(frozen=True)
class Opened:
    """A tunnel that is open: the address that hospitals use, and whether TLS ends at ngrok."""

    public_url: str
    ends_tls: bool

    @property
    def address(self) -> str:
        """`https://HOST` or `https://HOST:PORT`."""
        parts = urlsplit(self.public_url)
        port = parts.port
        return f"https://{parts.hostname}{'' if port in (None, 443) else f':{port}'}"


class TunnelKeeper:
    """Opens the tunnel, writes down where it is, and opens it again when it is lost, until `stop`."""

    def __init__(self, settings: TunnelSettings, token: str, say: Say) -> None:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        self._settings = settings
        self._token = token
        self._say = say
        self._stopped = threading.Event()
        self._file = settings.state_dir / "tunnel.json"
        self._config = self._agent_config()

    def _agent_config(self) -> PyngrokConfig:
        secrets = self._settings.state_dir / "agent"
        secrets.mkdir(mode=0o700, exist_ok=True)
        path = secrets / "ngrok.yml"
        path.unlink(missing_ok=True)
        write_secret(path, f'version: "2"\nauthtoken: {json.dumps(self._token)}\n'.encode())
        agent = self._settings.agent or secrets / "ngrok"
        return PyngrokConfig(
            ngrok_path=str(agent),
            config_path=str(path),
            config_version="2",
            request_timeout=REQUEST_S,
            start_new_session=True,
        )

    def stop(self) -> None:
        """End the service; from a signal handler."""
        self._stopped.set()

    def run(self) -> None:
        """Keep the tunnel open."""
        wait_s = FIRST_WAIT_S
        self._write(None)  # what one that was killed has left is no tunnel
        try:
            while not self._stopped.is_set():
                try:
                    opened = self._open()
                except Unreachable as error:
                    self._say(f"the tunnel cannot be opened, again in {wait_s:g} s: {error}")
                    self._stopped.wait(wait_s)
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                    continue
                wait_s = FIRST_WAIT_S
                self._write(opened)
                end = "ngrok, which reads what passes" if opened.ends_tls else "the proxy"
                self._say(f"the tunnel is open: {opened.address} (TLS ends at {end})")
                self._watch(opened)
        finally:
            self._write(None)
            self._close()

    def _watch(self, opened: Opened) -> None:
        """Return when the tunnel is lost, or when told to stop."""
        while not self._stopped.wait(LOOK_S):
            try:
                urls = {tunnel.public_url for tunnel in ngrok.get_tunnels(self._config)}
            except (PyngrokError, OSError, ValueError):
                urls = set()
            if opened.public_url not in urls:
                self._say(f"the tunnel {opened.address} is lost")
                self._write(None)
                self._close()
                return

    def _open(self) -> Opened:
        """Open the tunnel, passing TLS on to the proxy where the plan allows it.

        Raises:
            Unreachable: neither way; without ngrok's token in the text.
        """
        wanted = self._settings.protocol
        reasons = []
        for protocol in ("tls", "http") if wanted == "auto" else (wanted,):
            scheme = "" if protocol == "tls" else "https://"
            options = {"domain": self._settings.domain} if self._settings.domain else {}
            if protocol == "http":
                options["schemes"] = ["https"]  # type: ignore[assignment]
            try:
                tunnel = ngrok.connect(
                    f"{scheme}{self._settings.upstream}", protocol, pyngrok_config=self._config, **options
                )
            except (PyngrokError, OSError, ValueError) as error:
                reasons.append(f"{protocol}: {error}".replace(self._token, "***"))
                continue
            return Opened(str(tunnel.public_url), protocol == "http")
        self._close()
        raise Unreachable("; ".join(reasons)[:1000])

    def _close(self) -> None:
        with contextlib.suppress(PyngrokError, OSError):
            ngrok.kill(self._config)

    def _write(self, opened: Opened | None) -> None:
        """Tell the gateway, in a file that is whole or not there."""
        content = {"address": opened.address, "ends_tls": opened.ends_tls} if opened else {"address": None}
        part = self._file.with_name("tunnel.json.part")
        part.write_text(json.dumps(content), "utf-8")
        part.replace(self._file)


def serve() -> TunnelKeeper | None:
    """The service, ready to `run`; None, with a sentence, when no token is set.

    Raises:
        InvalidInput: a setting cannot be used.
    """
    # The agent's own lines may repeat the token ("Your authtoken: ...").
    logging.getLogger("pyngrok").setLevel(logging.CRITICAL + 1)
    settings = TunnelSettings.load()
    token = settings.read_token()

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    if token is None:
        say(NO_TOKEN)
        return None
    return TunnelKeeper(settings, token, say)

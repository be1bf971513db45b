"""The aggregator's settings, read once from the environment and handed down.

Tokens and keys stand in files alone, because what is in an environment or on a command line is seen by more programs than
the one that needs it. The processes of the runs read the same variables, which they inherit.
"""

import re
import secrets
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from fl_server.checkpoint import write_durably
from medhive.client import GatewayClient, Trust
from medhive.errors import InvalidInput
from medhive.signing import SigningKey, write_secret

PREFIX = "MEDHIVE_SERVER_"
SECRET_BYTES = 32
MAX_TOKEN_BYTES = 4096

FILE_SETTINGS = (
    "gateway_ca_file",
    "token_file",
    "coordinator_key_file",
    "tls_cert",
    "tls_key",
    "mlflow_ca_file",
    "mlflow_password_file",
)

HOLDER = re.compile("server-[0-9a-f]{16}")
"""An installation's name as a holder of leases."""

Url = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+(/[^\s]*)?$")]


class BadSettings(InvalidInput):
    """The service is not configured; the text names the variable."""

    code = "bad-settings"


class ServerSettings(BaseSettings):
    """Every setting of `medhive-server`, each the variable of its name in capitals with `MEDHIVE_SERVER_` before it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    state_dir: Path
    gateway_url: Url
    gateway_ca_file: Path
    token_file: Path
    coordinator_key_file: Path
    tls_cert: Path
    tls_key: Path
    fleet_port: int = Field(9092, ge=1, le=65535)
    # HOST:PORT of the gate before the SuperLink, in a container; without one only this machine reaches the fleet port.
    gate: Annotated[str, StringConstraints(pattern=r"^[^\s;{}]+:[0-9]{1,5}$")] | None = None
    # Runs that go on at once: each is a process of about 200 MB.
    max_runs: int = Field(8, ge=1, le=100)
    # Where Prometheus reads the figures, over plain HTTP on loopback; in a container the gate passes them on over TLS.
    metrics_port: int | None = Field(None, ge=1, le=65535)
    mlflow_url: Url | None = None
    mlflow_ca_file: Path | None = None
    mlflow_username: str | None = None
    mlflow_password_file: Path | None = None

    @classmethod
    def load(cls) -> Self:
        """Read the environment.

        Raises:
            BadSettings: one sentence that names the variable.
        """
        try:
            settings = cls()
        except ValidationError as error:
            raise BadSettings(_sentence(error)) from error
        settings._require_files()
        return settings

    def _require_files(self) -> None:
        for name in FILE_SETTINGS:
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise BadSettings(
                    f"{PREFIX}{name.upper()} names {path}, which is no file; the gateway makes it at its first start.",
                    variable=PREFIX + name.upper(),
                )

    @property
    def superlink_url(self) -> str:
        """Where the SuperLink answers, on loopback."""
        return f"https://127.0.0.1:{self.fleet_port}"

    @property
    def flower_home(self) -> Path:
        """Flower's own writable folder."""
        return self.state_dir / "flower"

    @property
    def superlink_database(self) -> Path:
        """The SuperLink's SQLite file, by which it survives a crash."""
        return self.state_dir / "superlink.db"

    @property
    def gate_dir(self) -> Path:
        """The gate's configuration and temporary files."""
        return self.state_dir / "gate"

    @property
    def superexec_secret_file(self) -> Path:
        """What SuperLink and superexec know each other by."""
        return self.state_dir / "secrets" / "superexec"

    @property
    def runs_dir(self) -> Path:
        """One folder a run, with its updates and its checkpoint."""
        return self.state_dir / "runs"

    @property
    def tracking_file(self) -> Path:
        """How far MLflow has been told."""
        return self.state_dir / "tracking.json"

    def prepare(self) -> None:
        """Make the folders and this service's own secrets, all for the owner alone.

        Raises:
            BadSettings: the state folder cannot be used.
        """
        try:
            for folder in (self.state_dir, self.flower_home, self.runs_dir):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self.superexec_secret_file.exists():
                write_secret(self.superexec_secret_file, secrets.token_hex(SECRET_BYTES).encode())
        except OSError as error:
            problem = f"Cannot use the state folder {self.state_dir} ({error.strerror}); check {PREFIX}STATE_DIR."
            raise BadSettings(problem) from error

    def holder(self) -> str:
        """This installation's name as a holder of leases: kept, so that a restarted service takes up its own runs."""
        path = self.state_dir / "holder"
        kept = path.read_text("utf-8", "replace").strip() if path.exists() else ""
        if not HOLDER.fullmatch(kept):  # a power cut can leave an empty file
            kept = f"server-{secrets.token_hex(8)}"
            write_durably(path, kept.encode())
        return kept

    def gateway(self) -> GatewayClient:
        """A connection to the gateway with the aggregator's own token.

        Raises:
            BadSettings: the gateway has not made its files yet, or they lie elsewhere.
        """
        token = read_token(self.token_file)
        return GatewayClient(self.gateway_url, Trust(ca_file=self.gateway_ca_file), token)

    def coordinator_key(self) -> SigningKey:
        """The key that signs every task."""
        return SigningKey.load(self.coordinator_key_file)


def read_token(path: Path) -> str:
    """Read a one-line secret.

    Raises:
        BadSettings: it cannot be read, is empty or far too long.
    """
    text = _read_made_by_gateway(path).strip()
    if not text or len(text) > MAX_TOKEN_BYTES or "\n" in text:
        raise BadSettings(f"{path} holds no token: one line of text is expected.")
    return text


def _read_made_by_gateway(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettings(f"Cannot read {path} ({error}); the gateway makes it at its first start.") from error


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    variable = PREFIX + str(first["loc"][0]).upper()
    if first["type"] == "missing":
        return f"{variable} is not set; see docs/configuration.md for what medhive-server needs."
    return f"{variable} does not fit: {first['msg']}."

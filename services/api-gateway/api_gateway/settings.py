"""What an operator may set: read once from the environment in `__main__`, then passed to whoever needs it.

Every variable carries the prefix `MEDHIVE_GATEWAY_`. Secrets may also be given as a file (`..._FILE`), so that they stand
neither in an environment listing nor on a command line. No secret has a default value.
"""

import ipaddress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from medhive.errors import InvalidInput

PREFIX = "MEDHIVE_GATEWAY_"
GIB = 1024**3


class Settings(BaseSettings):
    """The gateway's configuration."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    state_dir: Path = Path("gateway-state")
    host: str = "127.0.0.1"
    # 0 takes any free port; the address that was taken is printed.
    port: int = Field(8000, ge=0, le=65535)
    # postgresql://user@host/database; left out: SQLite in the state folder.
    database_url: SecretStr | None = None
    database_url_file: Path | None = None
    # Names and addresses, besides localhost, that the certificates are valid for.
    public_names: Annotated[tuple[str, ...], NoDecode] = ()
    # Where a hospital's node reaches Flower's fleet API: HOST:PORT, told to it in the answer to its join.
    fleet_address: str = "localhost:9092"
    coordinator_name: str = Field("Coordinator", min_length=1, max_length=120)
    # How long the services' certificates run; a new one is made in the last 60 days, or the last third of a shorter life.
    certificate_days: float = Field(397, gt=0, le=825)
    # How long a CA runs, and how long a successor is known before it issues and the former one is trusted after.
    ca_days: float = Field(3650, gt=0, le=7300)
    ca_overlap_days: float = Field(180, gt=0, le=1825)
    # The coordinator's signing key is changed when it is so old; 0: by `medhive-gateway renew key` alone.
    key_days: float = Field(0, ge=0, le=7300)
    # How often is looked whether one is due, and whether an own one has changed.
    renewal_look_s: float = Field(60.0, gt=0, le=86400)
    # Where the tunnel service (`medhive-gateway tunnel`) writes which address it has.
    tunnel_file: Path | None = None
    # The certificate that the proxy shows when it is not MedHive's own: hospitals then trust public roots at that address.
    own_cert_file: Path | None = None
    # Only asked for its health.
    mlflow_url: str | None = None
    admin_password_file: Path | None = None
    # Folder with a sub-folder for each service that gets its certificates and secrets from here (`api_gateway.handouts`).
    handout_dir: Path | None = None
    # Addresses or networks whose X-Forwarded-For is believed; without any, the peer's own address counts.
    trusted_proxy: Annotated[tuple[str, ...], NoDecode] = ()
    # Prefix of the proxy's internal location over the blobs folder; set, the proxy sends the bytes, not Python.
    accel_prefix: str | None = Field(None, pattern=r"^/[A-Za-z0-9/_-]*$")
    # What one hospital may keep in the blob store at one time: many updates of the largest models.
    site_quota_bytes: int = Field(40 * GIB, gt=0)
    lease_s: float = Field(30.0, gt=0, le=600)
    # How long a peer may take from connecting to the end of its request's head; a slow line needs a second or two.
    head_s: float = Field(20.0, gt=0, le=600)
    # How much of a body must come in how long: a twentieth of what a telephone line carried, so that only who holds a
    # connection on purpose, or has lost his, is cut off.
    body_window_s: float = Field(30.0, gt=0, le=600)
    body_window_bytes: int = Field(8 * 1024, gt=0, le=1024 * 1024)

    @field_validator("own_cert_file", "tunnel_file", mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        return value or None  # compose sets what is not wanted to nothing

    @field_validator("public_names", "trusted_proxy", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("trusted_proxy")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network, strict=False)
        return value

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        # It is announced two overlaps before the end, and must not be due for a successor itself when it takes over.
        if 4 * self.ca_overlap_days > self.ca_days:
            raise ValueError(f"{PREFIX}CA_OVERLAP_DAYS is more than a quarter of {PREFIX}CA_DAYS")
        return self

    @property
    def ca_validity(self) -> timedelta:
        """How long a CA runs."""
        return timedelta(days=self.ca_days)

    @property
    def ca_overlap(self) -> timedelta:
        """How long two CAs are trusted, before and after the successor takes over."""
        return timedelta(days=self.ca_overlap_days)

    @model_validator(mode="after")
    def _one_database(self) -> Self:
        if self.database_url and self.database_url_file:
            raise ValueError(f"set {PREFIX}DATABASE_URL or {PREFIX}DATABASE_URL_FILE, not both")
        return self

    @property
    def database_address(self) -> str:
        """The database's URL for SQLAlchemy.

        Raises:
            InvalidInput: the file that should hold it cannot be read, or it names a database of another kind.
        """
        url = self._given_database_url()
        if url is None:
            return f"sqlite:///{self.state_dir.resolve() / 'gateway.db'}"
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in ("postgresql", "postgresql+psycopg", "sqlite"):
            raise InvalidInput(f"{PREFIX}DATABASE_URL must begin with postgresql:// or sqlite://, not {scheme!r}.")
        return url if scheme == "sqlite" else f"postgresql+psycopg://{rest}"

    def _given_database_url(self) -> str | None:
        if self.database_url_file:
            return read_secret_file(self.database_url_file, "DATABASE_URL_FILE").strip()
        return self.database_url.get_secret_value() if self.database_url else None


def read_secret_file(path: Path, variable: str) -> str:
    """Read a secret that an operator laid into a file.

    Raises:
        InvalidInput: it cannot be read; the text names the variable.
    """
    try:
        return path.read_text().rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{PREFIX}{variable} names {path}, which cannot be read: {error}.") from error


def load_settings() -> Settings:
    """Read the environment.

    Raises:
        InvalidInput: one sentence that names the variable and what is wrong with it.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        variable = PREFIX + "_".join(str(part).upper() for part in first["loc"][:1])
        name = variable if first["loc"] else "The configuration"
        raise InvalidInput(f"{name}: {first['msg']}.") from error

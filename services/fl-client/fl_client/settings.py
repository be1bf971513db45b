"""What a hospital's installation is told from outside: addresses, folders, its name. Built once, passed everywhere.

Containers set the short names of interfaces.md (`SERVER_ADDRESS`, `STATE_DIR`, ...); the same with the prefix
`MEDHIVE_SITE_` is read too and wins, so that two programs on one machine need not share a variable.
"""

from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from medhive.errors import InvalidInput

PREFIX = "MEDHIVE_SITE_"
# Flower's node polls at this pace while a run of this site goes on: facts say 0.1 to 0.2 s costs 17% of a core for three.
FAST_POLL_S = 0.15
# And at this pace otherwise; the gateway's event stream wakes it earlier.
SLOW_POLL_S = 2.0
# The gateway is asked for the state of things at least so often, should its event stream be cut by a proxy in silence.
SYNC_S = 10.0
# Preprocessed scans: ten thousand boxes of 128 × 128 × 128 voxels.
CACHE_BYTES = 20 * 2**30
# What a pull leaves free on its disk: the keys, the database and the models of the hospital may lie on the same one.
PULL_KEEP_FREE_BYTES = 5 * 2**30


def _named(name: str, default: Any) -> Any:
    return Field(default, validation_alias=AliasChoices(PREFIX + name, name))


class Settings(BaseSettings):
    """The installation's settings; nothing here is changed while a process lives."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    server_address: str = _named("SERVER_ADDRESS", "")
    client_id: str = _named("CLIENT_ID", "")
    join_token: SecretStr | None = _named("JOIN_TOKEN", None)
    join_token_file: Path | None = _named("JOIN_TOKEN_FILE", None)
    data_dir: Path = _named("DATA_DIR", Path("/data"))
    state_dir: Path = _named("STATE_DIR", Path("/state"))
    extra_ca_file: Path | None = _named("EXTRA_CA_FILE", None)
    fast_poll_s: float = Field(FAST_POLL_S, gt=0, validation_alias=PREFIX + "FAST_POLL_S")
    slow_poll_s: float = Field(SLOW_POLL_S, gt=0, validation_alias=PREFIX + "SLOW_POLL_S")
    # Where this hospital's own Prometheus may read the node's figures; off without it.
    metrics_port: int | None = Field(None, ge=1, le=65535, validation_alias=PREFIX + "METRICS_PORT")
    sync_s: float = Field(SYNC_S, gt=0, validation_alias=PREFIX + "SYNC_S")
    cache_bytes: int = Field(CACHE_BYTES, gt=0, validation_alias=PREFIX + "CACHE_BYTES")
    # The hospital's archive; what a secret is may stand in a file, and is read when it is asked for.
    pacs_url: str = _named("PACS_URL", "")
    pacs_user: str = _named("PACS_USER", "")
    pacs_password: SecretStr | None = _named("PACS_PASSWORD", None)
    pacs_password_file: Path | None = _named("PACS_PASSWORD_FILE", None)
    pacs_token: SecretStr | None = _named("PACS_TOKEN", None)
    pacs_token_file: Path | None = _named("PACS_TOKEN_FILE", None)
    pacs_ca_file: Path | None = _named("PACS_CA_FILE", None)
    pacs_cert_file: Path | None = _named("PACS_CERT_FILE", None)
    pacs_key_file: Path | None = _named("PACS_KEY_FILE", None)
    pacs_plain_http: bool = Field(False, validation_alias=PREFIX + "PACS_PLAIN_HTTP")
    pull_keep_free_bytes: int = Field(PULL_KEEP_FREE_BYTES, ge=0, validation_alias=PREFIX + "PULL_KEEP_FREE_BYTES")

    @field_validator("server_address")
    @classmethod
    def _https_only(cls, value: str) -> str:
        for address in addresses_in(value):
            if not address.startswith("https://"):
                raise ValueError(f"the address {address} must begin with https://")
        return value

    @property
    def addresses(self) -> tuple[str, ...]:
        """The gateway's addresses, tried in this order."""
        return addresses_in(self.server_address)

    def read_join_token(self) -> str | None:
        """The invite's token, from its file or its variable.

        Raises:
            InvalidInput: the file that should hold it cannot be read.
        """
        if self.join_token_file is not None:
            try:
                return self.join_token_file.read_text("utf-8").strip()
            except OSError as error:
                raise InvalidInput(f"Cannot read the join token from {self.join_token_file}: {error}.") from error
        return self.join_token.get_secret_value().strip() if self.join_token else None


def addresses_in(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of addresses; a missing scheme means https."""
    parts = (part.strip().rstrip("/") for part in text.split(","))
    return tuple(part if "://" in part else f"https://{part}" for part in parts if part)

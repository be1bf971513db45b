"""What the gateway hands to the services beside it: certificates and secrets, each service its own and no other's.

In containers every service has a folder of its own here, which is a volume that only it mounts, read-only. A service whose
folder is not there is not served, so that a deployment without it needs no other setting.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from api_gateway.settings import PREFIX
from medhive.errors import InvalidInput
from medhive.signing import write_secret

TOKEN_BYTES = 32  # beyond guessing

# For each service: the files of the state folder that it may have.
FILES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "proxy": ("tls/ca.crt", "tls/proxy.crt", "tls/proxy.key", "secrets/mlflow-reader"),
        "fl-server": (
            "tls/ca.crt",
            "tls/superlink.crt",
            "tls/superlink.key",
            "secrets/server-token",
            "secrets/coordinator.key",
            "secrets/mlflow-writer",
        ),
        "mlflow": (
            "tls/ca.crt",
            "tls/mlflow.crt",
            "tls/mlflow.key",
            "secrets/mlflow-reader",
            "secrets/mlflow-writer",
            "secrets/mlflow-cookies",
        ),
    }
)
SECRETS = ("mlflow-reader", "mlflow-writer", "mlflow-cookies")


def hand_out(state: Path, folder: Path) -> list[str]:
    """Bring each service's folder up to date; returns the names of the services that have one.

    Only what differs is written, each file whole or not at all, so that a second start changes nothing.

    Raises:
        InvalidInput: the folder is missing, or a file cannot be written.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{PREFIX}HANDOUT_DIR names {folder}, which is no folder.")
    for name in SECRETS:
        path = state / "secrets" / name
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(TOKEN_BYTES).encode())
    served = [service for service in FILES if (folder / service).is_dir()]
    try:
        for service in served:
            _bring_up_to_date(state, folder / service, FILES[service])
    except OSError as error:
        raise InvalidInput(f"{PREFIX}HANDOUT_DIR: cannot write {error.filename}: {error.strerror}.") from error
    return served


def _bring_up_to_date(state: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        content, target = (state / name).read_bytes(), folder / Path(name).name
        if not target.exists() or target.read_bytes() != content:
            part = target.with_name(f"{target.name}.part")
            part.unlink(missing_ok=True)
            write_secret(part, content)
            part.replace(target)

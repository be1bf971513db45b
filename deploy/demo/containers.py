"""What deploy/compose.demo.yaml does once, inside its containers: a password, made scans, the study and its invites.

Each step looks first at what is there already, so that a second `up` changes nothing, and writes whole or not at all.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

STATE: Final = Path("/state")
HOSPITALS: Final = Path("/hospitals")
PASSWORD: Final = STATE / "demo-password"
STUDY: Final = "brain-mri"
# Enough for the default model to learn from within three rounds, few enough for some minutes on two cores.
SCANS_PER_CLASS: Final = 60
STUDY_OPTIONS: Final = ("--option", "image_size=64", "--default", "local_epochs=6", "--default", "batch_size=16")


def password() -> None:
    """Make the first admin's password, for the gateway's first start."""
    if PASSWORD.exists():
        return
    descriptor, part = tempfile.mkstemp(dir=STATE)  # made with mode 0600
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(16))
    Path(part).replace(PASSWORD)


def scans(seed: str) -> None:
    """Make one hospital's labelled phantoms."""
    from fl_client.tasks.phantoms import make_phantoms  # noqa: PLC0415 - the hospital's image alone has it

    folder = STATE / "data"
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=STATE) as part:
        make_phantoms(Path(part) / "data", SCANS_PER_CLASS, int(seed)).rename(folder)


def study(*hospitals: str) -> None:
    """Log in, make the study, and write an invite for each hospital that has none yet."""
    ca = STATE / "tls" / "ca.crt"
    admin(
        "login", "https://localhost:8000", "--username", "admin", "--password-file", str(PASSWORD), "--ca-file", str(ca)
    )
    if STUDY not in [each["name"] for each in json.loads(admin("studies", "--json"))]:
        classes = sorted(path.name for path in (HOSPITALS / hospitals[0] / "data").iterdir())
        admin("studies", "create", STUDY, "--task", "image-folder", "--classes", ",".join(classes), *STUDY_OPTIONS)
    for hospital in hospitals:
        token = HOSPITALS / hospital / "join-token"
        if not token.exists():
            part = token.with_suffix(".part")
            part.unlink(missing_ok=True)
            admin("invite", hospital, "--study", STUDY, "--out", str(part))
            part.replace(token)


def admin(*words: str) -> str:
    """`medhive-admin ...`; returns what it printed."""
    return subprocess.run(["medhive-admin", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


STEPS: Final[dict[str, Callable[..., Any]]] = {"password": password, "scans": scans, "study": study}

if __name__ == "__main__":
    STEPS[sys.argv[1]](*sys.argv[2:])

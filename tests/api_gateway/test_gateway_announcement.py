"""What a starting gateway says must be what a person needs at the first login."""

import io
import socket
from pathlib import Path

from api_gateway.__main__ import _announce, build
from api_gateway.admin.session import fingerprint
from api_gateway.settings import Settings


def test_the_fingerprint_is_the_one_that_a_login_shows(tmp_path: Path) -> None:
    gateway, password = build(Settings(state_dir=tmp_path / "state"))
    said = io.StringIO()
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            _announce(gateway, taken, password, said)
    finally:
        gateway.database.engine.dispose()
    ca_pem = (tmp_path / "state" / "tls" / "ca.crt").read_text()
    assert f"CA fingerprint: {fingerprint(ca_pem)}\n" in said.getvalue()
    assert f"admin password: {password}\n" in said.getvalue()

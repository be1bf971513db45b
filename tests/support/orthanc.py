"""A real PACS for tests: Orthanc with its DICOMweb plug-in on loopback, behind a real nginx that ends TLS.

All three are Debian packages (`orthanc`, `orthanc-dicomweb`, `nginx-light`). What the packages' services would use is left
alone: these have configurations, ports and a database of their own, and end with the test. nginx is there because Orthanc
1.10 of Debian 12 crashes when it ends TLS by itself; it also stands for a hospital's gateway with tokens or certificates.
"""

import json
import shutil
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from public_address import PublicCa
from stack import free_port
from waiting import until

PROGRAM: Final = shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
PLUGIN: Final = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD, TOKEN = "medhive", "only for this test", "a.token.for.this-test"
SLOW_BYTES_PER_S: Final = 8_000  # nginx sends a second of it at once; a series of ten thousand bytes takes longer
# One server a way to be asked: by name and password, by a token, by a client's certificate, by a slow line.
WAYS: Final = ("password", "token", "certificate", "slow")


def installed() -> bool:
    """Whether all three are here."""
    return PROGRAM is not None and PLUGIN.exists() and shutil.which("nginx") is not None


@dataclass(frozen=True)
class Orthanc:
    """One that answers; `http` is its administrator's way in."""

    folder: Path
    ports: dict[str, int]
    http: httpx.Client

    def environment(self, way: str = "password") -> dict[str, str]:
        """What a hospital sets to reach it."""
        found = {
            "PACS_URL": f"https://localhost:{self.ports[way]}/dicom-web",
            "PACS_CA_FILE": str(self.folder / "tls" / "ca.crt"),
            "MEDHIVE_SITE_PULL_KEEP_FREE_BYTES": "0",
        }
        if way == "token":
            return found | {"PACS_TOKEN_FILE": str(self.folder / "token")}
        if way == "certificate":
            return found | {"PACS_CERT_FILE": str(self.folder / "tls" / "client.pem")}
        return found | {"PACS_USER": USER, "PACS_PASSWORD_FILE": str(self.folder / "password")}

    def store(self, *paths: Path) -> None:
        """Take files in, as a scanner would send them."""
        for path in paths:
            self.http.post("/instances", content=path.read_bytes()).raise_for_status()

    def asked(self) -> list[str]:
        """What was asked for through nginx, in order."""
        return (self.folder / "asked.log").read_text("utf-8").splitlines()


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    """Start one with its database in the folder; it is empty."""
    assert PROGRAM is not None
    ca = PublicCa(folder / "tls")
    _make_client_certificate(folder / "tls")
    (folder / "password").write_text(PASSWORD + "\n")
    (folder / "token").write_text(TOKEN + "\n")
    own, ports = free_port(), {way: free_port() for way in WAYS}
    (folder / "orthanc.json").write_text(json.dumps(_settings(folder / "database", own)))
    (folder / "nginx.conf").write_text(_nginx(folder, own, ports))
    (folder / "asked.log").touch()
    with ExitStack() as stack:
        stack.enter_context(_running(folder, "orthanc", PROGRAM, str(folder / "orthanc.json")))
        stack.enter_context(_running(folder, "nginx", "nginx", "-e", "stderr", "-c", str(folder / "nginx.conf")))
        own_client = httpx.Client(base_url=f"http://127.0.0.1:{own}", auth=(USER, PASSWORD), timeout=30)
        orthanc = Orthanc(folder, ports, stack.enter_context(own_client))
        trust = ssl.create_default_context(cafile=str(ca.file))
        front = httpx.Client(
            base_url=f"https://localhost:{ports['password']}", auth=(USER, PASSWORD), verify=trust, timeout=30
        )
        stack.enter_context(front)
        until(lambda: _answers(front), f"Orthanc, see {folder}", 60)
        yield orthanc


def _make_client_certificate(folder: Path) -> None:
    """A certificate that vouches for itself, with its key in one file, as many archives hand them out."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "medhive")]), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signed = builder.sign(key, hashes.SHA256())
    (folder / "client.pem").write_bytes(signed.public_bytes(form[0]) + key.private_bytes(*form))


@contextmanager
def _running(folder: Path, name: str, *argv: str) -> Iterator[None]:
    with (folder / f"{name}.log").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        process.kill()  # its database goes with the test, and Orthanc takes seconds to leave in order
        process.wait(30)


def _answers(front: httpx.Client) -> bool:
    try:
        return front.get("/dicom-web/studies").is_success
    except httpx.TransportError:
        return False


def _settings(database: Path, port: int) -> dict[str, object]:
    return {
        "Name": "MedHive's tests",
        "StorageDirectory": str(database),
        "IndexDirectory": str(database),
        "Plugins": [str(PLUGIN)],
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomServerEnabled": False,
        "WebDavEnabled": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }


def _nginx(folder: Path, own: int, ports: dict[str, int]) -> str:
    basic = "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    known = f'proxy_set_header Authorization "{basic}";'
    more = {
        "password": "",
        "token": f'if ($http_authorization != "Bearer {TOKEN}") {{ return 401; }} {known}',
        "certificate": f"ssl_client_certificate {folder}/tls/client.pem; ssl_verify_client on; {known}",
        "slow": f"limit_rate {SLOW_BYTES_PER_S};",
    }
    servers = "\n".join(
        f"""server {{ listen 127.0.0.1:{port} ssl; {more[way]} location / {{ proxy_pass http://127.0.0.1:{own}; }} }}"""
        for way, port in ports.items()
    )
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;
events {{}}
http {{
log_format asked "$request_uri"; access_log {folder}/asked.log asked; {temporary}
proxy_http_version 1.1; proxy_buffering off;
ssl_certificate {folder}/tls/public.crt; ssl_certificate_key {folder}/tls/public.key;
{servers}
}}
"""

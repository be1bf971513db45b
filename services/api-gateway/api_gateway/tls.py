"""The coordinator's own certificate authority, made at first start, so that there is TLS everywhere from the first minute.

Hospitals learn it from the coordinator's signed introduction, which the key in their invite vouches for. An operator who has
a certificate from elsewhere gives it to the proxy in front.
"""

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medhive.errors import InvalidInput
from medhive.signing import write_secret

CA_VALIDITY = datetime.timedelta(days=3650)  # hospitals pin the CA at their join: it must outlive every study
LEAF_VALIDITY = datetime.timedelta(days=397)  # what browsers accept at most
RENEW_BEFORE = datetime.timedelta(days=60)  # twice the alarm's time, so that a renewed one never raises it
BACKDATED = datetime.timedelta(
    minutes=10
)  # a hospital whose clock is a little behind must not refuse a new certificate
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Authority:
    """The CA: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        """Load the CA of this folder, or make one when there is none.

        Raises:
            InvalidInput: the files are there but are no CA.
        """
        certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
        if not certificate_path.exists():
            # A key without a certificate is what an interrupted first start left: nobody can have trusted it yet.
            key_path.unlink(missing_ok=True)
            _make_authority(certificate_path, key_path, name)
        return cls(load_certificate(certificate_path), _load_key(key_path))

    @property
    def pem(self) -> str:
        """The certificate as PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate's DER, which an admin compares at a login."""
        return hashlib.sha256(self.certificate.public_bytes(serialization.Encoding.DER)).digest()

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether this CA signed a certificate."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def ensure_leaf(
        self,
        folder: Path,
        name: str,
        names: Sequence[str],
        now: datetime.datetime,
        validity: datetime.timedelta = LEAF_VALIDITY,
    ) -> bool:
        """Make `<name>.crt` and `<name>.key`, valid for these host names, unless there is a pair that still serves.

        Returns whether it was made.
        """
        certificate_path, key_path = folder / f"{name}.crt", folder / f"{name}.key"
        wanted = (*LOCAL_NAMES, *(each for each in names if each not in LOCAL_NAMES))
        due = now + min(RENEW_BEFORE, validity / 3)
        if certificate_path.exists() and key_path.exists() and self._serves(certificate_path, wanted, due):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(key.public_key(), wanted, now, validity)
        # Whoever reads between the two, or finds them after a crash, has a pair that does not fit, and looks again.
        _write_whole(key_path, _key_pem(key))
        _write_whole(certificate_path, certificate.public_bytes(serialization.Encoding.PEM) + self.pem.encode())
        return True

    def _serves(self, path: Path, wanted: Sequence[str], until: datetime.datetime) -> bool:
        certificate = load_certificate(path)
        if certificate.public_key() != _load_key(path.with_suffix(".key")).public_key():
            return False
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return (
            self.issued(certificate)
            and certificate.not_valid_after_utc > until
            and list(names) == [_general_name(name) for name in wanted]
        )

    def _issue(
        self, key: ec.EllipticCurvePublicKey, names: Sequence[str], now: datetime.datetime, validity: datetime.timedelta
    ) -> x509.Certificate:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = _builder(names[0], self.certificate.subject, key, now, validity)
        return (
            builder.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(identifier, critical=False)
            .sign(self.key, hashes.SHA256())
        )


def _make_authority(certificate_path: Path, key_path: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"MedHive CA of {name}"[:64])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        _builder(None, subject, key.public_key(), now, CA_VALIDITY, subject=subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_ca_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_secret(key_path, _key_pem(key))
    _write_whole(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    write_secret(part, content)
    part.replace(path)


def _builder(
    common_name: str | None,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    validity: datetime.timedelta,
    *,
    subject: x509.Name | None = None,
) -> x509.CertificateBuilder:
    owner = subject or x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name or "MedHive")])
    return (
        x509.CertificateBuilder()
        .subject_name(owner)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + validity)
    )


def _ca_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_certificate(path: Path) -> x509.Certificate:
    """Read the first certificate of a file.

    Raises:
        InvalidInput: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"Cannot read the certificate {path}: {error}.") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"Cannot read the key {path}: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"{path} holds another kind of key than an elliptic curve's.")
    return key

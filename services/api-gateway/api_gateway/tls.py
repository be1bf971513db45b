"""The coordinator's own certificate authority, made at first start, so that there is TLS everywhere from the first minute.

Hospitals learn it from the coordinator's signed introduction, which the key in their invite vouches for. An operator who has
a certificate from elsewhere gives it to the proxy in front.
"""

import datetime
import hashlib
import ipaddress
import ssl
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medhive.errors import InvalidInput
from medhive.leftovers import sync_folder
from medhive.signing import write_secret

CA_VALIDITY = datetime.timedelta(days=3650)  # hospitals pin the CA at their join: it must outlive every study
LEAF_VALIDITY = datetime.timedelta(days=397)  # what browsers accept at most
RENEW_BEFORE = datetime.timedelta(days=60)  # twice the alarm's time, so that a renewed one never raises it
BACKDATED = datetime.timedelta(
    minutes=10
)  # a hospital whose clock is a little behind must not refuse a new certificate
BUNDLE = "ca.crt"
NEXT_KEY = "ca-next.key"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class CaStep(StrEnum):
    """What is due in the life of CAs: each of the three steps is one file that appears, or is replaced, as a whole."""

    ANNOUNCE = "announce"
    HAND_OVER = "hand over"
    DROP = "drop"


@dataclass(frozen=True)
class Authority:
    """The CA that issues, with its key, and the CAs to trust beside it.

    `ca.crt` holds every CA that counts, the issuing one first. Which one issues is told by `ca.key`, and which one comes
    next by `ca-next.key`, so that the step from one to the other is a single rename.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    successor: x509.Certificate | None = None
    former: tuple[x509.Certificate, ...] = ()

    @classmethod
    def open(cls, folder: Path, name: str, validity: datetime.timedelta = CA_VALIDITY) -> Self:
        """Load the CA of this folder, or make one when there is none; what an interrupted step left is put in order.

        Raises:
            InvalidInput: the files are there but are no CA.
        """
        bundle, key_path = folder / BUNDLE, folder / "ca.key"
        if not bundle.exists():
            # A key without a certificate is what an interrupted first start left: nobody can have trusted it yet.
            key_path.unlink(missing_ok=True)
            key = _make_key(key_path)
            _write_whole(bundle, _pem(_self_signed(key, name, datetime.datetime.now(datetime.UTC), validity)))
        found = cls._load(folder)
        if found.bundle != bundle.read_bytes():
            _write_whole(bundle, found.bundle)
        return found

    @classmethod
    def _load(cls, folder: Path) -> Self:
        certificates, key = _load_certificates(folder / BUNDLE), _load_key(folder / "ca.key")
        issuing = _of_key(certificates, key)
        if issuing is None:
            raise InvalidInput(
                f"{folder / BUNDLE} holds no certificate for {folder / 'ca.key'}; restore a backup of both."
            )
        next_key = folder / NEXT_KEY
        successor = _of_key(certificates, _load_key(next_key)) if next_key.exists() else None
        former = tuple(each for each in certificates if each not in (issuing, successor))
        return cls(issuing, key, successor, former)

    @property
    def trusted(self) -> tuple[x509.Certificate, ...]:
        """All CAs that count, the issuing one first."""
        return (self.certificate, *((self.successor,) if self.successor else ()), *self.former)

    @property
    def bundle(self) -> bytes:
        """What `ca.crt` holds."""
        return b"".join(_pem(each) for each in self.trusted)

    def due(self, now: datetime.datetime, overlap: datetime.timedelta) -> CaStep | None:
        """The next step: a successor is known for one overlap before it issues, and the former one trusted for one after."""
        if self.successor is not None:
            if now >= self.takes_over(self.successor, overlap):
                return CaStep.HAND_OVER
        elif self.former and now >= min(_made(self.certificate) + 2 * overlap, *_ends(self.former)):
            return CaStep.DROP
        elif now >= self.certificate.not_valid_after_utc - 2 * overlap:
            return CaStep.ANNOUNCE
        return None

    def takes_over(self, successor: x509.Certificate, overlap: datetime.timedelta) -> datetime.datetime:
        """When an announced successor begins to issue: one overlap after it was made, or at the other's end."""
        return min(_made(successor) + overlap, self.certificate.not_valid_after_utc)

    def take(
        self, step: CaStep, folder: Path, name: str, now: datetime.datetime, validity: datetime.timedelta
    ) -> "Authority":
        """Do a step. A process that is killed in it has done it, or not begun."""
        next_key = folder / NEXT_KEY
        if step is CaStep.ANNOUNCE:
            next_key.unlink(missing_ok=True)  # one whose certificate never came: nobody knows it
            certificate = _self_signed(_make_key(next_key), name, now, validity)
            _write_whole(folder / BUNDLE, self.bundle + _pem(certificate))
        elif step is CaStep.HAND_OVER:
            next_key.replace(folder / "ca.key")
            sync_folder(folder)
        else:
            _write_whole(folder / BUNDLE, _pem(self.certificate))
        return type(self).open(folder, name, validity)

    @property
    def pem(self) -> str:
        """The certificate of the issuing CA as PEM."""
        return _pem(self.certificate).decode()

    @property
    def pems(self) -> tuple[str, ...]:
        """Every CA that counts as PEM, the issuing one first."""
        return tuple(_pem(each).decode() for each in self.trusted)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate's DER, which an admin compares at a login."""
        return bytes.fromhex(fingerprint(self.certificate))

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
        _write_whole(certificate_path, _pem(certificate) + self.pem.encode())
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


class ServedCertificate:
    """Changes the certificate that a running server shows, on any thread; connections that are open keep theirs.

    A context must not be given another certificate while handshakes of other threads read it: they break off, or the
    process does. So each certificate has a context of its own, and a connection is handed over to the newest as it begins.
    """

    def __init__(self, server: ssl.SSLContext) -> None:
        """
        Args:
            server: with what the server accepts its connections, and what it shows until `change`.
        """
        self._newest = server
        server.sni_callback = self._hand_over

    def change(self, certificate_file: Path, key_file: Path) -> None:
        """Show this one from the next connection on.

        Raises:
            OSError: the pair cannot be read, or does not fit; what was shown stays.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate_file, key_file)
        self._newest = context

    def _hand_over(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        # Asked for each connection, also when the client names no host.
        connection.context = self._newest


def _make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    write_secret(path, _key_pem(key))
    return key


def _self_signed(
    key: ec.EllipticCurvePrivateKey, name: str, now: datetime.datetime, validity: datetime.timedelta
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"MedHive CA of {name}"[:64])])
    return (
        _builder(None, subject, key.public_key(), now, validity, subject=subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_ca_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate's DER, in hexadecimal."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _made(certificate: x509.Certificate) -> datetime.datetime:
    return certificate.not_valid_before_utc + BACKDATED


def _ends(certificates: Iterable[x509.Certificate]) -> Iterator[datetime.datetime]:
    return (each.not_valid_after_utc for each in certificates)


def _of_key(certificates: Iterable[x509.Certificate], key: ec.EllipticCurvePrivateKey) -> x509.Certificate | None:
    return next((each for each in certificates if each.public_key() == key.public_key()), None)


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


def _load_certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"Cannot read the certificates {path}: {error}.") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"Cannot read the key {path}: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput(f"{path} holds another kind of key than an elliptic curve's.")
    return key

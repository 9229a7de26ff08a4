"""An authority of the tests' own, and the certificates it signs: files as certbot writes them."""

import datetime
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)
PRIVATE = serialization.NoEncryption()


@dataclass(frozen=True)
class Pair:
    certfile: Path
    keyfile: Path

    def replace_with(self, other: "Pair") -> None:
        """What renewing does: new content under the same names."""
        for mine, its in ((self.certfile, other.certfile), (self.keyfile, other.keyfile)):
            mine.write_bytes(its.read_bytes())

    @property
    def flags(self) -> list[str]:
        """For the server's command line."""
        return ["--ssl-certfile", str(self.certfile), "--ssl-keyfile", str(self.keyfile)]

    @property
    def der(self) -> bytes:
        """What a client sees of it."""
        return ssl.PEM_cert_to_DER_cert(self.certfile.read_text())


class Authority:
    """``file`` is its certificate; ``context`` is for clients that trust it and nobody else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("ochat_serve's tests")
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        made = self._builder(self._name, self._key).add_extension(constraints, critical=True)
        self.file = folder / "authority.pem"
        self.file.write_bytes(_pem(made.sign(self._key, hashes.SHA256())))

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.file))

    def shown_by(self, port: int) -> bytes | None:
        """The certificate that a new connection to this machine gets."""
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            self.context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            return connection.getpeercert(binary_form=True)

    def issue(
        self, name: str, encryption: serialization.KeySerializationEncryption = PRIVATE
    ) -> Pair:
        """A new pair for this machine, in ``name``'s files."""
        key = ec.generate_private_key(ec.SECP256R1())
        hosts = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = (
            self._builder(_name("localhost"), key)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .add_extension(authority, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.certfile.write_bytes(_pem(made))
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        pair.keyfile.write_bytes(key.private_bytes(pem, pkcs8, encryption))
        return pair

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(subject_key, critical=False)
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

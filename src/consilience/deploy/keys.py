"""Keys of the parties, and certificates of the server. One P-384 key a party serves Flower's authentication and the
seal on our messages; what is signed for one cannot be taken for the other."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

CONTEXT = b"consilience message v1\0"


def need_flower() -> None:
    """Raise ConfigError, in one clear line, where the extra is not installed."""
    try:
        import cryptography  # noqa: F401
        import flwr  # noqa: F401
    except ImportError:
        raise ConfigError("deploying needs Flower: pip install 'consilience[flower]'") from None


def make_key(path: Path) -> str:
    """A new key in ``path`` (readable by its owner alone), its public half in ``path`` + ``.pub``; returns that.
    A key that is there already is kept."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    if path.exists():
        return public_text(read_private(path).public_key())
    key = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_secret(path, key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    text = public_text(key.public_key())
    write_atomically(path.with_name(path.name + ".pub"), text + "\n")
    return text


def public_text(key: Any) -> str:
    """A public key in one line, as OpenSSH writes it."""
    from cryptography.hazmat.primitives import serialization as form

    return str(key.public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode())


def read_private(path: Path) -> EllipticCurvePrivateKey:
    """Raises ConfigError."""
    from cryptography.hazmat.primitives import serialization as form

    try:
        return form.load_ssh_private_key(path.read_bytes(), None)  # type: ignore[return-value]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a key as `consilience deploy key` makes it ({error})") from None


def read_public(text: str, where: str) -> EllipticCurvePublicKey:
    """Raises ConfigError."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    try:
        key = form.load_ssh_public_key(text.encode())
    except ValueError as error:
        raise ConfigError(f"{where}: not a public key ({error})") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise ConfigError(f"{where}: not a public key as `consilience deploy key` makes it (P-384)")
    return key


def sign(key: EllipticCurvePrivateKey, text: bytes) -> bytes:
    """A signature."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return key.sign(CONTEXT + text, ec.ECDSA(hashes.SHA384()))


def signed(key: EllipticCurvePublicKey, text: bytes, signature: bytes) -> bool:
    """Whether a signature is right."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key.verify(signature, CONTEXT + text, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def make_certificates(folder: Path, hosts: tuple[str, ...] = ("localhost", "127.0.0.1"), days: float = 90) -> None:
    """An authority of our own (ca.pem, ca.key) and the server's certificate for ``hosts`` (tls.pem, tls.key) in
    ``folder``. An authority that is there already is used again; days may be negative, for tests of what is over."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder.mkdir(parents=True, exist_ok=True)
    now = dt.datetime.now(dt.timezone.utc)

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def begun(subject: Any, issuer: Any, key: Any, until: float) -> Any:
        start = now + dt.timedelta(days=min(0.0, until)) - dt.timedelta(days=1)
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(start)
        return made.not_valid_after(now + dt.timedelta(days=until))

    pem, plain = form.Encoding.PEM, form.NoEncryption()
    if (folder / "ca.key").exists():
        ca_key: Any = form.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    else:
        ca_key = ec.generate_private_key(ec.SECP384R1())
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        who = name("consilience authority")
        made = begun(who, who, ca_key, max(365.0, days)).add_extension(x509.BasicConstraints(True, 0), True)
        made = made.add_extension(usage, True)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False)
        ca = made.sign(ca_key, hashes.SHA384())
        write_secret(folder / "ca.key", ca_key.private_bytes(pem, form.PrivateFormat.PKCS8, plain))
        write_atomically(folder / "ca.pem", ca.public_bytes(pem))
    key = ec.generate_private_key(ec.SECP384R1())
    named: list[Any] = []
    for host in hosts:
        try:
            named.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            named.append(x509.DNSName(host))
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    own = begun(name("consilience server"), ca.subject, key, days)
    own = own.add_extension(x509.SubjectAlternativeName(named), False).add_extension(identifier, False)
    own = own.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    write_secret(folder / "tls.key", key.private_bytes(pem, form.PrivateFormat.PKCS8, plain))
    write_atomically(folder / "tls.pem", own.sign(ca_key, hashes.SHA384()).public_bytes(pem))


def expired(path: Path) -> str | None:
    """The day on which a certificate ran out, or None if it has not. Raises ConfigError."""
    from cryptography import x509

    try:
        until = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a certificate ({error})") from None
    return f"{until:%Y-%m-%d}" if until < dt.datetime.now(dt.timezone.utc) else None


def secret_of(path: Path) -> bytes:
    """32 bytes that only the file's owner has, made when they are first needed."""
    if not path.exists():
        write_secret(path, secrets.token_bytes(32))
    return path.read_bytes()


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

"""Certificates and keys for a private federation: one local CA, one server certificate, one key pair a node."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfuse.config.files import replaced
from fedfuse.errors import UserError

ROLES = ("read", "submit", "register")  # of operators
LONGEST = 36_500  # days of the server's certificate; the CA's has ten times as many
MINUTE = "%Y-%m-%d %H:%M"
PEM, PRIVATE = serialization.Encoding.PEM, serialization.PrivateFormat
PLAIN = serialization.NoEncryption()


def write_certificates(
    directory: Path, names: Sequence[str], nodes: Sequence[str], days: int = 365, operators: Sequence[str] = ()
) -> list[Path]:
    """Make what is missing in a directory; what is there stays, so nodes can be added later.

    Parameters
    ----------
    directory : Path
        Gets `ca.crt`, `ca.key`, `server.pem`, `server.key`, and `<node>.key`, `<node>.pub` for each node.
    names : sequence of str
        DNS names and IP addresses under which nodes reach the server (subject alternative names).
    nodes : sequence of str
        Names of nodes to make a key pair for.
    operators : sequence of str
        Who may do what at the operators' port: `NAME` or `NAME=read,submit,register`; gets `operator-NAME.pem` and
        `operator-NAME.key`.
    days : int
        How long the server's certificate is valid; the CA's is valid ten times as long.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    UserError
        If the directory cannot be written, or the server's certificate is there without the CA's key.
    """
    if not 1 <= days <= LONGEST:
        raise UserError(f"--days {days}: allowed are 1 to {LONGEST}")
    if not all(names):
        raise UserError("--name '': a DNS name or an IP address is needed")
    for name in nodes:
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name in ("ca", "server"):
            raise UserError(f"--node {name}: letters, digits, '-', '_' and '.' are allowed, not 'ca' or 'server'")
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "ca.crt").exists():
            written += _ca(directory, days * 10)
        if not (directory / "server.pem").exists():
            if not (directory / "ca.key").exists():
                raise UserError(f"{directory}: has ca.crt and no ca.key: nothing can be signed with it")
            written += _server(directory, names, days)
        elif lacking := [name for name in names if str(_general(name).value) not in _names(directory / "server.pem")]:
            there = ", ".join(_names(directory / "server.pem"))
            raise UserError(
                f"--name {lacking[0]}: {directory / 'server.pem'} is for {there} and is kept; delete it and "
                "server.key to have both made anew"
            )
        for name in nodes:
            if not (directory / f"{name}.key").exists():
                written += node_keys(directory, name)
        for told in operators:
            written += _operator(directory, told, days)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from error
    return written


def _write(path: Path, content: bytes, secret: bool) -> Path:
    # a secret is never readable by others: not between creation and chmod, nor in a file that was there before
    with replaced(path) as partial:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600 if secret else 0o644)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    return path


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: str | x509.Name, issuer: str, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject) if isinstance(subject, str) else subject)
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _ca(directory: Path, days: int) -> list[Path]:
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _certificate("FedFuse CA", "FedFuse CA", key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return [
        _write(directory / "ca.key", key.private_bytes(PEM, PRIVATE.PKCS8, PLAIN), secret=True),
        _write(directory / "ca.crt", certificate.public_bytes(PEM), secret=False),
    ]


def _signer(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The CA's key and certificate."""
    if not (directory / "ca.key").exists():
        raise UserError(f"{directory}: has ca.crt and no ca.key: nothing can be signed with it")
    signer = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise UserError(f"{directory / 'ca.key'}: an elliptic-curve key is needed")
    return signer, x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())


def _authority(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    found = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def secret(path: Path, flag: str) -> Path:
    """A key's file, if nobody else may read it.

    Raises
    ------
    UserError
        If it is not there, or others may.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise UserError(f"{flag} {path}: can be read by others (mode {mode:o}); chmod 600 {path}")
    return path.resolve()


def _server(directory: Path, names: Sequence[str], days: int) -> list[Path]:
    signer, ca = _signer(directory)
    key = ec.generate_private_key(ec.SECP384R1())
    wanted = dict.fromkeys([*names, "localhost", "127.0.0.1"])
    certificate = (
        _certificate("FedFuse server", "FedFuse CA", key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in wanted]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_authority(ca), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return [
        _write(directory / "server.key", key.private_bytes(PEM, PRIVATE.PKCS8, PLAIN), secret=True),
        _write(directory / "server.pem", certificate.public_bytes(PEM), secret=False),
    ]


def _operator(directory: Path, told: str, days: int) -> list[Path]:
    """A certificate for an operator: the name and, as organisational units, the roles that the CA grants."""
    name, _, words = told.partition("=")
    roles = words.split(",") if words else list(ROLES)
    if not name.replace("-", "").isalnum() or set(roles) - set(ROLES):
        raise UserError(f"--operator {told}: NAME or NAME=ROLE,… is needed; roles are {', '.join(ROLES)}")
    if (kept := directory / f"operator-{name}.pem").exists():
        has = [str(one.value) for one in _read(kept).subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
        if words and set(has) != set(roles):
            raise UserError(
                f"--operator {told}: {kept} says {', '.join(has)} and is kept; delete it to have another made "
                "(the old one is good until its name is revoked)"
            )
        return []
    signer, ca = _signer(directory)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            *(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role) for role in roles),
        ]
    )
    signed = (
        _certificate(subject, "FedFuse CA", key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(_authority(ca), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return [
        _write(directory / f"operator-{name}.key", key.private_bytes(PEM, PRIVATE.PKCS8, PLAIN), secret=True),
        _write(directory / f"operator-{name}.pem", signed.public_bytes(PEM), secret=False),
    ]


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is no certificate in PEM") from error


def _names(path: Path) -> list[str]:
    """Whom a certificate is for."""
    try:
        found = _read(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in found]


def check_server(ca: Path, pem: Path, key: Path) -> None:
    """Look whether anybody who trusts the CA would take the server for what it says it is, today.

    Raises
    ------
    UserError
        If its certificate is not of that CA or of another key, or one of them has expired or does not hold yet.
    """
    certificate, now = _read(pem), datetime.datetime.now(datetime.UTC)
    try:
        chain = x509.load_pem_x509_certificates(pem.read_bytes())
        signers = x509.load_pem_x509_certificates(ca.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise UserError(f"--certs: {ca} or {key} is not in PEM, or under a passphrase") from error
    if private.public_key() != certificate.public_key():
        raise UserError(f"--certs: {key} is not the key of {pem}")
    signer = next((one for one in signers if _signed_by(one, chain[-1])), None)
    if signer is None:
        raise UserError(f"--certs: {pem} is not signed by {ca}")
    for path, one in ((pem, certificate), (ca, signer)):
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            since, until = one.not_valid_before_utc, one.not_valid_after_utc
            raise UserError(
                f"--certs: {path} holds from {since:{MINUTE}} to {until:{MINUTE}} UTC, and here it is {now:{MINUTE}}; "
                "'Rotate certificates' in docs/deployment.md says what to do"
            )


def _signed_by(signer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def node_keys(directory: Path, name: str, passphrase: bytes | None = None) -> list[Path]:
    """Write a node's key pair: in OpenSSH form, as Flower reads it, or in PEM under a passphrase."""
    key = ec.generate_private_key(ec.SECP384R1())
    if passphrase is None:
        content = key.private_bytes(PEM, PRIVATE.OpenSSH, PLAIN)
    else:
        content = key.private_bytes(PEM, PRIVATE.PKCS8, serialization.BestAvailableEncryption(passphrase))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [
        _write(directory / f"{name}.key", content, secret=True),
        _write(directory / f"{name}.pub", public + f" {name}\n".encode(), secret=False),
    ]


def hand_out(directory: Path, server: Path | None, operators: Path | None, public: Path | None) -> None:
    """Copy to each folder what its holder needs, so that no key lies where it is not used.

    Raises
    ------
    UserError
        If a folder cannot be written.
    """
    wanted = (
        (server, "server.*"),
        (operators, "operator-*"),
        (server, "ca.crt"),
        (operators, "ca.crt"),
        (public, "ca.crt"),
    )
    for folder, pattern in wanted:
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in directory.glob(pattern):
                _write(folder / path.name, path.read_bytes(), secret=path.suffix == ".key")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error

"""Who may talk to whom: both sides of a migration prove that they hold the same secret.

TLS 1.3 has no password of its own, so the secret is stretched (HKDF) into the key of a
certificate authority that exists in no file: whoever knows the secret can be that
authority, and nobody else. Each side issues itself a certificate for an hour, one says
``server``, the other ``client``; each demands one from the other, issued by the same
authority and for the other role.

A secret is read by everybody who can connect only as a certificate, from which guesses
could be tried: it must not be guessable. `generate_secret` makes one of 256 bits.

Sources: RFC 8446, RFC 5869, RFC 5280.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import os
import secrets
import ssl
import stat
from pathlib import Path
from typing import Literal

from pipeline.errors import UsageError

Role = Literal["server", "client"]

_MIN_BYTES = 16
_MAX_BYTES = 4096
_CA_NAME = "pipeline migration"
_LIFETIME = dt.timedelta(hours=1)
_SKEW = dt.timedelta(days=1)
#: the authority is the same certificate on both sides, so its dates are fixed
_EPOCH = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_END = dt.datetime(2120, 1, 1, tzinfo=dt.UTC)


def generate_secret() -> str:
    """A new secret of 256 bits, as text."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def load_secret(path: str) -> bytes:
    """Read a secret file.

    Raises:
        UsageError: it cannot be read, is readable by others, or is too short.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(_MAX_BYTES).strip()
    except OSError as error:
        raise UsageError(f"secret file {path}: {error.strerror}") from error
    if mode & (stat.S_IROTH | stat.S_IRGRP):
        raise UsageError(f"secret file {path} can be read by others; chmod 600 {path}")
    if len(secret) < _MIN_BYTES:
        raise UsageError(f"secret file {path} holds {len(secret)} bytes; {_MIN_BYTES} are the least")
    return secret


def proof(secret: bytes, role: Role, nonces: bytes) -> bytes:
    """What a side answers to a challenge on a connection without TLS."""
    return hmac.digest(secret, b"pipeline plaintext " + role.encode() + nonces, hashlib.sha256)


def server_context(secret: bytes) -> ssl.SSLContext:
    """For the side that listens."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _arm(context, secret, "server")
    return context


def client_context(secret: bytes) -> ssl.SSLContext:
    """For the side that connects."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the authority and the role are the identity, not a name
    _arm(context, secret, "client")
    return context


def _arm(context: ssl.SSLContext, secret: bytes, role: Role) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    authority, certificate, key = _issue(secret, role)
    context.load_verify_locations(cadata=authority.decode())
    # the module only reads keys from files: this one is in memory and gone at once
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(fd, certificate + key)
        context.load_cert_chain(Path(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def _issue(secret: bytes, role: Role) -> tuple[bytes, bytes, bytes]:
    """The authority's certificate, and a certificate and key for `role`; all PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    seed = HKDF(hashes.SHA256(), 32, salt=None, info=b"pipeline certificate authority 1").derive(secret)
    authority_key = Ed25519PrivateKey.from_private_bytes(seed)
    authority = (
        x509.CertificateBuilder()
        .subject_name(name(_CA_NAME))
        .issuer_name(name(_CA_NAME))
        .public_key(authority_key.public_key())
        .serial_number(1)
        .not_valid_before(_EPOCH)
        .not_valid_after(_END)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, None)
    )
    key = Ed25519PrivateKey.generate()
    now = dt.datetime.now(dt.UTC)
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name(role))
        .issuer_name(name(_CA_NAME))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _SKEW + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, None)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    return authority.public_bytes(pem), certificate.public_bytes(pem), private

"""Certificates of a hub that is reached over a network: what its API serves with. Files are PEM."""

import ssl
from pathlib import Path


def served(cert_file: str, key_file: str) -> ssl.SSLContext:
    """What a server shows. Raises OSError that names field and remedy."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load(context, cert_file, key_file)
    return context


def load(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    """Show this from the next connection on. Raises OSError; then it is as it was."""
    if not cert_file or not key_file:
        raise OSError(f"{'tls-key' if cert_file else 'tls-cert'}: is not given, and the other one is; give both")
    for field, path in (("tls-cert", cert_file), ("tls-key", key_file)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise OSError(f"{field}: {path} cannot be read ({error.strerror}); give a PEM file that this user may read") from None
    # Tried on another one first: a context that took the certificate and not the key would serve neither.
    for each in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
        try:
            each.load_cert_chain(cert_file, key_file, password=_none)
        except ssl.SSLError as error:
            raise OSError(f"tls-cert: {cert_file} and {key_file} are no certificate and its key ({error.reason or error}); give the chain, the hub's certificate first, and the key without a passphrase") from None


def _none() -> str:
    """Nobody is there to be asked for a passphrase."""
    return ""

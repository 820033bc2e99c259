"""Whether certificate files can be used, looked at before an agent depends on them. Not on the way of a start: it loads OpenSSL."""

import ssl


def problem(ca_file: str, cert_file: str, key_file: str) -> str:
    """What is wrong with files (PEM) that can be read, with its field and the remedy; empty where they can be used together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except ssl.SSLError as error:
            return f"ca_file {ca_file}: is no certificate ({error.reason or error}); give PEM"
        except OSError:
            pass  # who looks for files says so
    if key_file and not cert_file:
        return f"key_file {key_file}: there is no cert_file; give both"
    if cert_file:
        try:
            context.load_cert_chain(cert_file, key_file or None, password=_none)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                return f"key_file {key_file}: is not the key of cert_file {cert_file}; give the two that belong together"
            return f"cert_file {cert_file} and key_file {key_file or cert_file} are no certificate and its key ({error.reason or error}); give PEM, the edge's certificate first, the key without a passphrase"
        except OSError:
            pass
    return ""


def _none() -> str:
    """Nobody is there to be asked for a passphrase."""
    return ""

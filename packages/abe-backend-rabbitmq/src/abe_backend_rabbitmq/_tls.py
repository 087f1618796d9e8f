"""The TLS context: certificates and keys are read from the settings' files."""

import ssl

from abe.errors import ConfigurationError
from abe_backend_rabbitmq._settings import RabbitMQSettings


def tls_context(settings: RabbitMQSettings) -> ssl.SSLContext:
    """Read the files. They are read for each connection, so that a renewed certificate needs no restart. Blocks.

    Raises:
        ConfigurationError: A file cannot be read, or does not hold what it must.
    """
    ca, certificate, key = settings.ca_file, settings.certificate_file, settings.key_file
    names = {"RABBITMQ_CA_FILE": ca, "RABBITMQ_CERTIFICATE_FILE": certificate, "RABBITMQ_KEY_FILE": key}
    for name, path in names.items():
        if path is not None:
            try:
                with open(path, "rb") as file:
                    file.read(1)
            except OSError as exc:
                raise ConfigurationError(f"{name} must be a file that can be read: {path!r}: {exc.strerror}") from exc
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as exc:
        raise ConfigurationError(f"RABBITMQ_CA_FILE must hold certificates as PEM, and {ca!r} does not") from exc
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as exc:
            raise ConfigurationError(
                "RABBITMQ_CERTIFICATE_FILE must hold a certificate as PEM, and RABBITMQ_KEY_FILE, or the same file, its private key"
                f" without a password: {exc.reason or exc}"
            ) from exc
    return context


def _no_password() -> str:
    raise ConfigurationError("RABBITMQ_KEY_FILE must hold a private key without a password: it cannot be asked for")

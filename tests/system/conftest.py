"""The broker fixture of the integration tests serves here as well."""

from tests.integration.conftest import broker

__all__ = ["broker"]

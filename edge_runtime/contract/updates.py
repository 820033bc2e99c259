"""The order of an update of a device's image: what comes down, or is given to the edge's own interface. Pure."""

from typing import Any

from .errors import ContractError
from .schema import Field, check_fields

DATA = "/var/lib/novacron/"
"""Where an order may name a file: what is read with root's rights is not anything on the device."""

OF_THE_IMAGE = ("/etc/ssl/", "/usr/")
"""Folders of an image that a configuration may name a file in: the system's certificates."""

UPDATE_FIELDS = (
    Field("id", "id", "the update's name, unique within the edge; the same again is answered as it stands"),
    Field("url", "string", "where the bundle is: http:// or https://, a server that takes ranges", required=False, default="", max_items=2048),
    Field("token", "string", "sent along as a bearer token", required=False, default="", max_items=512),
    Field("path", "string", "or its file, on the data partition", required=False, default="", max_items=1024),
)


def check_order(order: dict[str, Any], where: str = "") -> None:
    """What the fields alone do not say. Raises ContractError."""
    if bool(order["url"]) == bool(order["path"]):
        raise ContractError(f"{where}url", "is missing, or path is there too", "give one of url and path", "missing")
    if order["url"] and not order["url"].startswith(("http://", "https://")):
        raise ContractError(f"{where}url", "is no address of a web server", "give http:// or https://", "type")
    if order["path"] and (not order["path"].startswith(DATA) or ".." in order["path"].split("/")):
        raise ContractError(f"{where}path", f"is not below {DATA}", "put the bundle onto the data partition, or give url", "path")


def trusted_file(value: Any) -> str:
    """The file of authorities by which an order's address is trusted, as the agent's configuration names it; empty for the system's. Raises ContractError."""
    if value in (None, ""):
        return ""
    if not isinstance(value, str) or not value.startswith((DATA, *OF_THE_IMAGE)) or ".." in value.split("/"):
        raise ContractError("ca_file", f"is not below {DATA}", "put it beside the configuration", "path")
    return value


def parse_order(value: Any) -> dict[str, str]:
    """An order, checked. Raises ContractError."""
    order = check_fields(UPDATE_FIELDS, value, "payload")
    check_order(order)
    return order

"""A device's configuration, looked at before it is given to a device that nobody can log in to. Pure but for reading the file."""

from collections.abc import Collection
from pathlib import Path

import yaml

from edge_runtime.config import ConfigError, EdgeConfig, load_config
from edge_runtime.config.load import read_yaml
from edge_runtime.contract.updates import OF_THE_IMAGE

from .errors import FirmwareError
from .layout import DATA, PROVISIONED

LOOPBACK = ("127.", "localhost", "::1", "[::1]")

CREDENTIAL_MAX_BYTES = 128 << 10
"""systemd takes no larger credential (CREDENTIAL_SIZE_MAX is 1 MiB in all)."""


def _away(url: str) -> bool:
    """Whether an address is set and not this device's own."""
    host = url.partition("//")[2].rpartition("@")[2]
    return bool(host) and not host.startswith(LOOPBACK)


def unreachable(config: EdgeConfig, broker: bool) -> str:
    """Why nobody would ever reach a device with this configuration, or hear of it; empty where somebody can. `broker`: the image has one, for programs of its own only."""
    if config.uplink.enabled and _away(config.uplink.url):
        return ""
    if config.api.enabled and not config.api.host.startswith(LOOPBACK):
        return ""
    if config.bus.enabled and _away(config.bus.url):
        return ""
    own = " (the image's own broker listens on loopback)" if broker and config.bus.url else ""
    return f"there is no login, and neither uplink.url nor bus.url nor api.host leads off the device{own}"


def check_files(config: EdgeConfig, given: Collection[str]) -> None:
    """`given`: names of the files that the device gets beside the configuration.

    Raises:
        FirmwareError: it names a file that the device will not have. Its agent would end at each start over that, and the device keeps the configuration and has no login.
    """
    named = [("api.token_file", config.api.token_file)] if config.api.enabled else []
    for name, part in (("uplink", config.uplink), ("bus", config.bus)):
        if part.enabled:
            named.append((f"{name}.password_file", part.password_file))
        if part.enabled and part.url.startswith("mqtts:"):
            named += [(f"{name}.ca_file", part.ca_file), (f"{name}.cert_file", part.cert_file), (f"{name}.key_file", part.key_file)]
    named.append(("updates.ca_file", config.updates.ca_file))
    had = {f"{DATA}/config/{name}" for name in given}
    for key, path in named:
        if not path or path in had or path.startswith(OF_THE_IMAGE):
            continue
        file = path.removeprefix(f"{DATA}/config/")
        if file in PROVISIONED:
            raise FirmwareError("config", f"{key} is {path}, and the device is given none", f"give --credential novacron.{file}=FILE too")
        raise FirmwareError("config", f"{key} is {path}, which a device does not have", f"name one of {', '.join(PROVISIONED[:6])} in {DATA}/config, and give it with --credential")


def name_in(text: str) -> str:
    """The edge_id of a configuration that has been looked at before; empty where it has none."""
    found = yaml.safe_load(text)
    return str(found.get("edge_id", "")) if isinstance(found, dict) else ""


def check(path: Path, broker: bool = False) -> EdgeConfig:
    """Load a configuration for an image. Raises FirmwareError: it cannot be used, has no name for the device, or leaves the device out of reach."""
    try:
        if path.stat().st_size > CREDENTIAL_MAX_BYTES:
            raise FirmwareError("config", f"{path} is larger than {CREDENTIAL_MAX_BYTES} bytes", "put rules into the hub's desired state")
        config = load_config(path, env={}).config
        named = "edge_id" in read_yaml(path)  # where it is left out the loader takes the name of the machine that it runs on: this one
    except OSError as error:
        raise FirmwareError("config", f"{path} cannot be read ({error})", "give a YAML file, see docs/edge-config.md") from None
    except ConfigError as error:
        raise FirmwareError("config", str(error), "see docs/edge-config.md") from None
    if not named:
        raise FirmwareError("config", "edge_id is left out, and every device has the same host name", "give edge_id")
    if why := unreachable(config, broker):
        raise FirmwareError("config", why, "set uplink.url to the hub's broker, or api.host: 0.0.0.0 with api.token_file")
    return config

"""`novacron-hub`: run the hub."""

import argparse
import asyncio
import errno
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.system import data_folder
from edge_runtime.system.service import ServiceManager

from . import __version__

if TYPE_CHECKING:
    from .server import Hub

DAYS_MAX = 36_500
"""A hundred years: past it somebody has mistaken the unit."""


OPEN_FILES = 65_536
"""What the hub asks for itself and its broker: more than the edges that a hub takes."""

MINUTES_MAX = 10_080
"""A week: who wants less often asks for it."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    env = os.environ
    parser = argparse.ArgumentParser(prog="novacron-hub", description="NovaCron hub. Options may also be set as NOVACRON_HUB_NAME (upper case).")
    parser.add_argument("--version", action="version", version=__version__)

    def option(name: str, default: str, text: str) -> None:
        parser.add_argument(f"--{name}", default=env.get(f"NOVACRON_HUB_{name.upper().replace('-', '_')}", default), help=f"{text} (default {default or 'none'})")

    option("data-dir", env.get("STATE_DIRECTORY", str(Path(env.get("HOME", "/tmp")) / ".local/share/novacron/hub")), "where the store and the token are")
    option("name", "hub", "the hub's name")
    option("broker", "auto", "auto, embedded, mosquitto, or mqtt://user:password@host:port")
    option("broker-listen", "127.0.0.1:1883", "where our own broker listens")
    option("broker-password-file", "", "file of mosquitto_passwd with those whom our mosquitto lets in; off loopback it needs this, or broker-client-ca")
    option("broker-client-ca", "", "authorities (PEM): our mosquitto lets in edges with a certificate by these, whose common name is the edge's; instead of passwords")
    option("broker-ca-file", "", "authorities (PEM) by which a broker of mqtts:// is trusted; empty: the system's")
    option("tls-cert", "", "certificate (PEM, with its chain) of API, page and our mosquitto, which speak TLS then; SIGHUP takes it, and passwords, anew")
    option("tls-key", "", "its key (PEM)")
    option("listen", "127.0.0.1:8460", "where API and page listen")
    option("token-file", "", "file with the API token; else data-dir/token")
    option("keep-telemetry-days", "30", "days that telemetry is kept; 0: for ever")
    option("keep-decision-days", "365", "days that decisions and events are kept; 0: for ever")
    option("rebalance-minutes", "0", "minutes between two looks whether to rebalance workloads; 0: only when asked")
    option("compiled", "off", "whether decisions run compiled by numba (the extra `fast`; about 130 MB more memory): off, auto (where it is installed), on")
    option("log-level", "info", "debug, info, warning, error")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ")
    logging.Formatter.converter = time.gmtime
    logging.getLogger("mqtt").setLevel(logging.WARNING)
    from .broker.base import Door, authority
    from .retention import RetentionSettings
    from .server import BrokerError, Hub, HubSettings
    from .store import StoreError

    try:
        host, port = _address(options.listen, "listen")
        broker_host, broker_port = _address(options.broker_listen, "broker-listen")
        token = Path(options.token_file).read_text().strip() if options.token_file else ""
        settings = HubSettings(
            Path(options.data_dir), options.name, options.broker, broker_host, broker_port, Door(options.broker_password_file, options.tls_cert, options.tls_key, options.broker_client_ca), options.broker_ca_file, host=host, port=port, token=token,
            retention=RetentionSettings(_days(options.keep_telemetry_days, "keep-telemetry-days"), _days(options.keep_decision_days, "keep-decision-days")),
            rebalance_minutes=_minutes(options.rebalance_minutes),
        )
        _compile(options.compiled)
    except (ValueError, OSError) as error:
        print(f"novacron-hub: {error}", file=sys.stderr)
        return 2

    _allow_files()
    manager = ServiceManager()

    async def serve() -> None:
        try:
            data_folder.hold(options.data_dir)
        except data_folder.InUse:
            raise
        except OSError as error:
            logging.getLogger(__name__).warning("data-dir: %s cannot be locked: %s; see that no other hub works on it", options.data_dir, error)
        hub = Hub(settings)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            reloads.add(task := asyncio.get_running_loop().create_task(hub.reload()))
            task.add_done_callback(reloads.discard)
        try:
            await hub.start()
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
            print(_greeting(hub.url, hub.token, bool(settings.token)), flush=True)
            alive = asyncio.get_running_loop().create_task(_alive(hub, manager))
            print(f"broker: {hub.broker.kind} {'mqtts' if hub.broker.tls or settings.door.cert_file else 'mqtt'}://{authority(hub.broker.host, hub.broker.port)}", flush=True)
            await stop.wait()
            manager.notify(STOPPING="1")
            alive.cancel()
        finally:
            await hub.stop()

    try:
        asyncio.run(serve())
    except data_folder.InUse as error:
        print(f"novacron-hub: data-dir: {options.data_dir}: {error}", file=sys.stderr)
        return 1
    except (BrokerError, StoreError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"novacron-hub: data-dir: {options.data_dir} has no room ({error}); free space on its disk" if full else f"novacron-hub: {error}", file=sys.stderr)
        return 1
    return 0


def _allow_files() -> None:
    """As many open files as edges may come: each is one of its broker's, and a login's usual limit of 1,024 turns the rest away without a word."""
    from .fleet import MAX_EDGES

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < MAX_EDGES:
        logging.getLogger(__name__).warning("at most %d files may be open (ulimit -Hn): about so many edges can have a link, of %d that a hub takes", wanted, MAX_EDGES)


async def _alive(hub: "Hub", manager: ServiceManager) -> None:
    """Tell systemd that the hub works, and go on telling as long as nothing of it is missing: else it is started anew."""
    manager.notify(READY="1", STATUS=f"{hub.url}, broker {hub.broker.kind}")
    while manager.watchdog_s:
        if not hub.parts.ended:
            manager.notify(WATCHDOG="1")
        await asyncio.sleep(manager.watchdog_s / 3)


def _greeting(url: str, token: str, given: bool) -> str:
    """Where the page is, with the token that logs in. Who gave the token has it, and what is printed may go to a log that more people read, as a container's does."""
    return f"hub: {url}/" if given or _journalled() else f"hub: {url}/#token={token}"


def _journalled() -> bool:
    """Whether what is printed goes to systemd's journal (systemd.exec(5), JOURNAL_STREAM), which more people may read than the token's file."""
    try:
        told = os.fstat(sys.stdout.fileno())
    except (OSError, ValueError):  # no file at all
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{told.st_dev}:{told.st_ino}"


def _compile(choice: str) -> None:
    if choice not in ("off", "auto", "on"):
        raise ValueError(f"compiled: {choice!r}; give off, auto or on")
    if choice != "off":
        from .scheduler import Invalid, kernels

        try:
            if kernels.use(choice):
                kernels.warm()
        except Invalid as error:
            raise ValueError(f"compiled: {error}") from None


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not (minutes == 0 or 1 <= minutes <= MINUTES_MAX):
        raise ValueError(f"rebalance-minutes: {text[:20]!r} is neither 0 nor 1 to {MINUTES_MAX}; give minutes, such as 10")
    return minutes


def _days(text: str, field: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days <= DAYS_MAX:
        raise ValueError(f"{field}: {text!r} is not 0 to {DAYS_MAX}; use days, such as 30, or 0 to keep all")
    return days


def _address(text: str, field: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{field}: {text!r} is not host:port; use 127.0.0.1:8460")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    sys.exit(main())

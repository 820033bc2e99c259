"""`novacron-edge`: run the agent, check a configuration."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .lean_imports import import_asyncio, import_logging, leave_out_openssl, leave_out_typing

logging = import_logging()  # before anything else imports it

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import EdgeConfig

LEAN_FLAGS = ("-OO", "-X", "no_debug_ranges")
"""Interpreter flags of a running agent: no docstrings, no column tables; 2 MiB less. Nothing relies on assert."""


def _options(arguments: list[str]) -> tuple[str, Path | None, bool, bool]:
    """Command, configuration, whether its quick form is to be written, and whether a file that is not there is a problem. Ends the process where that is not what the arguments ask for."""
    match arguments:
        case ["run", "--config", path] if not path.startswith("-"):  # as a service starts it: without argparse, which takes a twentieth of the start
            return "run", Path(path), False, False
    import argparse
    from functools import partial

    # Text of a set width: to ask the terminal for its own, argparse loads `shutil` and the libraries of three compressions.
    plain = partial(argparse.HelpFormatter, width=100)
    parser = argparse.ArgumentParser(prog="novacron-edge", description="NovaCron edge agent", formatter_class=plain)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, prog=parser.prog)
    for name, text in (("run", "run the agent"), ("check", "check a configuration and say what it comes to")):
        command = commands.add_parser(name, help=text, formatter_class=plain)
        command.add_argument("--config", type=Path, help="YAML file (see docs/edge-config.md)")
        if name == "check":
            command.add_argument("--quick", action="store_true", help="also keep what the file says as FILE.json, from which the agent starts quicker")
            command.add_argument("--strict", action="store_true", help="a file that it names and that cannot be read is a problem, not a warning")
    options = parser.parse_args(arguments)
    return options.command, options.config, options.command == "check" and options.quick, options.command == "check" and options.strict


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    command, path, quick, strict = _options(sys.argv[1:] if arguments is None else arguments)
    with leave_out_typing():
        from .config import ConfigError, load_config

        try:
            loaded = load_config(path)
        except ConfigError as error:
            print(f"the configuration cannot be used:\n{error}", file=sys.stderr)
            return 2
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if command == "check":
        return _check(loaded.config, strict) or (_keep_quick_form(path) if quick else 0)
    if not sys.flags.optimize and os.environ.get("NOVACRON_NO_REEXEC") != "1" and arguments is None:
        # The flags can only be given to a new interpreter; the process id stays the same.
        os.execv(sys.executable, [sys.executable, *LEAN_FLAGS, "-m", "edge_runtime", *sys.argv[1:]])
    return run(loaded.config)


def _check(config: object, strict: bool) -> int:
    import json

    from . import certificates
    from .config import EdgeConfig, public_dict
    from .contract.errors import ContractError
    from .decisions.models.manifest import ModelError, read_manifest
    from .decisions.rules import RuleError
    from .desired_state import model_path, own_rules
    from .mqtt_session import Endpoint, SessionClosed

    assert isinstance(config, EdgeConfig)
    problems = []

    def look(name: str, check: Callable[[], object]) -> None:
        try:
            check()
        except (RuleError, ContractError, ModelError, OSError) as error:
            problems.append(f"{name}{error}")

    def models() -> None:
        for entry in config.decisions.models:
            path = model_path(entry.manifest)
            read_manifest(path.read_bytes())

    look("", lambda: own_rules(config.decisions))
    look("decisions.models: ", models)
    def absent(text: str) -> None:
        if strict:
            problems.append(text)
        else:  # it may be there for the agent alone
            print(f"warning: {text}; the agent tries again until it can read it", file=sys.stderr)

    for name, part in (("uplink.", config.uplink), ("bus.", config.bus)):
        if part.enabled and part.url:
            try:
                endpoint = Endpoint.configured(part)
                endpoint.check_files()
                if endpoint.tls and (wrong := certificates.problem(endpoint.ca_file, endpoint.cert_file, endpoint.key_file)):
                    problems.append(f"{name}{wrong}")
            except ContractError as error:
                problems.append(f"{name}{error}")
            except SessionClosed as error:
                absent(f"{name}{error}")
    if strict:
        for name, path in (("api.token_file", config.api.token_file if config.api.enabled else ""), ("updates.ca_file", config.updates.ca_file)):
            if path:
                try:
                    Path(path).open("rb").close()
                except OSError as error:
                    problems.append(f"{name} {path}: {error.strerror}")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    print(json.dumps(public_dict(config), indent=1))
    return 0


def _keep_quick_form(path: Path | None) -> int:
    from .config import quick_form
    from .config.load import read_yaml

    if path is None:
        return 0
    try:
        quick_form.path_of(path).unlink(missing_ok=True)  # what the text says is kept, not what was kept before
        quick_form.write(path, path.read_bytes(), read_yaml(path))
    except OSError as error:
        print(f"warning: {quick_form.path_of(path)}: {error.strerror}; the agent reads the YAML at each start", file=sys.stderr)
    return 0


def needs_openssl(config: "EdgeConfig") -> bool:
    """Whether an agent may have to speak TLS in its own process: to its brokers, or to the registries of images."""
    return config.uplink.url.startswith("mqtts:") or config.bus.url.startswith("mqtts:") or (config.workloads.enabled and config.workloads.fetch)


def run(config: object) -> int:
    """Run one agent until it is told to stop."""
    from .config import EdgeConfig

    gc.disable()  # until all is up: what a start makes stays, and looking through it again and again takes a part of the start
    if not isinstance(config, EdgeConfig):
        raise TypeError("run takes an EdgeConfig")
    if config.workloads.enabled and config.workloads.rootless and os.geteuid() != 0:
        from .workloads import rootless  # before there is a second thread

        rootless.enter(Path(config.data_dir).resolve())
    if not needs_openssl(config):
        leave_out_openssl()
    asyncio = import_asyncio()
    with leave_out_typing():
        import sqlite3

        from .config import identity
        from .contract.errors import ContractError
        from .decisions.rules import RuleError
        from .logs import configure
        from .runtime import EdgeRuntime
        from .system import data_folder
        from .system.process import one_heap, prefer, short_turns

        # What this configuration will ask for while it starts.
        if config.devices.host.enabled:
            from .devices import host  # noqa: F401
        if config.updates.enabled:
            from .updates import duty  # noqa: F401

    one_heap(os.environ)
    prefer(config.nice)
    configure(config.logging.level, config.logging.format)
    # PyYAML is not needed any more; its modules stay out of the agent's memory.
    for name in [name for name in sys.modules if name == "yaml" or name.startswith(("yaml.", "_yaml", "argparse"))]:
        del sys.modules[name]

    async def serve() -> None:
        try:
            data_folder.hold(config.data_dir)
            identity.keep(config.data_dir, config.edge_id)
        except data_folder.InUse:
            raise
        except OSError as error:  # a full disk is no reason not to start
            logging.getLogger(__name__).warning("whose the data folder is cannot be written down: %s (data_dir %s)", error, config.data_dir)
        runtime = EdgeRuntime(config)
        try:
            await runtime.start()
        except BaseException:
            await runtime.stop("failed to start")
            raise
        gc.enable()
        short_turns()  # its way to the kernel takes as long to load as a dozen modules: once all is up
        if (start_code := sys.modules.get(f"{__package__}.start_code")) is not None:
            start_code.forget()
        await runtime.wait()

    try:
        asyncio.run(serve())
    except (ContractError, RuleError) as error:
        logging.getLogger(__name__).error("the agent cannot start: %s", error)
        return 2
    except (OSError, sqlite3.Error) as error:
        logging.getLogger(__name__).error("the agent cannot start: %s (data_dir %s)", error, config.data_dir)
        return 1
    return 0

"""What this edge is to do: its own rules and models from the configuration, and over them what the hub wants, checked whole, kept, then applied."""

import binascii
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config.schema import DecisionsConfig
from .contract import jsoncodec
from .contract.desired import Desired, parse_desired
from .contract.errors import ContractError
from .contract.operations import Operation
from .contract.records import Record
from .decisions.rules import RuleError, RuleSet, parse_rules
from .devices.registry import check_twin

if TYPE_CHECKING:
    from .runtime import EdgeRuntime

log = logging.getLogger(__name__)

SHIPPED_MODELS = Path(__file__).parent / "decisions" / "models" / "shipped"
"""Models that come with the agent."""

COMMANDS_REMEMBERED = 512
"""Ids of the hub's commands that are remembered, so that none is done twice: twice what one desired state may hold."""


def own_documents(decisions: DecisionsConfig) -> list[Any]:
    """The documents of the edge's own rules, from its configuration and `rules_file`; raises `ContractError` or OSError."""
    rules: list[Any] = list(decisions.rules)
    if decisions.rules_file:
        value = jsoncodec.decode(Path(decisions.rules_file).read_bytes())
        rules += value if isinstance(value, list) else [value]
    return rules


def own_rules(decisions: DecisionsConfig) -> RuleSet:
    """The edge's own rules; raises `RuleError`, `ContractError` or OSError."""
    rules = own_documents(decisions)
    try:
        return parse_rules(rules)
    except RuleError as error:
        raise RuleError(f"decisions.{error.field}", error.problem, error.remedy) from None


def model_path(name: str) -> Path:
    """Where a configured model's manifest is; `shipped:NAME/FORMAT` is one that comes with the agent."""
    return SHIPPED_MODELS / (name.removeprefix("shipped:") + ".json") if name.startswith("shipped:") else Path(name)


class DesiredState:
    """The desired state of one edge.

    Attributes:
        applied: the hub's, as it is in force; None where the edge goes by its own.
        last_error: the last one that was refused: generation, field, problem, remedy; None where none has been since one was taken.
        rule_documents: the rules in force as they were written.
        models: name to loaded model.
        commands: the hub's commands by id: how each stands.
    """

    def __init__(self, runtime: "EdgeRuntime") -> None:
        self._runtime = runtime
        self.config = runtime.config
        self.journal = runtime.journal
        self.metrics = runtime.metrics
        self.applied: Desired | None = None
        self.last_error: dict[str, str] | None = None
        self.rule_documents: list[Any] = []
        self.models: dict[str, Any] = {}
        self.commands: dict[str, str] = self.journal.state("commands") or {}
        self._commands_written_soon: set[str] = set()
        self._models_wanted: dict[str, tuple[bytes, bytes]] = {}
        self._own = RuleSet(())
        self._own_documents: list[Any] = []

    def begin(self) -> None:
        """At boot: the configured models and rules, over them what the hub wanted last."""
        self._load_configured_models()
        self._own = own_rules(self.config.decisions)
        self.rule_documents = self._own_documents = own_documents(self.config.decisions)
        self._apply_rules(self._own)
        self._restore_desired()

    # -- models and rules ----------------------------------------------------------------------------------------------------

    def _load_configured_models(self) -> None:
        if not self.config.decisions.models:
            return
        from .decisions.models import ModelError, load_model, read_manifest

        for entry in self.config.decisions.models:
            path = model_path(entry.manifest)
            try:
                manifest = read_manifest(path.read_bytes())
                self.models[entry.name or manifest.name] = load_model(manifest, Path(entry.data) if entry.data else path.parent)
            except (ModelError, OSError) as error:
                self._model_refused(entry.name or entry.manifest, str(error))

    def _model_refused(self, name: str, reason: str) -> None:
        self.metrics.inc("models_refused_total")
        log.error("model %s was refused: %s", name, reason)
        self.journal.append("event", "model", {"name": name, "outcome": "refused", "reason": reason[:500]})

    def _apply_rules(self, rules: RuleSet) -> None:
        self._runtime.engine.replace_models(dict(self.models))
        self._runtime.engine.replace_rules(rules)

    # -- desired state -------------------------------------------------------------------------------------------------------

    def _restore_desired(self) -> None:
        value = self.journal.state("desired")
        if value is None:
            return
        try:
            desired = parse_desired(value, self.config.edge_id)
            rules = self._check_desired(desired)
        except (ContractError, RuleError) as error:
            log.error("the kept desired state is not valid any more, own rules stay: %s", error)
            return
        self._take_desired(desired, rules, restored=True)

    def _check_desired(self, desired: Desired) -> RuleSet | None:
        """Everything that can be wrong with it, found before anything changes."""
        rules = parse_rules(desired.rules) if desired.rules is not None else None
        for device, twin in desired.twins.items():
            check_twin(twin, f"spec.twins.{device}")
        self._models_wanted = {}
        for index, entry in enumerate(desired.models):
            manifest, data = entry.get("manifest"), entry.get("data_b64")
            if not isinstance(manifest, dict) or not isinstance(data, str):
                raise ContractError(f"spec.models[{index}]", "has no manifest or no data_b64", "send both", "missing")
            try:
                import base64

                raw = base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError):
                raise ContractError(f"spec.models[{index}].data_b64", "is not base64", "encode the model's bytes as base64", "type") from None
            name = str(manifest.get("name", ""))
            if name in self._models_wanted:
                raise ContractError(f"spec.models[{index}].manifest.name", f"{name[:64]!r} stands twice", "send one version of each model", "duplicate")
            self._models_wanted[name] = (jsoncodec.encode(manifest).encode(), raw)
        return rules

    def receive(self, desired: Desired) -> None:
        """A desired state came in."""
        if self.applied is not None and desired.generation <= self.applied.generation:
            if desired.generation < self.applied.generation and self._runtime.uplink is not None:
                self._runtime.uplink.announce("generation")
            return
        stamp = self._runtime.clock.stamp()
        if desired.expires_ms and stamp.quality != "unsynced" and stamp.wall_ms > desired.expires_ms:
            self.refuse(ContractError("expires_ms", "this desired state has expired", "issue it again", "expired"), desired.generation)
            return
        try:
            rules = self._check_desired(desired)
            models = self._activate_models()
        except ContractError as error:
            self.refuse(error, desired.generation)
            return
        except RuleError as error:
            self.refuse(ContractError(f"spec.{error.field}", error.problem, error.remedy, "rule"), desired.generation)
            return
        replaced = [self.models[name] for name in models if name in self.models]
        self.models.update(models)

        def durable() -> None:
            self._take_desired(desired, rules)
            for model in replaced:
                model.close()

        self.journal.put_state("desired", desired.to_json(), durable)
        self.journal.append("event", "desired.applied", {"generation": desired.generation})

    def _activate_models(self) -> dict[str, Any]:
        if not self._models_wanted:
            return {}
        from .decisions.models import ModelError, ModelStore

        store = ModelStore(Path(self.config.data_dir) / "models")
        loaded: dict[str, Any] = {}
        try:
            for name, (manifest, data) in self._models_wanted.items():
                loaded[name] = store.load(store.put(manifest, data).sha256)
            store.activate(loaded)
        except (ModelError, OSError) as error:
            for model in loaded.values():
                model.close()
            self._model_refused(name, str(error))
            raise ContractError(f"spec.models.{name}", str(error), "send the model with the hash and shape of its manifest", "model") from None
        for name, model in loaded.items():
            self.journal.append("event", "model", {"name": name, "outcome": "activated", "sha256": model.manifest.sha256})
        return loaded

    def _take_desired(self, desired: Desired, rules: RuleSet | None, restored: bool = False) -> None:
        if restored and desired.models:
            from .decisions.models import ModelError, ModelStore

            store = ModelStore(Path(self.config.data_dir) / "models")
            for name, (manifest, data) in self._models_wanted.items():
                try:
                    self.models[name] = store.load(store.put(manifest, data).sha256)
                except (ModelError, OSError) as error:
                    self._model_refused(name, str(error))
                    try:
                        self.models[name] = store.active(name)[0]
                    except ModelError as none:
                        log.error("model %s has no last good version: %s", name, none)
        self.applied = desired
        self._runtime.pipeline.generation = desired.generation
        self.last_error = None
        self.rule_documents = desired.rules if desired.rules is not None else self._own_documents
        self._apply_rules(rules if rules is not None else self._own)
        if self._runtime.site is not None:
            self._runtime.site.tell_spec()
        if self.journal.state("twins_generation") != desired.generation:
            # Once per generation: a boot must not undo what was changed here since. In one group with the twins, so all of it or nothing.
            for device, twin in desired.twins.items():
                try:
                    self._runtime.pipeline.desire(device, twin, replace=True)
                except ContractError as error:
                    log.error("desired twin of %s was refused: %s", device, error)
            self.journal.put_state("twins_generation", desired.generation)
        self._take_commands(desired)
        self._runtime.take_update(desired.update)
        if desired.workloads or self.journal.state("workloads"):
            self._runtime.workload_node().take(desired.workloads)
        if desired.operations or self._runtime.config.workloads.moves_hub:
            stamp = self._runtime.clock.stamp()
            self._runtime.workload_node().asked.operate(desired.operations, frozenset(one["id"] for one in desired.operations if stamp.quality != "unsynced" and stamp.wall_ms > one["expires_ms"]))
        if self._runtime.uplink is not None:
            self._runtime.uplink.announce("desired")

    def _take_commands(self, desired: Desired) -> None:
        stamp = self._runtime.clock.stamp()
        for command in desired.commands:
            state = self.commands.get(command["id"])
            if (state is not None and state != "running") or command["id"] in self._commands_written_soon:
                continue  # done, or it is sent when its record is durable: two desired states may become durable in one commit
            if stamp.wall_ms > command["expires_ms"] and stamp.quality != "unsynced":
                if state is None:
                    self.commands[command["id"]] = "expired"
                    self._operation(command, "expired", "expired before it arrived")
                continue
            again = state == "running"
            self.commands[command["id"]] = "running"

            def durable(_record: Record | None, command: dict[str, Any] = command, again: bool = again) -> None:
                self._commands_written_soon.discard(command["id"])
                self._runtime.pipeline.order(command["id"], command["device"], command["name"], command["args"], command["expires_ms"], again)

            if again:
                durable(None)
            else:
                self._commands_written_soon.add(command["id"])
                self._operation(command, "running", "", durable)
        wanted = {command["id"] for command in desired.commands}
        for known in [key for key in self.commands if key not in wanted][: max(0, len(self.commands) - COMMANDS_REMEMBERED)]:
            del self.commands[known]
        self.journal.put_state("commands", self.commands)

    def _operation(self, command: dict[str, Any], state: str, reason: str, on_durable: Callable[[Record], None] | None = None) -> None:
        operation = Operation(command["id"], "command", state, 0, "accepted", reason, {"device": command["device"], "name": command["name"]})
        self.journal.append("event", "operation", operation.to_json(), on_durable)

    def command_moved(self, command_id: str, state: str) -> None:
        """A command has been sent, has expired or was superseded."""
        if command_id in self.commands:  # the hub's; those of decisions are in the journal's effects
            self.commands[command_id] = state
            self.journal.put_state("commands", self.commands)

    def refuse(self, error: ContractError, generation: int) -> None:
        """One came in that cannot be used."""
        if self.applied is not None and generation and generation <= self.applied.generation:
            return
        described = {"generation": generation, **error.to_json()}
        text = {key: str(value) for key, value in described.items()}
        if self.last_error == text:
            return  # the retained message comes back with every connection
        self.last_error = text
        self.metrics.inc("desired_rejected_total", reason=error.reason)
        log.error("desired state %d was refused: %s", generation, error)
        self.journal.append("event", "desired.rejected", described)

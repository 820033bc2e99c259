"""What each kind of fault does to the world; see `scenario.FAULTS` for the words."""

from typing import TYPE_CHECKING, Any

from .edge import Machine
from .rules import refused_rules, rules_of
from .scenario import Fault

if TYPE_CHECKING:
    from .world import World


PARTITIONS = ("both ways", "towards the broker", "from the broker")


def inflict(world: "World", fault: Fault) -> None:
    """Begin a fault; its end is scheduled."""
    machine = world.machines[fault.edge]
    world.trace("fault", f"{fault.kind} {machine.name} for {fault.lasts:.0f} s, value {fault.value:g}")
    world.happened[fault.kind] += fault.kind != "backup"  # which counts itself
    loop = world.loop

    def after(seconds: float, function: Any, *arguments: Any) -> None:
        loop.call_later(seconds, function, *arguments, context=loop.outside)

    lasts, value = fault.lasts, fault.value
    match fault.kind:
        case "partition" | "hub_partition":
            path = machine.path if fault.kind == "partition" else world.hub.path
            path.block(value in (0, 1), value in (0, 2))
            world.happened[f"{fault.kind.replace('_', ' ')} {PARTITIONS[int(value)]}"] += 1
            after(lasts, path.block, False, False)
        case "flaky":
            _flaky(machine, value)
            after(lasts, _flaky, machine, 0.0)
        case "delay":
            before = machine.path.delay_s
            machine.path.delay_s = before + value
            after(lasts, setattr, machine.path, "delay_s", before)
        case "broker_restart":
            world.broker.stop()
            after(lasts, world.broker.start)
            _storm(world, lasts, "the broker's return")
        case "broker_slams":
            world.broker.stop(keep=True)
            world.broker.start()
            world.broker.slams = True
            after(lasts, setattr, world.broker, "slams", False)
        case "bus_restart":
            machine.bus_stop(keep=not value)
            after(lasts, machine.bus_start)
        case "hub_restart":
            world.hub.kill(lasts)
            _storm(world, lasts, "the hub's return")
        case "hub_restore":
            world.hub.kill(lasts, restore=int(value))
        case "power_cut":
            machine.cut_at(int(value), lasts)
        case "kill":
            machine.kill(lasts)
        case "restart":
            machine.restart(lasts)
        case "disk_full":
            machine.disk.capacity = machine.disk.used + int(value)
            after(lasts, setattr, machine.disk, "capacity", 64 << 20)
        case "slow_disk":
            machine.disk.sync_s = value
            after(lasts, setattr, machine.disk, "sync_s", 0.0)
        case "clock_jump":
            machine.wall_offset_s += value
            world.happened[f"clock jumps {'ahead' if value > 0 else 'back'}"] += 1
            after(lasts, machine.set_right)
        case "hub_clock":
            world.hub.wall_offset_s = value
            world.happened[f"the hub's clock jumps {'ahead' if value > 0 else 'back'}"] += 1
            after(lasts, setattr, world.hub, "wall_offset_s", 0.0)
        case "clock_1970":
            machine.cut_at(-1, lasts, clock_1970=True, sync_later_s=value)
        case "desired":
            _desire(world, machine, int(value))
        case "backup":
            world.hub.backup()
        case "clone":
            _clone(world, machine, lasts, live=bool(value))
        case "refused":
            name = f"novacron-edge-{machine.edge}"
            world.broker.refuses.add(name)
            after(lasts, world.refused_since.__setitem__, machine.edge, loop.time() + lasts)
            for connection in list(machine.path.connections):
                connection.close_by_server("not authorised any more")
            after(lasts, world.broker.refuses.discard, name)


def _storm(world: "World", lasts: float, why: str) -> None:
    """In a storm: by when everyone must have been served: the cap of the back-off, the broker's queue, and a little."""
    if world.scenario.kind == "storm":
        world.happened["edges cut off together"] += sum(machine.life is not None for machine in world.machines)
        patience = 60.0 + len(world.machines) / world.broker.accepts_per_s + 30.0
        world.loop.call_later(lasts + patience, world.oracle.served, world.loop.time() + lasts, why, context=world.loop.outside)


def _flaky(machine: Machine, probability: float) -> None:
    machine.path.loss = machine.path.duplicate = machine.path.reorder = probability


def _desire(world: "World", machine: Machine, what: int) -> None:
    number = world.changes[machine.edge] = world.changes.get(machine.edge, 0) + 1
    device = machine.devices[number % len(machine.devices)].name
    if world.hub.hub is not None and (machine.runtime is None or machine.runtime.uplink is None or not machine.runtime.uplink.up):
        world.happened["desired state changed during an outage"] += 1
    if what == 0:
        world.hub.change(machine.edge, {"rules": rules_of(number)})
    elif what == 1:
        world.hub.change(machine.edge, {"twins": {device: {"speed": number, "mode": "hub"}}})
    elif what == 2:
        now = world.hub.now_ms()
        world.hub.change(machine.edge, {"commands": [{"id": f"c-{number}", "device": device, "name": "go", "args": {"by": number}, "expires_ms": now + 7_200_000}]})
    else:
        world.hub.change(machine.edge, {"rules": refused_rules()})
        world.loop.call_later(600, world.hub.change, machine.edge, {"rules": rules_of(number)}, context=world.loop.outside)


def _clone(world: "World", machine: Machine, lasts: float, live: bool) -> None:
    """The disk is copied (`live`: while the machine goes on, else while it is off) and a second machine runs with it; found and switched off
    later, and the quarantine ended."""
    if machine.life is None or any(other.name == f"{machine.edge}~clone" for other in world.machines):
        return
    if not live:
        machine.restart(3.0)
    books = world.oracle.of(machine)
    books.foreign = True

    def copied() -> None:
        clone = Machine(world, machine.number, machine.edge, machine)
        machine.disk.copy_to(clone.disk)
        world.machines.append(clone)
        world.oracle.of(clone).foreign = True
        world.trace(clone.name, "a second machine with this disk is switched on")
        clone.boot()
        world.loop.call_later(max(lasts, 300.0), found, clone, context=world.loop.outside)

    def found(clone: Machine) -> None:
        hub = world.hub.hub
        row = hub.fleet.rows.get(machine.edge) if hub is not None else None
        world.trace(clone.name, f"switched off; the hub's word was {row.quarantine if row else 'nothing'!r}")
        both = all(one.runtime is not None and one.runtime.uplink is not None and one.life is not None for one in (machine, clone))
        if both and row is not None and world.hub.life is not None and not (machine.path.up_blocked or machine.path.down_blocked) and world.quiet_for(240.0):
            world.oracle.cloned(machine, clone, row.quarantine)
        clone.off()
        world.loop.call_later(60.0, world.hub.attend, machine.edge, lambda: world.oracle.of(clone).boots, context=world.loop.outside)

    world.loop.call_later(2.0, copied, context=world.loop.outside)

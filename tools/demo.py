"""`make run`: hub, broker, one gateway edge on this host's real telemetry, sample devices; with `--outage` the link is cut and healed.

Hub and edge are the shipped programs in processes of their own; the edge's uplink goes through a TCP proxy that can be cut. The devices are
small MQTT clients here: a boiler whose temperature wanders, a fan that obeys commands, a power meter. Everything is under `.novacron/demo`.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import sqlite3
import sys
import time
import webbrowser
from collections import Counter
from pathlib import Path
from typing import Any

import aiomqtt

from edge_runtime.contract import ContractError, topics
from hub.broker.mosquitto import find_mosquitto, free_port
from hub.link import SOCKET_OPTIONS
from tools.faultproxy import FaultProxy
from tools.fencing import Fences
from tools.novactl import samples
from tools.novactl.client import Api, CommandError
from tools.novactl.verify import verify_edge

from .ending import ended

EDGE = "gateway-1"
EDGE_PORT = 8470
"""Where novactl looks for an edge; another one is taken where it is in use."""

READY_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 60.0
SETTLE_S = 2.0
"""How long nothing may be on its way before the books are compared: four ticks of the hub."""


def rules(threshold: float) -> list[dict[str, Any]]:
    """What the demo's edge decides by."""
    return [
        {
            "id": "overheat", "on": {"device": "boiler-*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 80}, "clear": {"value": "temp", "op": "<", "than": 76},
            "then": [
                {"command": {"device": "fan-1", "name": "speed", "args": {"level": 3}, "expires": "30s"}},
                {"alert": {"severity": "warning", "text": "{device} is at {temp} degrees"}},
            ],
        },
        {
            "id": "peak-shaving", "on": {"device": "meter-*", "metric": "power_watts"}, "trigger": "each",
            "if": {"all": [{"value": "power_watts", "op": ">", "than": 900}, {"window": {"metric": "power_watts", "over": "10s", "stat": "mean"}, "op": ">", "than": 500}]},
            "then": [{"command": {"device": "$device", "name": "limit", "args": {"watts": 900, "measured": "$value:power_watts"}, "expires": "10s"}}],
        },
        {
            "id": "host-busy", "on": {"device": "host", "metric": "cpu_ratio"}, "if": {"value": "cpu_ratio", "op": ">", "than": 0.9}, "for": "5s",
            "then": [{"alert": {"severity": "info", "text": "the host's processors are busy ({cpu_ratio})"}}],
        },
        {
            "id": "host-anomaly", "on": {"device": "host", "metric": "cpu_ratio"}, "if": {"model": "host-anomaly", "output": 0, "op": ">", "than": threshold},
            "clear": {"model": "host-anomaly", "output": 0, "op": "<", "than": threshold / 2}, "cooldown": "10s",
            "then": [{"alert": {"severity": "info", "text": "the host behaves unlike what the model learnt"}}],
        },
    ]


class SampleDevices:
    """Three devices on the local bus; counts every command id it is given."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.commands: Counter[str] = Counter()
        self._fences = Fences()
        self.sent = 0
        self.stop = asyncio.Event()

    async def run(self) -> None:
        """Publish and obey until `stop`."""
        while not self.stop.is_set():
            try:
                async with aiomqtt.Client(
                    self._host, self._port, identifier=f"devices-{secrets.token_hex(3)}", protocol=aiomqtt.ProtocolVersion.V311, socket_options=SOCKET_OPTIONS
                ) as client:
                    await client.publish("novacron/1/device/boiler-1/register", json.dumps({"kind": "boiler", "name": "Boiler, hall 2"}), qos=1, retain=True)
                    await client.publish("novacron/1/device/fan-1/register", json.dumps({"kind": "fan", "name": "Fan, hall 2"}), qos=1, retain=True)
                    await client.publish("novacron/1/device/meter-1/register", json.dumps({"kind": "meter", "name": "Main meter"}), qos=1, retain=True)
                    await client.subscribe("novacron/1/device/+/command", qos=1)
                    sender = asyncio.create_task(self._publish(client))
                    try:
                        async for message in client.messages:
                            await self._obey(client, message)
                    finally:
                        await ended(sender)
            except (aiomqtt.MqttError, OSError):
                await asyncio.sleep(0.5)

    async def _obey(self, client: aiomqtt.Client, message: aiomqtt.Message) -> None:
        try:
            device, _ = topics.parse(str(message.topic), "device", ("command",))
        except ContractError:
            return  # amqtt sends a new client every retained message that anybody has subscribed to
        command = json.loads(message.payload if isinstance(message.payload, bytes) else b"{}")
        if not self._fences.admits(command):
            await client.publish(f"novacron/1/device/{device}/result", json.dumps(self._fences.refusal(command)), qos=1)
            return
        self.commands[command["id"]] += 1
        if self.commands[command["id"]] == 1 and command["name"] == "speed":
            await client.publish(f"novacron/1/device/{device}/reported", json.dumps({"speed": command["args"]["level"]}), qos=1)
        await client.publish(f"novacron/1/device/{device}/result", json.dumps({"id": command["id"], "ok": True}), qos=1)

    async def _publish(self, client: aiomqtt.Client) -> None:
        started = time.monotonic()
        while not self.stop.is_set():
            passed = time.monotonic() - started
            values: dict[str, dict[str, Any]] = {
                "boiler-1": {"temp": round(74 + 9 * math.sin(passed / 4), 2), "pressure": round(2.1 + 0.2 * math.sin(passed / 3), 3)},
                "meter-1": {"power_watts": round(650 + 400 * math.sin(passed / 2.5)), "ts": int(time.time() * 1000)},
                "fan-1": {"rpm": 900},
            }
            for device, reading in values.items():
                stamp = reading.pop("ts", None)
                body = {"ts": stamp, "values": reading} if stamp is not None else reading
                await client.publish(f"novacron/1/device/{device}/telemetry", json.dumps(body), qos=1)
                self.sent += 1
            await asyncio.sleep(0.2)


async def start_program(arguments: list[str], log: Path, env: dict[str, str]) -> asyncio.subprocess.Process:
    """One of our programs in a process of its own, its words in `log`."""
    with open(log, "ab") as handle:
        return await asyncio.create_subprocess_exec(*arguments, stdout=handle, stderr=handle, stdin=asyncio.subprocess.DEVNULL, env=env, process_group=0)


async def ask(api: Api, path: str) -> Any:
    """GET without holding the loop up."""
    return await asyncio.get_running_loop().run_in_executor(None, api.get, path)


async def until(check: Any, seconds: float, what: str, process: asyncio.subprocess.Process | None = None, log: Path | None = None) -> Any:
    """Wait until `check()` gives something true; RuntimeError with the program's last words otherwise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process is not None and process.returncode is not None:
            break  # what answers there is another's
        try:
            if found := await check():
                return found
        except (CommandError, OSError, KeyError):
            pass  # not there yet
        await asyncio.sleep(0.1)
    words = log.read_text(errors="replace")[-2000:] if log is not None and log.exists() else ""
    raise RuntimeError(f"{what} did not happen within {seconds:.0f} s\n{words}")


def compare(edge_data: Path, hub_data: Path, edge_id: str = EDGE) -> dict[str, Any]:
    """Every record of the edge's journal against the hub's rows, by content and without the chain: what is lost, what is there twice."""
    lost = duplicated = compared = 0
    hub = sqlite3.connect(f"file:{hub_data / 'hub.db'}?mode=ro", uri=True)
    for name, streams in (("journal", ("decision", "event")), ("telemetry", ("telemetry",))):
        edge = sqlite3.connect(f"file:{edge_data / 'journal' / f'{name}.db'}?mode=ro", uri=True)
        for stream in streams:
            (upto,) = edge.execute("SELECT receipted FROM streams WHERE stream=?", (stream,)).fetchone() or (0,)
            kept = {
                row[0]: row[1:] for row in edge.execute(f"SELECT seq, boots.boot, mono, wall, body FROM records_{stream} r JOIN boots ON boots.number=r.boot WHERE seq<=?", (upto,))
            }
            rows = hub.execute("SELECT seq, boot, mono, wall, body FROM records WHERE edge=? AND stream=? AND seq<=?", (edge_id, stream, upto)).fetchall()
            counts = Counter(row[0] for row in rows)
            held = {row[0]: row[1:] for row in rows}
            compared += len(kept)
            lost += sum(held.get(seq) != values for seq, values in kept.items())
            duplicated += sum(count - 1 for count in counts.values())
        edge.close()
    hub.close()
    return {"lost": lost, "duplicated": duplicated, "compared": compared}


async def end_workloads(edge_data: Path) -> int:
    """End and remove what runs from the data folder of an edge that has ended: workloads outlive an agent, and nobody would come back for these. Returns how many there were."""
    from edge_runtime.workloads.drivers.container import ContainerDriver
    from edge_runtime.workloads.drivers.face import DriverError
    from edge_runtime.workloads.drivers.function import FunctionDriver
    from edge_runtime.workloads.drivers.microvm import MicrovmDriver
    from edge_runtime.workloads.drivers.vm import VmDriver
    from edge_runtime.workloads.images import ImageError, ImageStore

    folder, ended = (edge_data / "workloads").resolve(), 0
    kinds = [kind for name, kind in (("containers", ContainerDriver), ("functions", FunctionDriver), ("microvms", MicrovmDriver), ("vms", VmDriver)) if (folder / name).exists()]
    if not kinds:
        return 0
    try:
        store = ImageStore(folder / "images")
    except (ImageError, OSError):  # an agent is there: it sees to them
        return 0
    for kind in kinds:
        driver = kind(folder, store)
        for status in await driver.instances():
            try:
                await driver.delete(status.key)
                ended += 1
            except (DriverError, OSError) as error:
                print(f"workload {status.key.id} could not be ended: {error}", file=sys.stderr)
        driver.close()
    store.close()
    return ended


class Demo:
    """The whole thing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.home = Path(options.home)
        self.hub_data, self.edge_data = self.home / "hub", self.home / "edge"
        self.token = ""
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.processes: list[asyncio.subprocess.Process] = []

    def say(self, text: str) -> None:
        """To a person; with --json everything but the result goes to standard error."""
        print(text, file=sys.stderr if self.options.json else sys.stdout, flush=True)

    async def run(self) -> int:
        """Start, watch, stop; the exit status."""
        options = self.options
        if options.fresh and self.home.exists():
            await end_workloads(self.edge_data)  # a run that was killed left them
            shutil.rmtree(self.home)
        self.home.mkdir(parents=True, exist_ok=True)
        port = free_port("127.0.0.1") if options.port == 0 or not _port_is_free(options.port) else options.port
        broker_port = free_port("127.0.0.1")
        log = self.home / "hub.log"
        hub = await start_program(
            [sys.executable, "-m", "hub", "--data-dir", str(self.hub_data), "--listen", f"127.0.0.1:{port}", "--broker", options.broker, "--broker-listen", f"127.0.0.1:{broker_port}"],
            log, self.env,
        )
        self.processes.append(hub)
        url = f"http://127.0.0.1:{port}"
        await until(lambda: ask(Api(url), "/readyz"), READY_TIMEOUT_S, "the hub's start", hub, log)
        self.token = (self.hub_data / "token").read_text().strip()
        api = Api(url, self.token)
        broker = (await ask(api, "/api/v1/status"))["broker"]
        proxy = FaultProxy("127.0.0.1", broker_port)
        await proxy.start()
        edge_port = EDGE_PORT if options.port and _port_is_free(EDGE_PORT) else free_port("127.0.0.1")
        config = self._edge_config(proxy.port, broker_port, edge_port, broker["mqtt5"])
        self._samples()
        edge_log = self.home / "edge.log"
        command = [sys.executable, "-OO", "-X", "no_debug_ranges", "-m", "edge_runtime", "run", "--config", str(config)]
        edge = await start_program(command, edge_log, self.env)
        self.processes.append(edge)
        edge_api = Api(f"http://127.0.0.1:{edge_port}")
        await until(lambda: ask(edge_api, "/readyz"), READY_TIMEOUT_S, "the edge's start", edge, edge_log)
        devices = SampleDevices("127.0.0.1", broker_port)
        device_task = asyncio.create_task(devices.run())
        self.say(f"\n  NovaCron runs.\n\n  page    {url}/#token={self.token}\n  login   token {self.token}\n  edge    {edge_api.url}/api/v1/status   metrics {edge_api.url}/metrics")
        self.say(f"  broker  {broker['kind']} on mqtt://127.0.0.1:{broker_port}\n  data    {self.home}   logs hub.log, edge.log\n\n  try     .venv/bin/novactl status --hub {url} --token {self.token}\n          .venv/bin/novactl run --kind function --rm --hub {url} --token {self.token} --edge-api {edge_api.url}\n  end     Ctrl-C\n")
        if options.open:
            webbrowser.open(f"{url}/#token={self.token}")
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            watch = asyncio.create_task(self._watch(stop, proxy, edge_api, api))
            lives = {asyncio.create_task(process.wait()): (name, words) for name, process, words in (("hub", hub, log), ("edge", edge, edge_log))}
            await asyncio.wait((watch, device_task, *lives), return_when=asyncio.FIRST_COMPLETED)
            if device_task.done() and not stop.is_set():
                device_task.result()  # the sample devices never end by themselves
            for life, (name, words) in lives.items():
                if life.done() and not watch.done() and not stop.is_set():
                    watch.cancel()
                    raise RuntimeError(f"the {name} has ended with status {life.result()}\n{words.read_text(errors='replace')[-2000:]}")
                life.cancel()
            outage = await watch
            summary = await self._finish(edge_api, api, devices, device_task, proxy, outage)
        finally:
            devices.stop.set()
            await ended(device_task)
            await self._end()
            await proxy.close()
        if summary is None:
            return 0
        summary |= compare(self.edge_data, self.hub_data) if summary["drained"] else {}
        # A command that a device was given twice counts as well: QoS 1 may do that, our journal must not.
        summary["commands_twice"] = sum(count - 1 for count in devices.commands.values())
        summary["duplicated"] = summary.get("duplicated", 0) + summary["commands_twice"]
        ok = summary["drained"] and summary["verify_exact"] and summary.get("lost") == 0 and summary["duplicated"] == 0
        ok = ok and (not options.outage or summary["decided_offline"] > 0)
        summary["ok"] = ok
        print(json.dumps(summary))
        return 0 if ok else 1

    def _edge_config(self, uplink_port: int, bus_port: int, api_port: int, mqtt5: bool) -> Path:
        import yaml

        from edge_runtime.decisions.models.tflite_engine import find_library
        from edge_runtime.desired_state import SHIPPED_MODELS

        form = "tflite" if find_library() is not None else "portable"
        threshold = json.loads((SHIPPED_MODELS / "host-anomaly" / f"{form}.json").read_text())["threshold"]
        protocol = "auto" if mqtt5 else "3.1.1"
        config = {
            "edge_id": EDGE, "region": "here", "site": "demo", "data_dir": str(self.edge_data),
            "uplink": {"url": f"mqtt://127.0.0.1:{uplink_port}", "backoff_base": "500ms", "backoff_cap": "5s", "keepalive": "5s", "protocol": protocol},
            "bus": {"url": f"mqtt://127.0.0.1:{bus_port}", "protocol": protocol}, "api": {"port": api_port},
            "decisions": {"rules": rules(threshold), "models": [f"shipped:host-anomaly/{form}"]},
            "workloads": {"enabled": True, "reserve_disk": "1GiB", "reserve_memory": "256MiB", **self._guests()},
        }
        path = self.home / "edge.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def _guests(self) -> dict[str, Any]:
        """Micro-VMs and virtual machines, where they are asked for: they cost the boot of a guest, and the first ones memory."""
        kernel, wanted = Path(".novacron/guest-kernel").resolve(), {name: True for name in ("microvms", "vms") if getattr(self.options, name)}
        return {**wanted, **({"guest_kernel": str(kernel)} if wanted and kernel.is_dir() else {})}

    def _samples(self) -> None:
        """What `novactl run` runs."""
        for kind in (kind for kind in samples.NAMES if kind != "vm" or self.options.vms):
            try:
                samples.make(kind, self.edge_data / "workloads" / "archives")
            except CommandError as error:
                self.say(f"  no sample {kind}: {error}")

    async def _watch(self, stop: asyncio.Event, proxy: FaultProxy, edge: Api, hub: Api) -> float:
        """Until the duration is over or a signal came; cuts the link for `--outage` seconds in the middle. Returns how long it was cut."""
        duration, outage = self.options.duration, self.options.outage
        started = time.monotonic()
        cut_at = started + max(5.0, (duration - outage) / 3) if outage else math.inf
        cut_since, was_cut, told = math.inf, 0.0, started
        while not stop.is_set() and (not duration or time.monotonic() - started < duration):
            now = time.monotonic()
            if now >= cut_at:
                await proxy.cut()
                self.say(f"  the link to the hub is cut for {outage:.0f} s")
                cut_at, cut_since = math.inf, now
            if now - cut_since >= outage:
                await proxy.heal()
                was_cut, cut_since = now - cut_since, math.inf
                self.say("  the link is healed")
            if now - told >= 5:
                told = now
                with contextlib.suppress(CommandError):
                    status = await ask(edge, "/api/v1/status")
                    self.say(f"  link {status['link']:4}  readings {status['readings']}  decisions {status['decided']} ({status['decided_offline']} alone)  waiting for the hub {status['backlog_records']}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.2)
        if cut_since < math.inf:
            await proxy.heal()
            was_cut = time.monotonic() - cut_since
        return was_cut

    async def _finish(self, edge: Api, hub: Api, devices: SampleDevices, task: asyncio.Task[None], proxy: FaultProxy, outage: float) -> dict[str, Any] | None:
        """With a duration: stop the devices, wait until all is drained, verify."""
        if not self.options.duration:
            return None
        devices.stop.set()
        loop = asyncio.get_running_loop()

        async def drained() -> bool:
            report = await loop.run_in_executor(None, lambda: verify_edge(hub, EDGE, edge))
            status = await ask(edge, "/api/v1/status")
            # The host goes on being sampled; what counts is that nothing older than the last second is missing.
            return bool(status["link"] == "up" and report["exact"] and all(stream["behind"] <= 3 and not stream["missing"] for stream in report["streams"].values()))

        try:
            await until(drained, DRAIN_TIMEOUT_S, "the drain")
            done = True
        except RuntimeError as error:
            self.say(str(error))
            done = False
        report = await loop.run_in_executor(None, lambda: verify_edge(hub, EDGE, edge))
        status = await ask(edge, "/api/v1/status")
        return {
            "readings": status["readings"], "decided": status["decided"], "decided_offline": status["decided_offline"], "outage_seconds": round(outage, 1),
            "links_cut": proxy.cuts, "drained": done, "verify_exact": report["exact"],
            "records": {stream: entry["contiguous"] for stream, entry in report["streams"].items()},
            "resent_and_dropped": sum(entry["duplicates"] for entry in report["streams"].values()), "commands": len(devices.commands),
        }

    async def _end(self) -> None:
        for process in reversed(self.processes):
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 10)
                except TimeoutError:
                    process.kill()
                    await process.wait()
        if ended := await end_workloads(self.edge_data):
            self.say(f"  ended with it: {ended} workload{'s' * (ended > 1)}")


def _port_is_free(port: int) -> bool:
    import socket

    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="make run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--duration", type=float, default=0, help="seconds; 0: until Ctrl-C")
    parser.add_argument("--outage", type=float, default=0, help="cut the uplink for so many seconds by itself")
    parser.add_argument("--json", action="store_true", help="only the summary on standard output")
    parser.add_argument("--port", type=int, default=8460, help="the hub's port; another one is taken where it is in use")
    parser.add_argument("--broker", default="auto", help=f"auto ({'mosquitto' if find_mosquitto() else 'embedded'} here), embedded, mosquitto")
    parser.add_argument("--home", default=".novacron/demo", help="where everything is kept")
    parser.add_argument("--keep", dest="fresh", action="store_false", help="go on with what the last run left")
    parser.add_argument("--microvms", action="store_true", help="let the edge run micro-VMs: needs root and QEMU, and takes 130 MB")
    parser.add_argument("--vms", action="store_true", help="let the edge run virtual machines: needs root and QEMU")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args()
    try:
        return asyncio.run(Demo(options).run())
    except RuntimeError as error:
        print(f"make run: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

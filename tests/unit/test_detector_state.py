"""What detectors learned survives the agent's restart, through the real journal; damage costs one detector and is told."""

from pathlib import Path

from edge_runtime.config import load_config
from edge_runtime.contract import jsoncodec
from edge_runtime.contract.device_messages import Reading
from edge_runtime.runtime import EdgeRuntime

START = 1_795_478_400_000
RULES = [{"id": "odd", "on": {"device": "b-*"}, "if": {"anomaly": {"metric": "temp"}, "op": ">", "than": 0.99}, "then": [{"alert": {"text": "odd"}}]}]


def runtime(folder: Path, rules: list[dict[str, object]] = RULES) -> EdgeRuntime:
    path = folder / "edge.yaml"
    path.write_bytes(jsoncodec.encode({
        "edge_id": "e1", "data_dir": str(folder / "data"), "decisions": {"rules": rules}, "bus": {"enabled": False}, "uplink": {"enabled": False},
        "api": {"enabled": False}, "devices": {"host": {"enabled": False}, "auto_register": True},
    }).encode())
    return EdgeRuntime(load_config(path, {}).config)


def feed(made: EdgeRuntime, device: str, values: list[float], first: int = 0) -> None:
    for row, value in enumerate(values, first):
        made.pipeline.readings(device, [Reading({"temp": value}, START + row * 60_000)], lambda: None)


async def kinds(made: EdgeRuntime, stream: str) -> list[dict[str, object]]:
    await made.journal.flush()
    records, _ = await made.journal.read(stream, 1, 1000, 1 << 20)
    return [{"kind": record.kind, **jsoncodec.decode(record.body.encode())} for record in records]


async def test_a_restart_forgets_nothing_and_damage_costs_one_detector(tmp_path: Path) -> None:
    wave = [20 + row % 5 * 0.3 + row % 7 * 0.1 for row in range(300)]
    first = runtime(tmp_path)
    await first.start()
    for device in ("b-1", "b-2"):
        feed(first, device, wave)
    learned = {device: first.engine.detectors.get(device, "temp") for device in ("b-1", "b-2")}
    await first.stop()
    states = {device: detector.export_state() for device, detector in learned.items() if detector is not None}

    second = runtime(tmp_path)
    assert second.journal.state("detector/b-1/temp") == states["b-1"]
    await second.start()
    restored = second.engine.detectors.get("b-1", "temp")
    assert restored is not None and restored.export_state() == states["b-1"]
    feed(second, "b-1", [60.0], 300)
    found = [record for record in await kinds(second, "decision") if record["outcome"] == "fired"]
    assert [record["device"] for record in found] == ["b-1"], "a detector that had forgotten would be warming up"
    second.journal.put_state("detector/b-2/temp", states["b-2"][:-12] + "AAAAAAAAAAA=")
    second.engine.detectors.keep_only(lambda device, metric: device != "b-2")
    second.engine.detectors.take_gone()
    await second.stop()

    third = runtime(tmp_path)
    await third.start()
    assert third.engine.detectors.get("b-2", "temp") is None and third.engine.detectors.get("b-1", "temp") is not None
    (told,) = [record for record in await kinds(third, "event") if record["kind"] == "detector"]
    assert told["device"] == "b-2" and "damaged" in str(told["reason"]) and third.journal.state("detector/b-2/temp") is None
    feed(third, "b-2", [20.0], 300)
    assert third.engine.detectors.get("b-2", "temp") is not None, "it starts anew"
    await third.stop()

    fourth = runtime(tmp_path, [])
    await fourth.start()
    assert fourth.journal.state_keys("detector/") == [] and len(fourth.engine.detectors) == 0
    await fourth.stop()

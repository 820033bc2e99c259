"""Train the shipped model: an autoencoder of what a host's telemetry looks like, on telemetry recorded here while real work runs.

    python -m tools.train_host_model --seconds 120 --out edge_runtime/decisions/models/shipped/host-anomaly

It records with the agent's own `HostSampler` while light, varied work runs (idle, short computations, file writes, loopback traffic),
trains with numpy (Adam, fixed seed), sets the threshold at a quantile of held-out normal telemetry, and then provokes real anomalies
(all cores busy, a disk flood, a memory hog, a fork storm) to say how many of their samples are found. What it prints goes into the manifest.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from edge_runtime.devices.host import HostSampler

from .model_export import Layer, write_all

FEATURES: tuple[tuple[str, str], ...] = (
    ("cpu_ratio", "identity"), ("load1_per_core", "identity"), ("memory_used_ratio", "identity"), ("disk_read_bytes_per_second", "log1p"),
    ("disk_write_bytes_per_second", "log1p"), ("network_receive_bytes_per_second", "log1p"), ("network_transmit_bytes_per_second", "log1p"),
    ("context_switches_per_second", "log1p"), ("processes", "log1p"),
)
INTERVAL_S = 0.25
"""Time between two samples while recording: four times the agent's default, to see more states in the same time."""

MIN_SCALE = {"cpu_ratio": 0.1, "load1_per_core": 0.3, "memory_used_ratio": 0.05, "processes": 0.1}
"""Least deviation of a feature: a metric that hardly moved while recording must not make its smallest move an anomaly."""
MIN_SCALE_LOG = 1.0

QUANTILE = 0.995
HIDDEN = (16, 4, 16)
EPOCHS = 400
Rows = NDArray[numpy.float64]


def _busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(i * i for i in range(1000))


def _write(folder: str, size: int, sync: bool) -> None:
    path = os.path.join(folder, "work")
    with open(path, "wb") as handle:
        for _ in range(max(1, size // 65536)):
            handle.write(os.urandom(65536))
        if sync:
            handle.flush()
            os.fsync(handle.fileno())
    os.unlink(path)


def _traffic(size: int) -> None:
    one, two = socket.socketpair()
    with one, two:
        sent = threading.Thread(target=one.sendall, args=(bytes(size),))
        sent.start()
        left = size
        while left > 0:
            left -= len(two.recv(65536))
        sent.join()


def _normal_work(stop: threading.Event, folder: str, draw: random.Random) -> None:
    """Light, varied work of the kind a gateway does."""
    while not stop.is_set():
        kind = draw.random()
        if kind < 0.35:
            _busy(draw.uniform(0.01, 0.25))
        elif kind < 0.6:
            _write(folder, draw.randrange(65536, 2 << 20), draw.random() < 0.5)
        elif kind < 0.8:
            _traffic(draw.randrange(10_000, 2_000_000))
        stop.wait(draw.uniform(0.05, 1.2))


def record(seconds: float, during: Callable[[], Any] | None = None) -> list[dict[str, float]]:
    """Samples of this host over `seconds`."""
    sampler = HostSampler()
    sampler.sample()
    rows = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(INTERVAL_S)
        rows.append(sampler.sample())
        if during is not None:
            during()
    return rows


def matrix(rows: list[dict[str, float]]) -> Rows:
    """Samples as transformed features; samples that lack one are left out."""
    out = []
    for row in rows:
        if all(name in row for name, _ in FEATURES):
            out.append([numpy.log1p(max(0.0, row[name])) if how == "log1p" else row[name] for name, how in FEATURES])
    return numpy.asarray(out, dtype=numpy.float64)


def train(data: Rows, seed: int) -> list[Layer]:
    """An autoencoder by Adam on mean squared error; `data` is scaled."""
    rng = numpy.random.default_rng(seed)
    sizes = (data.shape[1], *HIDDEN, data.shape[1])
    weights = [rng.normal(0, numpy.sqrt(2 / a), (b, a)) for a, b in itertools.pairwise(sizes)]
    biases = [numpy.zeros(b) for b in sizes[1:]]
    parameters = weights + biases
    first, second = [numpy.zeros_like(p) for p in parameters], [numpy.zeros_like(p) for p in parameters]
    step = 0
    last = len(weights) - 1
    for _ in range(EPOCHS):
        for batch in numpy.array_split(rng.permutation(len(data)), max(1, len(data) // 32)):
            x = data[batch]
            activations = [x]
            for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
                z = activations[-1] @ w.T + b
                activations.append(numpy.maximum(z, 0) if index != last else z)
            gradient = 2 * (activations[-1] - x) / x.size
            gradients_w: list[Any] = [None] * len(weights)
            gradients_b: list[Any] = [None] * len(weights)
            for index in range(last, -1, -1):
                if index != last:
                    gradient = gradient * (activations[index + 1] > 0)
                gradients_w[index], gradients_b[index] = gradient.T @ activations[index], gradient.sum(0)
                gradient = gradient @ weights[index]
            step += 1
            for p, g, m, v in zip(parameters, gradients_w + gradients_b, first, second, strict=True):
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                p -= 0.003 * (m / (1 - 0.9**step)) / (numpy.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return [
        Layer(w.astype(numpy.float32), b.astype(numpy.float32), "relu" if index != last else "linear")
        for index, (w, b) in enumerate(zip(weights, biases, strict=True))
    ]


def errors(layers: list[Layer], data: Rows) -> Rows:
    """Mean squared reconstruction error per row."""
    x = data.astype(numpy.float32)
    out = x
    for layer in layers:
        out = out @ layer.weights.T + layer.bias
        if layer.activation == "relu":
            out = numpy.maximum(out, 0)
    result: Rows = ((out - x) ** 2).mean(1).astype(numpy.float64)
    return result


def provoke(seconds: float) -> dict[str, list[dict[str, float]]]:
    """Real anomalies, each recorded on its own."""
    found: dict[str, list[dict[str, float]]] = {}
    burners = [multiprocessing.Process(target=_busy, args=(seconds + 2,)) for _ in range(2 * (os.cpu_count() or 1))]
    for burner in burners:
        burner.start()
    found["cores busy"] = record(seconds)[4:]
    for burner in burners:
        burner.join()
    with tempfile.TemporaryDirectory() as folder:
        flood = [multiprocessing.Process(target=_flood, args=(folder, number, seconds + 1)) for number in range(2)]
        for process in flood:
            process.start()
        found["disk flood"] = record(seconds)[4:]
        for process in flood:
            process.join()
    hog = bytearray(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3)
    hog[::4096] = b"x" * len(hog[::4096])
    found["memory hog"] = record(seconds)[2:]
    del hog
    end = [time.monotonic() + seconds]
    storm = threading.Thread(target=_storm, args=(end,))
    storm.start()
    found["fork storm"] = record(seconds)[4:]
    storm.join()
    return found


def _flood(folder: str, number: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    block = os.urandom(8 << 20)
    while time.monotonic() < end:
        with open(os.path.join(folder, f"flood{number}"), "wb") as handle:
            for _ in range(8):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())


def _storm(end: list[float]) -> None:
    children: list[subprocess.Popen[bytes]] = []
    while time.monotonic() < end[0]:
        children.append(subprocess.Popen(["sleep", "2"]))
        if len(children) > 300:
            children.pop(0).wait()
    for child in children:
        child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="how long normal telemetry is recorded")
    parser.add_argument("--anomaly-seconds", type=float, default=10, help="how long each anomaly lasts")
    parser.add_argument("--recording", type=Path, help="JSON file to keep the recording in, or to train from if it exists")
    parser.add_argument("--out", type=Path, default=Path("edge_runtime/decisions/models/shipped/host-anomaly"))
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    if options.recording and options.recording.exists():
        kept = json.loads(options.recording.read_text())
        normal, anomalies = kept["normal"], kept["anomalies"]
    else:
        stop = threading.Event()
        with tempfile.TemporaryDirectory() as folder:
            worker = threading.Thread(target=_normal_work, args=(stop, folder, random.Random(options.seed)))
            worker.start()
            print(f"recording {options.seconds:.0f} s of normal telemetry", file=sys.stderr)
            normal = record(options.seconds)
            stop.set()
            worker.join()
        print("provoking anomalies", file=sys.stderr)
        anomalies = provoke(options.anomaly_seconds)
        if options.recording:
            options.recording.write_text(json.dumps({"normal": normal, "anomalies": anomalies}))
    data = matrix(normal)
    cut = int(len(data) * 0.75)
    mean = data[:cut].mean(0)
    scale = numpy.maximum(data[:cut].std(0), [MIN_SCALE.get(name, MIN_SCALE_LOG) for name, _ in FEATURES])
    scaled = (data - mean) / scale
    layers = train(scaled[:cut], options.seed)
    held = errors(layers, scaled[cut:])
    # The held-out part is split again: one half sets the threshold, the other tells the false alarms it leads to.
    threshold = float(numpy.quantile(held[::2], QUANTILE) * 1.5)
    note: dict[str, Any] = {
        "samples": len(data), "interval_s": INTERVAL_S, "seed": options.seed, "held_out_error_p50": round(float(numpy.median(held)), 5),
        "false_alarm_ratio": round(float((held[1::2] > threshold).mean()), 5),
        "found_ratio": {
            name: round(float((errors(layers, (matrix(rows) - mean) / scale) > threshold).mean()), 4) for name, rows in anomalies.items() if len(matrix(rows))
        },
    }
    inputs = [
        {"name": name, "transform": how, "mean": round(float(mean[index]), 6), "scale": round(float(scale[index]), 6)}
        for index, (name, how) in enumerate(FEATURES)
    ]
    write_all(options.out, "host-anomaly", "1", layers, inputs, {"kind": "reconstruction_mse"}, round(threshold, 5), note)
    print(json.dumps({"threshold": threshold, **note}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`novactl run`: one workload from its submit to its answer, and `novactl image`: samples to run."""

import argparse
import http.client
import secrets
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import samples
from .client import Api, CommandError, edge_api, hub_api

KINDS = {"container": "container", "function": "function", "microvm": "container", "vm": "vm"}
"""What can be run so, to the kind of its sample; more come with their drivers."""

SWITCHED = {"microvm": "microvms", "vm": "vms"}
"""Kinds that a node has no driver for until its configuration asks for it: it boots a guest at its start to see whether it can."""

LOOK_S = 0.1
"""Pause between two looks at the hub."""

SETTLE_S = 30.0
"""How long a workload that finds no node may wait for one: an edge tells what it can run some seconds after its start."""

REQUESTS = {"cpu": "100m", "memory": "64Mi"}
"""What is set aside where nothing is said: a small edge has it."""

VM_REQUESTS = {"cpu": "500m", "memory": "128Mi"}
"""The same for a virtual machine, whose system is in its memory too."""

Show = Callable[[Any, bool, list[list[Any]] | None, list[str] | None], None]


def add_commands(command: Callable[[str, Callable[[Any], int], str], argparse.ArgumentParser], show: Show, plain: Callable[[str], str]) -> None:
    """Add `run` and `image` to the parser."""

    def run(options: Any) -> int:
        return _run(options, show, plain)

    def image(options: Any) -> int:
        path = samples.make(options.kind, options.to, options.kernel)
        show({"image": samples.NAMES[options.kind], "archive": str(path)}, options.json, [[samples.NAMES[options.kind], path]], ["image", "archive"])
        return 0

    parser = command("run", run, "run one workload, wait until it answers, print what it says; without --image a sample")
    parser.add_argument("--kind", choices=KINDS, default="container")
    parser.add_argument("--image", default="", help="default: the sample of the kind, which make run and novactl image put into the edge's archives folder")
    parser.add_argument("--name", default="", help="the workload's id; default: one that is new")
    parser.add_argument("--cpu", default="", help="CPUs, or thousandths as 100m")
    parser.add_argument("--memory", default="", help="bytes, or 64Mi")
    parser.add_argument("--input", default="world", help="function: what it is sent")
    parser.add_argument("--timeout", type=float, default=60, help="seconds until it must have answered")
    parser.add_argument("--rm", action="store_true", help="remove it at the end, also where it failed")
    parser.add_argument("args", nargs="*", metavar="COMMAND", help="after --: a container's command, a function's arguments, what a virtual machine runs at its first boot")
    parser = command("image", image, "make a sample image as an archive: image container --to FOLDER, image function --to FOLDER, image vm --to FOLDER")
    parser.add_argument("kind", choices=sorted(samples.NAMES))
    parser.add_argument("--kernel", default="", help="vm: folder with boot/ and lib/modules/ of its kernel; default: .novacron/guest-kernel, else this machine's own")
    parser.add_argument("--to", type=Path, required=True, help="a folder, such as the edge's DATA_DIR/workloads/archives")


def _run(options: Any, show: Show, plain: Callable[[str], str]) -> int:
    if options.timeout <= 0:
        raise CommandError(f"run: --timeout {options.timeout:g} is no time; give seconds")
    hub, name, end = hub_api(options.hub, options.token), options.name or f"run-{options.kind}-{secrets.token_hex(3)}", time.monotonic() + options.timeout
    kind = KINDS[options.kind]
    requests = {**(VM_REQUESTS if kind == "vm" else REQUESTS), **({"cpu": options.cpu} if options.cpu else {}), **({"memory": options.memory} if options.memory else {})}
    spec: dict[str, Any] = {"command" if kind == "container" else "args": options.args} if options.args else {}
    if kind == "vm" and options.args:
        spec = {"cloud_init": {"user_data": "#!/bin/sh\n" + shlex.join(options.args) + "\n"}}
    if options.kind == "microvm":
        spec["isolation"] = "microvm"
    hub.call("POST", "/api/v1/workloads", {"id": name, "kind": kind, "image": options.image or samples.NAMES[kind], "requests": requests, "spec": spec})
    try:
        row = _running(hub, options, name, end)
        if not (node := row["node"] or next((one["node"] for one in reversed(row["placements"])), "")):
            raise CommandError(f"run: {name} has {row['state']}: {row['reason']}")
        edge = _edge(options, node)
        said = _answer(edge, name, options.input.encode(), end) if options.kind == "function" and row["state"] == "placed" else _words(hub, edge, name, end)
        row = _settled(hub, name, said)
    finally:
        if options.rm:
            _remove(hub, name, end)
    if options.json:
        show({"workload": name, "node": node, "state": row["state"], "said": row["said"], **said}, True, None, None)
    else:
        for line in said["stdout"].splitlines() + said["stderr"].splitlines():
            print(plain(line))
        print(plain(f"{name} ran on {node}" + (f", {row['state']}: {row['reason']}" if row["state"] == "failed" else "") + (", and was removed" if options.rm else f"; novactl workload cancel {name} removes it")))
    return 1 if row["state"] == "failed" else 0


def _path(name: str) -> str:
    return f"/api/v1/workloads/{quote(name, safe='')}"


def _running(hub: Api, options: Any, name: str, end: float) -> dict[str, Any]:
    """Until it runs, or has ended; raises `CommandError` with the reason where it will not run. What nobody takes may wait for a node that has just been started."""
    settled = time.monotonic() + SETTLE_S
    while True:
        row: dict[str, Any] = hub.get(_path(name))
        if row["said"] == "running" or row["state"] in ("done", "failed"):
            return row
        why = row["reason"]
        if row["state"] == "cancelled" or time.monotonic() >= end or (row["state"] == "pending" and (" refused it: " in why or time.monotonic() >= settled)):
            driver = _driver_lacks(options)
            refusals = [driver] if driver else [f"{one['node']}: {'; '.join(one['why'])}" for one in hub.get(_path(name) + "/explain")["nodes"] if not one["fits"]][:5]
            raise CommandError(f"run: {name} is {row['state']} and does not run: {why or 'no answer in time'}{'. ' if refusals else ''}{' | '.join(refusals)}; {remedy(options.kind, driver)}see novactl explain workload {name}")
        time.sleep(LOOK_S)


def remedy(kind: str, driver: str) -> str:
    """What may help where no node takes a kind, ready to be followed by more; empty where the probe of the edge's driver has said why (`driver`), or no switch is asked for it."""
    switch = SWITCHED.get(kind)
    return f"a node runs {kind}s where its configuration has workloads.{switch}: true (make run ARGS=--{switch}); " if switch and not driver else ""


def _driver_lacks(options: Any) -> str:
    """Why the edge that can be asked here has no driver for the kind, in the words of its probe; empty where it has one, or cannot be asked."""
    try:
        records = edge_api(options.edge_api).get("/api/v1/journal/event?limit=1000")
    except CommandError:
        return ""
    found = next((one["body"] for one in records if one["kind"] == "workload.driver" and one["body"].get("driver") == options.kind), None)  # the newest first
    return f"the edge's driver for {options.kind}s: {found['cannot'].get('start', '')}" if found is not None and not found["usable"] else ""


def _edge(options: Any, node: str) -> Api:
    """The local API of the edge where it runs."""
    edge = edge_api(options.edge_api)
    try:
        there = edge.get("/api/v1/status")["edge"]
    except CommandError as error:
        raise CommandError(f"run: it runs on {node}, whose local API does not answer here ({error}); run novactl there, or give --edge-api") from None
    if there != node:
        raise CommandError(f"run: it runs on {node}, and {edge.url} is {there}'s; give --edge-api of {node}")
    return edge


def _words(hub: Api, edge: Api, name: str, end: float) -> dict[str, Any]:
    """What a container has written: until it has ended, or has written something and runs on."""
    while True:
        row = hub.get(_path(name))
        try:
            said: dict[str, Any] = edge.get(f"{_path(name)}/logs")
        except CommandError as error:
            if error.status != 404:
                raise
            said = {"stdout": "", "stderr": "", "phase": "gone" if row["state"] in ("done", "failed") else "prepared"}  # it ended before it wrote a word, or is between its end and its removal
        if said["phase"] not in ("running", "prepared") or said["stdout"] or said["stderr"] or row["state"] in ("done", "failed"):
            return {key: said[key] for key in ("stdout", "stderr", "phase")}
        if time.monotonic() >= end:
            raise CommandError(f"run: {name} runs, and has written nothing in time; novactl workload cancel {name} ends it")
        time.sleep(LOOK_S)


def _settled(hub: Api, name: str, said: dict[str, Any]) -> dict[str, Any]:
    """What the hub says of it in the end: the edge knows of an end before the hub does."""
    end = time.monotonic() + SETTLE_S
    while True:
        row: dict[str, Any] = hub.get(_path(name))
        if said.get("phase") not in ("ended", "lost", "gone") or row["state"] in ("done", "failed", "cancelled") or time.monotonic() >= end:
            return row
        time.sleep(LOOK_S)


def _answer(edge: Api, name: str, body: bytes, end: float) -> dict[str, Any]:
    """What a function answers."""
    request = urllib.request.Request(f"{edge.url.rstrip('/')}/api/v1/functions/{quote(name, safe='')}", body, method="POST")
    if edge.token:
        request.add_header("Authorization", f"Bearer {edge.token}")
    try:
        with urllib.request.urlopen(request, timeout=max(0.1, end - time.monotonic())) as answer:
            return {"stdout": answer.read().decode(errors="replace"), "stderr": "", "ran_us": int(answer.headers.get("Novacron-Ran-Us", 0))}
    except urllib.error.HTTPError as error:
        raise CommandError(f"run: the call of {name} failed ({error.code}): {error.read().decode(errors='replace')[:500]}", error.code) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise CommandError(f"run: {edge.url} cannot be reached ({getattr(error, 'reason', error)}); give --edge-api") from None


def _remove(hub: Api, name: str, end: float) -> None:
    """Cancel it, and wait until its node has stopped it; what has ended needs nothing more."""
    row = hub.call("DELETE", _path(name))
    while row["state"] == "ending" and time.monotonic() < end + 15:  # asked to end, it has 10 s
        time.sleep(LOOK_S)
        row = hub.get(_path(name))

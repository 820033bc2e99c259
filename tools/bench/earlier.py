"""An earlier commit beside this code: what each left is taken up by the other, and each speaks with the other's hub; `verify` is exact each time.

An update that falls back has the old agent start on what the new one wrote, and a site has edges of several ages at one hub. Real processes of both, from a checkout of the commit; by kill -9 in between.
A hub is not started on what a newer one left: it refuses, and has to.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from tools.novactl.client import Api
from tools.novactl.verify import verify_edge

from .harness import ROOT, arguments, die_with_parent, free_port, machine, note, report, stop

COMMIT = "9172049"
"""The default: of 2026-11-28, before moves, conversions and what is asked of edges; its store is some versions older."""

EDGE = "edge-1"
RULE: dict[str, Any] = {
    "id": "each", "on": {"device": "host", "metric": "memory_used_ratio"}, "trigger": "each", "if": {"value": "memory_used_ratio", "op": ">=", "than": 0},
    "then": [{"alert": {"severity": "info", "text": "looked"}}],
}
PATIENCE_S = 60.0
RECORDS = 20
"""Decisions that each stage waits for before it is cut."""


class Stage:
    """A hub of one checkout and an edge of another, on data that earlier stages left."""

    def __init__(self, folder: Path, hub: Path, edge: Path) -> None:
        self.folder, self._roots = folder, {"hub": hub, "edge": edge}
        self.ports = {name: free_port() for name in ("api", "broker", "edge")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def _start(self, name: str, words: list[str]) -> None:
        root = self._roots[name]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen([sys.executable, *words], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=log, stderr=log, preexec_fn=die_with_parent)

    def start_hub(self) -> Api:
        """Its API, once it answers."""
        self._start("hub", ["-m", "hub", "--data-dir", str(self.folder / "hub"), "--broker", "auto", "--broker-listen", f"127.0.0.1:{self.ports['broker']}", "--listen", f"127.0.0.1:{self.ports['api']}"])
        address = f"http://127.0.0.1:{self.ports['api']}"

        def answers() -> Api:
            api = Api(address, (self.folder / "hub" / "token").read_text().strip())
            api.get("/api/v1/status")
            return api

        found: Api = self.until(answers, "the hub answers")
        return found

    def start_edge(self) -> None:
        """Start; nothing is waited for."""
        (self.folder / "edge.yaml").write_text(json.dumps({  # which is YAML
            "edge_id": EDGE, "data_dir": str(self.folder / "edge"), "uplink": {"url": f"mqtt://127.0.0.1:{self.ports['broker']}", "backoff_cap": "1s"}, "api": {"port": self.ports["edge"]},
            "devices": {"host": {"interval": "100ms"}}, "decisions": {"rules": [RULE]}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
        }))
        self._start("edge", ["-m", "edge_runtime", "run", "--config", str(self.folder / "edge.yaml")])

    def kill_edge(self) -> None:
        """SIGKILL, in the midst of it."""
        self._processes["edge"].kill()
        self._processes["edge"].wait()

    def until(self, look: Callable[[], Any], what: str) -> Any:
        """What `look` gives, once it is true; raises RuntimeError with what the processes said."""
        end, last = time.monotonic() + PATIENCE_S, ""
        while time.monotonic() < end:
            try:
                if found := look():
                    return found
            except Exception as error:
                last = str(error)
            time.sleep(0.1)
        said = "".join((self.folder / f"{name}.log").read_text(errors="replace")[-1500:] for name in self._processes)
        raise RuntimeError(f"{what} did not happen; {last}\n{said}")

    def held(self, hub: Api) -> int:
        """Decisions that the hub holds."""
        return int(hub.get(f"/api/v1/edges/{EDGE}/verify")["streams"]["decision"]["counted"])

    def close(self) -> None:
        """End all."""
        for name in ("edge", "hub"):
            if name in self._processes:
                stop(self._processes[name])

    def run(self) -> dict[str, Any]:
        """Decide, be killed, go on, be told something, and have it proven."""
        try:
            hub = self.start_hub()
            before = 0
            try:
                before = self.held(hub)
            except Exception:
                pass  # the first stage: no such edge yet
            self.start_edge()
            self.until(lambda: self.held(hub) >= before + RECORDS, "decisions reach the hub")
            self.kill_edge()
            self.start_edge()
            told = hub.call("PUT", f"/api/v1/edges/{EDGE}/desired", {"twins": {"fan-1": {"speed": before}}})
            self.until(lambda: hub.get(f"/api/v1/edges/{EDGE}")["generation"] >= told["generation"], "the edge applies desired state")
            self.until(lambda: self.held(hub) >= before + 2 * RECORDS, "decisions reach the hub after the kill")
            edge_api = Api(f"http://127.0.0.1:{self.ports['edge']}", "")
            proof = self.until(lambda: (found := verify_edge(hub, EDGE, edge_api))["exact"] and found, "verify is exact")
            return {name: {"counted": entry["counted"], "lost": entry["lost"], "duplicates": entry["duplicates"]} for name, entry in proof["streams"].items()}
        finally:
            self.close()


STAGES = 4
"""Of `meet`."""


def meet(earlier: Path, top: Path, tell: Callable[[str], None] = lambda _text: None) -> dict[str, Any]:
    """All stages with a checkout of an earlier commit; what the last of each proved. Raises RuntimeError.

    Args:
        top: where their data is put.
        tell: called with a line after each stage.
    """
    stages: dict[str, Any] = {}
    for name, steps in {
        "updated": ((earlier, earlier), (ROOT, ROOT)), "fell back": ((ROOT, earlier), (ROOT, ROOT), (ROOT, earlier)), "newer hub": ((ROOT, earlier),), "older hub": ((earlier, ROOT),),
    }.items():
        folder = top / name.replace(" ", "-")
        folder.mkdir()
        for hub, edge in steps:
            stages[name] = Stage(folder, hub, edge).run()
            tell(f"{name}: {stages[name]}")
    return stages


def main() -> int:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--commit", default=COMMIT, help="the earlier commit")
    options = parser.parse_args()
    about = machine()
    stages: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as top:
        earlier = Path(top) / "earlier"
        made = subprocess.run(["git", "worktree", "add", "--detach", str(earlier), options.commit], cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            print(f"earlier: {options.commit} cannot be checked out ({made.stderr.strip().splitlines()[-1:]}); give --commit one that this clone has", file=sys.stderr)
            return 2
        try:
            stages = meet(earlier, Path(top), lambda text: note(options, text))
        except RuntimeError as error:
            note(options, str(error))
            stages["failed"] = str(error)[-3000:]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(earlier)], cwd=ROOT, check=False)
    exact = sum(name != "failed" for name in stages)
    return report(
        options, about, "beside an earlier commit: data taken up either way, either hub, verify exact", exact, f"of {STAGES}", exact == STAGES and "failed" not in stages, inputs={"commit": options.commit},
        details=stages,
    )


if __name__ == "__main__":
    sys.exit(main())

"""The folder of what must not outlive a restart of the machine."""

import os
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers import outside


@pytest.mark.skipif(outside.UID is not None, reason="of the machine's own root")
def test_other_users_come_through_it_whatever_umask_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(outside, "RUN", str(run))
    own = os.umask(0o077)
    try:
        outside.made(str(run / "root"))
        assert run.stat().st_mode & 0o777 == 0o755 and (run / "root").stat().st_mode & 0o777 == 0o700
        run.chmod(0o700)  # of an earlier agent
        outside.made(str(run / "root"))
        assert run.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(own)

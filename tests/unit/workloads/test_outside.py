"""The folder of what must not outlive a restart of the machine."""

import os
import shutil
import subprocess
import sys
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


@pytest.mark.skipif(bool(outside.short_of_root()) or shutil.which("setpriv") is None, reason="needs a machine's root, and setpriv (util-linux)")
@pytest.mark.parametrize(("without", "first", "says"), [
    ("--nnp", "", ""), ("--bounding-set=-sys_admin --inh-caps=-sys_admin", "", "CAP_SYS_ADMIN"), ("--nnp", "os.setuid(65534)", "does not run as root"),
])
def test_what_we_lack_to_be_a_machines_root_is_told(without: str, first: str, says: str) -> None:
    """As root of a container of Docker's is root, and may mount nothing. Another user only once all is imported: it may not come to where this lies."""
    told = subprocess.run(
        ["setpriv", *without.split(), sys.executable, "-c", f"import os, outside\n{first}\nprint(outside.short_of_root())"], capture_output=True, text=True, env={"PYTHONPATH": str(Path(outside.__file__).parent)}, check=True
    ).stdout
    assert says in told and bool(told.strip()) == bool(says)

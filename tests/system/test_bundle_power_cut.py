"""The bench of an update's power cut, on one recording: some cuts, a boot or two, and its control."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from firmware_images.build import output
from tests.system.image_device import ARCH, HOME, PROFILE, image
from tools.bench.update_power_cut import cut, record

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(7200)]


def test_bundle_whose_power_is_cut_leaves_one_of_the_two_and_without_flushes_it_does_not(tmp_path: Path) -> None:
    built = image()
    image("next", 1)
    newer = output(HOME, ARCH, PROFILE, "next")
    options = SimpleNamespace(json=True, control=False, seed=1, cuts=20, read=3, boots=2)
    recorded = record(tmp_path, built, newer, HOME / "keys" / "update.key", options)
    cuts, boots, counts = cut(recorded, built, newer, options, tmp_path)
    assert not cuts.bad and not boots.bad, json.dumps([*cuts.bad, *boots.bad])[:3000]
    assert cuts.started["image 0"] and cuts.started["image 1"] and cuts.started["journal intact"] and boots.cuts == 2
    assert counts["to the boot partition"] > 20 and recorded.kept_at
    options.control, options.read = True, 0
    cuts, _, _ = cut(recorded, built, newer, options, tmp_path)
    assert cuts.bad, "an updater that never syncs was not caught"

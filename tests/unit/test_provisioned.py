"""What a machine's start says of what it was given, as files that somebody else writes."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.contract.jsoncodec import encode
from edge_runtime.provisioned import BYTES_MOST, FILES_MOST, provisioned


def test_each_file_is_one_thing_and_what_came_of_it(tmp_path: Path) -> None:
    (tmp_path / "configuration").write_text("taken\n\n")
    (tmp_path / "broker").write_text("refused\nthere is no key\n  beside the others\n")
    (tmp_path / "later.new").write_text("taken\n\n")  # its writer was cut off
    assert provisioned(tmp_path) == [
        {"what": "broker", "outcome": "refused", "reason": "there is no key beside the others"}, {"what": "configuration", "outcome": "taken", "reason": ""},
    ]


def test_where_nobody_says_anything_there_is_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert provisioned(tmp_path / "none") == [] and not caplog.text
    (tmp_path / "file").write_text("taken\n")
    assert provisioned(tmp_path / "file") == [] and "NOVACRON_TOLD" in caplog.text


def test_what_is_not_as_it_should_be_is_left_out_and_the_rest_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").write_text("perhaps\nwhy\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").write_bytes(b"refused\n\xff\xfe" + b"x" * BYTES_MOST * 2)
    [found] = provisioned(tmp_path)
    assert found["what"] == "c" and len(found["reason"]) < BYTES_MOST
    assert "/a: its first line is none of taken, refused" in caplog.text and "/b: " in caplog.text
    for number in range(FILES_MOST * 3):
        (tmp_path / f"n{number}").write_text("taken\n")
    assert len(provisioned(tmp_path)) <= FILES_MOST


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_whatever_stands_there_becomes_a_record_or_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "what").write_bytes(data)
    for body in provisioned(tmp_path):
        encode(body)
        assert body["outcome"] == data.split(b"\n")[0].decode() and os.linesep not in body["reason"]

"""Names of images in registries, what is configured for registries, where an answer may lead."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config.load import ConfigError, load_config
from edge_runtime.workloads.images import ImageError, credentials
from edge_runtime.workloads.images.reference import Host, Reference, challenge, hosts, may_follow, parse

D = "ab" * 32
SHORT = hosts([{"host": "docker.io", "short": True}])


@pytest.mark.parametrize(("text", "known", "wanted"), [
    ("registry.example:5000/name:tag", {}, Reference("registry.example:5000", "name", "tag", "")), ("ghcr.io/org/team/app", {}, Reference("ghcr.io", "org/team/app", "latest", "")),
    (f"r.example/app@sha256:{D}", {}, Reference("r.example", "app", "latest", D)), (f"r.example/app:3@sha256:{D}", {}, Reference("r.example", "app", "3", D)), ("localhost/app:1", {}, Reference("localhost", "app", "1", "")),
    ("box:1", {}, None), ("team/box:1", {}, None), (f"sha256:{D}", {}, None), ("box:1", SHORT, Reference("docker.io", "library/box", "1", "")), ("team/box:1", SHORT, Reference("docker.io", "team/box", "1", "")),
    ("docker.io/box", {}, Reference("docker.io", "library/box", "latest", "")), ("box:1", hosts([{"host": "r.example", "short": True}]), Reference("r.example", "box", "1", "")),
])
def test_what_a_name_means(text: str, known: dict[str, Host], wanted: Reference | None) -> None:
    assert parse(text, known) == wanted


@pytest.mark.parametrize("text", ["r.example/App:1", "r.example/a//b", "r.example/../x", "r.example/a:", "r.example/a:1@md5:aa", f"r.example/a@sha256:{D}0", "r.example:port/a", "r.example/", "r.example/a:b c", "-r.example/a", "r.example/a?x=1:1"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="write registry"):
        parse(text, {})


@given(st.text(max_size=80), st.booleans())
def test_any_text_is_a_name_or_one_error_and_no_part_can_leave_its_place_in_an_address(text: str, short: bool) -> None:
    try:
        found = parse(text, SHORT if short else {})
    except ImageError:
        return
    if found is not None:
        assert not set("/?#@ %\\\r\n") & set(found.host + found.tag) and not set("?#@: %\\\r\n") & set(found.repository)
        assert ".." not in found.repository.split("/") and "" not in found.repository.split("/")


def test_where_an_answer_may_lead() -> None:
    for here, there, may in (
        ("https://r.example", "https://cdn.example/x", True), ("http://r.example:5000", "http://r.example:5000/x", True), ("http://r.example", "http://r.example:80/x", True), ("http://r.example", "https://other/x", True),
        ("https://r.example", "http://r.example/x", False), ("http://r.example:5000", "http://r.example:5001/x", False), ("http://r.example", "http://169.254.169.254/latest", False), ("http://r.example", "file:///etc/passwd", False),
        ("https://r.example", "https://user:pass@other/x", False), ("https://r.example", "https:///x", False), ("https://r.example", "", False), ("https://r.example", "https://[bad", False), ("http://r.example", "http://r.example:99999/", False),
    ):
        assert may_follow(here, there) == may, (here, there)


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_makes_an_exception_of_a_challenge_or_an_address(one: str, other: str) -> None:
    may_follow(one, other)
    challenge((one, f"Bearer {other}"))


def test_a_challenge_is_read_bearer_before_basic() -> None:
    assert challenge(['Basic realm="x"', 'Bearer realm="https://a/t",service="s", scope="repository:a:pull,push"']) == ("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a:pull,push"})
    assert challenge(["Negotiate"]) == ("", {})


@pytest.mark.parametrize(("entries", "field"), [
    ([{"host": "https://r.example"}], r"workloads.registries\[0\].host"), ([{}], r"registries\[0\].host"), ([{"host": "a.b", "mirror": []}], r"registries\[0\].mirror"), ([{"host": "a.b", "insecure": "no"}], r"registries\[0\].insecure"),
    ([{"host": "a.b", "mirrors": ["c/d"]}], r"registries\[0\].mirrors"), ([{"host": "a.b"}, {"host": "a.b"}], r"registries\[1\].host"), ([{"host": "a.b", "short": True}, {"host": "c.d", "short": True}], r"registries\[1\].short"),
])
def test_a_bad_configuration_names_the_key_when_it_is_read(entries: list[dict[str, Any]], field: str, tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(json.dumps({"workloads": {"enabled": True, "registries": entries}}))
    with pytest.raises(ConfigError, match=field):
        load_config(path, {})


def test_credentials_are_read_of_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "auth"
    good = {"auths": {"https://index.docker.io/v1/": {"auth": base64.b64encode(b"a:b:c").decode()}, "r.example:5000": {"auth": base64.b64encode(b"d:e").decode()}}}
    path.write_text(json.dumps(good))
    os.chmod(path, 0o600)
    assert credentials.load(str(path)) == {"docker.io": ("a", "b:c"), "r.example:5000": ("d", "e")} and credentials.load("") == {}
    os.chmod(path, 0o640)
    with pytest.raises(ImageError, match="chmod 600"):
        credentials.load(str(path))
    os.chmod(path, 0o600)
    for bad in ("{", "[]", '{"auths": []}', '{"auths": {"a": {"auth": "!!"}}}', '{"auths": {"a": {"auth": "c2VjcmV0"}}}', '{"auths": {"a": 5}}', "[" * 100_000):
        path.write_text(bad)
        with pytest.raises(ImageError, match="docker login") as caught:
            credentials.load(str(path))
        assert "secret" not in str(caught.value)
    with pytest.raises(ImageError, match="cannot be read"):
        credentials.load(str(tmp_path / "none"))

"""Images from registries: a real one, cut connections, mirrors, credentials, and one that lies in every way we know of."""

import asyncio
import base64
import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from edge_runtime.config.schema import EdgeConfig, WorkloadsConfig
from edge_runtime.metrics import Metrics
from edge_runtime.workloads.images import ImageError, ImageStore, Limits
from edge_runtime.workloads.images import pull as pulls
from edge_runtime.workloads.images.registry import Part
from edge_runtime.workloads.node_images import NodeImages
from tests.unit.workloads.image_side import AS_ROOT, HERE, layer, layout, sha

from .registry_side import MANIFEST, Chops, Liar, Node, push, reason_against, registry

BASE = layer([("file", "bin/app", b"#!" * 500)])
BIG = layer([("file", "noise", os.urandom(5 << 20))])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if reason := reason_against():
        pytest.skip(reason)
    with registry(tmp_path_factory.mktemp("registry") / "r") as host:
        yield host


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Any]:
    made: list[Node] = []

    def make(*registries: dict[str, Any], **more: Any) -> Node:
        made.append(Node(tmp_path / f"node-{len(made)}", *registries, **more))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_an_image_is_fetched_verified_and_kept_and_its_layers_are_not_fetched_again(real: str, nodes: Any, tmp_path: Path) -> None:
    push(real, "team/app", "1", layout(tmp_path / "in", [BASE, BIG], run={"Cmd": ["app"]}))
    node = nodes({"host": real, "insecure": True})
    image = await node.puller.pull(f"{real}/team/app:1")
    assert image.names == (f"{real}/team/app:1",) and image.config.diff_ids == (sha(BASE), sha(BIG))
    assert (node.store.lower(image)[1] / "bin/app").read_bytes() == b"#!" * 500
    told = node.said[0]
    assert told["registry"] == real and told["blobs"] == 3 and 5 << 20 < told["bytes"] < len(BIG) + 20_000 and told["ms"] > 0 and not told["cuts"] and node.left() == []
    push(real, "team/app", "2", layout(tmp_path / "next", [BASE, BIG, layer([("file", "new", b"x")])], run={"Cmd": ["app"]}))
    await node.puller.pull(f"{real}/team/app:2")
    assert node.said[1]["bytes"] < 5000 and node.said[1]["blobs"] == 2


async def test_of_an_index_the_manifest_for_this_machine_is_taken_and_a_digest_means_the_index_too(real: str, nodes: Any, tmp_path: Path) -> None:
    source = layout(tmp_path / "in", [BIG], platform={"os": "linux", "architecture": "vax"})
    layout(source, [BASE], platform={"os": HERE.os, "architecture": HERE.arch, **({"variant": HERE.variant} if HERE.variant else {})})
    digest = push(real, "many", "1", source)
    node = nodes({"host": real, "insecure": True})
    image = await node.puller.pull(f"{real}/many@{digest}")
    assert image.config.diff_ids == (sha(BASE),) and node.store.find(f"{real}/many@{digest}").digest == image.digest
    assert (await node.puller.pull(f"{real}/many:1")).digest == image.digest and node.said[0]["bytes"] < 20_000


async def test_connections_that_are_cut_again_and_again_cost_no_byte_twice(real: str, nodes: Any, tmp_path: Path) -> None:
    push(real, "cut", "1", layout(tmp_path / "in", [BIG]))
    proxy = Chops(*real.split(":")[:1], int(real.split(":")[1]))
    await proxy.start()
    try:
        node = nodes({"host": f"127.0.0.1:{proxy.port}", "insecure": True})
        assert (await node.puller.pull(f"127.0.0.1:{proxy.port}/cut:1")).config.diff_ids == (sha(BIG),)
    finally:
        await proxy.close()
    told = node.said[0]
    assert told["cuts"] >= 4 and told["bytes"] < len(BIG) + 100_000


async def test_what_was_fetched_is_gone_on_from_after_a_restart_and_what_was_damaged_meanwhile_is_fetched_anew(nodes: Any, tmp_path: Path) -> None:
    async with Liar(layout(tmp_path / "in", [BIG])) as liar:
        whole = (liar.source / "blobs/sha256" / liar.layers[0][7:]).read_bytes()
        for damage in (False, True):
            text, node = f"{liar.host}/app:{damage}", nodes({"host": liar.host, "insecure": True})
            blobs = node.folder / "pulls" / pulls._name(text) / "blobs/sha256"
            blobs.mkdir(parents=True)
            (blobs / f"{liar.layers[0][7:]}.part").write_bytes((b"x" if damage else whole[:1]) + whole[1:3_000_000])
            assert (await node.puller.pull(text)).config.diff_ids == (sha(BIG),)
            assert (node.said[0]["resumed_bytes"] == 0) == damage
            assert (node.said[0]["bytes"] > len(whole)) == damage


async def test_what_was_damaged_after_it_had_been_verified_is_refused_once_and_fetched_anew(nodes: Any, tmp_path: Path) -> None:
    async with Liar(layout(tmp_path / "in", [BASE])) as liar:
        text, node = f"{liar.host}/app:1", nodes({"host": liar.host, "insecure": True})
        blobs = node.folder / "pulls" / pulls._name(text) / "blobs/sha256"
        blobs.mkdir(parents=True)
        (blobs / liar.layers[0][7:]).write_bytes(bytes((liar.source / "blobs/sha256" / liar.layers[0][7:]).stat().st_size))
        with pytest.raises(ImageError, match="is not what its digest"):
            await node.puller.pull(text)
        assert node.store.images() == [] and (await node.puller.pull(text)).config.diff_ids == (sha(BASE),)


async def test_a_registry_that_does_not_know_ranges_is_asked_from_the_beginning(nodes: Any, tmp_path: Path) -> None:
    async with Liar(layout(tmp_path / "in", [BIG])) as liar:
        data = (liar.source / "blobs/sha256" / liar.layers[0][7:]).read_bytes()
        count = []

        async def cut_once(request: web.Request) -> web.StreamResponse:
            count.append(request.headers.get("Range"))
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[:2 << 20] if len(count) == 1 else data)
            if len(count) == 1 and request.transport is not None:
                request.transport.abort()
            return response

        liar.lies[liar.layers[0]] = cut_once
        node = nodes({"host": liar.host, "insecure": True})
        assert (await node.puller.pull(f"{liar.host}/app:1")).config.diff_ids == (sha(BIG),)
        assert count[0] is None and count[1] is not None and len(count) == 2


def _body(data: bytes, **more: Any) -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=data, **more)

    return answer


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    response.enable_chunked_encoding()
    await response.prepare(request)
    sent = 0
    while sent < 1 << 30:
        await response.write(bytes(1 << 18))
        sent += 1 << 18
    return response


def _to(target: str) -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": target})

    return answer


async def test_every_lie_is_refused_by_name_and_leaves_no_image(nodes: Any, tmp_path: Path) -> None:
    source = layout(tmp_path / "in", [BASE])
    async with Liar(source) as liar, Liar(source) as other:
        blob, good = liar.layers[0], (source / "blobs/sha256" / liar.layers[0][7:]).read_bytes()
        evil = json.dumps({"schemaVersion": 2, "config": {}, "layers": []}).encode()
        cases: list[tuple[str, str, Any, str]] = [
            ("wrong blob", blob, _body(good[:-1] + bytes((good[-1] ^ 1,))), "sent what is not sha256:"),
            ("another blob", blob, _body(b"x" * len(good)), "sent what is not sha256:"),
            ("too much", blob, _body(good + b"x"), "sends more for sha256:"),
            ("without an end", blob, _endless, "sends more for sha256:"),
            ("manifest without an end", "/manifests/1", _endless, "sends more than"),
            ("no manifest", "/manifests/1", _body(b"{", content_type=MANIFEST), "is not JSON"),
            ("an empty one", "/manifests/1", _body(evil, content_type=MANIFEST), "manifest.config"),
            ("says another digest", "/manifests/1", _body((source / "blobs/sha256" / liar.manifest["digest"][7:]).read_bytes(), content_type=MANIFEST, headers={"Docker-Content-Digest": f"sha256:{'0' * 64}"}), "sent what has the digest"),
            ("is no image", "/manifests/1", _body(b"{}", content_type="text/html"), "is no image"),
            ("leads elsewhere", blob, _to(f"http://{other.host}/v2/app/blobs/{blob}"), "neither https nor the same host"),
            ("leads to a file", blob, _to("file:///etc/passwd"), "neither https nor the same host"),
            ("leads in a circle", blob, _to(f"/v2/app/blobs/{blob}"), "in a circle"),
            ("forbids", blob, _body(b"", status=403), "does not let us read"),
            ("has none", "/manifests/1", _body(b"", status=404), "has no app:1"),
            ("wants a token from elsewhere", "/manifests/1", _body(b"", status=401, headers={"WWW-Authenticate": f'Bearer realm="http://{other.host}/token"'}), "neither https nor the same host"),
            ("never content", "/manifests/1", _body(b"", status=401, headers={"WWW-Authenticate": f'Bearer realm="http://{liar.host}/token"'}), "gives no token|is not JSON|does not let us|answers 500"),
            ("fails for ever", "/manifests/1", _body(b"", status=503), "answers 503"),
        ]
        for what, where, lie, says in cases:
            liar.lies = {where: lie, "/token": _body(b'{"token": "t"}')}
            node = nodes({"host": liar.host, "insecure": True})
            with pytest.raises(ImageError, match=says):
                await node.puller.pull(f"{liar.host}/app:1")
            assert node.store.images() == [] and node.store.used_bytes() == 0, what
            assert blob[7:] not in node.left(), what
        assert other.seen == [], "nobody was led there"
        liar.lies = {}
        with pytest.raises(ImageError, match="asked for was sha256:0000"):
            await nodes({"host": liar.host, "insecure": True}).puller.pull(f"{liar.host}/app@sha256:{'0' * 64}")
        with pytest.raises(ImageError, match=r"workloads.images_bytes is 10"):
            await nodes({"host": liar.host, "insecure": True}, budget=10).puller.pull(f"{liar.host}/app:1")
        with pytest.raises(ImageError, match="stay free"):
            await nodes({"host": liar.host, "insecure": True}, limits=Limits(keep_free=1 << 60)).puller.pull(f"{liar.host}/app:1")
        assert len((await nodes({"host": liar.host, "insecure": True}).puller.pull(f"{liar.host}/app:1")).names) == 1


async def test_control_a_puller_that_believes_is_caught(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(self: Part, digest: str, target: Path) -> bool:
        os.rename(self.path, target)
        return True

    monkeypatch.setattr(Part, "settle", settle)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await test_every_lie_is_refused_by_name_and_leaves_no_image(nodes, tmp_path)


async def test_control_a_client_that_follows_is_caught(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.workloads.images.registry.may_follow", lambda here, there: True)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await test_every_lie_is_refused_by_name_and_leaves_no_image(nodes, tmp_path)


async def test_a_mirror_is_asked_first_and_the_registry_where_it_fails_or_lies(nodes: Any, tmp_path: Path) -> None:
    async with Liar(layout(tmp_path / "in", [BASE])) as first, Liar(layout(tmp_path / "same", [BASE])) as mirror:
        configured = ({"host": first.host, "insecure": True, "mirrors": [mirror.host]}, {"host": mirror.host, "insecure": True})
        node = nodes(*configured)
        await node.puller.pull(f"{first.host}/app:1")
        assert node.said[0]["registry"] == mirror.host and first.seen == []
        mirror.lies[mirror.layers[0]] = _body(b"x" * (mirror.source / "blobs/sha256" / mirror.layers[0][7:]).stat().st_size)
        node = nodes(*configured)
        await node.puller.pull(f"{first.host}/app:1")
        assert node.said[0]["registry"] == first.host
        first.lies["/manifests/1"] = _body(b"", status=404)
        with pytest.raises(ImageError, match=r"none of .* gives it: .*sent what is not.* \| .*has no app:1"):
            await nodes(*configured).puller.pull(f"{first.host}/app:1")


async def test_tokens_are_asked_for_with_the_credentials_and_go_nowhere_else(nodes: Any, tmp_path: Path) -> None:
    async with Liar(layout(tmp_path / "in", [BASE])) as liar:
        tokens: list[Any] = []

        async def token(request: web.Request) -> web.StreamResponse:
            tokens.append((request.query.get("service"), request.query.get("scope"), request.headers.get("Authorization")))
            return web.json_response({"access_token": f"t{len(tokens)}"})

        async def guarded(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Authorization") != f"Bearer t{len(tokens)}" or len(tokens) < 1:
                return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="http://{liar.host}/token",service="the registry",scope="repository:app:pull"'})
            del liar.lies["/manifests/1"]
            return await liar.serve(request)

        liar.lies |= {"/token": token, "/manifests/1": guarded}
        file = tmp_path / "auth.json"
        file.write_text(json.dumps({"auths": {liar.host: {"auth": base64.b64encode(b"me:secret").decode()}}}))
        os.chmod(file, 0o644)
        with pytest.raises(ImageError, match="can be read by others"):
            await nodes({"host": liar.host, "insecure": True}, credentials=str(file)).puller.pull(f"{liar.host}/app:1")
        os.chmod(file, 0o600)
        await nodes({"host": liar.host, "insecure": True}, credentials=str(file)).puller.pull(f"{liar.host}/app:1")
        assert tokens == [("the registry", "repository:app:pull", "Basic " + base64.b64encode(b"me:secret").decode())]


async def test_a_real_registry_with_a_password(nodes: Any, tmp_path: Path) -> None:
    if reason := reason_against():
        pytest.skip(reason)
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    (tmp_path / "htpasswd").write_text(f"me:{library.crypt(b'secret', b'$2b$04$abcdefghijklmnopqrstuu').decode()}\n")
    file = tmp_path / "auth.json"
    with registry(tmp_path / "r", f"auth:\n  htpasswd:\n    realm: here\n    path: {tmp_path}/htpasswd\n") as host:
        secret = base64.b64encode(b"me:secret").decode()
        push(host, "app", "1", layout(tmp_path / "in", [BASE]), {"Authorization": f"Basic {secret}"})
        for auth, says in (("", "does not let us read"), (base64.b64encode(b"me:wrong").decode(), "does not let us read"), (secret, "")):
            file.write_text(json.dumps({"auths": {f"https://{host}/v1/": {"auth": auth}} if auth else {}}))
            os.chmod(file, 0o600)
            node = nodes({"host": host, "insecure": True}, credentials=str(file))
            if not says:
                assert (await node.puller.pull(f"{host}/app:1")).config.diff_ids == (sha(BASE),)
                continue
            with pytest.raises(ImageError, match=says):
                await node.puller.pull(f"{host}/app:1")


async def test_all_who_want_an_image_share_one_pull_and_the_last_who_leaves_ends_it(nodes: Any, tmp_path: Path) -> None:
    async with Liar(layout(tmp_path / "in", [BASE])) as liar:
        gate, asked = asyncio.Event(), asyncio.Event()

        async def slow(request: web.Request) -> web.StreamResponse:
            asked.set()
            await gate.wait()
            del liar.lies["/manifests/1"]
            return await liar.serve(request)

        liar.lies["/manifests/1"] = slow
        node = nodes({"host": liar.host, "insecure": True})
        first, second = (asyncio.create_task(node.puller.pull(f"{liar.host}/app:1")) for _ in range(2))
        await asked.wait()
        first.cancel()
        gate.set()
        assert (await second).config.diff_ids == (sha(BASE),) and len(node.said) == 1
        assert sum("/manifests/" in request.path for request in liar.seen) == 2  # one of them by the lie itself


async def test_a_registry_by_a_name_that_nobody_serves_is_given_up_with_the_reason(nodes: Any) -> None:
    with pytest.raises(ImageError, match="cannot be reached"):
        await nodes({"host": "127.0.0.1:1", "insecure": True}).puller.pull("127.0.0.1:1/app:1")


class _Said:
    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, Any]]] = []

    def append(self, stream: str, kind: str, body: dict[str, Any]) -> None:
        self.records.append((kind, body))

    def state(self, key: str) -> Any:
        return None


async def test_a_node_asks_the_registry_as_the_document_says_and_tells_what_it_fetched(tmp_path: Path) -> None:
    async with Liar(layout(tmp_path / "in", [BASE])) as liar:
        said, metrics = _Said(), Metrics()
        config = EdgeConfig(data_dir=str(tmp_path / "data"), workloads=WorkloadsConfig(enabled=True, registries=({"host": liar.host, "insecure": True},)))
        images = NodeImages(config, said, metrics)  # type: ignore[arg-type]
        images.store = ImageStore(tmp_path / "data/workloads/images", limits=Limits(keep_free=0), own=AS_ROOT)
        name = f"{liar.host}/app:1"
        with pytest.raises(ImageError, match="not on this node"):
            await images.take(name, "never")
        with pytest.raises(ImageError, match="not on this node"):
            await images.take("app:1", "missing")  # names no registry
        assert liar.seen == []
        image = await images.take(name, "missing")
        assert [kind for kind, _ in said.records] == ["image.pull"] and said.records[0][1]["digest"] == f"sha256:{image.digest}"
        assert metrics.total("image_pulls_total") == 1 and metrics.total("image_pull_bytes_total") == said.records[0][1]["bytes"] > 0
        asked = len(liar.seen)
        assert await images.take(name, "missing") and await images.take(f"{liar.host}/app@sha256:{image.digest}", "missing") and len(liar.seen) == asked, "what is here is used without asking"
        layout(liar.source, [BASE, layer([("file", "new", b"n")])], name="other")
        liar.manifest = json.loads((liar.source / "index.json").read_text())["manifests"][1]
        assert (await images.take(name, "missing")).digest == image.digest
        assert (await images.take(name, "always")).digest == liar.manifest["digest"][7:] != image.digest
        assert (await images.take(name, "missing")).digest != image.digest, "the name means the newer one now"
        await images.stop()
        images.store.close()


async def test_tls_is_trusted_by_the_authority_that_is_configured_and_by_no_other(nodes: Any, tmp_path: Path) -> None:
    if reason := reason_against() or ("" if shutil.which("openssl") else "no openssl (as root: apt install openssl)"):
        pytest.skip(reason)
    for name in ("ours", "other"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem"),
                        "-days", "2", "-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    with registry(tmp_path / "plain") as host:  # filled without TLS, then served with it
        push(host, "app", "1", layout(tmp_path / "in", [BASE]))
    (tmp_path / "plain").rename(tmp_path / "filled")
    tls = f"  tls:\n    certificate: {tmp_path}/ours.pem\n    key: {tmp_path}/ours.key\n"
    with registry(tmp_path / "plain", tls, before=lambda folder: shutil.copytree(tmp_path / "filled/data", folder / "data")) as host:
        for more, says in (({}, "cannot be trusted"), ({"ca_file": str(tmp_path / "other.pem")}, "cannot be trusted"), ({"ca_file": str(tmp_path / "ours.pem")}, "")):
            node = nodes({"host": host, **more})
            if says:
                with pytest.raises(ImageError, match=says):
                    await node.puller.pull(f"{host}/app:1")
            else:
                assert (await node.puller.pull(f"{host}/app:1")).config.diff_ids == (sha(BASE),)


async def test_the_proxy_of_the_environment_is_asked_unless_it_says_otherwise(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Liar(layout(tmp_path / "in", [BASE])) as liar:
        monkeypatch.setenv("http_proxy", f"http://{liar.host}")
        monkeypatch.setenv("no_proxy", "elsewhere.invalid")
        await nodes({"host": "registry.invalid:5000", "insecure": True}).puller.pull("registry.invalid:5000/app:1")
        seen = len(liar.seen)
        assert seen >= 3
        monkeypatch.setenv("no_proxy", ".invalid")
        with pytest.raises(ImageError, match="cannot be reached"):
            await nodes({"host": "registry.invalid:5000", "insecure": True}).puller.pull("registry.invalid:5000/app:1")
        assert len(liar.seen) == seen

"""OCI layouts of our containers, as our own reader and strict eyes see them; compose file and Kubernetes manifests against what they may say."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config.load import load_config
from edge_runtime.workloads.images import source
from edge_runtime.workloads.images.layer import Limits
from edge_runtime.workloads.images.manifest import Platform
from firmware_images import containers, oci
from firmware_images.cli import main
from firmware_images.errors import FirmwareError
from firmware_images.tree import Tree
from hub.broker.base import Door
from hub.broker.mosquitto import MosquittoBroker
from hub.cli import main as hub_main

DEPLOY = Path(containers.__file__).with_name("deploy")

TIME_S = 1_700_000_000

PROCESS = containers.process(containers.SERVICES["edge"], "production")


def made(arch: str = "amd64", content: bytes = b"x") -> oci.Image:
    tree = Tree()
    tree.file("/usr/bin/a", content, 0o755)
    tree.link("/bin", "usr/bin")
    tree.folder("/tmp", 0o1777)
    return oci.image(tree.items(), arch, PROCESS, {"org.opencontainers.image.title": "t"}, TIME_S)


def read(layout: Path, arch: str) -> source.Plan:
    """By the reader of our container driver."""
    return source.plan(source.FolderFiles(layout), "", Platform("linux", arch, "v8" if arch == "arm64" else ""), Limits())


def test_our_reader_finds_the_image_of_its_machine_among_several(tmp_path: Path) -> None:
    for arch in ("amd64", "riscv64", "arm64"):
        oci.add(tmp_path, "a:1", made(arch, arch.encode()), "amd64")
    for arch in ("amd64", "riscv64", "arm64"):
        plan = read(tmp_path, arch)
        assert plan.names == ("docker.io/library/a:1", "a:1") and plan.config.user == "990:990" and plan.config.entrypoint == PROCESS.arguments and plan.config.args == ()
        with plan.layers[0].open() as layer:
            data = layer.read()
        plain = gzip.decompress(data)
        assert hashlib.sha256(data).hexdigest() == plan.layers[0].digest and hashlib.sha256(plain).hexdigest() == plan.layers[0].diff_id.removeprefix("sha256:")
        with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
            file = archive.extractfile("./usr/bin/a")
            assert file is not None and file.read() == arch.encode() and archive.getmember("./tmp").mode == 0o1777


def test_a_layout_keeps_no_blob_that_nothing_names_and_the_other_architectures(tmp_path: Path) -> None:
    oci.add(tmp_path, "a:1", made("arm64"), "amd64")
    oci.add(tmp_path, "a:1", made("amd64", b"old"), "amd64")
    oci.add(tmp_path, "a:1", made("amd64", b"new"), "amd64")
    assert len(list((tmp_path / "blobs/sha256").iterdir())) == 7, "two of three blobs, and the index of both"
    assert {path.name for path in (tmp_path / "blobs/sha256").iterdir()} == {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "blobs/sha256").iterdir()}
    assert [entry["platform"]["architecture"] for entry in oci.listed(tmp_path, "a:1")] == ["amd64", "arm64"]


def test_a_layout_lists_one_thing_under_its_name(tmp_path: Path) -> None:
    """skopeo refuses a layout that lists several ("more than one image in oci"), and under a name it copies the first of them, whatever `--all` says."""
    for arch in ("arm64", "amd64"):
        oci.add(tmp_path, "a:1", made(arch), "amd64")
    [top] = json.loads((tmp_path / "index.json").read_text())["manifests"]
    assert top["mediaType"] == oci.INDEX_MEDIA and "platform" not in top
    assert top["annotations"] == {oci.REF_NAME: "a:1", "io.containerd.image.name": "docker.io/library/a:1"}, "the name by which a kubelet asks containerd for it"


@pytest.mark.parametrize(("built", "here", "taken"), [(("arm64", "amd64"), "amd64", "amd64"), (("arm64", "amd64"), "arm64", "arm64"), (("arm64", "riscv64"), "amd64", "arm64"), (("riscv64",), "amd64", "riscv64")])
def test_docker_load_finds_this_machines_image(built: tuple[str, ...], here: str, taken: str, tmp_path: Path) -> None:
    """Docker that keeps images itself reads no layout: `manifest.json` is what `docker save` writes."""
    for arch in built:
        oci.add(tmp_path, "a:1", made(arch, arch.encode()), here)
    [entry] = json.loads((tmp_path / "manifest.json").read_text())
    config = json.loads((tmp_path / entry["Config"]).read_text())
    plain = [hashlib.sha256(gzip.decompress((tmp_path / name).read_bytes())).hexdigest() for name in entry["Layers"]]
    assert entry["RepoTags"] == ["a:1"] and config["architecture"] == taken and config["rootfs"]["diff_ids"] == [f"sha256:{digest}" for digest in plain]
    # The same by our reader of such archives, which looks for a layout first.
    (tmp_path / "oci-layout").unlink()
    assert read(tmp_path, taken).layers[0].size > 0


def test_a_layout_of_before_is_taken_over(tmp_path: Path) -> None:
    """Until there was an index between, each architecture's image stood in the layout's own."""
    oci.add(tmp_path, "a:1", made("arm64"), "amd64")
    [entry] = oci.listed(tmp_path, "a:1")
    (tmp_path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [{**entry, "annotations": {oci.REF_NAME: "a:1"}}]}))
    assert oci.listed(tmp_path, "a:1") == [entry]
    oci.add(tmp_path, "a:1", made("amd64"), "amd64")
    assert [one["platform"]["architecture"] for one in oci.listed(tmp_path, "a:1")] == ["amd64", "arm64"] and read(tmp_path, "arm64").layers


def test_a_blob_that_was_changed_is_noticed(tmp_path: Path) -> None:
    image = made()
    oci.add(tmp_path, "a:1", image, "amd64")
    manifest = tmp_path / "blobs/sha256" / image.entry["digest"].removeprefix("sha256:")
    manifest.write_bytes(manifest.read_bytes().replace(b'"schemaVersion":2', b'"schemaVersion":3'))
    with pytest.raises(Exception, match="is not what its digest"):
        read(tmp_path, "amd64")


@given(st.binary(max_size=200))
def test_an_index_that_is_not_ours_is_refused_and_left_as_it_is(noise: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as top:
        index = Path(top) / "index.json"
        index.write_bytes(noise)
        with pytest.raises(FirmwareError, match="is not one of ours"):
            oci.add(Path(top), "a:1", made(), "amd64")
        assert index.read_bytes() == noise


def test_the_same_tree_gives_the_same_digests() -> None:
    assert made().entry == made().entry and made(content=b"y").entry["digest"] != made().entry["digest"]


@pytest.mark.parametrize("mode", containers.MODES)
@pytest.mark.parametrize("service", list(containers.SERVICES))
def test_no_container_runs_as_root_or_has_a_password(service: str, mode: str) -> None:
    chosen = containers.service(service)
    tree = Tree()
    containers.furnish(tree, chosen, mode)
    assert containers.process(chosen, mode).user == "990:990"
    assert all(line.split(":")[1] == "x" for line in tree["/etc/passwd"].data.decode().splitlines()) and "/etc/shadow" not in tree
    assert ("/usr/bin/sh" in tree) == (mode == "development")
    assert not any(word.partition("=")[0].endswith(("PASSWORD", "TOKEN", "SECRET")) for word in containers.process(chosen, mode).environment)


@pytest.mark.parametrize(("arguments", "words"), [
    (["containers", "--arch", "z80"], "arch: 'z80' is unknown"), (["containers", "--service", "web"], "service: 'web' is unknown"), (["containers", "--mode", "fast"], "mode: 'fast' is unknown"),
])
def test_bad_input_is_one_clear_line(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--home", str(tmp_path / "new")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "new").exists()


# -- compose and Kubernetes ------------------------------------------------------------------------------------------------------------


class _Strict(yaml.SafeLoader):
    """YAML in which a key stands once."""


def _once(loader: _Strict, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    if len(keys) != len(set(keys)):
        raise ValueError(f"a key stands twice in {keys}")
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Strict.add_constructor("tag:yaml.org,2002:map", _once)

TEXT, NUMBER, FLAG = str, int, bool
SECRET_KEY = {"name": TEXT, "key": TEXT}
PROBE = {"httpGet": {"path": TEXT, "port": TEXT}, "tcpSocket": {"port": TEXT}, "initialDelaySeconds": NUMBER, "periodSeconds": NUMBER, "timeoutSeconds": NUMBER, "failureThreshold": NUMBER}
CONTAINER = {
    "name!": TEXT, "image!": TEXT, "command": [TEXT], "env": [{"name!": TEXT, "value": TEXT, "valueFrom": {"secretKeyRef": SECRET_KEY, "fieldRef": {"fieldPath": TEXT}}}],
    "securityContext!": {"allowPrivilegeEscalation!": FLAG, "readOnlyRootFilesystem!": FLAG, "capabilities!": {"drop!": [TEXT]}}, "ports": [{"name!": TEXT, "containerPort!": NUMBER}],
    "startupProbe": PROBE, "livenessProbe": PROBE, "readinessProbe!": PROBE, "resources!": {"requests!": {"cpu!": TEXT, "memory!": TEXT}, "limits!": {"memory!": TEXT}},
    "volumeMounts": [{"name!": TEXT, "mountPath!": TEXT, "readOnly": FLAG}],
}
META = {"name!": TEXT, "namespace!": TEXT}
KINDS: dict[tuple[str, str], Any] = {
    ("v1", "Namespace"): {"metadata!": {"name!": TEXT, "labels": {"*": TEXT}}},
    ("v1", "ConfigMap"): {"metadata!": META, "data!": {"*": TEXT}},
    ("v1", "Service"): {"metadata!": META, "spec!": {"clusterIP": TEXT, "publishNotReadyAddresses": FLAG, "selector!": {"app!": TEXT}, "ports!": [{"name!": TEXT, "port!": NUMBER, "targetPort!": TEXT}]}},
    ("apps/v1", "StatefulSet"): {"metadata!": META, "spec!": {
        "serviceName!": TEXT, "replicas!": NUMBER, "selector!": {"matchLabels!": {"app!": TEXT}}, "volumeClaimTemplates": [{"metadata!": {"name!": TEXT}, "spec!": {"accessModes!": [TEXT], "resources!": {"requests!": {"storage!": TEXT}}}}],
        "template!": {"metadata!": {"labels!": {"app!": TEXT}}, "spec!": {
            "automountServiceAccountToken!": FLAG, "containers!": [CONTAINER],
            "securityContext!": {"runAsNonRoot!": FLAG, "runAsUser!": NUMBER, "runAsGroup!": NUMBER, "fsGroup!": NUMBER, "seccompProfile!": {"type!": TEXT}},
            "volumes": [{"name!": TEXT, "configMap": {"name!": TEXT}, "emptyDir": {"sizeLimit!": TEXT}, "secret": {"secretName!": TEXT, "defaultMode!": NUMBER, "items!": [{"key!": TEXT, "path!": TEXT}]}}],
        }},
    }},
}
"""What our documents may say, a `!` marking what they must: fields of the API of Kubernetes 1.30 (apps/v1, core/v1)."""


def wrong(value: Any, shape: Any, where: str) -> list[str]:
    """What a document says that its shape has no place for."""
    if isinstance(shape, list):
        return [f"{where} is no list"] if not isinstance(value, list) else [one for at, item in enumerate(value) for one in wrong(item, shape[0], f"{where}[{at}]")]
    if not isinstance(shape, dict):
        return [] if type(value) is shape else [f"{where}: {value!r} is no {shape.__name__}"]
    if not isinstance(value, dict):
        return [f"{where} is no mapping"]
    known = {name.rstrip("!"): inner for name, inner in shape.items()}
    told = [f"{where} lacks {name[:-1]}" for name in shape if name.endswith("!") and name[:-1] not in value]
    for name, item in value.items():
        inner = known.get(name, known.get("*"))
        told += [f"{where}.{name} is unknown"] if inner is None else wrong(item, inner, f"{where}.{name}")
    return told


def documents(text: str) -> list[str]:
    """What is wrong with the manifests: fields, and names that lead nowhere."""
    told: list[str] = []
    found = [dict(one) for one in yaml.load_all(text, _Strict)]
    names = {(one["kind"], one["metadata"]["name"]) for one in found}
    for one in found:
        kind = (one.pop("apiVersion"), one.pop("kind"))
        where = f"{kind[1]} {one['metadata']['name']}"
        told += [f"{where}: unknown kind"] if kind not in KINDS else wrong(one, KINDS[kind], where)
        if kind[1] == "Service" and ("StatefulSet", one["spec"]["selector"]["app"]) not in names:
            told.append(f"{where} selects nothing")
        if kind[1] != "StatefulSet" or told:
            continue
        spec, pod = one["spec"], one["spec"]["template"]["spec"]
        if spec["selector"]["matchLabels"] != spec["template"]["metadata"]["labels"] or ("Service", spec["serviceName"]) not in names:
            told.append(f"{where}: labels or service do not match")
        volumes = {volume["name"] for volume in [*pod.get("volumes", ()), *(claim["metadata"] for claim in spec.get("volumeClaimTemplates", ()))]}
        told += [f"{where}: no config map {volume['configMap']['name']}" for volume in pod.get("volumes", ()) if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in names]
        for container in pod["containers"]:
            ports = {port["name"] for port in container["ports"]}
            asked = {probe[how]["port"] for probe in (container.get("startupProbe", {}), container.get("livenessProbe", {}), container["readinessProbe"]) for how in ("httpGet", "tcpSocket") if how in probe}
            if {mount["name"] for mount in container["volumeMounts"]} != volumes or not asked <= ports or container["image"] not in IMAGES:
                told.append(f"{where}: volumes, ports or image lead nowhere")
            if pod["securityContext"]["runAsUser"] != containers.USER or container["securityContext"]["allowPrivilegeEscalation"] or not container["securityContext"]["readOnlyRootFilesystem"]:
                told.append(f"{where}: it is not locked in")
    return told


IMAGES = {containers.reference(service, mode) for service in containers.SERVICES.values() for mode in containers.MODES}


def test_the_manifests_say_only_what_kubernetes_knows_and_lead_somewhere() -> None:
    assert documents((DEPLOY / "kubernetes.yaml").read_text()) == []


@pytest.mark.parametrize(("old", "new"), [
    ("readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true"), ("replicas: 1", 'replicas: "1"'), ("{app: broker}}\n  template", "{app: brokr}}\n  template"), ("mountPath: /tmp", "mountpath: /tmp"),
    ("novacron-hub:0.1.0", "novacron-hub:latest"), ("port: http}, periodSeconds", "port: web}, periodSeconds"), ("configMap: {name: mosquitto}", "configMap: {name: mosquito}"), ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
])
def test_control_a_mistake_in_a_manifest_is_found(old: str, new: str) -> None:
    text = (DEPLOY / "kubernetes.yaml").read_text()
    assert old in text and documents(text.replace(old, new, 1))


def environment(text: str) -> dict[str, dict[str, str]]:
    """The variables that compose file and manifests set, by image."""
    found: dict[str, dict[str, str]] = {}
    for document in yaml.load_all(text, _Strict):
        for service in document.get("services", {}).values():
            found.setdefault(service["image"], {}).update(service.get("environment", {}))
        for container in document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()) if "kind" in document else ():
            found.setdefault(container["image"], {}).update({entry["name"]: entry.get("value", "given") for entry in container.get("env", ())})
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_the_variables_are_ones_that_edge_and_hub_know(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = environment((DEPLOY / name).read_text())
    edge = {key: value for key, value in told["novacron-edge:0.1.0"].items() if not value.startswith("${")}
    assert load_config(None, env=edge).config.uplink.url == "mqtt://broker:1883"
    with pytest.raises(SystemExit):
        hub_main(["--help"])
    options = capsys.readouterr().out
    for key in told["novacron-hub:0.1.0"]:
        assert f"--{key.removeprefix('NOVACRON_HUB_').lower().replace('_', '-')} " in options, key


def test_the_compose_file_leads_somewhere_and_gives_nothing_away() -> None:
    told = yaml.load((DEPLOY / "compose.yaml").read_text(), _Strict)
    known = {"restart", "read_only", "init", "cap_drop", "security_opt", "tmpfs", "pids_limit", "logging", "image", "entrypoint", "mem_limit", "networks", "secrets", "volumes", "depends_on", "ports", "environment"}
    # No configs: what stands in the file itself Compose copies into the container, which Docker refuses where the root is read-only; podman-compose does not know them.
    assert set(told) == {"name", "x-locked", "services", "networks", "secrets", "volumes"}
    for name, service in told["services"].items():
        assert set(service) <= known, name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"] and service["image"] in IMAGES
        assert set(service["secrets"]) <= set(told["secrets"]) and set(service["networks"]) <= set(told["networks"]) and set(service.get("depends_on", ())) <= set(told["services"])
        for what, target, *more in (volume.split(":") for volume in service["volumes"]):
            assert (what in told["volumes"] and target == containers.DATA) or ((DEPLOY / what).is_file() and more == ["ro"])
        assert service["logging"]["options"]["max-size"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_the_edges_secrets_are_files_that_it_is_pointed_to() -> None:
    told = yaml.load((DEPLOY / "compose.yaml").read_text(), _Strict)["services"]
    for service in told.values():
        for name, value in service.get("environment", {}).items():
            assert not name.endswith("_FILE") or value.removeprefix("/run/secrets/") in service["secrets"], name
    for document in yaml.load_all((DEPLOY / "kubernetes.yaml").read_text(), _Strict):
        if document["kind"] == "StatefulSet":
            pod = document["spec"]["template"]["spec"]
            files = {f"/run/secrets/novacron/{item['path']}" for volume in pod["volumes"] if "secret" in volume for item in volume["secret"]["items"]}
            assert {entry["value"] for entry in pod["containers"][0].get("env", ()) if entry["name"].endswith("_FILE")} <= files
            assert all(volume["secret"]["defaultMode"] == 0o440 for volume in pod["volumes"] if "secret" in volume), "for the pod's group, and nobody else"


def broker_lines(text: str) -> list[str]:
    """What a configuration of mosquitto says, but where and for whom."""
    return [line for line in text.splitlines() if line and not line.startswith(("#", "password_file", "listener", "persistence_location", "allow_anonymous"))]


def test_the_brokers_are_set_as_the_hubs_own(tmp_path: Path) -> None:
    """mosquitto's own limits are lower, and it would write what it holds every half hour."""
    [told] = [document["data"]["mosquitto.conf"] for document in yaml.load_all((DEPLOY / "kubernetes.yaml").read_text(), _Strict) if document["kind"] == "ConfigMap"]
    assert told.replace("/run/secrets/novacron/", "/run/secrets/").splitlines() == [line for line in (DEPLOY / "mosquitto.conf").read_text().splitlines() if not line.startswith("#")]
    own = MosquittoBroker.__new__(MosquittoBroker)
    own.host, own.port, own.inside, own._data_dir, own._door = "127.0.0.1", 1883, ("127.0.0.1", 1883), tmp_path, Door()
    assert sorted(line for line in broker_lines(own._configuration()) if line != "user root") == sorted(broker_lines(told))


def test_no_pod_is_started_anew_for_what_a_new_start_does_not_mend() -> None:
    """/healthz of a hub is 503 while its broker is away, that of an edge while its disk is full: a kubelet would kill it every two minutes, for as long as that lasts."""
    for document in yaml.load_all((DEPLOY / "kubernetes.yaml").read_text(), _Strict):
        for container in document["spec"]["template"]["spec"]["containers"] if document["kind"] == "StatefulSet" else ():
            for probe in ("startupProbe", "livenessProbe"):
                assert container.get(probe, {"httpGet": {"path": "/livez"}})["httpGet"]["path"] == "/livez"
        if document["kind"] == "Service" and document["metadata"]["name"] == "hub":
            assert document["spec"]["publishNotReadyAddresses"] is True, "a hub without its broker can be looked at"


def refused(text: str) -> list[str]:
    """What Kubernetes' own description of its newest API says against the manifests, where no field is allowed that it does not know."""
    told = []
    for document in yaml.safe_load_all(text):
        try:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            told.append(f"{document['kind']}: {error.message}")
    return told


def test_the_manifests_are_what_the_newest_kubernetes_knows() -> None:
    assert refused((DEPLOY / "kubernetes.yaml").read_text()) == []


@pytest.mark.parametrize(("old", "new", "word"), [
    ("failureThreshold: 60", "failuresThreshold: 60", "failuresThreshold"), ("publishNotReadyAddresses: true", 'publishNotReadyAddresses: "yes"', "yes"), ("serviceName: hub", "servicename: hub", "servicename"), ("defaultMode: 0440", 'defaultMode: "0440"', "0440"),
])
def test_control_what_kubernetes_does_not_know_is_refused(old: str, new: str, word: str) -> None:
    text = (DEPLOY / "kubernetes.yaml").read_text()
    assert old in text and word in "".join(refused(text.replace(old, new, 1)))


def test_a_development_edge_keeps_its_asserts() -> None:
    edge = containers.SERVICES["edge"]
    assert "NOVACRON_NO_REEXEC=1" in containers.process(edge, "development").environment and "-OO" not in containers.process(edge, "development").arguments
    assert "NOVACRON_NO_REEXEC=1" not in containers.process(edge, "production").environment and "-OO" in containers.process(edge, "production").arguments

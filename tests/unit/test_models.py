"""Models: three engines that agree, and every bad model refused by name while the process lives on. The store is in test_model_store.py."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.decisions.models import Model, ModelError, load_model, read_manifest
from edge_runtime.decisions.models import tflite_engine as tflite_module
from edge_runtime.decisions.models.manifest import ModelEngineMissing, ModelInputError
from edge_runtime.decisions.models.onnx_engine import OnnxEngine
from edge_runtime.decisions.models.portable import MAX_LAYERS, MAX_NODES, MAX_TREES, MAX_WEIGHTS, PortableEngine
from edge_runtime.decisions.models.tflite_engine import find_library, open_tflite
from tools.model_export import Layer, onnx, portable, tflite

SHIPPED = Path(tflite_module.__file__).parent / "shipped" / "host-anomaly"
FORMATS = ("onnx", "tflite", "portable")


def shipped(format_: str) -> Model:
    return load_model(read_manifest((SHIPPED / f"{format_}.json").read_bytes()), SHIPPED)


@pytest.fixture(scope="module")
def host_anomaly() -> Any:
    models = {format_: shipped(format_) for format_ in FORMATS}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture(scope="module")
def dense() -> list[Layer]:
    draw = numpy.random.default_rng(11)
    sizes = (5, 8, 6, 3)
    return [
        Layer(draw.normal(0, 1, (b, a)).astype("f4"), draw.normal(0, 1, b).astype("f4"), activation)
        for a, b, activation in zip(sizes, sizes[1:], ("relu", "linear", "relu"), strict=False)
    ]


def host_values() -> st.SearchStrategy[dict[str, float]]:
    """Values a host may have: ratios, rates from nothing to 100 GB/s, process counts."""
    rate = st.floats(0, 1e11)
    return st.fixed_dictionaries({
        "cpu_ratio": st.floats(0, 1), "load1_per_core": st.floats(0, 200), "memory_used_ratio": st.floats(0, 1), "disk_read_bytes_per_second": rate,
        "disk_write_bytes_per_second": rate, "network_receive_bytes_per_second": rate, "network_transmit_bytes_per_second": rate,
        "context_switches_per_second": st.floats(0, 1e8), "processes": st.integers(1, 4_000_000),
    })


# -- agreement -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(host_values())
def test_the_engines_agree_on_the_shipped_model(host_anomaly: dict[str, Model], values: dict[str, float]) -> None:
    found = {format_: model.predict(values) for format_, model in host_anomaly.items()}
    assert {len(outputs) for outputs in found.values()} == {1}
    assert found["onnx"][0] == pytest.approx(found["portable"][0], rel=1e-4, abs=1e-5)
    assert found["tflite"][0] == pytest.approx(found["portable"][0], rel=1e-4, abs=1e-5)


def test_each_format_runs_in_its_own_engine(host_anomaly: dict[str, Model]) -> None:
    assert {format_: model.engine for format_, model in host_anomaly.items()} == {"onnx": "onnxruntime", "tflite": "litert-c", "portable": "portable"}


@settings(max_examples=200)
@given(st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5))
def test_the_engines_agree_on_a_network_with_both_exported_activations(engines: dict[str, Any], vector: list[float]) -> None:
    found = {name: engine.run(vector) for name, engine in engines.items()}
    for name in ("onnxruntime", "litert-c"):
        assert found[name] == pytest.approx(found["portable"], rel=1e-4, abs=1e-3), name


@pytest.fixture(scope="module")
def engines(dense: list[Layer]) -> Any:
    made = {engine.name: engine for engine in (OnnxEngine(onnx(dense), 5), open_tflite(tflite(dense), 5), PortableEngine(portable(dense), 5))}
    yield made
    for engine in made.values():
        engine.close()


def test_a_planted_difference_of_one_number_is_seen(dense: list[Layer]) -> None:
    changed = [Layer(layer.weights, layer.bias.copy(), layer.activation) for layer in dense]
    changed[-1].bias[0] += 0.01
    vector = [1.0, -2.0, 3.0, 0.5, 7.0]
    assert PortableEngine(portable(changed), 5).run(vector) != pytest.approx(OnnxEngine(onnx(dense), 5).run(vector), rel=1e-4, abs=1e-3)


def onnx_of(nodes: list[Any], initializers: list[Any], inputs: int, outputs: int, domain: str = "") -> bytes:
    """An ONNX model from its nodes, for what tools/model_export.py does not export."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])], initializers
    )
    imports = [helper.make_opsetid("", 13)] + ([helper.make_opsetid(domain, 3)] if domain else [])
    raw: bytes = helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    return raw


@pytest.mark.parametrize(("activation", "operator"), [("tanh", "Tanh"), ("sigmoid", "Sigmoid"), ("softmax", "Softmax"), ("relu", "Relu"), ("linear", "Identity")])
@settings(max_examples=60)
@given(vector=st.lists(st.floats(-200, 200, width=32), min_size=4, max_size=4))
def test_every_portable_activation_is_that_of_onnxruntime(activation: str, operator: str, vector: list[float]) -> None:
    from onnx import helper, numpy_helper

    weights, bias = numpy.asarray([[1, -1, 0.5, 0], [0.25, 0, 0, 2], [-3, 1, 1, 1]], "f4"), numpy.asarray([0.5, -0.25, 0], "f4")
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1), helper.make_node(operator, ["h"], ["y"])]
    raw = onnx_of(nodes, [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")], 4, 3)
    assert PortableEngine(portable([Layer(weights, bias, activation)]), 4).run(vector) == pytest.approx(OnnxEngine(raw, 4).run(vector), rel=1e-4, abs=5e-4)  # float32: sums of up to 1,000


TREES = [
    {"feature": [0, 1, -1, -1, -1], "threshold": [0.5, -1.0, 0, 0, 0], "left": [1, 2, 0, 0, 0], "right": [4, 3, 0, 0, 0], "value": [0, 0, 1.5, -2.0, 4.0]},
    {"feature": [2, -1, -1], "threshold": [3.0, 0, 0], "left": [1, 0, 0], "right": [2, 0, 0], "value": [0, 10.0, 20.0]},
    {"feature": [-1], "threshold": [0], "left": [0], "right": [0], "value": [0.25]},
]


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@settings(max_examples=100)
@given(vector=st.lists(st.sampled_from([-1.0, 0.5, 3.0]) | st.floats(-5, 5, width=32), min_size=3, max_size=3))
def test_a_tree_ensemble_is_that_of_onnxruntime(aggregate: str, vector: list[float]) -> None:
    from onnx import helper

    flat = [(tree, node, TREES[tree]) for tree in range(len(TREES)) for node in range(len(TREES[tree]["feature"]))]
    leaves = [(tree, node, data["value"][node]) for tree, node, data in flat if data["feature"][node] < 0]
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1, aggregate_function="SUM" if aggregate == "sum" else "AVERAGE", base_values=[0.5],
        nodes_treeids=[tree for tree, _, _ in flat], nodes_nodeids=[node for _, node, _ in flat], nodes_featureids=[max(0, data["feature"][node]) for _, node, data in flat],
        nodes_values=[float(data["threshold"][node]) for _, node, data in flat], nodes_modes=["LEAF" if data["feature"][node] < 0 else "BRANCH_LEQ" for _, node, data in flat],
        nodes_truenodeids=[data["left"][node] for _, node, data in flat], nodes_falsenodeids=[data["right"][node] for _, node, data in flat],
        target_treeids=[tree for tree, _, _ in leaves], target_nodeids=[node for _, node, _ in leaves], target_ids=[0] * len(leaves), target_weights=[float(value) for _, _, value in leaves],
    )
    mine = PortableEngine(json.dumps({"kind": "trees", "aggregate": aggregate, "base": 0.5, "trees": TREES}).encode(), 3)
    assert mine.run(vector) == pytest.approx(OnnxEngine(onnx_of([node], [], 3, 1, "ai.onnx.ml"), 3).run(vector), rel=1e-5, abs=1e-6)


# -- manifests -----------------------------------------------------------------------------------------------------------------


def manifest(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "schema_version": 1, "name": "m", "version": "1", "format": "portable", "sha256": "0" * 64, "size_bytes": 10, "data_file": "model.portable",
        "inputs": [{"name": "a"}, {"name": "b", "mean": 1, "scale": 2, "transform": "log1p"}], "output": {"kind": "vector", "size": 1}, "threshold": 0.5,
    }
    base.update(changes)
    return base


BAD_MANIFESTS: list[tuple[dict[str, Any], str]] = [
    ({"schema_version": 2}, "schema_version"), ({"schema_version": None}, "schema_version"), ({"name": ""}, "name"), ({"name": "../../etc"}, "name"), ({"name": 3}, "name"),
    ({"format": "pickle"}, "format"), ({"format": None}, "format"), ({"sha256": "x" * 64}, "sha256"), ({"sha256": "0" * 63}, "sha256"), ({"sha256": None}, "sha256"),
    ({"size_bytes": 0}, "size_bytes"), ({"size_bytes": True}, "size_bytes"), ({"size_bytes": (32 << 20) + 1}, "size_bytes"), ({"size_bytes": 1.5}, "size_bytes"), ({"size_bytes": "10"}, "size_bytes"),
    ({"inputs": []}, "inputs"), ({"inputs": {}}, "inputs"), ({"inputs": [{"name": f"f{n}"} for n in range(257)]}, "inputs"), ({"inputs": [{"name": "a"}, {"name": "a"}]}, "inputs"),
    ({"inputs": [3]}, "inputs[0].name"), ({"inputs": [{"name": ""}]}, "inputs[0].name"), ({"inputs": [{"name": "a"}, {"mean": 1}]}, "inputs[1].name"),
    ({"inputs": [{"name": "a", "mean": "x"}]}, "inputs[0].mean"), ({"inputs": [{"name": "a", "mean": math.nan}]}, "inputs[0].mean"), ({"inputs": [{"name": "a", "scale": 0}]}, "inputs[0].scale"),
    ({"inputs": [{"name": "a", "scale": math.inf}]}, "inputs[0].scale"), ({"inputs": [{"name": "a", "scale": False}]}, "inputs[0].scale"),
    ({"inputs": [{"name": "a", "transform": "sqrt"}]}, "inputs[0].transform"), ({"output": None}, "output.kind"), ({"output": {"kind": "argmax"}}, "output.kind"),
    ({"output": {"kind": "vector"}}, "output.size"), ({"output": {"kind": "vector", "size": 0}}, "output.size"), ({"output": {"kind": "vector", "size": 257}}, "output.size"),
    ({"threshold": "high"}, "threshold"), ({"threshold": math.nan}, "threshold"), ({"data_file": "../model"}, "data_file"), ({"data_file": ".."}, "data_file"), ({"data_file": 7}, "data_file"),
]


@pytest.mark.parametrize(("changes", "field"), BAD_MANIFESTS, ids=[f"{field}-{number}" for number, (_, field) in enumerate(BAD_MANIFESTS)])
def test_a_bad_manifest_names_its_field_and_the_remedy(changes: dict[str, Any], field: str) -> None:
    read_manifest(json.dumps(manifest()).encode())
    with pytest.raises(ModelError) as caught:
        read_manifest(json.dumps(manifest(**changes)).encode())
    assert caught.value.field == field and caught.value.problem and caught.value.remedy


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"\xff\xfe\xff", b"[" * 50_000, b" " * 70_000, b"null"], ids=lambda raw: repr(raw[:8]))
def test_a_manifest_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ModelError, match="manifest"):
        read_manifest(raw)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*manifest(), "kind", "size", "mean", "scale", "transform"]), inner, max_size=6), max_leaves=12,
))
def test_no_manifest_raises_anything_but_a_model_error(value: Any) -> None:
    for document in (value, manifest(**value) if isinstance(value, dict) else manifest(inputs=value)):
        try:
            read_manifest(json.dumps(document).encode())
        except ModelError as error:
            assert error.field and error.remedy


# -- models that are not what their manifest says ------------------------------------------------------------------------------


def write(folder: Path, data: bytes, **changes: Any) -> tuple[Any, Path]:
    """A model file and its manifest, which is right unless `changes` say otherwise."""
    path = folder / "model.bin"
    path.write_bytes(data)
    document = manifest(**{"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data), "data_file": "model.bin", **changes})
    return read_manifest(json.dumps(document).encode()), path


ONE_LAYER = [Layer(numpy.asarray([[1, 2]], "f4"), numpy.asarray([0], "f4"), "linear")]


@pytest.mark.parametrize(("data", "format_"), [(portable(ONE_LAYER), "portable"), (onnx(ONE_LAYER), "onnx"), (tflite(ONE_LAYER), "tflite")], ids=["portable", "onnx", "tflite"])
def test_hash_size_and_shape_must_be_the_manifests(tmp_path: Path, data: bytes, format_: str) -> None:
    def refused(**changes: Any) -> ModelError:
        with pytest.raises(ModelError) as caught:
            load_model(*write(tmp_path, data, format=format_, **changes))
        assert caught.value.remedy
        return caught.value

    model = load_model(*write(tmp_path, data, format=format_, inputs=[{"name": "a"}, {"name": "b"}]))
    assert model.predict({"a": 3, "b": 0.5}) == pytest.approx([4.0])
    model.close()
    assert refused(sha256="1" * 64).field == "sha256"
    assert refused(size_bytes=len(data) + 1).field == "size_bytes"
    assert refused(output={"kind": "vector", "size": 2}).field == "output.size"
    for inputs in (["a"], ["a", "b", "c"]):
        assert "inputs" in str(refused(inputs=[{"name": name} for name in inputs]))
    with pytest.raises(ModelError, match="data_file"):
        load_model(read_manifest(json.dumps(manifest()).encode()), tmp_path / "not there")


@pytest.mark.parametrize(("values", "name"), [
    ({"a": 1}, "b"), ({}, "a"), ({"a": 1, "b": None}, "b"), ({"a": "1", "b": 1}, "a"), ({"a": True, "b": 1}, "a"), ({"a": math.nan, "b": 1}, "a"), ({"a": 1, "b": math.inf}, "b"),
    ({"a": -math.inf, "b": 1}, "a"),
])
def test_a_feature_that_is_missing_or_no_finite_number_is_named(tmp_path: Path, values: dict[str, Any], name: str) -> None:
    model = load_model(*write(tmp_path, portable(ONE_LAYER)))
    with pytest.raises(ModelInputError) as caught:
        model.predict(values)
    assert caught.value.field == name and caught.value.remedy


def test_an_output_that_overflows_is_an_error_and_not_a_number(tmp_path: Path) -> None:
    big = [Layer(numpy.asarray([[3e38, 3e38]], "f4"), numpy.asarray([0], "f4"), "linear")] + [Layer(numpy.asarray([[3e38]], "f4"), numpy.asarray([0], "f4"), "linear")] * 8
    model = load_model(*write(tmp_path, portable(big), inputs=[{"name": "a"}, {"name": "b"}]))
    with pytest.raises(ModelInputError, match="output"):
        model.predict({"a": 3e38, "b": 3e38})


# -- malformed bytes -----------------------------------------------------------------------------------------------------------


def mlp(**changes: Any) -> dict[str, Any]:
    layer = {"weights": [[1.0, 2.0]], "bias": [0.0], "activation": "linear", **changes}
    return {"kind": "mlp", "layers": [layer]}


def trees(**changes: Any) -> dict[str, Any]:
    tree = {"feature": [0, -1, -1], "threshold": [0, 0, 0], "left": [1, 0, 0], "right": [2, 0, 0], "value": [0, 1, 2], **changes}
    return {"kind": "trees", "aggregate": "sum", "trees": [tree]}


WIDE = MAX_WEIGHTS // 2 + 1
BAD_PORTABLE: list[tuple[Any, str]] = [
    ([], "data.kind"), ({"kind": "svm"}, "data.kind"), ({"kind": "mlp"}, "data.layers"), ({"kind": "mlp", "layers": []}, "data.layers"),
    ({"kind": "mlp", "layers": [{"weights": [[1, 2], [3, 4]], "bias": [0, 0], "activation": "relu"}] * (MAX_LAYERS + 1)}, "data.layers"),
    (mlp(weights=[[1.0] * 2] * WIDE, bias=[0.0] * WIDE), "data.layers"), (mlp(weights=[[math.nan, 1]]), "data.layers[0].weights"), (mlp(weights=[[math.inf, 1]]), "data.layers[0].weights"),
    (mlp(weights=[[1e300, 1]]), "data.layers[0].weights"), (mlp(weights=[["1", 2]]), "data.layers[0].weights"), (mlp(weights=[[1, None]]), "data.layers[0].weights"), (mlp(weights=[[1]]), "data.layers[0].weights"),
    (mlp(weights=[3]), "data.layers[0].weights"), (mlp(weights=[]), "data.layers[0]"), (mlp(weights={"a": 1}), "data.layers[0]"), (mlp(bias=[]), "data.layers[0]"), (mlp(bias=[math.nan]), "data.layers[0].bias"),
    (mlp(activation="gelu"), "data.layers[0].activation"), ({"kind": "mlp", "layers": [3]}, "data.layers[0]"), (mlp(weights=[[10**400, 1]]), "data.layers[0].weights"),
    ({"kind": "trees", "aggregate": "sum"}, "data.trees"), ({"kind": "trees", "aggregate": "sum", "trees": []}, "data.trees"), ({**trees(), "aggregate": "max"}, "data.aggregate"),
    ({**trees(), "base": math.nan}, "data.base"), ({**trees(), "base": "0"}, "data.base"), ({**trees(), "trees": trees()["trees"] * (MAX_TREES + 1)}, "data.trees"), ({**trees(), "trees": [7]}, "data.trees[0]"),
    (trees(left=[0, 0, 0]), "data.trees[0].left"), (trees(right=[0, 0, 0]), "data.trees[0].left"), (trees(left=[3, 0, 0]), "data.trees[0].left"), (trees(left=[-1, 0, 0]), "data.trees[0].left"),
    (trees(left=[True, 0, 0]), "data.trees[0].left"), (trees(feature=[2, -1, -1]), "data.trees[0].feature"), (trees(feature=[-2, -1, -1]), "data.trees[0].feature"), (trees(feature=[0.0, -1, -1]), "data.trees[0].feature"),
    (trees(feature=[0]), "data.trees[0]"), (trees(value=[0, math.nan, 2]), "data.trees[0]"), (trees(threshold=[math.inf, 0, 0]), "data.trees[0]"), (trees(value="abc"), "data.trees[0]"),
    (trees(**{name: [-1 if name == "feature" else 0] * (MAX_NODES + 1) for name in ("feature", "threshold", "left", "right", "value")}), "data.trees"),
]


@pytest.mark.parametrize(("document", "field"), BAD_PORTABLE, ids=[f"{field}-{number}" for number, (_, field) in enumerate(BAD_PORTABLE)])
def test_a_malformed_portable_model_names_its_field(document: Any, field: str) -> None:
    PortableEngine(json.dumps(mlp()).encode(), 2)
    PortableEngine(json.dumps(trees()).encode(), 2)
    with pytest.raises(ModelError) as caught:
        PortableEngine(json.dumps(document).encode(), 2)
    assert caught.value.field == field and caught.value.remedy


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["feature", "threshold", "left", "right", "value", "weights", "bias", "activation"]), inner, max_size=5), max_leaves=15,
))
def test_no_portable_document_raises_anything_but_a_model_error_and_every_walk_ends(part: Any) -> None:
    documents = [{"kind": "mlp", "layers": [part]}, {"kind": "trees", "aggregate": "sum", "trees": [part]}, trees(**part) if isinstance(part, dict) else part, mlp(**part) if isinstance(part, dict) else part]
    for document in documents:
        try:
            PortableEngine(json.dumps(document).encode(), 2).run([0.5, 1.0])
        except ModelError as error:
            assert error.field and error.remedy


def bent(data: bytes, count: int, seed: int) -> list[bytes]:
    """Truncations and flipped bytes of a model; the same ones every time."""
    draw = random.Random(seed)
    out = [data[: len(data) * part // 8] for part in range(8)]
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        out.append(bytes(changed))
    return out


def test_a_malformed_onnx_model_is_refused() -> None:
    data = onnx(ONE_LAYER)
    refused = 0
    for broken in [b"", b"not a model", b"\x08" * 500, *bent(data, 60, 3)]:
        try:
            engine = OnnxEngine(broken, 2)
            engine.run([0.0, 0.0])
        except ModelError as error:
            assert error.field and error.remedy
            refused += 1
    assert refused >= 12


def lethal(data: bytes) -> bytes:
    """A model that LiteRT 2.3 takes for sound and then reads out of bounds: one byte of one table's layout."""
    changed = bytearray(data)
    changed[data.index(14, 8)] = 6
    return bytes(changed)


LOADER = """
import json, pathlib, sys
from edge_runtime.decisions.models.manifest import ModelError
from edge_runtime.decisions.models.tflite_engine import open_tflite
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        engine = open_tflite(path.read_bytes(), 2)
        engine.run([0.0, 0.0])
        engine.close()
        print(json.dumps([path.name, "loaded"]), flush=True)
    except ModelError as error:
        print(json.dumps([path.name, str(error)]), flush=True)
print(json.dumps(["the end", "alive"]), flush=True)
"""


def load_all(folder: Path, loader: str = LOADER) -> dict[str, str]:
    """What a process of its own made of every file; without "the end" it did not live to say so."""
    done = subprocess.run([sys.executable, "-c", loader, str(folder)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=170, check=False)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.skipif(find_library() is None, reason="LiteRT's C library (ai-edge-litert) is not installed")
def test_malformed_tflite_is_refused_and_the_process_lives_on(tmp_path: Path) -> None:
    data = tflite(ONE_LAYER)
    broken = [b"", b"TFL3", b"0000TFL3", b"\xff" * 4 + b"TFL3" + b"\xff" * 60, *bent(data, 12, 5), lethal(data)]
    for number, content in enumerate(broken):
        (tmp_path / f"{number:03}").write_bytes(content)
    (tmp_path / "good").write_bytes(data)
    told = load_all(tmp_path)
    assert told.pop("the end") == "alive" and len(told) == len(broken) + 1
    assert told.pop("good") == "loaded" and "loading it ends the process (status -11)" in told[f"{len(broken) - 1:03}"]
    for number in range(12):  # no identifier, or truncated
        assert told[f"{number:03}"] != "loaded"
    assert all(text == "loaded" or (";" in text and text.startswith(("data", "inputs"))) for text in told.values())


@pytest.mark.skipif(find_library() is None, reason="LiteRT's C library (ai-edge-litert) is not installed")
def test_without_the_child_process_a_malformed_model_ends_the_agent(tmp_path: Path) -> None:
    # The control: the probe taken out. Were the process to live, the test above would prove nothing.
    (tmp_path / "0").write_bytes(lethal(tflite(ONE_LAYER)))
    assert load_all(tmp_path)["the end"] == "alive"
    planted = LOADER.replace("for path", "from edge_runtime.decisions.models import tflite_engine\ntflite_engine._probe = lambda data, inputs: None\nfor path", 1)
    assert "the end" not in load_all(tmp_path, planted)


# -- engines that are not there, imports that are not wanted -------------------------------------------------------------------


def hidden(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    def hide(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_a_missing_engine_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden("onnxruntime", "tflite_runtime")(monkeypatch)
    monkeypatch.setattr(tflite_module, "find_library", lambda: None)
    with pytest.raises(ModelEngineMissing, match="install onnxruntime"):
        OnnxEngine(onnx(ONE_LAYER), 2)
    with pytest.raises(ModelEngineMissing, match="install ai-edge-litert"):
        open_tflite(tflite(ONE_LAYER), 2)


@pytest.mark.parametrize(("format_", "unwanted"), [("portable", ["numpy", "onnxruntime", "ctypes.util", "subprocess"]), ("tflite", ["numpy", "onnxruntime", "ai_edge_litert"])])
def test_an_engine_brings_nothing_heavy_that_it_does_not_need(format_: str, unwanted: list[str]) -> None:
    if format_ == "tflite" and find_library() is None:
        pytest.skip("LiteRT's C library (ai-edge-litert) is not installed")
    script = (
        "import sys; from pathlib import Path; from edge_runtime.decisions.models import load_model, read_manifest\n"
        "folder = Path(sys.argv[1]); model = load_model(read_manifest((folder / (sys.argv[2] + '.json')).read_bytes()), folder)\n"
        "names = [item.name for item in model.manifest.inputs]; model.predict(dict.fromkeys(names, 1.0))\n"
        "print([name for name in sys.argv[3:] if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(SHIPPED), format_, *unwanted, "edge_runtime"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "['edge_runtime']"), done.stderr


def test_an_agent_that_asks_no_model_imports_nothing_heavy() -> None:
    heavy = ["numpy", "onnxruntime", "ai_edge_litert", "aiohttp", "yaml", "sqlite_utils", "rich", "aiomqtt", "paho.mqtt.client"]
    script = "import sys, edge_runtime.runtime; print([name for name in sys.argv[1:] if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script, *heavy], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_the_other_formats_cannot_say_is_not_exported_as_something_else() -> None:
    layer = Layer(numpy.ones((1, 2), numpy.float32), numpy.zeros(1, numpy.float32), "tanh")
    for export in (onnx, tflite):
        with pytest.raises(ValueError, match=r"layers\[0\].activation"):
            export([layer])

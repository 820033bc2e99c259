"""One dense network, three files: ONNX, TFLite (built by hand with flatbuffers, no TensorFlow), portable JSON. Same weights in each."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float32]


@dataclass(frozen=True)
class Layer:
    """`activation(weights @ x + bias)`; weights (outputs, inputs); activation `relu` or `linear`."""

    weights: Array
    bias: Array
    activation: str


def portable(layers: list[Layer]) -> bytes:
    """The portable evaluator's JSON; float32 values are written exactly."""
    return json.dumps({
        "kind": "mlp",
        "layers": [
            {"weights": [[float(w) for w in row] for row in layer.weights], "bias": [float(b) for b in layer.bias], "activation": layer.activation}
            for layer in layers
        ],
    }).encode()


def _check(layers: list[Layer]) -> None:
    for index, layer in enumerate(layers):
        if layer.activation not in ("relu", "linear"):
            raise ValueError(f"layers[{index}].activation: {layer.activation!r} cannot be exported; use relu or linear, or the portable format")


def onnx(layers: list[Layer]) -> bytes:
    """An ONNX model: Gemm and Relu, input `x` (1, n), output `y`."""
    from onnx import TensorProto, checker, helper, numpy_helper

    _check(layers)
    nodes: list[Any] = []
    weights: list[Any] = []
    name = "x"
    for index, layer in enumerate(layers):
        weights += [numpy_helper.from_array(layer.weights, f"w{index}"), numpy_helper.from_array(layer.bias, f"b{index}")]
        last = index == len(layers) - 1
        out = "y" if last and layer.activation == "linear" else f"h{index}"
        nodes.append(helper.make_node("Gemm", [name, f"w{index}", f"b{index}"], [out], transB=1))
        if layer.activation == "relu":
            activated = "y" if last else f"a{index}"
            nodes.append(helper.make_node("Relu", [out], [activated]))
            out = activated
        name = out
    graph = helper.make_graph(
        nodes, "dense", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, layers[0].weights.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, layers[-1].weights.shape[0]])], weights,
    )
    # IR 8 and opset 13: what onnxruntime of Debian 12's time (1.13) reads as well.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    checker.check_model(model)
    raw: bytes = model.SerializeToString()
    return raw


def tflite(layers: list[Layer]) -> bytes:
    """A TFLite flatbuffer: FULLY_CONNECTED operators with fused activations (schema version 3)."""
    _check(layers)
    import flatbuffers
    import tflite as tf

    builder = flatbuffers.Builder(4096)

    def vector(items: list[int], start: Any) -> int:
        start(builder, len(items))
        for item in reversed(items):
            builder.PrependUOffsetTRelative(item)
        return int(builder.EndVector())

    def integers(values: list[int]) -> int:
        return int(builder.CreateNumpyVector(numpy.asarray(values, dtype=numpy.int32)))

    buffers: list[int] = []

    def buffer(data: bytes | None) -> int:
        content = None
        if data is not None:
            builder.StartVector(1, len(data), 16)  # tensors are read in place: 16-byte alignment
            builder.head = builder.head - len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data
            content = builder.EndVector()
        tf.BufferStart(builder)
        if content is not None:
            tf.BufferAddData(builder, content)
        buffers.append(tf.BufferEnd(builder))
        return len(buffers) - 1

    tensors: list[int] = []

    def tensor(name: str, shape: list[int], data: bytes | None) -> int:
        index = buffer(data) if data is not None else 0
        label, dimensions = builder.CreateString(name), integers(shape)
        tf.TensorStart(builder)
        tf.TensorAddShape(builder, dimensions)
        tf.TensorAddType(builder, tf.TensorType.FLOAT32)
        tf.TensorAddBuffer(builder, index)
        tf.TensorAddName(builder, label)
        tensors.append(tf.TensorEnd(builder))
        return len(tensors) - 1

    buffer(None)  # buffer 0 is empty by convention
    first = current = tensor("x", [1, layers[0].weights.shape[1]], None)
    operators: list[int] = []
    for number, layer in enumerate(layers):
        outputs, inputs = layer.weights.shape
        weights = tensor(f"w{number}", [outputs, inputs], layer.weights.astype("<f4").tobytes())
        bias = tensor(f"b{number}", [outputs], layer.bias.astype("<f4").tobytes())
        out = tensor(f"y{number}", [1, outputs], None)
        tf.FullyConnectedOptionsStart(builder)
        kind = tf.ActivationFunctionType
        tf.FullyConnectedOptionsAddFusedActivationFunction(builder, kind.RELU if layer.activation == "relu" else kind.NONE)
        options = tf.FullyConnectedOptionsEnd(builder)
        takes, gives = integers([current, weights, bias]), integers([out])
        tf.OperatorStart(builder)
        tf.OperatorAddOpcodeIndex(builder, 0)
        tf.OperatorAddInputs(builder, takes)
        tf.OperatorAddOutputs(builder, gives)
        tf.OperatorAddBuiltinOptionsType(builder, tf.BuiltinOptions.FullyConnectedOptions)
        tf.OperatorAddBuiltinOptions(builder, options)
        operators.append(tf.OperatorEnd(builder))
        current = out
    all_tensors = vector(tensors, tf.SubGraphStartTensorsVector)
    all_operators = vector(operators, tf.SubGraphStartOperatorsVector)
    takes, gives, label = integers([first]), integers([current]), builder.CreateString("main")
    tf.SubGraphStart(builder)
    tf.SubGraphAddTensors(builder, all_tensors)
    tf.SubGraphAddInputs(builder, takes)
    tf.SubGraphAddOutputs(builder, gives)
    tf.SubGraphAddOperators(builder, all_operators)
    tf.SubGraphAddName(builder, label)
    graph = tf.SubGraphEnd(builder)
    tf.OperatorCodeStart(builder)
    tf.OperatorCodeAddDeprecatedBuiltinCode(builder, tf.BuiltinOperator.FULLY_CONNECTED)
    tf.OperatorCodeAddBuiltinCode(builder, tf.BuiltinOperator.FULLY_CONNECTED)
    tf.OperatorCodeAddVersion(builder, 1)
    code = tf.OperatorCodeEnd(builder)
    codes = vector([code], tf.ModelStartOperatorCodesVector)
    graphs = vector([graph], tf.ModelStartSubgraphsVector)
    all_buffers = vector(buffers, tf.ModelStartBuffersVector)
    label = builder.CreateString("NovaCron dense network")
    tf.ModelStart(builder)
    tf.ModelAddVersion(builder, 3)
    tf.ModelAddOperatorCodes(builder, codes)
    tf.ModelAddSubgraphs(builder, graphs)
    tf.ModelAddDescription(builder, label)
    tf.ModelAddBuffers(builder, all_buffers)
    builder.Finish(tf.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def write_all(folder: Path, name: str, version: str, layers: list[Layer], inputs: list[dict[str, Any]], output: dict[str, Any], threshold: float | None, note: dict[str, Any]) -> None:
    """Write `model.FORMAT` and `FORMAT.json` (the manifest) for each format into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, suffix, data in (("onnx", "onnx", onnx(layers)), ("tflite", "tflite", tflite(layers)), ("portable", "json", portable(layers))):
        file = f"model.{suffix}" if kind != "portable" else "model.portable"
        (folder / file).write_bytes(data)
        manifest = {
            "schema_version": 1, "name": name, "version": version, "format": kind, "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data),
            "data_file": file, "inputs": inputs, "output": output, "threshold": threshold, "training": note,
        }
        (folder / f"{kind}.json").write_text(json.dumps(manifest, indent=1) + "\n")

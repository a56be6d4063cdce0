"""Which ONNX files a client takes: those of the exporter, and none that reads files, loops or asks for memory."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fastprompt as fp
from fastprompt.pixels.graph import selection_graph
from fastprompt_client import Client, FolderError, graph as graph_module
from fastprompt_client.graph import GraphError, check_graph

IMAGE, WEIGHTS = (1, 32, 32, 3), (4, 12)


@pytest.fixture(scope="module")
def exported(folder: Path) -> onnx.ModelProto:
    """What the exporter writes; a test changes a copy."""
    return onnx.load_from_string((folder / "generator.onnx").read_bytes())


@pytest.mark.parametrize(
    "config",
    [
        fp.RGBPGNConfig(num_prompts=4, library_size=12, widths=(4, 8)),
        fp.PGNConfig(num_prompts=4, library_size=12, widths=(4,), activation="sigmoid", stem_pool=False),
        fp.RGBPGNConfig(num_prompts=4, library_size=12, resolution=16),
        fp.PGNConfig(num_prompts=4, library_size=12, trunk="resnet18"),
    ],
    ids=str,
)
def test_what_the_exporter_writes_is_taken(config: Any, backbone: fp.FrozenViT) -> None:
    model = fp.PromptedViT(backbone, config, 3).eval()
    check_graph(selection_graph(model.generator, backbone), IMAGE, WEIGHTS)


def test_the_shapes_are_those_that_onnxruntime_computes(exported: onnx.ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(exported, strict_mode=True)
    expected = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
    assert len(expected) > 20
    shapes = {"image": IMAGE}
    constants = dict(
        map(graph_module._constant, [memoryview(c.SerializeToString()) for c in exported.graph.initializer])
    )
    shapes |= {name: constant.shape for name, constant in constants.items()}
    for node in exported.graph.node:
        output, shape, _ = graph_module._node(memoryview(node.SerializeToString()), shapes, constants)
        shapes[output] = shape
    assert {name: shapes[name] for name in expected} == expected


def external(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.ClearField("raw_data")

    return change


def stored_weights(model: onnx.ModelProto) -> None:
    model.graph.node.pop()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(WEIGHTS, "f"), "weights"))


def with_node(node: onnx.NodeProto) -> Callable[[onnx.ModelProto], None]:
    """The node in front of all others."""

    def change(model: onnx.ModelProto) -> None:
        nodes = [copy.deepcopy(each) for each in model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend([node, *nodes])

    return change


def constants(*arrays: np.ndarray) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(array, f"hostile{i}") for i, array in enumerate(arrays)]


def with_constants(node: onnx.NodeProto, *arrays: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.extend(constants(*arrays))
        with_node(node)(model)

    return change


def loop() -> onnx.NodeProto:
    """`while True: pass`."""
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["condition"], ["again"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), condition],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, [])],
    )
    return helper.make_node("Loop", ["", "constant0"], [], body=body)


def in_a_relu(node: onnx.NodeProto) -> onnx.NodeProto:
    """A subgraph as an attribute of an operator that takes none."""
    return helper.make_node("Relu", ["constant0"], ["hostile"], body=node.attribute[0].g)


ones = np.ones
HOSTILE: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "external data": (external("private.bin"), "initializer has a field 13"),
    "external data above": (external("../private.bin"), "initializer has a field 13"),
    "external data anywhere": (external("/etc/passwd"), "initializer has a field 13"),
    "a data location": (lambda m: setattr(m.graph.initializer[0], "data_location", 1), "initializer has a field 14"),
    "a loop": (with_node(loop()), "operator must be one that fastprompt writes, .*, got 'Loop'"),
    "a loop in an attribute": (with_node(in_a_relu(loop())), "Relu's attribute has a field 6"),
    "another operator": (
        with_node(helper.make_node("Identity", ["image"], ["x"])),
        "operator must be .* got 'Identity'",
    ),
    "another domain": (
        with_node(helper.make_node("Relu", ["image"], ["x"], domain="com.microsoft")),
        "node has a field 7",
    ),
    "a tensor in an attribute": (
        with_node(helper.make_node("Relu", ["image"], ["x"], value=constants(ones(1))[0])),
        "Relu's attribute has a field 5",
    ),
    "another attribute": (with_node(helper.make_node("Relu", ["image"], ["x"], group=4)), "Relu must take 1 inputs"),
    "a function": (
        lambda m: m.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [], m.opset_import)),
        "model has a field 25",
    ),
    "training": (lambda m: m.training_info.add(), "model has a field 20"),
    "metadata": (lambda m: m.metadata_props.add(key="k", value="v"), "model has a field 14"),
    "another opset": (lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "opset_import must be"),
    "an old opset": (lambda m: setattr(m.opset_import[0], "version", 7), "opset_import must be"),
    "an old version": (lambda m: setattr(m, "ir_version", 3), "ir_version must be from 8 to 10, got 3"),
    "a sparse tensor": (lambda m: m.graph.sparse_initializer.add(), "graph has a field 15"),
    "another input": (lambda m: m.graph.input.append(m.graph.output[0]), "graph.input must be only 'image'"),
    "another output": (lambda m: m.graph.output.append(m.graph.input[0]), "graph.output must be only 'weights'"),
    "other weights": (lambda m: m.graph.node.pop(), "'weights' must be computed, of shape"),
    "weights that are stored": (stored_weights, "'weights' must be computed"),
    "an unknown value": (with_node(helper.make_node("Relu", ["nowhere"], ["x"])), "Relu must map known values"),
    "a value from later": (with_node(helper.make_node("Relu", ["weights"], ["x"])), "Relu must map known values"),
    "a value twice": (with_node(helper.make_node("Relu", ["image"], ["image"])), "value 'image' is computed twice"),
    "a constant twice": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "'constant0' occurs twice"),
    "a constant of other size": (lambda m: m.graph.initializer[0].dims.append(2), "does not have 4 bytes"),
    "a constant of negative size": (
        lambda m: m.graph.initializer[0].dims.extend([-1, -1]),
        "does not have 4 bytes",
    ),
    "a constant of text": (lambda m: m.graph.initializer.append(constants(np.array(["x"], object))[0]), "field 6"),
    "a constant of doubles": (lambda m: m.graph.initializer.extend(constants(ones(1))), "must be float or int64"),
    "gigabytes by a product": (
        with_constants(
            helper.make_node("MatMul", ["hostile0", "hostile1"], ["x"]), ones((70_000, 1), "f"), ones((1, 70_000), "f")
        ),
        "its values have more than",
    ),
    "gigabytes by broadcasting": (
        with_constants(
            helper.make_node("Add", ["hostile0", "hostile1"], ["x"]), ones((70_000, 1), "f"), ones((1, 70_000), "f")
        ),
        "its values have more than",
    ),
    "gigabytes by padding": (
        with_constants(
            helper.make_node(
                "Conv",
                ["hostile0", "hostile1", "hostile2"],
                ["x"],
                pads=[1 << 20, 1 << 20, 1, 1],
                strides=[1, 1],
                kernel_shape=[1, 1],
            ),
            ones((1, 1, 1, 1), "f"),
            ones((1, 1, 1, 1), "f"),
            ones(1, "f"),
        ),
        "its values have more than",
    ),
    "a reshape of computed size": (
        with_constants(helper.make_node("Reshape", ["image", "image"], ["x"])),
        "Reshape cannot take inputs",
    ),
    "a reshape to another size": (
        with_constants(helper.make_node("Reshape", ["image", "hostile0"], ["x"]), np.array([-1, 3])),
        "Reshape cannot take inputs",
    ),
    "a stride of 0": (
        with_constants(
            helper.make_node("MaxPool", ["hostile0"], ["x"], pads=[0] * 4, strides=[0, 1], kernel_shape=[1, 1]),
            ones((1, 1, 1, 1), "f"),
        ),
        "MaxPool cannot take inputs",
    ),
    "strides of 3 sides": (
        with_constants(
            helper.make_node("MaxPool", ["hostile0"], ["x"], pads=[0] * 4, strides=[1] * 3, kernel_shape=[1, 1]),
            ones((1, 1, 1, 1), "f"),
        ),
        "MaxPool cannot take inputs",
    ),
    "a permutation that is none": (
        with_node(helper.make_node("Transpose", ["image"], ["x"], perm=[0, 0, 1, 2])),
        "Transpose cannot take inputs",
    ),
    "many nodes": (
        lambda m: m.graph.node.extend([helper.make_node("Relu", ["image"], [f"x{i}"]) for i in range(1000)]),
        "it must have at most 1000 nodes",
    ),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_graph_is_refused(
    change: Callable[[onnx.ModelProto], Any], message: str, exported: onnx.ModelProto
) -> None:
    hostile = copy.deepcopy(exported)
    change(hostile)
    with pytest.raises(GraphError, match=message):
        check_graph(hostile.SerializeToString(), IMAGE, WEIGHTS)


def test_hours_of_products_are_refused(exported: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MOST_PRODUCTS", 64 * 64 * 1000)
    hostile, square = copy.deepcopy(exported), ones((64, 64), "f")
    for i in range(20):
        node = helper.make_node("MatMul", ["hostile0", "hostile0"], [f"x{i}"])
        with_constants(node, *([] if i else [square]))(hostile)
    with pytest.raises(GraphError, match="one run needs more than 4,096,000 multiplications"):
        check_graph(hostile.SerializeToString(), IMAGE, WEIGHTS)


def field(number: int, content: bytes) -> bytes:
    """A message's field of bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (field(7, b""), "model.graph occurs twice"),  # protocol buffers would merge the two
        (b"\x08\x08", "model.ir_version occurs twice"),
        (b"\x0a\x01\x08", "model.ir_version has the wrong type"),
        (b"\x38\x01", "model.graph has the wrong type"),
        (b"\x3d\x00\x00\x00\x00", "model.graph has the wrong type"),
        (b"\x3b\x3c", "model.graph has the wrong type"),  # a group
        (b"\x00", "model has a field 0"),
        (b"\x12\x7f", "model.producer_name is cut off"),
        (b"\x80", "it is cut off"),
        (b"\xff" * 11, "a number has more than 64 bits"),
        (field(8, field(1, b"\xff")), "domain is not UTF-8"),
    ],
    ids=str,
)
def test_a_file_that_two_readers_could_read_in_two_ways_is_refused(
    more: bytes, message: str, exported: onnx.ModelProto
) -> None:
    with pytest.raises(GraphError, match=message):
        check_graph(exported.SerializeToString() + more, IMAGE, WEIGHTS)


def test_a_file_that_is_two_formats_is_refused(exported: onnx.ModelProto) -> None:
    named = copy.deepcopy(exported)
    named.ClearField("ir_version")
    content = field(2, b"\0\0ORTM")
    content = b"\x12" + content[1:] + exported.SerializeToString().replace(field(2, b"fastprompt"), b"", 1)
    assert content[4:8] == b"ORTM"
    with pytest.raises(GraphError, match="onnxruntime's own format"):
        check_graph(content, IMAGE, WEIGHTS)


def test_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"", b"\x08\x08", b"no graph", bytes(100)):
        with pytest.raises(GraphError):
            check_graph(content, IMAGE, WEIGHTS)
    monkeypatch.setattr(graph_module, "LARGEST_GRAPH", 10)
    with pytest.raises(GraphError, match="it must have at most 10 bytes, got 11"):
        check_graph(bytes(11), IMAGE, WEIGHTS)


def test_a_damaged_graph_is_refused_or_runs(exported: onnx.ModelProto) -> None:
    content, random = exported.SerializeToString(), torch.Generator().manual_seed(0)
    places = torch.randperm(8 * len(content), generator=random)[:300].tolist()
    refused = ran = 0
    for place in [*range(320), *places]:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        try:
            check_graph(bytes(flipped), IMAGE, WEIGHTS)
        except GraphError:
            refused += 1
        else:
            ran += 1
    for length in range(0, len(content), 97):
        with pytest.raises(GraphError):
            check_graph(content[:length], IMAGE, WEIGHTS)
    assert refused > 50
    assert ran > 50  # in a name or a number


@pytest.fixture
def hostile_folder(folder: Path, tmp_path: Path, exported: onnx.ModelProto) -> Callable[[bytes], Path]:
    """`hostile_folder(content)`: a folder with that graph, and a manifest as if it belonged there."""

    def write(content: bytes) -> Path:
        made = Path(shutil.copytree(folder, tmp_path / "hostile"))
        (made / "generator.onnx").write_bytes(content)
        manifest = json.loads((made / "manifest.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"]["generator.onnx"] = {"bytes": len(content), "sha256": digest}
        (made / "manifest.json").write_text(json.dumps(manifest))
        return made

    return write


def test_a_folder_cannot_read_files_beside_the_client(
    hostile_folder: Callable[[bytes], Path],
    exported: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "private.bin").write_bytes(np.full(1, 99, "f").tobytes())
    monkeypatch.chdir(tmp_path)
    hostile = copy.deepcopy(exported)
    external("private.bin")(hostile)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnxruntime.InferenceSession(hostile.SerializeToString(), options)  # reads it
    with pytest.raises(FolderError, match=r"generator\.onnx is not a graph that .*: initializer has a field 13"):
        Client(hostile_folder(hostile.SerializeToString()))


def test_what_onnxruntime_raises_is_a_folder_error(
    hostile_folder: Callable[[bytes], Path], exported: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copy.deepcopy(exported)
    whole.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING  # which Cast takes, and a picture is not
    with pytest.raises(FolderError, match=r"generator\.onnx must map|generator\.onnx cannot be run"):
        Client(hostile_folder(whole.SerializeToString()))


def test_what_onnxruntime_raises_in_a_run_is_a_folder_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(folder)

    class Broken:
        def run(self, *_: Any) -> None:
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException("out of memory")

    client._session = Broken()
    with pytest.raises(FolderError, match=r"generator\.onnx cannot be run: out of memory"):
        client.prompt(np.zeros((32, 32, 3), np.uint8))

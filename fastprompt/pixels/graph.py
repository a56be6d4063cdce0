"""Export a PGN's selection of library entries as an ONNX graph: raw pixels in, weights of the library out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.extras import needed
from fastprompt.generators.pgn import PGN, BasicBlock, ResNet10
from fastprompt.vit import FrozenViT

with needed("weights", "the folder of a client"):
    import onnx
    from onnx import helper, numpy_helper

OPSET, IR_VERSION = 17, 8


class Graph:
    """Builds a list of ONNX nodes in execution order. Each node has one output and is named by it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Tensor | np.ndarray) -> str:
        """Add a constant: int64 for integers, else float32."""
        array = np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def conv(self, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> str:
        """Add a convolution with the eval-mode batch norm that follows folded into it."""
        weight = conv.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        if norm is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * scale[:, None, None, None]
            bias = (bias - norm.running_mean.double()) * scale + norm.bias.detach().double()
        (top, left), strides = (int(side) for side in conv.padding), [int(side) for side in conv.stride]
        return self.node(
            "Conv",
            x,
            self.constant(weight),
            self.constant(bias),
            strides=strides,
            pads=[top, left, top, left],
            kernel_shape=list(weight.shape[2:]),
        )

    def relu(self, x: str) -> str:
        return self.node("Relu", x)

    def max_pool(self, x: str) -> str:
        """Add a 3 × 3 max pooling with stride 2 and padding 1."""
        return self.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])

    def fully_connected(self, x: str, layer: nn.Linear) -> str:
        """Add the mean over positions, then the Linear."""
        x = self.node("Flatten", self.node("GlobalAveragePool", x))
        return self.node("Gemm", x, self.constant(layer.weight), self.constant(layer.bias), transB=1)


def selection_graph(generator: PGN, backbone: FrozenViT) -> bytes:
    """Return an ONNX file: "image" uint8 (1, H, W, 3) of the backbone's size → "weights" float32 (K, M) of the library.

    The graph contains normalisation, resampling to the generator's own resolution, the trunk (batch norms folded) and
    softmax or sigmoid. It uses only stateless standard operators of opset 17.
    """
    graph, config = Graph(), generator.config
    height, width = backbone.image_size
    x = graph.node("Transpose", graph.node("Cast", "image", to=onnx.TensorProto.FLOAT), perm=[0, 3, 1, 2])
    x = graph.node("Div", x, graph.constant(np.float32(255)))
    x = graph.node("Sub", x, graph.constant(np.asarray(backbone.mean).reshape(1, 3, 1, 1)))
    x = graph.node("Div", x, graph.constant(np.asarray(backbone.std).reshape(1, 3, 1, 1)))
    resized, antialias = config.resized(height, width), config.resize == "square"
    if resized != (height, width):
        x = graph.node("MatMul", graph.constant(resampling(height, resized[0], antialias)), x)
        x = graph.node("MatMul", x, graph.constant(resampling(width, resized[1], antialias).T))
    trunk = generator.trunk
    x = _resnet10(graph, x, trunk) if isinstance(trunk, ResNet10) else _resnet18(graph, x, trunk)
    x = graph.node("Reshape", x, graph.constant(np.array([config.num_prompts, config.library_size])))
    if config.activation == "softmax":
        graph.node("Softmax", x, axis=-1, output="weights")
    else:
        graph.node("Sigmoid", x, output="weights")
    image = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, [1, height, width, 3])
    weights = helper.make_tensor_value_info(
        "weights", onnx.TensorProto.FLOAT, [config.num_prompts, config.library_size]
    )
    made = helper.make_model(
        helper.make_graph(graph.nodes, "selection", [image], [weights], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="fastprompt",
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(made)
    return made.SerializeToString()


def resampling(old: int, new: int, antialias: bool) -> Tensor:
    """Return the (new, old) matrix of bilinear resampling along one axis, as in `F.interpolate`."""
    unit = torch.eye(old, dtype=torch.float64)[None, None]  # (1, 1, old, old)
    return F.interpolate(unit, size=(new, old), mode="bilinear", align_corners=False, antialias=antialias)[0, 0]


def _resnet10(graph: Graph, x: str, trunk: ResNet10) -> str:
    conv, norm, _ = trunk.stem
    x = graph.relu(graph.conv(x, conv, norm))  # type: ignore[arg-type]
    if isinstance(trunk.pool, nn.MaxPool2d):
        x = graph.max_pool(x)
    for block in trunk.blocks:
        assert isinstance(block, BasicBlock)
        first, first_norm, _, second, second_norm = block.body
        body = graph.relu(graph.conv(x, first, first_norm))  # type: ignore[arg-type]
        body = graph.conv(body, second, second_norm)  # type: ignore[arg-type]
        skip = graph.conv(x, block.skip) if isinstance(block.skip, nn.Conv2d) else x
        x = graph.relu(graph.node("Add", body, skip))
    return graph.fully_connected(x, trunk.fc)


def _resnet18(graph: Graph, x: str, trunk: Any) -> str:
    x = graph.max_pool(graph.relu(graph.conv(x, trunk.conv1, trunk.bn1)))
    for group in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        for block in group:
            body = graph.relu(graph.conv(x, block.conv1, block.bn1))
            body = graph.conv(body, block.conv2, block.bn2)
            skip = x if block.downsample is None else graph.conv(x, *block.downsample)
            x = graph.relu(graph.node("Add", body, skip))
    return graph.fully_connected(x, trunk.fc)

"""Validate `generator.onnx`: only operators that fastprompt's exporter writes, on tensors of bounded size.

A folder may come from an untrusted source, and onnxruntime does whatever a graph says: read tensors from other files,
loop without end, allocate any amount of memory. The file is therefore parsed here first, by the wire format of protocol
buffers and the field numbers of onnx.proto. Every field that the exporter does not write is refused: external data,
subgraphs, functions, other operators. The sizes of all values are computed from the operators before any is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

LARGEST_GRAPH = 512 << 20
"""Maximum size of the file in bytes."""
MOST_ELEMENTS = 1 << 28
"""Maximum number of elements of all computed values, 1 GiB; a ResNet-18 at 1024 x 1024 pixels has half of that."""
MOST_PRODUCTS = 1 << 40
"""Maximum number of multiplications of one run; a ResNet-18 at 1024 x 1024 pixels needs 1/28 of that."""
MOST_NODES = 1000
IR_VERSIONS, OPSETS = range(8, 11), range(17, 18)

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FLOAT, _INT64 = 1, 7  # of TensorProto.DataType
_INT, _INTS = 2, 7  # of AttributeProto.AttributeType
_ITEM = {_FLOAT: "<f4", _INT64: "<i8"}

Shape = tuple[int, ...]


class GraphError(ValueError):
    """The file is not one that fastprompt's exporter writes; the message says where."""


class Field(NamedTuple):
    """Name and wire type of a message's field, and whether it may be repeated."""

    name: str
    wire: int
    repeated: bool = False


MODEL = {
    1: Field("ir_version", VARINT),
    2: Field("producer_name", BYTES),
    3: Field("producer_version", BYTES),
    7: Field("graph", BYTES),
    8: Field("opset_import", BYTES, True),
}
OPSET = {1: Field("domain", BYTES), 2: Field("version", VARINT)}
GRAPH = {
    1: Field("node", BYTES, True),
    2: Field("name", BYTES),
    5: Field("initializer", BYTES, True),
    11: Field("input", BYTES, True),
    12: Field("output", BYTES, True),
}
NODE = {
    1: Field("input", BYTES, True),
    2: Field("output", BYTES, True),
    3: Field("name", BYTES),
    4: Field("op_type", BYTES),
    5: Field("attribute", BYTES, True),
}
ATTRIBUTE = {
    1: Field("name", BYTES),
    3: Field("i", VARINT),
    8: Field("ints", VARINT, True),
    20: Field("type", VARINT),
}
TENSOR = {
    1: Field("dims", VARINT, True),
    2: Field("data_type", VARINT),
    8: Field("name", BYTES),
    9: Field("raw_data", BYTES),
}
VALUE = {1: Field("name", BYTES), 2: Field("type", BYTES)}


class Constant(NamedTuple):
    """An initializer: its shape and, for integers, its values."""

    shape: Shape
    whole: tuple[int, ...] | None


def check_graph(content: bytes, image: Shape, weights: Shape) -> None:
    """Raise `GraphError` unless the file could be the exporter's, with "image" and "weights" of these shapes."""
    if len(content) > LARGEST_GRAPH:
        raise GraphError(f"it must have at most {LARGEST_GRAPH:,} bytes, got {len(content):,}")
    if content[4:8] == b"ORTM":  # onnxruntime would read it in its own format
        raise GraphError("it is in onnxruntime's own format")
    model = _message(memoryview(content), MODEL, "model")
    if model.get("ir_version") not in IR_VERSIONS:
        raise GraphError(f"ir_version must be from 8 to 10, got {model.get('ir_version')}")
    opsets = [_message(part, OPSET, "opset_import") for part in model.get("opset_import", [])]
    if [(_text(opset, "domain"), opset.get("version")) for opset in opsets] not in [[("", v)] for v in OPSETS]:
        raise GraphError(f"opset_import must be ONNX's own operators of version 17, got {opsets}")
    graph = _message(model.get("graph", memoryview(b"")), GRAPH, "graph")
    for kind, name in (("input", "image"), ("output", "weights")):
        names = [_text(_message(value, VALUE, kind), "name") for value in graph.get(kind, [])]
        if names != [name]:
            raise GraphError(f"graph.{kind} must be only {name!r}, got {names}")
    constants: dict[str, Constant] = {}
    for part in graph.get("initializer", []):
        name, constant = _constant(part)
        if name in constants or name == "image":
            raise GraphError(f"initializer {name!r} occurs twice")
        constants[name] = constant
    nodes = graph.get("node", [])
    if len(nodes) > MOST_NODES:
        raise GraphError(f"it must have at most {MOST_NODES} nodes, got {len(nodes)}")
    shapes: dict[str, Shape] = {"image": image, **{name: constant.shape for name, constant in constants.items()}}
    elements = products = 0
    for part in nodes:
        output, shape, work = _node(part, shapes, constants)
        if output in shapes:
            raise GraphError(f"value {output!r} is computed twice")
        shapes[output], elements, products = shape, elements + math.prod(shape), products + work
        if elements > MOST_ELEMENTS:
            raise GraphError(f"its values have more than {MOST_ELEMENTS:,} elements")
        if products > MOST_PRODUCTS:
            raise GraphError(f"one run needs more than {MOST_PRODUCTS:,} multiplications")
    if "weights" in constants or shapes.get("weights") != weights:
        raise GraphError(f"'weights' must be computed, of shape {weights}, got {shapes.get('weights')}")


def _fields(content: memoryview, known: dict[int, Field], where: str) -> Iterator[tuple[Field, Any]]:
    """Yield (field, value) of a message in order, as ints or bytes; repeated integers may be packed."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        field = known.get(key >> 3)
        if field is None:
            raise GraphError(f"{where} has a field {key >> 3} that fastprompt does not write")
        wire = key & 7
        if wire == VARINT and field.wire == VARINT:
            value, place = _varint(content, place)
            yield field, _signed(value)
        elif wire == BYTES:
            length, place = _varint(content, place)
            if length > len(content) - place:
                raise GraphError(f"{where}.{field.name} is cut off")
            part, place = content[place : place + length], place + length
            if field.wire == BYTES:
                yield field, part
            elif field.repeated:
                inside = 0
                while inside < len(part):
                    value, inside = _varint(part, inside)
                    yield field, _signed(value)
            else:
                raise GraphError(f"{where}.{field.name} has the wrong type")
        else:
            raise GraphError(f"{where}.{field.name} has the wrong type")


def _message(content: memoryview, known: dict[int, Field], where: str) -> dict[str, Any]:
    """Return a message's fields by name, repeated ones as lists. Other fields that occur twice are refused."""
    found: dict[str, Any] = {}
    for field, value in _fields(content, known, where):
        if field.repeated:
            found.setdefault(field.name, []).append(value)
        elif field.name in found:
            raise GraphError(f"{where}.{field.name} occurs twice")
        else:
            found[field.name] = value
    return found


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """Return (the number at `place`, where it ends)."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            raise GraphError("it is cut off")
        byte = content[place]
        value, place = value | (byte & 127) << shift, place + 1
        if byte < 128:
            return value & (1 << 64) - 1, place
    raise GraphError("a number has more than 64 bits")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _text(message: dict[str, Any], name: str) -> str:
    try:
        return bytes(message.get(name, b"")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise GraphError(f"{name} is not UTF-8") from error


def _constant(content: memoryview) -> tuple[str, Constant]:
    """Return (name, constant) of an initializer after checking that its data are in the file."""
    tensor = _message(content, TENSOR, "initializer")
    name, shape = _text(tensor, "name"), tuple(tensor.get("dims", []))
    kind, data = tensor.get("data_type"), tensor.get("raw_data", memoryview(b""))
    if kind not in _ITEM:
        raise GraphError(f"initializer {name!r} must be float or int64, got data_type {kind}")
    if any(side < 0 for side in shape) or math.prod(shape) * np.dtype(_ITEM[kind]).itemsize != len(data):
        raise GraphError(f"initializer {name!r} of shape {shape} does not have {len(data)} bytes")
    whole = tuple(np.frombuffer(data, "<i8").tolist()) if kind == _INT64 and len(data) <= 64 else None
    return name, Constant(shape, whole)


def _node(content: memoryview, shapes: dict[str, Shape], constants: dict[str, Constant]) -> tuple[str, Shape, int]:
    """Return (output's name, its shape, multiplications) of a node."""
    node = _message(content, NODE, "node")
    kind = _text(node, "op_type")
    if kind not in OPERATORS:
        raise GraphError(f"operator must be one that fastprompt writes, {', '.join(OPERATORS)}, got {kind!r}")
    names = [bytes(name).decode("utf-8", "replace") for name in node.get("input", [])]
    outputs = [bytes(name).decode("utf-8", "replace") for name in node.get("output", [])]
    unknown = [name for name in names if name not in shapes]
    if unknown or len(outputs) != 1:
        raise GraphError(f"{kind} must map known values to one value, got {names} and {outputs}")
    attributes: dict[str, tuple[int, ...]] = {}
    for part in node.get("attribute", []):
        attribute = _message(part, ATTRIBUTE, f"{kind}'s attribute")
        name = _text(attribute, "name")
        if name in attributes:
            raise GraphError(f"{kind}'s attribute {name!r} occurs twice")
        if attribute.get("type") == _INT and "ints" not in attribute:
            attributes[name] = (attribute.get("i", 0),)
        elif attribute.get("type") == _INTS and "i" not in attribute:
            attributes[name] = tuple(attribute.get("ints", []))
        else:
            raise GraphError(f"{kind}'s attribute {name!r} must be one integer or a list of them")
    takes, wanted, shape_of = OPERATORS[kind]
    if len(names) != takes or set(attributes) != wanted:
        raise GraphError(
            f"{kind} must take {takes} inputs and the attributes {sorted(wanted)}, got {len(names)} and "
            f"{sorted(attributes)}"
        )
    inputs = [shapes[name] for name in names]
    if kind == "Reshape":
        constant = constants.get(names[1])
        attributes = {"shape": (constant.whole if constant is not None else None) or ()}
    try:
        shape, products = shape_of(inputs, attributes)
    except (ValueError, IndexError, TypeError) as error:
        raise GraphError(f"{kind} cannot take inputs {inputs} with {attributes}") from error
    return outputs[0], shape, products


Attributes = dict[str, tuple[int, ...]]
Result = tuple[Shape, int]


def _need(condition: bool) -> None:
    if not condition:
        raise ValueError


def _same(inputs: list[Shape], attributes: Attributes) -> Result:
    return inputs[0], math.prod(inputs[0])


def _cast(inputs: list[Shape], attributes: Attributes) -> Result:
    _need(attributes["to"] == (_FLOAT,))
    return inputs[0], 0


def _softmax(inputs: list[Shape], attributes: Attributes) -> Result:
    _need(attributes["axis"] == (-1,))
    return inputs[0], math.prod(inputs[0])


def _broadcast(inputs: list[Shape], attributes: Attributes) -> Result:
    shape = tuple(np.broadcast_shapes(*inputs))
    return shape, math.prod(shape)


def _transpose(inputs: list[Shape], attributes: Attributes) -> Result:
    _need(sorted(attributes["perm"]) == list(range(len(inputs[0]))))
    return tuple(inputs[0][axis] for axis in attributes["perm"]), 0


def _matmul(inputs: list[Shape], attributes: Attributes) -> Result:
    (*left, m, k), (*right, k2, n) = inputs
    _need(k == k2)
    shape = (*np.broadcast_shapes(tuple(left), tuple(right)), m, n)
    return shape, math.prod(shape) * k


def _windows(shape: Shape, attributes: Attributes) -> tuple[int, int]:
    """Return rows and columns of a convolution's or pooling's output."""
    (kernel_y, kernel_x), (top, left, bottom, right) = attributes["kernel_shape"], attributes["pads"]
    (stride_y, stride_x), (height, width) = attributes["strides"], shape[2:]
    _need(min(kernel_y, kernel_x, stride_y, stride_x) >= 1 and min(top, left, bottom, right) >= 0)
    rows, columns = (
        (height + top + bottom - kernel_y) // stride_y + 1,
        (width + left + right - kernel_x) // stride_x + 1,
    )
    _need(rows >= 1 and columns >= 1)
    return rows, columns


def _conv(inputs: list[Shape], attributes: Attributes) -> Result:
    x, (outputs, channels, *kernel), bias = inputs
    _need(len(x) == 4 and x[1] == channels and tuple(kernel) == attributes["kernel_shape"] and bias == (outputs,))
    shape = (x[0], outputs, *_windows(x, attributes))
    return shape, math.prod(shape) * channels * math.prod(kernel)


def _max_pool(inputs: list[Shape], attributes: Attributes) -> Result:
    _need(len(inputs[0]) == 4)
    shape = (*inputs[0][:2], *_windows(inputs[0], attributes))
    return shape, math.prod(shape) * math.prod(attributes["kernel_shape"])


def _pool_all(inputs: list[Shape], attributes: Attributes) -> Result:
    _need(len(inputs[0]) == 4)
    return (*inputs[0][:2], 1, 1), math.prod(inputs[0])


def _flatten(inputs: list[Shape], attributes: Attributes) -> Result:
    return (inputs[0][0], math.prod(inputs[0][1:])), 0


def _gemm(inputs: list[Shape], attributes: Attributes) -> Result:
    (m, k), (n, k2), bias = inputs
    _need(attributes["transB"] == (1,) and k == k2 and bias == (n,))
    return (m, n), m * n * k


def _reshape(inputs: list[Shape], attributes: Attributes) -> Result:
    shape = attributes["shape"]
    _need(min(shape) >= 1 and math.prod(shape) == math.prod(inputs[0]))
    return shape, 0


OPERATORS: dict[str, tuple[int, set[str], Callable[[list[Shape], Attributes], Result]]] = {
    "Add": (2, set(), _broadcast),
    "Cast": (1, {"to"}, _cast),
    "Conv": (3, {"kernel_shape", "pads", "strides"}, _conv),
    "Div": (2, set(), _broadcast),
    "Flatten": (1, set(), _flatten),
    "Gemm": (3, {"transB"}, _gemm),
    "GlobalAveragePool": (1, set(), _pool_all),
    "MatMul": (2, set(), _matmul),
    "MaxPool": (1, {"kernel_shape", "pads", "strides"}, _max_pool),
    "Relu": (1, set(), _same),
    "Reshape": (2, set(), _reshape),
    "Sigmoid": (1, set(), _same),
    "Softmax": (1, {"axis"}, _softmax),
    "Sub": (2, set(), _broadcast),
    "Transpose": (1, {"perm"}, _transpose),
}
"""Operator → number of inputs, attributes, and a function (shapes, attributes) → (output's shape, multiplications)."""

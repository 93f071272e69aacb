"""Write a quantized graph as an ONNX file: QuantizeLinear and DequantizeLinear, opset 21, tables included.

Scales that depend on the timestep are moved out of the quantized operators (`rescale_temporal`). With
constant scales, a runtime can fuse QuantizeLinear, DequantizeLinear and a matrix product into an int8 kernel.
A computed scale is legal ONNX, but prevents that. The graph looks up the step in the timestep's tables by
ArgMin |table - t|.

On a CPU, onnxruntime 1.31 treats the standard form as follows. Matrix products run in int8, even without an
8-bit output (MatMulIntegerToFloat), unless an Add of a bias follows: it would be fused into a float Gemm
first. So the bias is added by Sub. A convolution needs an 8-bit output (QLinearConv), which would round
values that the recipe does not round. Without one it runs in float, and its weight is dequantized at every
call.

So there are two forms: the standard form for other runtimes, and one for onnxruntime. In the latter,
convolutions are matrix products over patches (`unfold_convolutions`), and 4-bit weights are cast to bytes by
operators that onnxruntime computes once, when it loads the file.

A file may run on another CPU than the one that wrote it. On x86 without VNNI, onnxruntime's kernels of
unsigned by signed bytes silently saturate for 8-bit weights. Those of unsigned by unsigned bytes multiply in
16 bits and do not saturate. With VNNI, it computes both with the same instruction. So weights that could
saturate are stored unsigned (`store_weights`).
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from tfmq_fx.artefact.program import dynamic_shapes, exported, graph_of
from tfmq_fx.artefact.quantized_graph import QuantizedGraph, example_inputs
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files
from tfmq_fx.base.tracing import tracing
from tfmq_fx.graph.nodes import aten, meta_value
from tfmq_fx.passes.int8.to_int8 import TO_INT8
from tfmq_fx.passes.int8.unfold_convolutions import unfold_convolutions
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.temporal.partition_temporal import BLOCK_NAME
from tfmq_fx.runtimes.exported import fallen_back
from tfmq_fx.runtimes.layers import float8_because, float8_layers, path_of, quantized_layers
from tfmq_fx.runtimes.onnx_weights import store_weights

log = logging.getLogger(__name__)


ops = torch.ops.quantized_decomposed


OPSET = 21  # the first with 4-bit integers and scales per block


LARGEST = 2**31 - 2**20  # the most bytes of weights inside the file; protobuf's limit is 2 GiB


_INT8_KERNELS = {
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv",
    "QLinearMatMul",
}  # fmt: skip


_FLOAT_KERNELS = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulNBits"}


def require_onnx() -> None:
    """Raise a TFMQError that says how to install the packages, if one is missing."""
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TFMQError(
            f'export to ONNX: a package is missing ({error}); pip install "tfmq_fx[onnx]".'
        ) from error


def export_onnx(model: QuantizedGraph, file: Path, *, for_onnxruntime: bool, strict: bool) -> dict[str, Any]:
    """Write the file and, if the weights are too large for one file, FILE.data beside it.

    for_onnxruntime: write the form for onnxruntime, not the standard form; see the module.

    Returns the fields of `Exported` that are known here: weights, kernels and notes. Raises TFMQError for a
    missing package, for a node that ONNX cannot express, naming it, and, if `strict`, when onnxruntime
    computes a quantized layer in float.
    """
    require_onnx()
    import onnx_ir

    gm = graph_of(exported(model))
    PassManager([*TO_INT8, *([unfold_convolutions] if for_onnxruntime else [])])(gm)
    _four_dimensional_attention(gm)
    floats = float8_layers(gm)
    layers, because = [*quantized_layers(gm), *floats], float8_because(floats)
    inputs = example_inputs(model, batch=2)
    with tracing(), torch.no_grad():
        program = torch.export.export(gm, (), inputs, dynamic_shapes=dynamic_shapes(model), strict=False)
    ir = _translated(program, for_onnxruntime=for_onnxruntime)
    paths = _paths(layers, ir)
    found: dict[str, Any] = {"weights": store_weights(ir, for_onnxruntime=for_onnxruntime)}

    def write(path: Path) -> None:
        size = sum(v.const_value.nbytes for v in ir.graph.initializers.values() if v.const_value is not None)
        onnx_ir.save(ir, path, external_data=f"{path.name}.data" if size > LARGEST else None)
        try:
            ran = _products(path)
        except ImportError as error:
            if strict:
                raise TFMQError(f'strict: {error}; pip install "tfmq_fx[onnx]".') from error
            found["notes"] = ("onnxruntime is not installed: which kernels it runs is not known",)
        else:
            found["kernels"] = _counts(ran)
            fallen = [f"{paths[n]} ({op})" for n, op in ran if n in paths and op not in _INT8_KERNELS]
            found["notes"] = fallen_back(
                found["kernels"], len(layers), strict=strict, because=because, layers=fallen
            )

    replace_files(file, write)
    return found


def _paths(layers: Sequence[Node], ir: Any) -> dict[str, str]:
    """Return the paths of these layers' weights, by the names of the layers' nodes in the file."""
    paths = {path_of(layer) for layer in layers}
    found: dict[str, str] = {}
    for node in ir.graph:
        if node.op_type in _PRODUCTS:
            weight = node.inputs[1]
            while (made := weight.producer()) is not None and made.inputs:
                weight = made.inputs[0]
            path = weight.name.removeprefix(f"{BLOCK_NAME}.").removesuffix("_q")
            found |= {node.name: path} if path in paths else {}
    return found


_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def kernels(file: Path) -> dict[str, int]:
    """Return how many products with constants onnxruntime's CPU computes in int8, and how many in float.

    The products are convolutions, linears and others. Raises ImportError if onnxruntime is not installed.
    """
    return _counts(_products(file))


def _counts(products: Sequence[tuple[str, str]]) -> dict[str, int]:
    int8 = sum(op in _INT8_KERNELS for _, op in products)
    return {"int8": int8, "float": sum(op in _FLOAT_KERNELS for _, op in products)}


def _products(file: Path) -> list[tuple[str, str]]:
    """Return the name and the operator of every product with constants, in the graph as onnxruntime rewrites it when it loads the file."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is first imported
    import onnx_ir
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="tfmq-onnx-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimized)
        # The next level lays out convolutions for this CPU, and warns that the file fits no other CPU.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights.bin"
        )
        options.log_severity_level = 3
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        graph = onnx_ir.load(optimized).graph
    found = []
    matrices = {name for name, value in graph.initializers.items() if len(value.shape) > 1}
    constants = set(graph.initializers)
    for node in graph:
        given = {v.name for v in node.inputs if v is not None}
        if given <= constants:  # it dequantizes or transposes a weight
            made = {v.name for v in node.outputs}
            constants |= made
            matrices |= made if given & matrices else set()
        elif given & matrices:
            found.append((str(node.name), str(node.op_type)))
    return found


def _four_dimensional_attention(gm: GraphModule) -> None:
    """Rewrite attention of rank 3 to rank 4, the only rank that torch's exporter supports.

    attention(q, k, v) of rank 3 ==> squeeze(attention(unsqueeze(q), ..))
    """
    call = gm.graph.call_function
    for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        value = meta_value(node)
        if not isinstance(value, torch.Tensor) or value.dim() != 3:
            continue
        with gm.graph.inserting_before(node):
            heads = [call(aten.unsqueeze.default, (x, 1)) if x is not None else None for x in node.args[:4]]
            node.args = (*heads, *node.args[4:])
        with gm.graph.inserting_after(node):
            flat = call(aten.squeeze.dim, (node, 1))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        flat.args = (node, 1)
    gm.recompile()


@tracing()
def _translated(program: torch.export.ExportedProgram, *, for_onnxruntime: bool) -> Any:
    """Return the ONNX model in memory, without the exporter's notes on where in our code a node came from.

    Raises TFMQError naming the node that cannot be translated.
    """
    with _quiet():
        try:
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=_translations(for_onnxruntime),
            )
        except torch.onnx.OnnxExporterError as error:
            raise TFMQError(_cannot_express(error)) from error
    assert translated is not None
    ir = translated.model
    for part in (
        ir,
        ir.graph,
        *ir.graph,
        *ir.graph.initializers.values(),
        *(v for n in ir.graph for v in n.outputs),
    ):
        part.metadata_props.clear()
    return ir


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about torchvision's operators, which are not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cannot_express(error: BaseException) -> str:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    node = re.search(r"node %(\w+) .*?target=torch\.ops\.([\w.]+)", " ".join(map(str, causes)), re.S)
    last = str(causes[-1]).strip().splitlines()[0]
    where = f"node {node[1]}: ONNX cannot express {node[2]}" if node else "ONNX cannot express the graph"
    return f"{where} ({last}); export it as .pt2, or use the quantized network as it is."


def _translations(for_onnxruntime: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return translations of operators that torch's exporter lacks, or writes in a form that is not fused."""
    import onnx_ir
    from onnxscript import opset21 as op

    def constant(value: float, dtype: int) -> Any:
        return op.Constant(value=onnx_ir.tensor(value, dtype=onnx_ir.DataType(dtype)))

    # The limits can be left out, as they are those of the dtype: `byte_activations` ensures it for
    # activations, and weights are constants within them.
    def quantize(x: Any, scale: float, zero_point: int, _low: int, _high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, constant(scale, 1), constant(zero_point, dtype))

    def dequantize(q: Any, scale: float, zero_point: int, _low: int, _high: int, dtype: int) -> Any:
        return op.DequantizeLinear(q, constant(scale, 1), constant(zero_point, dtype))

    def dequantize_rows(
        q: Any, scale: Any, zero_point: Any, axis: int, _low: int, _high: int, dtype: int
    ) -> Any:
        return op.DequantizeLinear(q, scale, op.Cast(zero_point, to=dtype), axis=axis)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return y if bias is None else op.Sub(y, op.Neg(bias))

    def group_norm(
        x: Any,
        num_groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        _cudnn: bool = True,
    ) -> Any:
        """Write a group norm by InstanceNormalization.

        onnxruntime's CPU has a kernel for that. GroupNormalization it would expand to thirteen operators.
        """
        ones = onnx_ir.tensor(np.ones(num_groups, np.float32))
        zeros = onnx_ir.tensor(np.zeros(num_groups, np.float32))
        groups = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
        normed = op.InstanceNormalization(
            groups, op.Constant(value=ones), op.Constant(value=zeros), epsilon=eps
        )
        y = op.Reshape(normed, op.Shape(x))
        places = op.Constant(value_ints=list(range(1, len(x.shape) - 1)))
        y = y if weight is None else op.Mul(y, op.Unsqueeze(weight, places))
        return y if bias is None else op.Add(y, op.Unsqueeze(bias, places))

    return {
        ops.quantize_per_tensor.default: quantize,
        ops.dequantize_per_tensor.default: dequantize,
        ops.dequantize_per_channel.default: dequantize_rows,
        aten.linear.default: linear,
        **({aten.group_norm.default: group_norm} if for_onnxruntime else {}),
    }

"""Store the weights of an ONNX graph in the form that is computed best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfmq_fx.base.arithmetic import PAIRS_FIT


def store_weights(ir: Any, *, for_onnxruntime: bool) -> dict[str, int]:
    """Store the integers of weights in four bits where they fit, in the form that is computed best; how many are stored how.

        DequantizeLinear(uint8 q, s, uint8 z)   ==>   DequantizeLinear(uint4 q, s, uint4 z)
        an int8 kernel can read it:             ==>   DequantizeLinear(int8(int32(uint4 q) - z), s, 0)
        none can:                               ==>   (float(uint4 q) - z) * s
        DequantizeLinear(int8 q, s, 0), |q| > 64      ==>   DequantizeLinear(uint8(q + 128), s, 128)

    The second and third are for onnxruntime. It computes what stands before the product once, when it loads the file; then
    has the signed bytes that its int8 kernels take, or a float weight that it need not dequantize at every call. A
    product of a float with DequantizeLinear is its MatMulNBits, which rounds that float to 8 bits unless a session option
    forbids it (`session.qdq_matmulnbits_accuracy_level`): so there the third is for every runtime. The fourth is for
    CPUs on which the sums of signed weights saturate (`PAIRS_FIT`); smaller ones stay signed, which is faster there.
    """
    import onnx_ir
    from onnx_ir import DataType

    stored: Counter[str] = Counter()

    def initializer(name: str, array: Any, dtype: Any) -> Any:
        if name not in ir.graph.initializers:
            tensor = onnx_ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
            kind = onnx_ir.TensorType(dtype)
            value = onnx_ir.Value(name=name, const_value=tensor, type=kind, shape=tensor.shape)
            ir.graph.register_initializer(value)
        return ir.graph.initializers[name]

    for node in [n for n in ir.graph if n.op_type == "DequantizeLinear"]:
        q, scale, zero_point = node.inputs
        if q.const_value is None or len(q.const_value.shape) < 2:
            continue
        integers, z = q.const_value.numpy(), zero_point.const_value.numpy()
        fits = integers.dtype == np.uint8 and max(integers.max(), z.max()) < 16
        stored["int4" if fits else "int8"] += 1
        source = initializer(f"{q.name}_4bit", integers, DataType.UINT4) if fits else q
        axis = node.attributes["axis"].as_int()
        shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
        centred = integers.astype(np.int16) - z.reshape(shape).astype(np.int16)
        saturates = np.abs(centred).max() > PAIRS_FIT
        readers = list(_readers(node.outputs[0]))
        float_product = any(n.op_type == "MatMul" and not _is_dequantized(n.inputs[0]) for n in readers)
        int8 = all(n.op_type == "MatMul" and _is_dequantized(n.inputs[0]) for n in readers)
        if float_product or (for_onnxruntime and not int8):
            offset = initializer(f"{node.name}_offset", z.reshape(shape), DataType.FLOAT)
            factor = initializer(
                f"{node.name}_factor", scale.const_value.numpy().reshape(shape), DataType.FLOAT
            )
            value = onnx_ir.node("Cast", [source], {"to": DataType.FLOAT})
            less = onnx_ir.node("Sub", [value.outputs[0], offset])
            product = onnx_ir.node("Mul", [less.outputs[0], factor])
            ir.graph.insert_before(node, [value, less, product])
            node.outputs[0].replace_all_uses_with(product.outputs[0])
            ir.graph.remove(node, safe=True)
        elif for_onnxruntime and fits:
            offset = initializer(f"{node.name}_offset", z.reshape(shape), DataType.INT32)
            wide = onnx_ir.node("Cast", [source], {"to": DataType.INT32})
            less = onnx_ir.node("Sub", [wide.outputs[0], offset])
            byte = onnx_ir.node("Cast", [less.outputs[0]], {"to": DataType.INT8})
            ir.graph.insert_before(node, [wide, less, byte])
            node.replace_input_with(0, byte.outputs[0])
            node.replace_input_with(2, initializer(f"{node.name}_zeros", np.zeros_like(z), DataType.INT8))
        elif saturates:
            if integers.dtype == np.int8:
                raised = [x.astype(np.int16) + 128 for x in (integers, z)]
                node.replace_input_with(0, initializer(f"{q.name}_unsigned", raised[0], DataType.UINT8))
                node.replace_input_with(2, initializer(f"{node.name}_middle", raised[1], DataType.UINT8))
        elif for_onnxruntime and integers.dtype == np.uint8:
            node.replace_input_with(0, initializer(f"{q.name}_signed", centred, DataType.INT8))
            node.replace_input_with(2, initializer(f"{node.name}_zeros", np.zeros_like(z), DataType.INT8))
        elif fits:
            node.replace_input_with(0, source)
            node.replace_input_with(2, initializer(f"{node.name}_zero_point", z, DataType.UINT4))
    for value in list(ir.graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del ir.graph.initializers[value.name]
    return dict(stored)


def _readers(value: Any) -> Iterator[Any]:
    """The nodes that compute with a value, also after a transposition."""
    for use in value.uses():
        if use.node.op_type == "Transpose":
            yield from _readers(use.node.outputs[0])
        else:
            yield use.node


def _is_dequantized(value: Any) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"

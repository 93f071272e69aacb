"""Store the weights of an ONNX graph in the form that runs best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfmq_fx.base.arithmetic import PAIRS_FIT


def store_weights(ir: Any, *, for_onnxruntime: bool) -> dict[str, int]:
    """Store integer weights in four bits if they fit, in the form that runs best. Return the count by type.

        DequantizeLinear(uint8 q, s, uint8 z)   ==>   DequantizeLinear(uint4 q, s, uint4 z)
        an int8 kernel can read it:             ==>   DequantizeLinear(int8(int32(uint4 q) - z), s, 0)
        none can:                               ==>   (float(uint4 q) - z) * s
        DequantizeLinear(int8 q, s, 0), |q| > 64      ==>   DequantizeLinear(uint8(q + 128), s, 128)

    The second and third are for onnxruntime. It computes the operators before the product once, when it loads
    the file. Then it has the signed bytes that its int8 kernels take, or a float weight that need not be
    dequantized at every call.

    onnxruntime computes a product of a float with DequantizeLinear as MatMulNBits, which rounds that float to
    8 bits unless a session option forbids it (`session.qdq_matmulnbits_accuracy_level`). So for such
    products, the third form is used for every runtime.

    The fourth is for CPUs on which the sums of signed weights saturate (`PAIRS_FIT`). Smaller weights stay
    signed, which is faster there.
    """
    stored: Counter[str] = Counter()
    for node in [n for n in ir.graph if n.op_type == "DequantizeLinear"]:
        q = node.inputs[0]
        if q.const_value is not None and len(q.const_value.shape) > 1:
            weight = _Weight(ir, node)
            weight.store(for_onnxruntime=for_onnxruntime)
            stored["int4" if weight.fits else "int8"] += 1
    for value in list(ir.graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del ir.graph.initializers[value.name]
    return dict(stored)


class _Weight:
    """A weight of an ONNX graph that a DequantizeLinear reads, with methods that write its possible forms."""

    def __init__(self, ir: Any, node: Any) -> None:
        self.ir, self.node = ir, node
        self.q, self.scale, zero_point = node.inputs
        self.integers, self.z = self.q.const_value.numpy(), zero_point.const_value.numpy()
        axis = node.attributes["axis"].as_int()
        self.shape = [
            -1 if i == axis else 1 for i in range(self.integers.ndim)
        ]  # the shape in which scales broadcast with the integers
        self.centred = self.integers.astype(np.int16) - self.z.reshape(self.shape).astype(np.int16)
        self.unsigned = self.integers.dtype == np.uint8
        self.fits = bool(self.unsigned and max(self.integers.max(), self.z.max()) < 16)  # four bits

    def store(self, *, for_onnxruntime: bool) -> None:
        """Give the weight its form; see `store_weights`."""
        inputs = [n.inputs[0] for n in _readers(self.node.outputs[0]) if n.op_type == "MatMul"]
        others = any(n.op_type != "MatMul" for n in _readers(self.node.outputs[0]))
        float_product = any(not _is_dequantized(x) for x in inputs)
        if float_product or (for_onnxruntime and others):
            self._as_float()
        elif for_onnxruntime and self.fits:
            self._as_signed_bytes_of_four_bits()
        elif np.abs(self.centred).max() > PAIRS_FIT:
            self._as_unsigned_bytes()
        elif for_onnxruntime and self.unsigned:
            self._read(self.centred, "_signed", "INT8")
            self._zero_point(np.zeros_like(self.z), "_zeros", "INT8")
        elif self.fits:
            self.node.replace_input_with(0, self._source())
            self._zero_point(self.z, "_zero_point", "UINT4")

    def _as_float(self) -> None:
        """Store the weight as (float(q) - z) * s."""
        offset = self._constant(f"{self.node.name}_offset", self.z.reshape(self.shape), "FLOAT")
        scale = self.scale.const_value.numpy().reshape(self.shape)
        factor = self._constant(f"{self.node.name}_factor", scale, "FLOAT")
        value = self._before("Cast", self._source(), to="FLOAT")
        product = self._before("Mul", self._before("Sub", value, offset), factor)
        self.node.outputs[0].replace_all_uses_with(product)
        self.ir.graph.remove(self.node, safe=True)

    def _as_signed_bytes_of_four_bits(self) -> None:
        """Store the weight as DequantizeLinear(int8(int32(uint4 q) - z), s, 0)."""
        offset = self._constant(f"{self.node.name}_offset", self.z.reshape(self.shape), "INT32")
        wide = self._before("Cast", self._source(), to="INT32")
        byte = self._before("Cast", self._before("Sub", wide, offset), to="INT8")
        self.node.replace_input_with(0, byte)
        self._zero_point(np.zeros_like(self.z), "_zeros", "INT8")

    def _as_unsigned_bytes(self) -> None:
        """Store the weight as DequantizeLinear(uint8(q + 128), s, 128)."""
        if not self.unsigned:
            self._read(self.integers.astype(np.int16) + 128, "_unsigned", "UINT8")
            self._zero_point(self.z.astype(np.int16) + 128, "_middle", "UINT8")

    def _source(self) -> Any:
        """Return the integers, in four bits if they fit."""
        return self._constant(f"{self.q.name}_4bit", self.integers, "UINT4") if self.fits else self.q

    def _read(self, integers: Any, suffix: str, dtype: str) -> None:
        self.node.replace_input_with(0, self._constant(f"{self.q.name}{suffix}", integers, dtype))

    def _zero_point(self, values: Any, suffix: str, dtype: str) -> None:
        self.node.replace_input_with(2, self._constant(f"{self.node.name}{suffix}", values, dtype))

    def _constant(self, name: str, array: Any, dtype: str) -> Any:
        """Return the graph's constant of that name. Add it if it does not exist."""
        import onnx_ir

        found = self.ir.graph.initializers
        if name not in found:
            kind = onnx_ir.DataType[dtype]
            tensor = onnx_ir.tensor(array.astype(kind.numpy()), dtype=kind, name=name)
            value = onnx_ir.Value(
                name=name, const_value=tensor, type=onnx_ir.TensorType(kind), shape=tensor.shape
            )
            self.ir.graph.register_initializer(value)
        return found[name]

    def _before(self, op: str, *inputs: Any, to: str | None = None) -> Any:
        """Insert an operator before the DequantizeLinear; return its output."""
        import onnx_ir

        made = onnx_ir.node(op, list(inputs), {} if to is None else {"to": onnx_ir.DataType[to]})
        self.ir.graph.insert_before(self.node, [made])
        return made.outputs[0]


def _readers(value: Any) -> Iterator[Any]:
    """Yield the nodes that compute with a value, directly or after a transposition."""
    for use in value.uses():
        if use.node.op_type == "Transpose":
            yield from _readers(use.node.outputs[0])
        else:
            yield use.node


def _is_dequantized(value: Any) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"

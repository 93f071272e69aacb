"""Two integers of four bits in a byte."""

import pytest
import torch

from tfmq_fx.base.onednn import pack_int4, unpack_int4


@pytest.mark.parametrize(("columns", "shape"), [(8, (4, 8)), (9, (5, 9)), (27, (6, 3, 3, 3))])
def test_packing_keeps_every_integer(columns, shape):
    q = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(columns))
    zero_point = torch.arange(shape[0], dtype=torch.int8)
    packed = pack_int4(q)
    assert (packed.dtype, packed.shape) == (torch.uint8, (shape[0], -(-columns // 2)))
    expected = q - zero_point.view(-1, *[1] * (len(shape) - 1))
    assert torch.equal(unpack_int4(packed, zero_point, list(shape)), expected.to(torch.int8))

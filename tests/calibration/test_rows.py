"""Rows appended to files."""

import pytest
import torch

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.rows import Sink


def test_rows_of_different_sizes_are_refused(tmp_path):
    sink = Sink(tmp_path, 1e9, even={"sample"})
    sink.append({"sample": torch.zeros(2, 4, 8, 8)})
    with pytest.raises(TFMQError, match=r"'sample' has rows of torch.float32 \(4, 12, 12\) after rows of"):
        sink.append({"sample": torch.zeros(2, 4, 12, 12)})
    with pytest.raises(TFMQError, match="some calls of the network have 'label' and some do not"):
        sink.append({"sample": torch.zeros(2, 4, 8, 8), "label": torch.zeros(2)})

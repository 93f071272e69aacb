"""A feature's value at each value of its key."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.networks.small import TIMESTEPS, Labelled, TinyUNet, labelled_data, make, sinusoid
from tests.helpers.maintenance import prepared
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.maintenance.tables import feature_tables


def test_the_tables_are_the_float_blocks_values():
    network, tables = make(TinyUNet), feature_tables(prepared())
    with torch.no_grad():
        emb = F.silu(network.time_mlp(sinusoid(TIMESTEPS, 16)))
        expected = [network.down_block.emb(emb), network.up_block.emb(emb)]
    for table, value in zip(tables.values(), expected, strict=True):
        torch.testing.assert_close(table, value)


def test_past_max_table_entries_a_feature_has_no_table():
    gm = prepared(Labelled, maintain="cache", max_table_entries=49)
    with pytest.raises(
        TFMQError, match="10 x 5 values of timestep, class_labels exceed max_table_entries=49"
    ):
        maintain(gm, labelled_data())

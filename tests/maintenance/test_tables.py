"""A feature's value at each value of its key."""

import torch
from torch.nn import functional as F

from benchmarks.networks.small import TIMESTEPS, Labelled, TinyUNet, labelled_data, make, sinusoid
from tests.helpers.maintenance import prepared
from tfmq_fx.maintenance.stage import maintain
from tfmq_fx.maintenance.tables import feature_tables
from tfmq_fx.passes.quantize.state import state_of


def test_the_tables_are_the_float_blocks_values():
    network, tables = make(TinyUNet), feature_tables(prepared())
    with torch.no_grad():
        emb = F.silu(network.time_mlp(sinusoid(TIMESTEPS, 16)))
        expected = [network.down_block.emb(emb), network.up_block.emb(emb)]
    for table, value in zip(tables.values(), expected, strict=True):
        torch.testing.assert_close(table, value)


def test_past_max_table_entries_a_feature_has_no_table_but_one_for_each_request():
    gm = maintain(prepared(Labelled, maintain="cache", max_table_entries=49), labelled_data())
    for row in state_of(gm).maintenance.features:
        assert row.chosen == "request"
        assert row.why == "10 x 5 values of timestep, class_labels exceed max_table_entries=49"
    assert state_of(gm).features == ()

import functools
import logging
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import tfmq_fx
from benchmarks.networks.small import ScalarTime, TinyUNet, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.capturing.calibrated import capture_rows
from tfmq_fx.graph.nodes import op_name
from tfmq_fx.graph.written import writing_nodes

X, T = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_graph_equals_the_network_at_any_batch_size(batch):
    network = make(TinyUNet)
    gm = tfmq_fx.capture(network, {"sample": X, "timestep": T})
    x, t = torch.randn(batch, 1, 8, 8), torch.randint(0, 1000, (batch,))
    with torch.no_grad():
        assert torch.equal(gm(x, t), network(x, t))
    assert {id(p) for p in gm.parameters()} <= {id(p) for p in network.parameters()}  # shared, not copied


def test_a_batch_of_one_and_a_scalar_timestep_are_fine():
    network = make(ScalarTime)
    gm = tfmq_fx.capture(network, {"sample": torch.randn(1, 4), "timestep": torch.tensor(7)})
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(gm(x, torch.tensor(400)), network(x, torch.tensor(400)))


class Masked(nn.Module):
    """A mask is repeated for each head, as diffusers' attention does; and tokens along the last dimension."""

    def __init__(self):
        super().__init__()
        self.time, self.out = nn.Linear(1, 4), nn.Linear(8, 4)

    def forward(self, sample, timestep, mask):
        heads = mask.repeat_interleave(2, dim=0).view(sample.shape[0], 2, -1).mean(1)
        x = torch.repeat_interleave(
            sample + self.time(timestep[:, None].float()), 2, -1
        ) + heads.repeat_interleave(2, 1)
        return self.out(x)


def test_what_is_repeated_has_any_batch():
    """torch 2.11 makes a constant of the size that repeat_interleave repeats."""
    network = make(Masked)
    gm = tfmq_fx.capture(network, {"sample": torch.randn(2, 4), "timestep": T, "mask": torch.randn(2, 4)})
    x, t, mask = torch.randn(5, 4), torch.arange(5), torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(gm(x, t, mask), network(x, t, mask))
    assert "repeat_interleave" not in {op_name(n) for n in gm.graph.nodes}


def test_dropout_is_gone():
    gm = tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": T})
    assert "dropout" not in {op_name(n) for n in gm.graph.nodes}


def test_train_mode_is_refused():
    network = make(TinyUNet)
    network.down_block.dropout.train()
    with pytest.raises(TFMQError, match=r"down_block\.dropout is in train mode"):
        tfmq_fx.capture(network, {"sample": X, "timestep": T})


@pytest.mark.parametrize(
    ("network", "example", "words"),
    [
        (
            make(TinyUNet),
            (X, T),
            "example_inputs: expected Mapping, found tuple; give forward's arguments by name",
        ),
        (TinyUNet, {"sample": X, "timestep": T}, "network: expected Module, found the class TinyUNet"),
    ],
)
def test_wrong_objects_are_refused(network, example, words):
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.capture(network, example)


def test_a_python_int_timestep_is_refused():
    with pytest.raises(TFMQError, match=r"a Python int \(5\) would be baked"):
        tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": 5})


def test_an_unknown_timestep_name_shows_the_nearest():
    with pytest.raises(TFMQError, match="'timesteps': not among the example inputs timestep, sample"):
        tfmq_fx.capture(make(TinyUNet), {"sample": X, "timestep": T}, timestep="timesteps")


def test_nan_in_the_weights_is_refused():
    network = make(TinyUNet)
    with torch.no_grad():
        network.down.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(TFMQError, match=r"weight down\.weight: holds NaN"):
        tfmq_fx.capture(network, {"sample": X, "timestep": T})


class Causal(nn.Module):
    """Its mask is a buffer of 0 and -inf."""

    def __init__(self):
        super().__init__()
        self.time, self.i, self.o = nn.Linear(1, 8), nn.Linear(4, 24), nn.Linear(8, 4)
        self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))

    def forward(self, sample, timestep):
        q, k, v = self.i(sample).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.o(y + self.time(timestep.reshape(-1, 1).float() / 1000)[:, None])


def test_an_infinite_mask_is_no_weight():
    network, x = make(Causal), torch.randn(16, 6, 4)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": torch.arange(0, 800, 100).repeat(2)})
    recipe = tfmq_fx.Recipe(weight_bits=8, reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    q = tfmq_fx.quantize(network, recipe, calibration=data)
    with torch.no_grad():
        expected = network(x, data.tensors["timestep"])
        found = q(x, data.tensors["timestep"])
    # three layers of 8 bits
    assert (found - expected).abs().max() < 3 / 64 * expected.abs().max()
    with torch.no_grad():
        network.o.weight[0, 0] = -torch.inf
    with pytest.raises(TFMQError, match=r"weight o\.weight: holds NaN or infinite"):
        tfmq_fx.capture(network, {"sample": x[:2], "timestep": T})


def test_data_dependent_control_flow_is_refused_with_exports_words():
    class Branches(nn.Module):
        def forward(self, sample, timestep):
            return sample * 2 if sample.sum() > 0 else sample + timestep

    with pytest.raises(TFMQError, match=r"torch\.export cannot capture Branches: .*[Dd]ata-dependent"):
        tfmq_fx.capture(Branches().eval(), {"sample": torch.randn(2), "timestep": T})


class Counts(nn.Module):
    """Turns its batch into a number, and may divide by it."""

    mean = False

    def forward(self, sample, timestep):
        rows = int(sample.shape[0])
        sizes = [tuple(x.shape) for x in [sample[0]] * rows]
        parts = [x.reshape(size) * 2 for x, size in zip(sample, sizes, strict=True)]
        return torch.stack(parts) * timestep[:, None] / (rows if self.mean else 1)


def test_a_batch_turned_into_a_number_is_that_of_one_row():
    gm = tfmq_fx.capture(Counts().eval(), {"sample": torch.randn(2, 3), "timestep": T})
    x, t = torch.randn(5, 3), torch.arange(5)
    assert torch.equal(gm(x, t), Counts()(x, t))


class Mixes(Counts):
    """Compares its rows with each other, a little."""

    def forward(self, sample, timestep):
        return super().forward(sample + 0.01 * (sample - sample.mean(0)), timestep)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_network_that_counts_and_mixes_its_rows_is_refused(rows):
    example = {"sample": torch.randn(rows, 3), "timestep": torch.arange(1.0, rows + 1)}
    with pytest.raises(TFMQError, match="fixed the batch of 'sample' at 2: Mixes"):
        tfmq_fx.capture(Mixes().eval(), example)


class InPieces(nn.Module):
    """Computes the frames of all rows in pieces of four, to save memory. Each row has three."""

    def forward(self, sample, timestep):
        pieces = [torch.tanh(x) for x in sample.flatten(0, 1).split(4)]
        return torch.cat(pieces).unflatten(0, (sample.shape[0], -1)) * timestep[:, None, None]


def test_rows_that_are_computed_in_pieces_are_captured_for_any_number_of_pieces():
    gm = tfmq_fx.capture(InPieces().eval(), {"sample": torch.randn(2, 3, 5), "timestep": T})
    for rows in (1, 2, 7):
        x, t = torch.randn(rows, 3, 5), torch.arange(1.0, rows + 1)
        assert torch.equal(gm(x, t), InPieces()(x, t))


def test_rows_that_are_mixed_in_pieces_are_refused():
    class Mixes(InPieces):
        def forward(self, sample, timestep):
            return super().forward(sample - sample.mean(0), timestep)

    with pytest.raises(TFMQError, match="fixed the number of pieces of 'split': Mixes splits its rows"):
        tfmq_fx.capture(Mixes().eval(), {"sample": torch.randn(2, 3, 5), "timestep": T})


def test_a_network_that_computes_with_its_batch_as_a_number_is_refused():
    divides = Counts().eval()
    divides.mean = True
    with pytest.raises(
        TFMQError, match="fixed the batch of 'sample' at 2: Counts turns it into a Python number"
    ):
        tfmq_fx.capture(divides, {"sample": torch.randn(2, 3), "timestep": T})


def test_the_length_of_a_tensor_moves_with_its_batch():
    class Counts(nn.Module):
        def forward(self, sample, timestep):
            return sample.reshape(len(sample), -1) * timestep[:, None]

    network, x = Counts().eval(), torch.randn(5, 3)
    gm = tfmq_fx.capture(network, {"sample": x[:2], "timestep": T})
    assert torch.equal(gm(x, torch.arange(5.0)), network(x, torch.arange(5.0)))
    assert "len" not in globals()  # as before the capture


def test_the_line_of_the_control_flow_is_shown():
    class Branches(nn.Module):
        def forward(self, sample, timestep):
            if sample.sum() > 0:  # the line
                return sample * 2
            return sample + timestep

    with pytest.raises(TFMQError, match=r"test_network\.py:\d+ in forward: if sample\.sum\(\) > 0:"):
        tfmq_fx.capture(Branches().eval(), {"sample": torch.randn(2), "timestep": T}, "timestep")


def test_the_remedy_fits_the_cause_and_torchs_long_text_is_logged(caplog, capsys):
    class ThroughNumpy(nn.Module):
        def forward(self, sample, timestep):
            return sample + torch.from_numpy(np.sin(timestep.numpy()))[:, None]

    class Reads(nn.Module):
        def forward(self, sample, timestep, needed):
            return sample + timestep[:, None] + needed

    class Branches(nn.Module):
        def forward(self, sample, timestep):
            return sample * 2 if sample.sum() > 0 else sample + timestep[:, None]

    example = {"sample": torch.randn(2, 3), "timestep": T}
    with caplog.at_level(logging.INFO, "tfmq_fx"):
        with pytest.raises(TFMQError, match=r"numpy\(\).*Change that part of the network, or hand") as numpy:
            tfmq_fx.capture(ThroughNumpy().eval(), example)
        with pytest.raises(TFMQError, match=r"^Reads cannot run on the example inputs: .*'needed'.*Give it"):
            tfmq_fx.capture(Reads().eval(), example)
        with pytest.raises(TFMQError, match="Remove the data-dependent control flow") as branches:
            tfmq_fx.capture(Branches().eval(), example)
    for error in (numpy.value, branches.value):
        assert "data-dependent" not in str(error) or error is branches.value
        assert len(str(error).splitlines()) == 1
        assert error.__cause__ is None
        assert error.__suppress_context__
    assert "def forward" in caplog.text  # the graph, which torch prints
    assert "def forward" not in capsys.readouterr().err


class Numbered(nn.Module):
    """It turns its sizes into numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample, timestep):
        width, height = int(sample.shape[3]), float(sample.shape[2])
        part = self.conv(sample)[..., : int(width / 2)] * (isinstance(width, int) + height)
        return part + torch.as_tensor(width) * timestep[:, None, None, None]


def test_sizes_that_a_network_turns_into_numbers_stay_open():
    network = make(Numbered)
    gm = tfmq_fx.capture(network, {"sample": torch.randn(2, 1, 8, 6), "timestep": torch.tensor([1, 2])})
    x, t = torch.randn(3, 1, 4, 10), torch.tensor([3, 4, 5])
    with torch.no_grad():
        assert torch.equal(gm(x, t), network(x, t))


def test_threads_capture_in_turn():
    networks = [make(ScalarTime) for _ in range(4)]
    before = dict(vars(torch.SymInt))
    found: dict[int, torch.fx.GraphModule] = {}

    def run(i):
        example = {"sample": torch.randn(2, 4), "timestep": torch.tensor(7)}
        found[i] = tfmq_fx.capture(networks[i], example)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Only now: while a thread captures, torch.export turns oneDNN off for the whole process, and its GELU rounds
    # differently from the other one.
    with torch.no_grad():
        for i, network in enumerate(networks):
            x, t = torch.randn(3, 4), torch.tensor(i)
            assert torch.equal(found[i](x, t), network(x, t))
    assert dict(vars(torch.SymInt)) == before


class Labels(nn.Module):
    """It reads what only **kwargs takes."""

    def __init__(self):
        super().__init__()
        self.time, self.label, self.out = nn.Linear(1, 4), nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep, **kwargs):
        emb = self.time(timestep[:, None].float() / 1000) + self.label(kwargs["y"])
        return self.out((sample + emb).relu())


class Passes(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Guides(Passes):
    """It looks like a wrapper, but computes."""

    def forward(self, *args, **kwargs):
        return 2 * self.module(*args, **kwargs)


class Unnamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Labels()

    def forward(self, sample, /, timestep, *rest):
        return self.inner(sample, timestep, y=rest[0])


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda m: m, ""),
        (Passes, ""),
        (nn.DataParallel, ""),
        (nn.parallel.DistributedDataParallel, ""),
        (torch.optim.swa_utils.AveragedModel, ""),
        (Guides, "module."),
    ],
)
def test_any_signature_and_wrapper_is_captured(wrap, prefix):
    network = wrap(make(Labels)).eval()
    y = torch.tensor([3, 9])
    gm = tfmq_fx.capture(network, {"sample": torch.randn(2, 4), "timestep": T, "y": y})
    x, t, y = torch.randn(5, 4), torch.arange(5), torch.arange(5)
    with torch.no_grad():
        assert torch.equal(gm(sample=x, timestep=t, y=y), network(x, timestep=t, y=y))
    assert f"{prefix}out.weight" in dict(gm.named_parameters())


def test_arguments_without_a_name_are_inputs_by_number():
    network = make(Unnamed)
    example = {"sample": torch.randn(2, 4), "timestep": T, "rest": [torch.tensor([3, 9])]}
    gm = tfmq_fx.capture(network, example)
    x, t, y = torch.randn(5, 4), torch.arange(5), torch.arange(5)
    with torch.no_grad():
        assert torch.equal(gm(sample=x, timestep=t, rest_0=y), network(x, t, y))


def test_a_quantized_network_is_called_like_the_one_with_unnamed_arguments():
    network, x = make(Unnamed), torch.randn(8, 4)
    t, y = torch.arange(0, 800, 100), torch.arange(8)
    data = tfmq_fx.CalibrationSet.from_tensors({"sample": x, "timestep": t, "rest": [y]})
    nearest = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    q = tfmq_fx.quantize(network, nearest, calibration=data)
    with torch.no_grad():
        float_output = network(x, t, y)
        assert torch.equal(q(x, t, y), q(sample=x, timestep=t, rest=[y]))
        # 4-bit weights, first and last layer 8: 5% of the largest output is far above their rounding
        assert (q(x, t, y) - float_output).abs().max() < 0.05 * float_output.abs().max()


class OneGuidance(nn.Module):
    """A list as long as the number of timesteps becomes a tensor, as in Chroma: that number is a constant in any export."""

    def __init__(self):
        super().__init__()
        self.time, self.table, self.out = nn.Linear(1, 4), nn.Embedding(2, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        emb = self.time(timestep[:, None] / 1000) + self.table(torch.tensor([0] * timestep.shape[0]))
        return self.out(sample + emb)


class OneGuidanceForAll(OneGuidance):
    """Its rows are not by themselves, either."""

    def forward(self, sample, timestep):
        return super().forward(sample - sample.median(), timestep)


class BatchOfTimesteps(OneGuidance):
    """The sample's batch is read from the timesteps, so that one timestep for all rows would be another function."""

    def forward(self, sample, timestep):
        emb = self.table(torch.tensor([0] * timestep.shape[0])) + self.time(timestep[:, None] / 1000)
        return self.out(sample.reshape(timestep.shape[0], -1, 4) - sample.median() + emb[:, None])


class OneTimestepAlone(OneGuidance):
    """It takes a single timestep, (1,), and fails for any other shape."""

    def forward(self, sample, timestep):
        if timestep.shape != (1,):
            raise ValueError("one timestep, please")
        return super().forward(sample, timestep)


def test_a_network_that_fails_for_a_timestep_of_each_row_is_refused_in_one_line():
    example = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7.0, 9.0])}
    with pytest.raises(TFMQError, match="one timestep, please"):
        capture_rows(make(OneTimestepAlone), example, "timestep")


def test_a_network_that_counts_its_timesteps_is_captured_with_one_for_each_row():
    network, t = make(OneGuidance), torch.tensor([7.0, 9.0])
    gm, _ = capture_rows(network, {"sample": torch.randn(2, 4), "timestep": t}, "timestep")
    x, t = torch.randn(5, 4), torch.rand(5)
    with torch.no_grad():
        torch.testing.assert_close(gm(x, t), network(x, t))


def test_a_network_that_counts_its_timesteps_and_mixes_rows_is_captured_with_one_for_all_rows():
    network = make(OneGuidanceForAll)
    gm, _ = capture_rows(
        network, {"sample": torch.randn(2, 4), "timestep": torch.tensor([7.0, 9.0])}, "timestep"
    )
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(gm(x, torch.tensor(400.0)), network(x, torch.full((5,), 400.0)))


def test_a_network_whose_batch_is_that_of_its_timesteps_is_refused_as_before():
    example = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7.0, 9.0])}
    with pytest.raises(TFMQError, match="fixed the batch of 'sample' at 2"):
        capture_rows(make(BatchOfTimesteps), example, "timestep")


class OnSizes(nn.Module):
    """Scaled by numpy's square root of a ratio in which the batch cancels, and of the batch."""

    def forward(self, sample, timestep):
        x = sample * np.sqrt(sample[:, 0].numel() / sample.numel()) + timestep[:, None]
        return x / np.sqrt(sample.shape[0])


def test_numpy_functions_of_sizes_are_captured():
    gm = tfmq_fx.capture(OnSizes().eval(), {"sample": torch.randn(2, 4), "timestep": torch.tensor([1, 2])})
    assert 0.5 in [n.args[1] for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    for rows in (1, 5):
        x, t = torch.randn(rows, 4), torch.arange(rows)
        assert torch.equal(gm(x, t), OnSizes()(x, t))
    assert not hasattr(torch.SymInt, "sqrt")


class InPlace(nn.Module):
    """Adds to a value that other layers read, fills a part of one of zeros, and the diagonal in a part of another."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.time = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(1, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, sample, timestep):
        h = self.first(sample) + self.time(timestep[:, None] / 1000)
        part = torch.zeros_like(h)
        part[:, 2:5] = h[:, :3].double()
        mask = torch.full((8, 8), 0.5)
        mask[1:7, 2:7].fill_diagonal_(2.0)
        for layer in self.layers:
            h += torch.relu_(layer(h))
        return self.last(h + part @ mask)


def test_the_graph_of_a_network_that_writes_in_place_does_not():
    network, given = make(InPlace), {"sample": torch.randn(2, 4), "timestep": torch.tensor([3.0, 500])}
    gm = tfmq_fx.capture(network, given)
    assert not writing_nodes(gm)
    x, t = torch.randn(5, 4), torch.arange(5.0)
    with torch.no_grad():
        assert torch.equal(gm(x, t), network(x.clone(), t))
    gm(x, t).sum().backward()  # for what is learned
    assert network.first.weight.grad is not None


@functools.lru_cache(maxsize=8)
def frequencies(size):
    return torch.exp(torch.arange(size) * -1.0)


class Remembers(nn.Module):
    """Caches what it computes of sizes, by functions that Python's own functools remember."""

    def __init__(self):
        super().__init__()
        self.time, self.last = nn.Linear(4, 8), nn.Linear(8, 8)
        self.table = torch.randn(16, 8)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def rows(self, count):
        return self.table[:count] * 2

    def forward(self, sample, timestep):
        emb = self.time(torch.sin(timestep[:, None] * frequencies(4)))[:, None]
        return self.last(sample + emb + self.rows(sample.shape[1]))


def test_what_a_network_remembers_of_a_trace_is_not_given_to_its_next_call():
    network, given = make(Remembers), {"sample": torch.randn(2, 6, 8), "timestep": torch.tensor([3.0, 500])}
    gm = tfmq_fx.capture(network, given)
    with torch.no_grad():
        found = network(**given)  # for the first time
        assert torch.equal(gm(*given.values()), found)
    assert frequencies.cache_info().currsize == 1
    assert type(frequencies(4)) is torch.Tensor

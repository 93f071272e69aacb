"""Networks that read the lengths of padded rows from masks, as numbers: captured without the padding, quantized, saved, lowered."""

import copy

import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import make
from tests.helpers.lowered import lower
from tests.helpers.nearest import recipe
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.masked_rows import MaskedRows, lengths_of
from tfmq_fx.calibration.padding import cut_by_masks, without_padding
from tfmq_fx.graph.nodes import op_name


class Joined(nn.Module):
    """Cuts each prompt to its length, joins its tokens with the picture's in a loop, and picks names by their mask."""

    leak = 0.0  # of the padding

    def __init__(self):
        super().__init__()
        self.pixels, self.words, self.names = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(4, 8)
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 8))
        self.q, self.k, self.v, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, timestep, words, mask, names, names_mask):
        lengths = mask.sum(dim=1).tolist()
        time = self.time((timestep[:, None] / 1000).to(x.dtype))
        h, pixels = self.pixels(x) + time[:, None], x.shape[1]
        words = self.words(words)
        joined, there = (
            h.new_zeros(len(x), max(lengths) + pixels, 8),
            h.new_zeros(len(x), max(lengths) + pixels),
        )
        for i, length in enumerate(lengths):
            joined[i, :length] = words[i, :length] * torch.arange(1, length + 1)[:, None]
            joined[i, length : length + pixels] = h[i]
            there[i, : length + pixels] = 1
        one = len(set(lengths)) == 1
        weights = self.q(joined) @ self.k(joined).mT
        weights = weights if one else weights.masked_fill(there[:, None] == 0, float("-inf"))
        h = weights.softmax(-1) @ self.v(joined)
        named = [self.names(n)[m.bool()].sum(0) for n, m in zip(names, names_mask, strict=True)]
        h = torch.stack([h[i, n : n + pixels] for i, n in enumerate(lengths)]) + torch.stack(named)[:, None]
        return self.last(torch.tanh(h + self.leak * words.mean(1, keepdim=True)))


def given(rows=24, lengths=(3, 7), named=(2, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = (torch.arange(9) < torch.tensor(lengths).repeat(rows)[:rows, None]).long()
    return {
        "x": normal(rows, 10, 6), "timestep": torch.tensor([900, 600, 300]).repeat(rows)[:rows],
        "words": normal(rows, 9, 5), "mask": mask,
        "names": normal(rows, 4, 4), "names_mask": (torch.arange(4) < torch.tensor(named).repeat(rows)[:rows, None]).float(),
    }  # fmt: skip


def calibration():
    return tfmq_fx.CalibrationSet.from_tensors(given())


@pytest.fixture(scope="module")
def network():
    return make(Joined)


@pytest.fixture(scope="module")
def quantized(network):
    return tfmq_fx.quantize(network, recipe("w8a8"), calibration=calibration())


def off(a, b):
    return float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max())  # of the worst row


def test_each_mask_marks_the_tokens_that_do_not_count_without_it(network):
    cut = without_padding(network, calibration())
    assert dict(cut.row_lists.masks) == {"mask": ("int64", ("words",)), "names_mask": ("float32", ("names",))}
    assert set(cut.tensors) == {"x", "timestep", "words", "names"}
    assert [x.shape for x in cut.arguments(slice(0, 2))["words"]] == [(3, 5), (7, 5)]
    with torch.no_grad():
        expected = network(**given())[:4]
        torch.testing.assert_close(cut.row_wise(network)(**cut.arguments(slice(0, 4))), expected)


@pytest.mark.parametrize(
    ("lengths", "named"), [((3, 7), (2, 4)), ((9, 1, 3, 2), (4, 1, 3)), ((5,), (3,)), ((3, 7), (0, 4))]
)
def test_rows_of_all_lengths_are_computed_as_in_the_float_network(network, quantized, lengths, named):
    call = given(8, lengths, named, seed=1)
    with torch.no_grad():
        found, expected = quantized(**call), network(**call)
    assert off(found, expected) < 0.05  # 8 bits; a row of another's tokens is further off than 0.5
    assert off(found, expected.roll(1, 0)) > 0.3
    alone = quantized(**{n: x[2:3] for n, x in call.items()})
    torch.testing.assert_close(alone[0], found[2], rtol=1e-4, atol=1e-5)


def test_it_is_saved_loaded_and_lowered(quantized, tmp_path):
    call = given(6, (3, 7, 8))
    expected = quantized(**call)
    quantized.save_pretrained(tmp_path)
    loaded = tfmq_fx.load(tmp_path)
    assert torch.equal(loaded(**call), expected)
    assert (
        off(lower(loaded, engine="torch", compile=False)(**call), expected) < 0.03
    )  # bfloat16 between the integers


def test_without_masks_all_tokens_are_there(quantized):
    call = given(2, (9,), (4,))
    without = {n: x for n, x in call.items() if "mask" not in n}
    assert torch.equal(quantized(**without), quantized(**call))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0, 0]] * 2), "'mask' must have ones for the first tokens of a row"),
        (torch.full((2, 9), 2), "'mask' must have ones for the first tokens of a row"),
        (torch.ones(2, 8), r"'mask' is \(2, 8\), but must be a mask of shape \(2, 9\)"),
        ([1, 1], "'mask' is list, but must be a mask"),
    ],
)  # fmt: skip
def test_other_masks_are_refused(quantized, mask, words):
    with pytest.raises(TFMQError, match=words):
        quantized(**{**given(2), "mask": mask})


@pytest.mark.slow
def test_a_network_that_reads_its_padding_is_refused_as_before(network):
    leaks = copy.deepcopy(network)
    leaks.leak = 0.1
    assert set(without_padding(leaks, calibration()).row_lists.masks) == {"names_mask"}
    with pytest.raises(TFMQError, match="cannot capture Joined"):
        tfmq_fx.quantize(leaks, recipe("w8a8"), calibration=calibration())


def test_masks_with_holes_are_no_lengths(network):
    assert lengths_of(torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [2, 0]
    assert lengths_of(torch.tensor([[True, False, True]])) is None
    assert lengths_of(torch.tensor([[1.0, 0.5, 0.0]])) is None
    holes = given()
    holes["mask"][0, 0] = 0
    found = without_padding(network, tfmq_fx.CalibrationSet.from_tensors(holes))
    assert set(found.row_lists.masks) == {"names_mask"}


class Pictured(Joined):
    """Looks at a picture beside the others only if there is one: which a pipeline without pictures says by zeros."""

    def __init__(self):
        super().__init__()
        self.see = nn.Linear(6, 8)

    def forward(self, x, timestep, words, mask, names, names_mask, picture=None):
        if torch.all(picture == 0):
            picture, x = picture * 0, x + 1
        seen = self.see(picture).mean(1, keepdim=True)
        return super().forward(x, timestep, words, mask, names, names_mask) + seen


@pytest.mark.slow
def test_what_is_zero_everywhere_is_fixed_and_no_names_at_all_are_taken():
    network, call = make(Pictured), {**given(named=(0,)), "picture": torch.zeros(24, 3, 6)}
    q = tfmq_fx.quantize(network, recipe("w8a8"), calibration=tfmq_fx.CalibrationSet.from_tensors(call))
    call = {**given(6, (2, 7, 5), (0,), seed=1), "picture": torch.zeros(6, 3, 6)}
    with torch.no_grad():
        assert off(q(**call), network(**call)) < 0.08  # 8 bits
    assert torch.equal(q(**{**call, "picture": None}), q(**call))
    with pytest.raises(TFMQError, match="'picture' was 0 everywhere when the network was captured"):
        q(**{**call, "picture": torch.ones(6, 3, 6)})
    with pytest.raises(TFMQError, match=r"'names' has shape \(1, 2, 4\), captured with \(N, 0, 4\)"):
        q(**{**call, "names_mask": given(6, named=(2, 0))["names_mask"]})


class Asks(nn.Module):
    """Asks whether there is a picture, by its values."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.time = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(1, 8)
        self.picture, self.none = nn.Linear(5, 8), nn.Linear(6, 8)

    def forward(self, x, timestep, picture):  # (N, T, 6), (N,), (N, M, 5)
        h = self.first(x) + self.time(timestep[:, None] / 1000)[:, None]
        if torch.all(picture == 0):
            return self.last(h + self.none(x))
        return self.last(h + self.picture(picture).mean(1, keepdim=True))


def test_a_network_that_asks_whether_there_is_a_picture_is_captured_with_one(tmp_path):
    network = Asks().eval()
    given = {
        "x": torch.randn(24, 3, 6),
        "timestep": torch.tensor([900.0, 600, 300]).repeat(8),
        "picture": torch.randn(24, 4, 5),
    }
    given["picture"][5] = 0  # one without, beside others with
    data = tfmq_fx.CalibrationSet.from_tensors(given)
    nearest = tfmq_fx.Recipe(weight_bits=8, reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    q = tfmq_fx.quantize(network, nearest, calibration=data)
    assert q.interface.nonzero == ("picture",)
    q.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = network(**given)
    for model in (q, tfmq_fx.load(tmp_path)):
        assert (model(**given) - expected).norm() < 0.02 * expected.norm()
        with pytest.raises(
            TFMQError, match=r"'picture' is 0 everywhere, and was not when the network was captured"
        ):
            model(given["x"][:2], given["timestep"][:2], torch.zeros(2, 4, 5))
    gm = tfmq_fx.capture(network, data.arguments(slice(0, 2)))
    assert not [n for n in gm.graph.nodes if op_name(n) in ("eq", "all", "item")]


def test_its_temporal_block_is_precomputed(network):
    example = given(2)
    tables = tfmq_fx.precompute(network, example=example, timesteps=[900, 600, 300])
    assert [f["chosen"] for f in tables.report["maintenance"]["features"]] == ["table"]
    for lengths in ((3, 7), (9, 1)):
        call = given(6, lengths, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(tables(**call), network(**call), rtol=1e-4, atol=1e-5)


def test_a_precomputed_one_is_quantized_on_rows_without_padding(network, quantized):
    tables = tfmq_fx.precompute(network, example=given(2), timesteps=[900, 600, 300])
    again = tfmq_fx.quantize(tables, recipe("w8a8"), calibration=calibration())
    call = given(8, seed=1)
    assert off(again(**call), quantized(**call)) < 0.02  # ties of the rounding; of padded rows it is 0.06
    holes = given()
    holes["mask"][0, 0] = 0
    with pytest.raises(TFMQError, match="calibration: 'mask' must have ones for the first tokens of a row"):
        tfmq_fx.quantize(tables, recipe("w8a8"), calibration=tfmq_fx.CalibrationSet.from_tensors(holes))


def test_what_was_zero_at_capture_is_zero_in_calibration_data():
    lists = MaskedRows(
        ("words",), (), masks={"mask": ("float32", ("words",))}, zeros={"picture": ("float32", (3, 6))}
    )
    call = {**given(), "picture": torch.zeros(24, 3, 6)}
    cut = cut_by_masks(tfmq_fx.CalibrationSet.from_tensors(call), lists)
    assert not {"mask", "picture"} & cut.tensors.keys()
    call["picture"][23, 2, 5] = 1
    with pytest.raises(
        TFMQError, match="calibration: 'picture' was 0 everywhere when the network was captured"
    ):
        cut_by_masks(tfmq_fx.CalibrationSet.from_tensors(call), lists)

"""What is kept of the float network answers as it did; what would change it, or needs its weights, is refused."""

import copy
import io
import json
import pickle

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

import tfmq_fx
from benchmarks.networks.pipelines import unet_text
from benchmarks.networks.small import TinyUNet, make
from tests.helpers.lowered import lower
from tfmq_fx.artefact.float_network import MOST_VALUES, facts_of
from tfmq_fx.base.errors import TFMQError

NEAREST = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
X, TEXT = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 16)


@pytest.fixture(scope="module")
def network():
    return unet_text()


@pytest.fixture(scope="module", params=["quantized", "loaded", "lowered"])
def q(request, made):
    return made[request.param]


@pytest.fixture(scope="module")
def made(network, tmp_path_factory):
    data = {"sample": X, "timestep": torch.tensor([500, 1]), "encoder_hidden_states": TEXT}
    data = tfmq_fx.CalibrationSet.from_tensors(data)
    model = tfmq_fx.quantize(network, NEAREST, calibration=data)
    folder = tmp_path_factory.mktemp("q") / "q"
    model.save_pretrained(folder)
    lowered = lower(model, engine="torch", compile=False, batch=2)
    return {"quantized": model, "loaded": tfmq_fx.load(folder), "lowered": lowered}


def test_it_is_an_instance_of_both_classes_and_has_the_name_of_its_own(q, network):
    assert isinstance(q, type(network))
    assert isinstance(q, diffusers.ModelMixin)
    assert isinstance(q, type(q))
    assert not isinstance(q, diffusers.UNet2DModel)
    assert (q.__class__.__name__, q.__class__.__module__) == (type(q).__name__, type(q).__module__)
    assert type(q) in (tfmq_fx.QuantizedModel, tfmq_fx.LoweredModel)


def test_the_configuration_is_that_of_the_float_network(q, network):
    assert len(q.config) == len(network.config)
    assert set(q.config) == set(network.config)
    assert q.config.in_channels == q.config["in_channels"] == q.in_channels == 4
    with pytest.raises(AttributeError, match="'no_such_thing' is not one of them"):
        _ = q.no_such_thing
    assert not hasattr(q, "text_encoder_hid_proj")
    assert q.encoder_hid_proj is None


def test_modules_are_walked_as_those_of_the_float_network(q, network):
    assert list(q.attn_processors) == list(network.attn_processors)
    assert len(q.up_blocks) == len(network.up_blocks)
    assert [b.__class__ for b in q.up_blocks] == [type(b) for b in network.up_blocks]
    assert q.down_blocks[-1].attentions[0].__class__ is type(network.down_blocks[-1].attentions[0])
    assert [b.__class__ for b in q.up_blocks[::-1]] == [type(b) for b in network.up_blocks[::-1]]
    inner = [n for n, _ in network.mid_block.named_modules()]
    assert [n for n, _ in q.mid_block.named_modules()] == inner
    assert isinstance(q.mid_block.attentions[0].transformer_blocks[0].attn1.processor, AttnProcessor2_0)
    assert q.conv_in
    assert not q.is_gradient_checkpointing


def test_what_leaves_the_network_as_it_is_may_be_set(q):
    q.set_attn_processor(q.attn_processors)
    q.set_attn_processor(AttnProcessor2_0())
    q.disable_freeu()
    q.unload_lora()
    q.encoder_hid_proj = None
    q.mark = 3  # not of the float network
    assert q.mark == 3
    del q.mark


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.set_attn_processor(AttnProcessor()), r"attn1\.processor: a quantized network is fixed"),
        (lambda q: q.enable_freeu(1.1, 1.1, 0.9, 0.9), r"up_blocks\.0\.s1: a quantized network is fixed"),
        (lambda q: q.enable_gradient_checkpointing(), r"gradient_checkpointing_func: a quantized network is"),
        (lambda q: q.enable_layerwise_casting(torch.float8_e4m3fn), "a quantized network is fixed"),
        (lambda q: setattr(q, "conv_in", nn.Identity()), "conv_in: a quantized network is fixed"),
        (lambda q: setattr(q.conv_in, "stride", (2, 2)), r"conv_in\.stride: a quantized network is fixed"),
        (lambda q: delattr(q.conv_in, "stride"), r"conv_in\.stride: a quantized network is fixed"),
        (lambda q: q.conv_in(X), "conv_in: a quantized network has none of the float network's layers"),
        (lambda q: q.add_adapter(None), "a quantized network takes no adapters"),
    ],
)
def test_what_would_change_the_network_is_refused(q, change, words):
    with pytest.raises(TFMQError, match=words):
        change(q)


@pytest.mark.parametrize(
    "read",
    [
        lambda q: q.conv_in.weight,
        lambda q: q.mid_block.attentions[0].register_forward_hook(print),
        lambda q: list(q.conv_in.parameters()),
    ],
)
def test_weights_and_hooks_of_inner_layers_are_not_there(q, read):
    with pytest.raises(
        AttributeError, match="keeps only the plain attributes of the float network's modules"
    ):
        read(q)


def test_copies_and_pickles_compute_the_same(made):
    q, file = made["quantized"], io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    with torch.no_grad():
        expected = q(X, 500, TEXT).sample
        for copied in (
            copy.deepcopy(q),
            pickle.loads(pickle.dumps(q)),
            torch.load(file, weights_only=False),
        ):
            assert type(copied) is tfmq_fx.QuantizedModel
            assert isinstance(copied, diffusers.UNet2DConditionModel)
            assert torch.equal(copied(X, 500, TEXT).sample, expected)


def test_groups_of_its_tensors_may_be_offloaded(made):
    q = copy.deepcopy(made["quantized"])
    q.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1)
    with torch.no_grad():
        assert torch.equal(q(X, 500, TEXT).sample, made["quantized"](X, 500, TEXT).sample)
    assert q.get_memory_footprint() == made["quantized"].get_memory_footprint()


class Odd(TinyUNet):
    def __init__(self):
        super().__init__()
        self.sizes, self.limit, self.table = (1, 2), float("inf"), {1: 2}
        self.register_buffer("statistics", torch.linspace(0, 1, 4))
        self.register_buffer("large", torch.zeros(MOST_VALUES + 1))
        self.register_buffer("mask", torch.full((4,), -torch.inf))
        self.spare = nn.Linear(2, 2)
        self.spare.bias = None


def test_facts_are_what_json_holds_and_small_tensors_that_nothing_computes_with():
    found = facts_of(make(Odd), {"spare.weight"})
    own = json.loads(json.dumps(found, allow_nan=False))[""]
    assert own["sizes"] == [1, 2]
    assert own["statistics"]["dtype"] == "float32"
    assert not {"limit", "table", "large", "mask"} & own.keys()
    assert found["spare"] == {
        "__class__": "torch.nn.modules.linear.Linear", "in_features": 2, "out_features": 2, "bias": None,
    }  # fmt: skip


def test_a_network_of_the_users_own_has_no_class_to_stand_in_for(tiny):
    assert tiny.__class__ is tfmq_fx.QuantizedModel
    assert not isinstance(tiny, diffusers.ModelMixin)

"""Objects that a pipeline gives its network: a cache of keys and values, which is for calls with pictures alone (GLM-Image)."""

import dataclasses

import diffusers
import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import TinyUNet, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet

NEAREST = dataclasses.replace(
    tfmq_fx.Recipe.preset("w8a8"), reconstruction=tfmq_fx.Reconstruction(method="nearest")
)


class Cache:
    def __init__(self, shift=0.0):
        self.shift, self.layers = shift, [{"keys": []}]


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make(TinyUNet)

    def forward(self, sample, timestep, cache=None):
        keys = cache.layers[0]["keys"] if cache is not None else []
        shift = 0.0 if cache is None else cache.shift
        return self.inner(sample, timestep) + shift + sum(k.mean() for k in keys)


class Pipe(diffusers.DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size=1, num_inference_steps=3, generator=None, shift=0.0):
        cache, x = Cache(shift), torch.randn(batch_size, 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t.expand(batch_size), cache=cache), t, x).prev_sample
        return diffusers.ImagePipelineOutput(images=x)


def recorded(**more):
    pipe = Pipe(Cached().eval(), diffusers.DDIMScheduler(clip_sample=False))
    return pipe, CalibrationSet.record(pipe, num_samples=4, num_inference_steps=3, batch_size=2, **more)


@torch.no_grad()
def test_an_object_without_tensors_is_left_out_and_ignored(tmp_path):
    pipe, data = recorded()
    assert data.idle == ("cache",)
    q = tfmq_fx.quantize(pipe, NEAREST, calibration=data)
    assert any(n["reason"].startswith("cache: an object without tensors") for n in q.report["notes"])
    q.save_pretrained(tmp_path / "q")
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([0, 333])
    for network in (q, tfmq_fx.load(tmp_path / "q")):
        assert torch.equal(network(x, t, cache=Cache()), q(x, t))
        pipe.unet = network
        assert pipe(2).images.isfinite().all()


def test_one_that_holds_tensors_later_is_refused():
    pipe, data = recorded()
    q, full = tfmq_fx.quantize(pipe, NEAREST, calibration=data), Cache()
    full.layers[0]["keys"].append(torch.ones(3))
    with pytest.raises(TFMQError, match="'cache' holds tensors; it held none when the network was captured"):
        q(torch.ones(2, 1, 8, 8), torch.tensor([0, 333]), cache=full)


def test_one_that_the_network_computes_with_is_refused():
    with pytest.raises(TFMQError, match="cache"):
        tfmq_fx.quantize(*recorded(shift=1.0)[:1], NEAREST, calibration=recorded(shift=1.0)[1])

"""Find out, before anything is recorded, what a user has switched on in a float network that quantizing cannot take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._subclasses import FakeTensor

from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.base.arithmetic import NETWORK_DTYPES
from tfmq_fx.base.errors import TFMQError, require_type


def require_ready(network: nn.Module) -> None:
    """Raise TFMQError, with the call that mends it, unless this is a plain float network in eval mode.

    Refused are quantized networks, compiled networks, offload and cache hooks, adapters, sliced attention, train mode,
    weights that are quantized by others, and weights on several devices.
    """
    require_type(network, nn.Module, "network", "give an nn.Module with its weights")
    if isinstance(network, DropIn):
        if network.is_float:
            return
        raise TFMQError(
            "calibration: the pipeline's denoiser is already quantized; record with the float network."
        )
    for found in (_compiled, _hooked, _adapted, _sliced, _training, _quantized, _scattered):
        if (words := next(found(network), None)) is not None:
            raise TFMQError(words)


def _modules(network: nn.Module, wrong: Callable[[nn.Module], object]) -> Iterator[tuple[str, object]]:
    """Yield the names of modules, and what is wrong with them, for those where something is."""
    for name, module in network.named_modules():
        if value := wrong(module):
            yield name or "the network", value


def _compiled(network: nn.Module) -> Iterator[str]:
    if isinstance(network, OptimizedModule):
        yield "the network is compiled; give what it was compiled from, network._orig_mod, and compile the quantized one."
    for name, _ in _modules(
        network, lambda m: isinstance(m, OptimizedModule) or _own(m, "_compiled_call_impl")
    ):
        yield f"{name} is compiled; load the network again, quantize it, and compile the quantized one."


def _hooked(network: nn.Module) -> Iterator[str]:
    for name, hook in _modules(network, lambda m: _own(m, "_hf_hook")):
        yield f"{name} has an offload hook ({type(hook).__name__}); call pipe.remove_all_hooks(), then pipe.to(device), or give execution_device=."
    for name, registry in _modules(network, lambda m: _own(m, "_diffusers_hook")):
        names = list(getattr(registry, "hooks", {}))
        if names:
            yield (
                f"{name} has diffusers' hook {names[0]!r} (a cache, group offloading or layerwise casting); load the network "
                "again without it."
            )


def _adapted(network: nn.Module) -> Iterator[str]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None and any(isinstance(m, tuners.BaseTunerLayer) for m in network.modules()):
        # They would be rounded one by one.
        yield "the network has adapters (LoRA) beside its weights; call pipe.fuse_lora(), then pipe.unload_lora_weights()."


def _sliced(network: nn.Module) -> Iterator[str]:
    for name, size in _modules(network, lambda m: _own(_own(m, "processor"), "slice_size")):
        yield f"{name} computes attention in slices ({size}); call pipe.disable_attention_slicing()."


def _training(network: nn.Module) -> Iterator[str]:
    fused = {name for name, _ in _modules(network, lambda m: _own(m, "fused_projections"))}
    for name, _ in _modules(network, lambda m: m.training):
        why = "dropout would be baked into the graph"
        if name.rpartition(".")[0] in fused:
            why = "fuse_qkv_projections() made it so; fused projections are quantized as they are"
        yield f"{name} is in train mode; call .eval() on the network first ({why})."


def _quantized(network: nn.Module) -> Iterator[str]:
    for name, p in network.named_parameters():
        plain = type(p) in (nn.Parameter, Tensor, FakeTensor)
        if not plain or not (p.is_floating_point() or p.is_complex()):
            yield (
                f"weight {name}: is quantized already ({p.dtype if plain else type(p).__name__}); load the float network, without "
                "quantization_config and from its float file."
            )
        elif p.is_floating_point() and p.dtype not in NETWORK_DTYPES:
            yield f"weight {name}: is {p.dtype}, but must be float32, float16 or bfloat16; call network.float() first."


def _scattered(network: nn.Module) -> Iterator[str]:
    devices = {p.device: name for name, p in network.named_parameters()}
    if len(devices) > 1:
        (a, first), (b, second), *_ = devices.items()
        yield f"weight {first} is on {a}, and {second} on {b}; move the network to one device with .to(device)."


def _own(value: object, name: str) -> object:
    """Return an attribute that other libraries set on their objects, or None."""
    return getattr(value, name, None)

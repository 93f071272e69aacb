"""Run every stage on a strict second device, in a process of its own: python -m tests.helpers.second_device FOLDER NAME ..."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

import tfmq_fx
from benchmarks.networks.small import TinyUNet, calibration, make
from tfmq_fx import Recipe, Reconstruction

SECOND = "second"
SMALL = {"num_samples": 16, "gptq_samples": 16, "temporal_iterations": 3, "batch_size": 8}
NEAREST = Reconstruction(method="nearest")
GPTQ = Reconstruction(method="gptq", tune_iterations=3, **SMALL)
ADAROUND = Reconstruction(
    method="adaround",
    temporal_method="adaround",
    iterations=4,
    tune_iterations=2,
    learn_activation_scale=True,
    **SMALL,
)
BOTH = Reconstruction(method="gptq+adaround", iterations=3, tune_iterations=2, **SMALL)
RECIPES = {
    "chosen": ("w8a8", {"reconstruction": NEAREST}),
    "gptq": ("w4a8", {"reconstruction": GPTQ}),
    "adaround": ("w4a8", {"reconstruction": ADAROUND}),
    "keyed": ("w8a8", {"keyed": "all", "smooth": 0.5, "reconstruction": BOTH}),
    "few bits": ("w4a8", {"low_rank": 2, "rotate": 2, "smooth": 0.5, "reconstruction": GPTQ}),
    "cache": ("w8a8", {"maintain": "cache", "reconstruction": NEAREST}),
    "maintain": ("w8a8", {"maintain": "auto", "cache_type": "int8", "reconstruction": NEAREST}),
    "tokens": ("w4a8", {"activation_granularity": "token", "group_size": 8, "reconstruction": GPTQ}),
    "observers": ("w8a8", {"activation_observer": "mse", "temporal_observer": "percentile", "attention_bits": 8, "reconstruction": NEAREST}),
    "unseen": ("w8a8", {"unseen": "float", "reconstruction": NEAREST}),
    "float8": ("w8a8", {"linear_dtype": "float8_e4m3fn", "reconstruction": GPTQ}),
}  # fmt: skip


def add_device(folder: Path) -> None:
    """Compile the device, and name it."""
    source = Path(__file__).with_suffix(".cpp")
    load(
        "second_device",
        [str(source)],
        build_directory=str(folder),
        extra_cflags=["-O0", "-w"],
        is_python_module=False,
    )
    torch.utils.rename_privateuse1_backend(SECOND)
    module = types.ModuleType(f"torch.{SECOND}")
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_is_in_bad_fork": False,
    }
    for name, value in answers.items():
        setattr(module, name, lambda value=value: value)
    module.manual_seed_all = lambda _: None  # the CPU's own generator draws
    module.get_rng_state, module.set_rng_state = (
        lambda _=None: torch.get_rng_state(),
        lambda x, _=None: torch.set_rng_state(x),
    )
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module(SECOND, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    plain = torch.Tensor.__deepcopy__

    def copied(x, memo):
        if x.device.type != SECOND or id(x) in memo:
            return plain(x, memo)
        y = x.detach().clone()
        memo[id(x)] = torch.nn.Parameter(y, x.requires_grad) if isinstance(x, torch.nn.Parameter) else y
        return memo[id(x)]

    torch.Tensor.__deepcopy__ = copied


def run(name: str, folder: Path, *, data_on: str) -> dict:
    """Quantize on the second device and on the CPU; save, load, move. Returns differences of outputs, and strays."""
    base, changes = RECIPES[name]
    recipe = dataclasses.replace(Recipe.preset(base), **changes)
    data = calibration(24)
    given = tfmq_fx.CalibrationSet.from_tensors({n: x.to(data_on) for n, x in data.tensors.items()})
    rows = {n: x[:6] for n, x in data.tensors.items()}
    here = tfmq_fx.quantize(make(TinyUNet), recipe, calibration=data, seed=0)
    q = tfmq_fx.quantize(make(TinyUNet).to(SECOND), recipe, calibration=given, seed=0)
    strays = [n for n, x in (*q.named_parameters(), *q.named_buffers()) if x.device.type != SECOND]
    there = {n: x.to(SECOND) for n, x in rows.items()}
    with torch.no_grad():
        expected, y = here(**rows), q(**there)
        q.save_pretrained(folder / name)
        loaded = tfmq_fx.load(folder / name)
        again = loaded(**rows)
        moved = loaded.to(SECOND)(**there)
        back = q.cpu()(**rows)
    size = expected.std()
    return {
        "recipe": name,
        "device": y.device.type,
        "strays": strays,
        "to_cpu": float((y.cpu() - expected).abs().max() / size),
        "loaded": max(float((x.cpu() - y.cpu()).abs().max() / size) for x in (again, moved, back)),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    add_device(folder)
    for i, name in enumerate(sys.argv[2:] or RECIPES):
        print(json.dumps(run(name, folder, data_on=(SECOND, "cpu")[i % 2])), flush=True)


if __name__ == "__main__":
    main()

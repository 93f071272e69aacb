"""Run `make demo`: from the embedded float network to quantized samples in a few minutes.

Quantizes to W8A8 and W4A8, saves, loads, and samples float and quantized from the same noise. Prints the
table of docs/measured/quality.md and the time of each stage, and writes out/demo.png.
"""

from __future__ import annotations

import logging as stdlib_logging
import os
import shutil
import time
import warnings
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
warnings.simplefilter("ignore")  # libraries warn about themselves at import
stdlib_logging.getLogger("torch.utils._pytree").setLevel(stdlib_logging.ERROR)

import torch  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from rich.console import Console  # noqa: E402

import tfmq_fx  # noqa: E402
from benchmarks.quality import NOISE_SEED, STEPS, run, table  # noqa: E402
from tfmq_fx.demo import FOLDER, embedded_pipeline  # noqa: E402
from tfmq_fx.evaluation.sampling import sample, save_grid  # noqa: E402

OUT = Path("out")
SAMPLES = 128


def main() -> None:
    console = Console(width=140, highlight=False)
    logging.disable_progress_bar()
    started = time.monotonic()
    console.print(
        f"quantizing the embedded DDPM to W8A8 and W4A8, {SAMPLES} samples each ({torch.get_num_threads()} threads) ..."
    )
    result = run(["w8a8", "w4a8", "w4a8 nearest"], samples=SAMPLES, seeds=1)
    console.print(table(result.figures))

    folder, q = OUT / "w4a8", result.models["w4a8"]
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    shutil.rmtree(folder, ignore_errors=True)
    q.save_pretrained(folder)
    again = sample(pipe, tfmq_fx.load(folder), num_samples=8, num_inference_steps=STEPS, seed=NOISE_SEED)
    same = torch.equal(again, sample(pipe, q, num_samples=8, num_inference_steps=STEPS, seed=NOISE_SEED))
    weights = folder / "diffusion_pytorch_model.safetensors"
    original = FOLDER / "unet" / weights.name
    console.print(
        f"{weights}: {weights.stat().st_size / 1e6:.2f} MB, {weights.stat().st_size / original.stat().st_size:.3f} of float32; "
        f"loaded again, its samples are {'the same bit for bit' if same else 'DIFFERENT'}"
    )
    save_grid([(name, x[:64]) for name, x in result.images.items()], OUT / "demo.png")
    console.print(f"{OUT / 'demo.png'}: the same noise through each network")
    stages = ", ".join(f"{k} {v:.0f} s" for k, v in q.report["seconds"].items())
    console.print(f"one w4a8: {stages}; the whole demo {time.monotonic() - started:.0f} s")
    if not same:
        raise SystemExit("the loaded model differs from the saved one")


if __name__ == "__main__":
    main()

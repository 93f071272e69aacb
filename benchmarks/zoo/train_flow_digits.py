"""Train the fourth demo model: flow matching on scikit-learn's digits, from scratch, seeded.

    python -m benchmarks.zoo.train_flow_digits --output benchmarks/zoo/flow-digits

Writes a diffusers pipeline folder. Prints the training time, and how many of 1,024 samples of 20 Euler steps
a classifier trained on real digits recognises with confidence over 0.9.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from benchmarks.digits import IMAGE_SIZE, NUM_CLASSES, digits, recognise, train_classifier
from benchmarks.zoo.flow_digits import FlowDigitsPipeline
from benchmarks.zoo.training import fit


def make_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 48, 96),
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def train(*, steps: int, batch: int, lr: float, seed: int) -> FlowDigitsPipeline:
    torch.manual_seed(seed)
    x0_N1HW = digits()[0]
    net = make_unet().train()

    def loss(_: int) -> Tensor:
        x0 = x0_N1HW[torch.randint(len(x0_N1HW), (batch,))]
        # Draw one time from each of `batch` equal intervals: the same distribution, but less gradient noise.
        s = (torch.randperm(batch) + torch.rand(batch)) / batch
        noise, mix = torch.randn_like(x0), s[:, None, None, None]
        return F.mse_loss(net((1 - mix) * x0 + mix * noise, 1000 * s).sample, noise - x0)

    ema = fit(net, loss, steps=steps, lr=lr, decay=0.998)
    return FlowDigitsPipeline(ema, FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000))


def report(pipe: FlowDigitsPipeline, *, num_samples: int, step_counts: list[int]) -> None:
    pipe.set_progress_bar_config(disable=True)
    classifier = train_classifier()
    for steps in step_counts:
        generator = torch.Generator().manual_seed(1)
        images = pipe(num_samples, steps, generator, output_type="pt").images
        label, confidence = recognise(classifier, images * 2 - 1)
        print(
            f"{num_samples} samples, Euler {steps}: {(confidence > 0.9).float().mean():.1%} recognised with confidence > 0.9; "
            f"digits {torch.bincount(label, minlength=NUM_CLASSES).tolist()}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1024, help="samples of the report")
    parser.add_argument(
        "--euler", type=int, nargs="+", default=[20], help="numbers of Euler steps of the report"
    )
    args = parser.parse_args()
    # The weights depend on the order of sums, and so on the number of threads.
    torch.set_num_threads(1)
    started = time.process_time()
    pipe = train(steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    print(
        f"trained {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.2f} M parameters in {time.process_time() - started:.0f} s "
        f"of CPU time on {torch.get_num_threads()} thread"
    )
    pipe.save_pretrained(args.output)
    report(pipe, num_samples=args.samples, step_counts=args.euler)


if __name__ == "__main__":
    main()

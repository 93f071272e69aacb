"""Train the demo model: an unconditional DDPM on scikit-learn's handwritten digits, from scratch, seeded.

    python benchmarks/train_digits.py --output tfmq_fx/ddpm-digits

Writes a diffusers pipeline folder. Prints the figures that docs/measured/quality.md quotes: training time,
and how many of 1,024 DDIM-50 samples are recognised with confidence over 0.9 by a classifier trained on real
digits.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from benchmarks.digits import IMAGE_SIZE, NUM_CLASSES, digits, recognise, split, train_classifier
from benchmarks.zoo.training import fit


def make_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def train(*, steps: int, batch: int, lr: float, seed: int, prediction: str) -> DDPMPipeline:
    torch.manual_seed(seed)
    x0_N1HW = digits()[0]
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type=prediction)
    net = make_unet().train()

    def loss(_: int) -> Tensor:
        x0 = x0_N1HW[torch.randint(len(x0_N1HW), (batch,))]
        t = torch.randint(1000, (batch,))
        noise = torch.randn_like(x0)
        target = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
        return F.mse_loss(net(scheduler.add_noise(x0, noise, t), t).sample, target)

    ema = fit(
        net, loss, steps=steps, lr=lr, decay=0.999, warmup=0.1, betas=(0.9, 0.999), fused=False, every=250
    )
    return DDPMPipeline(ema, scheduler)


def report(pipe: DDPMPipeline, *, num_samples: int = 1024) -> None:
    ddim = DDIMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    ddim.set_progress_bar_config(disable=True)
    images = torch.from_numpy(
        ddim(
            batch_size=num_samples,
            num_inference_steps=50,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
        ).images
    ).permute(0, 3, 1, 2)
    classifier = train_classifier()
    x, y = digits()
    x, y = x[split()[1]], y[split()[1]]
    label, confidence = recognise(classifier, x)
    print(
        f"classifier on {len(x)} held-out real digits: {(label == y).float().mean():.1%} right, {(confidence > 0.9).float().mean():.1%} with confidence > 0.9"
    )
    label, confidence = recognise(classifier, images * 2 - 1)
    print(
        f"{num_samples} samples, DDIM 50: {(confidence > 0.9).float().mean():.1%} recognised with confidence > 0.9; digits {torch.bincount(label, minlength=NUM_CLASSES).tolist()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    args = parser.parse_args()
    started = time.monotonic()
    pipe = train(
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        prediction=args.prediction,
    )
    print(
        f"trained {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.2f} M parameters in {time.monotonic() - started:.0f} s on {torch.get_num_threads()} threads"
    )
    pipe.save_pretrained(args.output)
    report(pipe)


if __name__ == "__main__":
    main()

"""Train the third demo model: text-to-image latent diffusion on drawn shapes, entirely from scratch, seeded.

    python -m benchmarks.zoo.train_ldm_shapes --output benchmarks/zoo/ldm-shapes

Trains tokenizer and autoencoder first, then text encoder and UNet together. Writes a StableDiffusionPipeline
folder. Prints the autoencoder's PSNR on images it has not seen, and how many of 512 DDIM-50 samples closely
match their caption.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.zoo.shapes import IMAGE_SIZE, PROMPTS, as_asked, draw, judge
from benchmarks.zoo.training import fit
from tfmq_fx.base.metrics import psnr

PICTURES = 12_000  # drawn once for the UNet; the autoencoder sees new ones at every step
TOKENS, WIDTH = 8, 64  # length of a prompt, width of its embedding
CAPTION_DROPOUT = 0.1
KL_WEIGHT = 1e-4


def make_tokenizer() -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer in which each word of the captions is one token.

    Other words are read as bytes. The merges are made here, because the trainer of `tokenizers` numbers its
    tokens differently in every process.
    """
    parts = [[*word[:-1], f"{word[-1]}</w>"] for prompt in PROMPTS for word in prompt.split()]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in parts for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        parts = [_merged(word, best) for word in parts]
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{x}</w>" for x in letters),
        *map("".join, merges),
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    done: list[str] = []
    for part in word:
        if done and (done[-1], part) == pair:
            done[-1] += part
        else:
            done.append(part)
    return done


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def train_autoencoder(*, steps: int, batch: int, lr: float, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = make_autoencoder().train()

    def loss(step: int) -> Tensor:
        x = draw(torch.randint(len(PROMPTS), (batch,)), seed=step)
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        found: Tensor = F.mse_loss(vae.decode(z).sample, x) + KL_WEIGHT * posterior.kl().mean() / z[0].numel()
        return found

    return fit(vae, loss, steps=steps, lr=lr, decay=None, name="autoencoder: ")


@torch.no_grad()
def encode(vae: AutoencoderKL, caption_N: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of drawn images."""
    found = [vae.encode(x).latent_dist for x in draw(caption_N, seed=seed).split(100)]
    return torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])


def train(vae: AutoencoderKL, *, steps: int, batch: int, lr: float, seed: int) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    caption_N = torch.arange(PICTURES) % len(PROMPTS)
    # The autoencoder used the seeds from 1, one per step.
    mean_NCHW, std_NCHW = encode(vae, caption_N, seed=0)
    scale = 1 / (mean_NCHW + std_NCHW * torch.randn_like(std_NCHW)).std().item()
    vae.register_to_config(scaling_factor=scale)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    nets = nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(tokenizer)}).eval()  # no dropout
    # There are few captions: each step encodes all of them, the empty one last, and each image takes its own.
    ids = tokenizer(
        [*PROMPTS, ""], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids

    def loss(_: int) -> Tensor:
        rows = torch.randint(PICTURES, (batch,))
        x0 = scale * (mean_NCHW[rows] + std_NCHW[rows] * torch.randn_like(std_NCHW[rows]))
        caption = torch.where(torch.rand(batch) < CAPTION_DROPOUT, len(PROMPTS), caption_N[rows])
        # Draw one timestep from each of `batch` equal intervals: the same distribution, less gradient noise.
        t = ((torch.randperm(batch) + torch.rand(batch)) * (1000 / batch)).long().clamp(max=999)
        noise = torch.randn_like(x0)
        text = nets["text"](ids).last_hidden_state[caption]
        return F.mse_loss(nets["unet"](scheduler.add_noise(x0, noise, t), t, text).sample, noise)

    ema = fit(nets, loss, steps=steps, lr=lr, decay=0.998, name="latent diffusion: ")
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=ema["text"],
        tokenizer=tokenizer,
        unet=ema["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def report(pipe: StableDiffusionPipeline, *, num_samples: int, guidance_scales: list[float]) -> None:
    pipe.set_progress_bar_config(disable=True)
    asked = torch.arange(num_samples) % len(PROMPTS)
    real = draw(asked, seed=1_000_000)
    decoded = torch.cat([pipe.vae(x).sample for x in real.split(100)])
    print(
        f"autoencoder on {num_samples} pictures it has not seen: PSNR {psnr(decoded, real):.1f} dB; the judge finds its caption "
        f"in {as_asked(decoded, asked).float().mean():.1%} (of the pictures themselves in {as_asked(real, asked).float().mean():.1%})"
    )
    for scale in guidance_scales:
        generator = torch.Generator().manual_seed(1)
        images = torch.cat(
            [
                pipe(
                    [PROMPTS[i] for i in part], guidance_scale=scale, generator=generator, output_type="pt"
                ).images
                for part in asked.split(64)
            ]
        )
        label, closeness = judge(images * 2 - 1)
        good = as_asked(images * 2 - 1, asked)
        parts = [asked // 12 == label // 12, asked % 12 // 3 == label % 12 // 3, asked % 3 == label % 3]
        by_part = ", ".join(
            f"{name} {share.float().mean():.1%}"
            for name, share in zip(("size", "colour", "shape"), parts, strict=True)
        )
        print(
            f"{num_samples} samples, DDIM 50, guidance {scale}: {good.float().mean():.1%} show what the caption asks for, closely "
            f"({(label == asked).float().mean():.1%} at any distance: {by_part}); mean PSNR to the judge's drawing {closeness.mean():.1f} dB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--autoencoder", type=Path, help="use this trained one (a folder) instead of training it"
    )
    parser.add_argument("--autoencoder-steps", type=int, default=1400)
    parser.add_argument("--autoencoder-batch", type=int, default=16)
    parser.add_argument("--autoencoder-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=512, help="samples of the report")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0], help="scales of the report")
    args = parser.parse_args()
    # The weights depend on the order of sums, and so on the number of threads.
    torch.set_num_threads(1)
    started = time.process_time()
    if args.autoencoder:
        vae = AutoencoderKL.from_pretrained(args.autoencoder)
    else:
        vae = train_autoencoder(
            steps=args.autoencoder_steps, batch=args.autoencoder_batch, lr=args.autoencoder_lr, seed=args.seed
        )
        vae.save_pretrained(args.output / "vae")  # the pipeline writes it again, with its scaling factor
    print(f"autoencoder ready after {time.process_time() - started:.0f} s of CPU time", flush=True)
    pipe = train(vae, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6:.2f} M"
        for name in ("unet", "vae", "text_encoder")
    )
    print(
        f"trained {sizes} in {time.process_time() - started:.0f} s of CPU time on {torch.get_num_threads()} thread"
    )
    pipe.save_pretrained(args.output)
    report(pipe, num_samples=args.samples, guidance_scales=args.guidance)


if __name__ == "__main__":
    main()

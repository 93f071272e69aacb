"""Load scikit-learn's handwritten digits as 16x16 images, and train a classifier that recognises them.

The classifier judges the samples of the demo model. It is trained on real digits only, so its judgement of
generated ones is independent of the diffusion model.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

IMAGE_SIZE = 16
NUM_CLASSES = 10


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all 1,797 digits: images (N, 1, 16, 16) float32 in [-1, 1], labels (N,) int64."""
    bunch = load_digits()
    x_N88 = torch.from_numpy(bunch.images).float() / 8.0 - 1.0  # pixel values are 0..16
    x_N1HW = F.interpolate(x_N88[:, None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return x_N1HW.clamp(-1, 1), torch.from_numpy(bunch.target).long()


def split(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the classifier's 80% training and 20% held-out images."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    return order[360:], order[:360]


def classifier_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 16, NUM_CLASSES),
    )  # fmt: skip


def train_classifier(*, epochs: int = 30, seed: int = 0) -> nn.Module:
    """Return a small convolutional network trained on the 80% split, in eval mode (about 15 CPU seconds)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x, y = digits()
        x, y = x[split()[0]], y[split()[0]]
        net = classifier_network().train()
        opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
        steps = epochs * (len(x) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64)[: len(x) // 64]:
                # Shift by a pixel at random, because generated digits are not centred to the pixel.
                dy, dx = torch.randint(-1, 2, (2,)).tolist()
                loss = F.cross_entropy(net(x[batch].roll((dy, dx), (2, 3))), y[batch])
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                schedule.step()
    return net.eval()


@torch.no_grad()
def recognise(classifier: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class and confidence (softmax maximum), each (N,), for images (N, 1, 16, 16) in [-1, 1]."""
    confidence, label = classifier(images).softmax(-1).max(-1)
    return label, confidence

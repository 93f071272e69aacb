"""The trained models, with the settings by which benchmarks quantize and judge them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.digits import classifier_network, recognise, train_classifier
from benchmarks.zoo.dit_digits import dit_digits_pipeline
from benchmarks.zoo.flow_digits import flow_digits_pipeline
from benchmarks.zoo.ldm_shapes import ldm_shapes_pipeline
from benchmarks.zoo.shapes import PROMPTS, as_asked
from tfmq_fx.demo import embedded_pipeline

CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One trained model.

    The `folder` of its methods keeps the digits' classifier, once it is trained.
    """

    make: Callable[[], Any]
    steps: int = 50
    arguments: dict[str, Any] = field(default_factory=dict)  # of the pipeline's call
    finite: dict[str, Any] = field(default_factory=dict)
    digits: bool = True  # judged by the digits' classifier; otherwise shapes, judged by redrawing them

    def pipeline(self) -> Any:
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def features(self, images: Tensor, folder: Path) -> Tensor:
        """Return features (N, 64 or 192) for Frechet distances: the classifier's last map, or images at 8x8."""
        if not self.digits:
            return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
        network = classifier(folder)
        assert isinstance(network, nn.Sequential)
        with torch.no_grad():
            mapped: Tensor = network[:-2](images)
        return mapped.mean((2, 3))

    def good(self, images: Tensor, folder: Path) -> float:
        """Return the percentage of good samples.

        These are digits recognised with confidence over 0.9, or the shape that was asked for.
        """
        if not self.digits:
            captions = torch.arange(len(images)) % len(PROMPTS)
            return 100 * as_asked(images, captions).float().mean().item()
        return 100 * (recognise(classifier(folder), images)[1] > 0.9).float().mean().item()


def classifier(folder: Path) -> nn.Module:
    file = folder / CLASSIFIER
    if not file.exists():
        save_file(train_classifier().state_dict(), file)
    network = classifier_network().eval()
    network.load_state_dict(load_file(file))
    return network


MODELS = {
    "digits": Model(make=embedded_pipeline),
    "dit": Model(
        make=dit_digits_pipeline,
        arguments={"guidance_scale": 2.0, "class_labels": list(range(10))},
        finite={"class_labels": range(11)},
    ),
    "ldm": Model(
        make=ldm_shapes_pipeline, arguments={"guidance_scale": 3.0, "prompt": list(PROMPTS)}, digits=False
    ),
    "flow": Model(make=flow_digits_pipeline, steps=20),
}

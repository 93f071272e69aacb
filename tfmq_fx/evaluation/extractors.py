"""Extract features of images by a network, and measure distances between sets of images in them.

An extractor is any function from images (N, C, H, W) in [-1, 1] to `Features`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_fx.base.errors import TFMQError, first_line
from tfmq_fx.base.metrics import (
    frechet_distance,
    inception_score,
    precision_recall,
    psnr,
    psnr_by_image,
    ssim_by_image,
)

NEIGHBOURS = 3  # the k of precision and recall: a set needs more images than this
# The spatial variant's features: 7 channels of 17 x 17, as in the ADM evaluator (Dhariwal & Nichol 2021).
SPATIAL = 2023


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of N images, one row each."""

    pooled_ND: Tensor
    spatial_NS: Tensor  # a few channels of a feature map at all positions, for sFID (Nash et al. 2021)
    probabilities_NK: Tensor | None  # class probabilities; None if the network is not a classifier


Extractor = Callable[[Tensor], Features]


def network_extractor(network: nn.Module, layer: str, *, batch_size: int = 256) -> Extractor:
    """Return an extractor from any classifier: the output (N, C, h, w) of `layer`, averaged over positions.

    The network's own output is taken as logits. layer: a name in `network.named_modules()`. Raises TFMQError
    if there is no such layer or its output is not (N, C, h, w).
    """
    if layer not in dict(network.named_modules()):
        raise TFMQError(
            f"network_extractor: no layer {layer!r}; found {', '.join(n for n, _ in network.named_modules() if n)}."
        )

    @torch.no_grad()
    def extract(images: Tensor) -> Features:
        maps: list[Tensor] = []
        handle = network.get_submodule(layer).register_forward_hook(lambda _m, _i, out: maps.append(out))
        try:
            logits = torch.cat([network(part) for part in images.split(batch_size)])
        finally:
            handle.remove()
        if maps[0].dim() != 4:
            raise TFMQError(
                f"network_extractor: layer {layer!r} returns shape {tuple(maps[0].shape)}; choose one that returns (N, C, h, w)."
            )
        return _features(torch.cat(maps), logits)

    return extract


def inception_extractor(weights: str | Path | None = None, *, batch_size: int = 64) -> Extractor:
    """Return an extractor by torch-fidelity's InceptionV3, the network of published FIDs.

    The probabilities come from its logits without bias. weights: its file, or None for the file in
    torch-fidelity's cache. Nothing is downloaded: raises TFMQError, naming the path, if the package or the
    file is missing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise TFMQError(
            f"inception_extractor: needs torch-fidelity ({error}); pip install torch-fidelity."
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    file = file if weights is None else Path(weights)
    if not file.is_file():
        raise TFMQError(
            f"inception_extractor: no weights at {file}; download {URL_INCEPTION_V3} to that path, or use "
            "`network_extractor` with a classifier of your own."
        )
    names = ["768", "2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(file)).eval()

    @torch.no_grad()
    def extract(images: Tensor) -> Features:
        found: list[Sequence[Tensor]] = [network(_pixels(part)) for part in images.split(batch_size)]
        spatial, pooled, logits = (torch.cat(column) for column in zip(*found, strict=True))
        return Features(pooled_ND=pooled, spatial_NS=spatial, probabilities_NK=logits.softmax(-1))

    return extract


def torchvision_inception_extractor(weights: str | Path | None = None, *, batch_size: int = 64) -> Extractor:
    """Return an extractor by torchvision's inception_v3, whose images are scaled to 299 x 299.

    It has 2,048 pooled features, 7 channels of 17 x 17, and the classes of ImageNet. The features are not
    those of published FIDs; use `inception_extractor` for these.

    weights: a file with its state dict, or None for the file in torchvision's cache. Nothing is downloaded:
    raises TFMQError, naming the path, if the file is missing or holds something else.
    """
    from torchvision.models import Inception_V3_Weights, inception_v3
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.transforms.v2.functional import resize

    url = Inception_V3_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    file = file if weights is None else Path(weights)
    if not file.is_file():
        raise TFMQError(
            f"torchvision_inception_extractor: no weights at {file}; download {url} to that path, or name another file."
        )
    network = inception_v3(init_weights=False)  # transform_input is off: the images are in [-1, 1] already
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load and pickle raise many types
        raise TFMQError(
            f"torchvision_inception_extractor: {file} does not hold weights of inception_v3 ({first_line(error)})."
        ) from error
    names = {"Mixed_6e": "spatial", "avgpool": "pooled", "fc": "logits"}
    network = create_feature_extractor(network.eval(), names, suppress_diff_warning=True).eval()

    @torch.no_grad()
    def extract(images: Tensor) -> Features:
        parts = [_pixels(part).float() / 127.5 - 1 for part in images.split(batch_size)]
        found = [network(resize(part, [299, 299], antialias=True)) for part in parts]
        pooled = torch.cat([part["pooled"].flatten(1) for part in found])
        channels = SPATIAL // math.prod(found[0]["spatial"].shape[2:])
        spatial = torch.cat([part["spatial"][:, :channels].flatten(1) for part in found])
        probabilities = torch.cat([part["logits"] for part in found]).softmax(-1)
        return Features(pooled_ND=pooled, spatial_NS=spatial, probabilities_NK=probabilities)

    return extract


# Names for `tfmq evaluate --extractor` -> a function from a weights file, or None, to an extractor.
EXTRACTORS: dict[str, Callable[[str | Path | None], Extractor]] = {
    "inception": inception_extractor,
    "torchvision-inception": torchvision_inception_extractor,
}


def extractor_named(name: str, weights: str | Path | None = None) -> Extractor:
    """Return an extractor by its name in EXTRACTORS. weights: its file, or None for the one in torch's cache.

    Raises TFMQError for an unknown name, or if the package or the file is missing.
    """
    if name not in EXTRACTORS:
        raise TFMQError(f"extractor: {name!r} is unknown; use one of {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name](weights)


def _pixels(images: Tensor) -> Tensor:
    """Return the images as a PNG would store them: (N, 3, H, W), bytes."""
    return (images.expand(-1, 3, -1, -1).clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)


def _features(map_NCHW: Tensor, logits: Tensor) -> Features:
    channels = max(1, min(map_NCHW.shape[1], SPATIAL // math.prod(map_NCHW.shape[2:])))
    return Features(
        pooled_ND=map_NCHW.mean((2, 3)),
        spatial_NS=map_NCHW[:, :channels].flatten(1),
        probabilities_NK=logits.softmax(-1) if logits.dim() == 2 else None,
    )


def compare(images: Tensor, reference: Tensor, *, extractor: Extractor | None = None) -> dict[str, float]:
    """Compare images (N, C, H, W) in [-1, 1] with those of the float network from the same noise.

    Returns PSNR and SSIM as means over images, the median PSNR, and PSNR over all pixels. With an extractor,
    also Frechet distance, its spatial variant, precision and recall of the set, and the inception scores of
    both sets.
    """
    by_image = psnr_by_image(images, reference)
    found = {
        "psnr": by_image[by_image.isfinite()].mean().item() if by_image.isfinite().any() else math.inf,
        "psnr_median": by_image.median().item(),
        "psnr_pooled": psnr(images, reference),
        "ssim": ssim_by_image(images, reference).mean().item(),
    }
    if extractor is None:
        return found
    a, b = extractor(images), extractor(reference)
    found |= set_distances(a, b)
    if a.probabilities_NK is not None and b.probabilities_NK is not None:
        found["inception_score"] = inception_score(a.probabilities_NK)
        found["inception_score_float"] = inception_score(b.probabilities_NK)
    return found


def set_distances(features: Features, reference: Features) -> dict[str, float]:
    """Return Frechet distance, its spatial variant, precision and recall of a set of images to a reference.

    Raises TFMQError if a set has NEIGHBOURS images or fewer.
    """
    precision, recall = precision_recall(features.pooled_ND, reference.pooled_ND, neighbours=NEIGHBOURS)
    return {
        "frechet": frechet_distance(features.pooled_ND, reference.pooled_ND),
        "frechet_spatial": frechet_distance(features.spatial_NS, reference.spatial_NS),
        "precision": precision,
        "recall": recall,
    }


def lpips_distance(images: Tensor, reference: Tensor, *, network: str = "alex") -> Tensor:
    """Return the LPIPS (Zhang et al. 2018) of each image, (N,), by torchmetrics.

    The backbone's weights must be on this machine: nothing is downloaded. Raises TFMQError if they or
    torchmetrics are missing.
    """
    files = {
        "alex": "alexnet-owt-7be5be79.pth",
        "vgg": "vgg16-397923af.pth",
        "squeeze": "squeezenet1_1-b8a52dc0.pth",
    }
    if network not in files:
        raise TFMQError(f"lpips_distance: network={network!r} is unknown; use {', '.join(files)}.")
    try:
        from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
    except ImportError as error:
        raise TFMQError(f'LPIPS needs torchmetrics ({error}); pip install "tfmq_fx[eval]".') from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / files[network]
    if not file.is_file():
        raise TFMQError(f"LPIPS: no backbone weights at {file}; download torchvision's weights to that path.")
    values = [
        learned_perceptual_image_patch_similarity(
            x[None].expand(-1, 3, -1, -1).clamp(-1, 1),
            y[None].expand(-1, 3, -1, -1).clamp(-1, 1),
            net_type=network,
        )
        for x, y in zip(images, reference, strict=True)
    ]
    return torch.stack(values)


@torch.no_grad()
def clip_score(images: Tensor, prompts: Sequence[str], folder: str | Path) -> float:
    """Return 100 times the mean over images of max(cos(image, prompt), 0), by a local CLIP.

    This is the CLIP score of Hessel et al. 2021.

    folder: a transformers CLIPModel with its processor, as `save_pretrained` writes them. Raises TFMQError
    if the package or the folder is missing, or if there is not one prompt per image.
    """
    if len(images) != len(prompts):
        raise TFMQError(
            f"clip_score: {len(images)} images and {len(prompts)} prompts; give one prompt per image."
        )
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise TFMQError(f"clip_score: needs transformers ({error}); pip install transformers.") from error
    if not Path(folder).is_dir():
        raise TFMQError(f"clip_score: {folder} is not a folder; give one with a CLIPModel and its processor.")
    model: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
    inputs = processor(
        text=list(prompts), images=list(_pixels(images)), return_tensors="pt", padding=True, truncation=True
    )
    output = model(**inputs)
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds, dim=-1)
    return float(100 * cosine.clamp(min=0).mean())

"""Feature extractors and the comparisons that use them, against closed forms and the libraries' own results."""

import builtins
import json
import math

import pytest
import torch
from torch import nn

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.metrics import frechet_distance, inception_score, precision_recall, ssim_by_image
from tfmq_fx.evaluation.extractors import (
    clip_score,
    compare,
    inception_extractor,
    lpips_distance,
    network_extractor,
)


def classifier():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def pictures(n, seed=0):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def without(monkeypatch, package):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_inception_score_in_closed_form():
    assert inception_score(torch.eye(5)) == pytest.approx(5.0)  # sure of each class, all classes
    assert inception_score(torch.full((7, 4), 0.25)) == pytest.approx(1.0)
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    marginal = p.mean(0)
    expected = math.exp(
        sum(float(a * (a / m).log()) for row in p for a, m in zip(row, marginal, strict=True)) / 2
    )
    assert inception_score(p) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_see_quality_and_coverage():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 100, x) == (0.0, 0.0)
    half = x[x[:, 0] > 0]  # all real, but only one side of it
    precision, recall = precision_recall(half, x)
    assert precision == 1.0
    assert 0.3 < recall < 0.75
    assert precision_recall(x, half) == (recall, precision)
    with pytest.raises(TFMQError, match="a has 3 rows; more than 3"):
        precision_recall(x[:3], x)


def test_precision_is_that_of_brute_force():
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(12, 2, generator=g), torch.randn(15, 2, generator=g) * 0.7
    radius = [sorted(float((y - z).norm()) for z in b)[3] for y in b]
    inside = [any(float((x - y).norm()) <= r for y, r in zip(b, radius, strict=True)) for x in a]
    assert precision_recall(a, b)[0] == pytest.approx(sum(inside) / len(a))


def test_ssim_is_one_for_equal_images_and_of_constants_in_closed_form():
    x = pictures(2)
    assert torch.allclose(ssim_by_image(x, x), torch.ones(2))
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.25)
    c1 = (0.01 * 2.0) ** 2  # variances are zero: only the luminance term is left
    assert ssim_by_image(a, b).item() == pytest.approx((2 * 0.125 + c1) / (0.25 + 0.0625 + c1), rel=1e-4)


def test_features_of_a_network_are_its_layer_and_logits():
    network, x = classifier(), pictures(5)
    found = network_extractor(network, "1", batch_size=2)(x)
    with torch.no_grad():
        maps = network[:2](x)
        torch.testing.assert_close(found.pooled_ND, maps.mean((2, 3)))
        torch.testing.assert_close(found.spatial_NS, maps.flatten(1))  # 8 x 14 x 14 are fewer than 2,023
        torch.testing.assert_close(found.probabilities_NK, network(x).softmax(-1))
    with pytest.raises(TFMQError, match=r"no layer 'head'; found 0, 1"):
        network_extractor(network, "head")
    with pytest.raises(TFMQError, match=r"layer '4' returns shape \(5, 4\)"):
        network_extractor(network, "4")(x)


def test_compare_without_and_with_an_extractor():
    x = pictures(64)
    y = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert set(compare(y, x)) == {"psnr", "psnr_median", "psnr_pooled", "ssim"}
    extractor = network_extractor(classifier(), "1")
    found, same = compare(y, x, extractor=extractor), compare(x, x, extractor=extractor)
    assert found["frechet"] == pytest.approx(frechet_distance(extractor(y).pooled_ND, extractor(x).pooled_ND))
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    assert same["psnr"] == math.inf
    assert same["frechet"] < 1e-9 < found["frechet"]
    assert same["inception_score"] == same["inception_score_float"] >= 1.0


@pytest.mark.parametrize(
    ("package", "call", "words"),
    [
        ("torchmetrics", lambda: ssim_by_image(pictures(1), pictures(1)), "SSIM needs torchmetrics"),
        ("torchmetrics", lambda: lpips_distance(pictures(1), pictures(1)), "LPIPS needs torchmetrics"),
        ("torch_fidelity", inception_extractor, "needs torch-fidelity"),
        ("transformers", lambda: clip_score(pictures(1), ["a"], "."), "needs transformers"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, call, words):
    without(monkeypatch, package)
    with pytest.raises(TFMQError, match=words):
        call()


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pytest.importorskip("torchvision")
    with pytest.raises(TFMQError, match=r"no backbone weights at .*squeezenet1_1"):
        lpips_distance(pictures(1), pictures(1), network="squeeze")
    pytest.importorskip("torch_fidelity")
    with pytest.raises(TFMQError, match=r"inception_extractor: no weights at .*inception"):
        inception_extractor()


def test_lpips_with_weights_that_are_there(monkeypatch, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    distance = lpips_distance(torch.cat([x[:1], -x[1:]]), x, network="squeeze")
    assert distance[0] == 0
    assert distance[1] > 0


def test_clip_score_of_a_local_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    size = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(
        tmp_path / "clip"
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 6, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).eval().save_pretrained(tmp_path / "clip")
    found = [clip_score(pictures(1, seed=i), ["a b"], tmp_path / "clip") for i in range(8)]
    together = clip_score(torch.cat([pictures(1, seed=i) for i in range(8)]), ["a b"] * 8, tmp_path / "clip")
    assert together == pytest.approx(sum(found) / 8, abs=1e-3)
    assert all(0 <= x <= 100 for x in found)
    with pytest.raises(TFMQError, match="1 images and 2 prompts"):
        clip_score(pictures(1), ["a", "b"], tmp_path / "clip")
    with pytest.raises(TFMQError, match="nowhere is not a folder"):
        clip_score(pictures(1), ["a"], tmp_path / "nowhere")

"""What leaves a network when its temporal block becomes tables: bytes at the published sizes, seconds of the block.

    python -m benchmarks.precompute                   every network, on the meta device: bytes
    python -m benchmarks.precompute dit sd-3          these
    python -m benchmarks.precompute --seconds dit     and the seconds of its block, with random weights in memory
    python -m benchmarks.precompute --run dit         the whole network before and after, in float32 with random weights

Weights are bfloat16. "leaves" is what the network no longer holds; "table" is for 50 steps, of one request where it depends on one; W4 counts
half a byte for each weight of a convolution or linear, and two for everything else. A request's seconds are those of the block at
50 timesteps in one batch; a step's are those of the block on two rows, which the network no longer spends.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import tfmq_fx
from benchmarks.networks.zoo import ZOO
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.outside import Outside
from tfmq_fx.base.row_lists import RowLists
from tfmq_fx.capturing.calibrated import capture_rows
from tfmq_fx.graph.inputs import placeholders
from tfmq_fx.graph.nodes import attribute, fresh, meta_value, set_buffer, weight_path
from tfmq_fx.maintenance.paying import COMPUTED, paying
from tfmq_fx.passes import extract_temporal, find_temporal, open_temporal
from tfmq_fx.precomputing import FLOAT, prepared
from tfmq_fx.settings import Settings

STEPS = 50
DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Published:
    """A network of its published size, and the arguments of one call."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    timestep: str = "timestep"
    lists: RowLists | None = None  # which arguments and outputs are lists of rows; on meta, no call shows it


def _sd35() -> nn.Module:
    network: nn.Module = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=38, attention_head_dim=64,
        num_attention_heads=38, joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048,
        pos_embed_max_size=192, qk_norm="rms_norm",
    )  # fmt: skip
    return network


def _call(
    latents: tuple[int, ...], text: int, width: int, times: tuple[float, float], **more: Any
) -> dict[str, Any]:
    """Return the arguments of a call with two samples. latents, and (text, width): the shapes of one."""
    return {
        "hidden_states": torch.zeros(2, *latents),
        "encoder_hidden_states": torch.zeros(2, text, width),
        "timestep": torch.tensor(times),
        **more,
        "return_dict": False,
    }


# Small pictures and videos: the layers are the same, and the capture is quicker.
MORE = (
    Published(
        name="sd-3.5-large",
        build=_sd35,
        inputs=lambda: _call((16, 32, 32), 154, 4096, (900, 500), pooled_projections=torch.zeros(2, 2048)),
    ),
    Published(
        name="qwen-image",
        build=lambda: diffusers.QwenImageTransformer2DModel(),
        inputs=lambda: _call(
            (64, 64), 16, 3584, (0.5, 0.25), img_shapes=[[(1, 8, 8)]] * 2,
            encoder_hidden_states_mask=torch.ones(2, 16, dtype=torch.bool),
        ),
    ),
    Published(
        name="hunyuan-video",
        build=lambda: diffusers.HunyuanVideoTransformer3DModel(),
        inputs=lambda: _call(
            (16, 3, 16, 16), 16, 4096, (900, 500), encoder_attention_mask=torch.ones(2, 16),
            pooled_projections=torch.zeros(2, 768), guidance=torch.tensor([6000.0, 1000.0]),
        ),
    ),
    Published(
        name="auraflow",
        build=lambda: diffusers.AuraFlowTransformer2DModel(),
        inputs=lambda: _call((4, 32, 32), 32, 2048, (0.5, 0.25)),
    ),
    Published(
        name="z-image",
        build=lambda: diffusers.ZImageTransformer2DModel(),
        inputs=lambda: {
            "x": torch.zeros(2, 16, 1, 16, 16), "t": torch.tensor([0.5, 0.25]), "cap_feats": torch.zeros(2, 32, 2560),
            "return_dict": False,
        },
        timestep="t",
        lists=RowLists(("x", "cap_feats"), (0,)),
    ),
)  # fmt: skip
WANTED = ("sd-1.5", "sd-xl", "dit", "pixart-512", "sd-3", "flux", "wan")
NETWORKS = {
    **{e.name: Published(name=e.name, build=partial(e.build, True), inputs=partial(e.inputs, True), timestep=e.timestep)
       for e in ZOO if e.name in WANTED},
    **{p.name: p for p in MORE},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """The bytes of one network, before and after, and its block."""

    whole: int
    left: int
    table: int
    left_4bit: int
    features: int
    kinds: str
    block: GraphModule
    gm: GraphModule


def measured(published: Published) -> Found:
    """Count the bytes on the meta device."""
    with torch.device("meta"):
        network = published.build().eval().to(DTYPE)
        network = network if published.lists is None else published.lists.batched(network)
    inputs = pytree.tree_map_only(Tensor, _on_meta, published.inputs())
    inputs[published.timestep] = inputs[published.timestep].to(torch.float32)
    plain, _ = capture_rows(network, inputs, published.timestep)
    settings = Settings(timestep=published.timestep)
    gm = prepared(plain, FLOAT, torch.linspace(1000, 1, STEPS), settings)
    found = paying(gm)
    gone = tuple(d.feature for d in found.features if d.chosen != COMPUTED)
    temporal = find_temporal(plain, timestep=published.timestep, features=gone)
    block = extract_temporal(fresh(plain), temporal)
    open_temporal(gm, features=gone)
    left = _bytes(gm)
    kinds = {k: sum(d.chosen == k for d in found.features) for k in ("table", "request", "computed")}
    return Found(
        whole=_bytes(plain),
        left=left,
        table=sum(d.bytes[d.chosen] for d in found.features if d.feature in gone),
        left_4bit=left - round(1.5 * _weights(gm)),
        features=len(found.features),
        kinds="/".join(map(str, kinds.values())),
        block=block,
        gm=plain,
    )


def _on_meta(x: Tensor) -> Tensor:
    return x.to("meta", DTYPE if x.is_floating_point() else x.dtype)


def _bytes(gm: GraphModule) -> int:
    return sum(x.nbytes for x in tensors_of(gm).values())


def _weights(gm: GraphModule) -> int:
    """Return the number of weights of convolutions and linears."""
    paths = {path for node in gm.graph.nodes if (path := weight_path(node)) is not None}
    return sum(attribute(gm, path).numel() for path in paths)


def seconds(found: Found, timestep: str) -> tuple[float, float]:
    """Return the seconds of one request's table, and of the block on two rows, with random weights in memory."""
    for path, x in tensors_of(found.block).items():
        value = torch.empty(x.shape, dtype=x.dtype)
        set_buffer(found.block, path, value.normal_(std=0.02) if x.is_floating_point() else value.zero_())
    tables = {timestep: torch.linspace(1000, 1, STEPS)}
    outputs: Any = found.block.graph.output_node().args[0]
    names = [n.name for n in outputs]
    outside = Outside(found.block, features=names, taken=names, timestep=timestep, tables=tables)
    given = {timestep: tables[timestep][:2]}
    for name, node in placeholders(found.block).items():
        if name != timestep:
            fake = meta_value(node)
            given[name] = torch.ones([2, *(int(d) for d in fake.shape[1:])], dtype=fake.dtype)
    start = time.perf_counter()
    outside.look_up(given)
    request = time.perf_counter() - start
    steps = []
    for _ in range(3):
        start = time.perf_counter()
        outside.evaluate(given)
        steps.append(time.perf_counter() - start)
    return request, min(steps)


def run(published: Published) -> list[str]:
    """Precompute a network in memory, in float32. Return a row of a table: bytes, seconds, milliseconds of a call, agreement.

    Calls are interleaved; the first of each, which makes a request's table, is left out of the medians.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        network = published.build().eval()
    network = network.to_empty(device="cpu")
    for p in chain(network.parameters(), network.buffers()):
        if p.is_floating_point():
            p.data.normal_(std=p[0].numel() ** -0.5) if p.dim() > 1 else p.data.zero_()
    inputs = pytree.tree_map_only(
        Tensor,
        lambda x: torch.randn_like(x) if x.is_floating_point() and x.dim() > 1 else x,
        published.inputs(),
    )
    times = inputs[published.timestep]
    schedule = torch.cat([times, torch.linspace(1, float(times.max()), STEPS - len(times)).to(times.dtype)])
    start = time.perf_counter()
    new = tfmq_fx.precompute(
        network, example=inputs, timesteps=schedule.unique(), timestep=published.timestep
    )
    made = time.perf_counter() - start
    results, spent = [], {True: list[float](), False: list[float]()}
    with torch.no_grad():
        for i in range(6):
            start = time.perf_counter()
            results.append((network if i % 2 else new)(**inputs))
            spent[bool(i % 2)].append(time.perf_counter() - start)
    found, own = (pytree.tree_leaves(x)[0] for x in results[-2:])
    before, after = (statistics.median(spent[kind][1:]) for kind in (True, False))
    held = (
        sum(x.nbytes for x in network.state_dict().values()),
        sum(x.nbytes for x in new.network.state_dict().values()),
    )
    off = float((found - own).abs().max() / own.abs().max())
    return [
        published.name, *(f"{n / 1e9:.2f}" for n in held), f"{made:.0f}", f"{spent[False][0]:.2f}", f"{before * 1e3:.0f}", f"{after * 1e3:.0f}",
        f"{before / after:.3f}", "equal" if torch.equal(found, own) else f"{off:.1e}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []])
    parser.add_argument(
        "--seconds", action="store_true", help="also run the block, with random weights in memory"
    )
    parser.add_argument(
        "--run", action="store_true", help="run the networks instead, in float32 with random weights"
    )
    given = parser.parse_args()
    console = Console(width=150)
    if given.run:
        columns = (
            "network",
            "GB",
            "GB after",
            "made in s",
            "first call s",
            "call ms",
            "after, ms",
            "ratio",
            "outputs",
        )
        runs = Table(*columns)
        for name in given.networks:
            runs.add_row(*run(NETWORKS[name]))
        console.print(runs)
        return
    table = Table(
        "network",
        "weights GB",
        "leaves GB",
        "%",
        f"table MB, {STEPS} steps",
        "left GB",
        "left W4 GB",
        "table/request/computed",
        "request s",
        "step ms",
    )
    for name in given.networks or NETWORKS:
        published = NETWORKS[name]
        found = measured(published)
        leaves = found.whole - found.left
        times = ("", "")
        if given.seconds:
            request, step = seconds(found, published.timestep)
            times = (f"{request:.2f}", f"{step * 1e3:.1f}")
        table.add_row(
            name, f"{found.whole / 1e9:.2f}", f"{leaves / 1e9:.2f}", f"{100 * leaves / found.whole:.0f}", f"{found.table / 1e6:.1f}",
            f"{found.left / 1e9:.2f}", f"{found.left_4bit / 1e9:.2f}", found.kinds, *times,
        )  # fmt: skip
        console.print(f"{name}: done")
    console.print(table)
    console.print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()

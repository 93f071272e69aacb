"""A zoo of diffusion networks, each with its temporal block written down by hand.

The temporal block of a network is the set of its weighted layers (Linear, ConvNd) whose output depends on
the timestep and on no data: not on the sample, not on token sequences, not on position ids. Per-sample
conditioning vectors (class labels, pooled text, sizes, guidance) that are mixed in ahead of the embedding
layers may count as part of the block (`features`, `layers`, `keys`) or as data (`pure_features`,
`pure_layers`). A temporal feature is the last weighted layer on a path from the timestep: its output meets
data after nothing but views and pointwise operations. A layer of conditioning alone is never a feature.

The ground truth was written from the networks' sources and imports nothing from tfmq_fx, so that it can
disagree with it. `depends` is a second opinion, equally independent: it perturbs one input at a time and
watches which layers' outputs change.
"""

from __future__ import annotations

from benchmarks.networks.zoo.entry import Entry
from benchmarks.networks.zoo.experts import EXPERTS
from benchmarks.networks.zoo.joint import JOINT
from benchmarks.networks.zoo.newest import NEWEST
from benchmarks.networks.zoo.oracle import depends
from benchmarks.networks.zoo.plain import PLAIN
from benchmarks.networks.zoo.recent import RECENT
from benchmarks.networks.zoo.transformers import TRANSFORMERS
from benchmarks.networks.zoo.unets import UNETS_2D
from benchmarks.networks.zoo.unets_text import UNET_KANDINSKY3, UNETS_TEXT
from benchmarks.networks.zoo.unets_video import UNETS_VIDEO

ZOO: tuple[Entry, ...] = (
    *UNETS_2D,
    *UNETS_TEXT,
    UNET_KANDINSKY3,
    *UNETS_VIDEO,
    *TRANSFORMERS,
    *RECENT,
    *NEWEST,
    *JOINT,
    *EXPERTS,
    *PLAIN,
)

__all__ = ["ZOO", "Entry", "depends"]

"""Attention processors that a pipeline sets while it samples, and that compute some rows of a call in another way.

Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377) gives its network each sample once more, and sets
processors that replace the attention map by the identity for the last third (or half) of a call's rows. Every row then
depends on its place in the call. For calibration, each row says by itself how it is computed:

    network(x), x = [uncond, cond, cond]   ==>   network(x, perturbed_rows=[False, False, True])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from tfmq_fx.artefact.float_network import class_name, facts_of_object
from tfmq_fx.artefact.interface import PERTURBED
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.signatures import signature_of, with_flag, with_forward

# Relative distance up to which two rows are computed in the same way: far above rounding in bfloat16, far below a row
# without attention.
NOISE = 2**-5

Held = dict[str, Any]  # path of an attribute -> the object in it


@dataclass(frozen=True)
class Perturbation:
    """What a pipeline sets in its network while it samples.

    objects: what is set, by the path of the attribute. pattern: whether each of the equal parts that a call's rows
    have is computed in the other way.
    """

    objects: Held
    pattern: tuple[bool, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what an artefact keeps."""
        return {
            "pattern": list(self.pattern),
            "objects": {p: facts_of_object(x) for p, x in self.objects.items()},
        }

    def rows(self, size: int) -> Tensor:
        """Return which rows of a call are computed in the other way, (size,) bool."""
        return torch.tensor(self.pattern).repeat_interleave(size // len(self.pattern))

    def row_wise(self, network: nn.Module) -> nn.Module:
        """Return the same network, on the same tensors, whose argument `perturbed_rows` (N,) bool says it for each row."""
        signature = signature_of(network)

        def forward(inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            flags = kwargs.pop(PERTURBED)
            torch._check(flags.shape[0] == _rows(args, kwargs))  # torch.export takes them for two sizes
            with self._by_row(network, flags):
                return inner(*args, **kwargs)

        return with_forward(network, forward, with_flag(signature, PERTURBED))

    @contextmanager
    def _by_row(self, network: nn.Module, flags: Tensor) -> Iterator[None]:
        modules = {network.get_submodule(path.rpartition(".")[0]) for path in self.objects}
        with placed(network, self.objects):
            forwards = {m: (vars(m).get("forward"), m.forward) for m in modules}
            for m, (_, forward) in forwards.items():
                m.forward = partial(_chosen, forward, self.pattern, flags)
            try:
                yield
            finally:
                for m, (before, _) in forwards.items():
                    del m.forward
                    if before is not None:
                        m.forward = before


def _chosen(
    forward: Callable[..., Any], pattern: Sequence[bool], flags: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Compute a module's rows in both ways, at places of a larger call where it does so, and choose by row."""
    rows = _rows(args, kwargs)
    many = partial(_repeated, rows=rows, times=len(pattern))
    found = forward(*pytree.tree_map(many, args), **pytree.tree_map(many, kwargs))
    per_row = flags[:, None].expand(-1, rows // flags.shape[0]).flatten()  # of frames, among others

    def chosen(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        parts = x.unflatten(0, (len(pattern), -1))
        flag = per_row.reshape(-1, *(1 for _ in x.shape[1:]))
        return torch.where(flag, parts[pattern.index(True)], parts[pattern.index(False)])

    return pytree.tree_map(chosen, found)


def _repeated(x: Any, *, rows: int, times: int) -> Any:
    has_rows = isinstance(x, Tensor) and x.dim() and statically_known_true(x.shape[0] == rows)
    return torch.cat([x] * times) if has_rows else x


def _rows(args: Any, kwargs: Any) -> int:
    """Return the number of rows of a module's call: that of its first tensor."""
    return next(x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim())


@contextmanager
def placed(network: nn.Module, objects: Held) -> Iterator[None]:
    """Put objects into a network's modules until exit."""
    places = {
        path: (network.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in objects
    }
    before = {path: getattr(m, name) for path, (m, name) in places.items()}
    try:
        for path, (m, name) in places.items():
            setattr(m, name, objects[path])
        yield
    finally:
        for path, (m, name) in places.items():
            setattr(m, name, before[path])


def held(network: nn.Module) -> Held:
    """Return the objects that a network's modules hold, such as attention processors, by the path of the attribute."""
    return {
        f"{path}.{name}": value
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if path and not name.startswith("_") and hasattr(value, "__dict__") and not _is_no_object(value)
    }


def _stored(value: Any, depth: int = 2) -> str:
    """Return the attribute of an object, or of those in it, that holds tensors; "" for none."""
    for name, inner in vars(value).items():
        if any(isinstance(x, Tensor) for x in pytree.tree_leaves(inner)):
            return str(name)
        if (
            depth
            and hasattr(inner, "__dict__")
            and not _is_no_object(inner)
            and (found := _stored(inner, depth - 1))
        ):
            return f"{name}.{found}"
    return ""


def _is_no_object(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, (type, Tensor, nn.Module))


class Watch:
    """Notes of what a pipeline has set in its network at each call, and only for the time of sampling.

    changes: for each call, the objects that are others than before and after the run. given: of the first module with
    such an object, the arguments of one call. seen: all objects that were not there before the run.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.before = network, held(network)
        self.changes: list[Held] = []
        self.seen: Held = {}
        self.given: tuple[Any, Any] | None = None

    def restore(self) -> None:
        """Put back what an error of the pipeline has left in the network."""
        now = held(self.network)
        for path, value in self.before.items():
            if now.get(path) is not value:
                owner, _, name = path.rpartition(".")
                setattr(self.network.get_submodule(owner), name, value)

    def perturbation(self) -> Perturbation | None:
        """Return what the pipeline sets; None for nothing. Raises TFMQError for what cannot be told row by row."""
        objects = next((found for found in self.changes if found), None)
        if objects is None or self.given is None:
            return None
        self.require(objects)
        path = next(iter(objects))
        if class_name(objects[path]) is None:
            raise TFMQError(
                f"calibration: the pipeline sets {path} to a {type(objects[path]).__name__} while it samples, which only its own "
                "code can compute; switch that off (pag_scale=0), or use a processor of diffusers."
            )
        found = Perturbation(objects, _pattern(self.network, path, objects, self.given))
        _require_row_wise(self.network, path, found, self.given)
        return found

    def require_no_store(self) -> None:
        """Raise TFMQError if the pipeline has set an object that keeps what the network computes, to read it from there."""
        for path, value in self.seen.items():
            if name := _stored(value):
                raise TFMQError(
                    f"calibration: the pipeline reads {path}.{name}, which its network computes on the way; a quantized network "
                    "has its outputs alone, so only pipelines without such attention maps can be recorded."
                )

    def require(self, objects: Held) -> None:
        """Raise TFMQError if a call had others set than these, or some of these."""
        for i, found in enumerate(self.changes):
            if found and (
                found.keys() != objects.keys() or any(found[p] is not x for p, x in objects.items())
            ):
                path = next((p for p in {**objects, **found} if objects.get(p) is not found.get(p)), "")
                raise TFMQError(
                    f"calibration: the pipeline sets {path} otherwise in call {i + 1} of the network than before; change its "
                    "arguments so that it stays the same while it samples (pag_scale=0 switches perturbed attention off)."
                )


@contextmanager
def watched(network: nn.Module) -> Iterator[Watch]:
    """Watch what is set in a network's modules while the context is open. Only what is as before at the end counts."""
    watch = Watch(network)
    before = watch.before

    def look(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        now = held(network)
        changed = {p: x for p, x in now.items() if p in before and before[p] is not x}
        watch.changes.append(changed)
        watch.seen.update(changed)
        if changed and watch.given is None:
            handles.append(_first_module(network, changed).register_forward_pre_hook(keep, with_kwargs=True))

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if watch.given is None:
            watch.given = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))

    handles = [network.register_forward_pre_hook(look, with_kwargs=True)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
        after = held(network)
        watch.changes = [{p: x for p, x in c.items() if after.get(p) is before[p]} for c in watch.changes]


def _first_module(network: nn.Module, objects: Mapping[str, Any]) -> nn.Module:
    return network.get_submodule(next(iter(objects)).rpartition(".")[0])


@torch.no_grad()
def _pattern(network: nn.Module, path: str, objects: Held, given: tuple[Any, Any]) -> tuple[bool, ...]:
    """Return for which of the equal parts of its rows a module computes something else, on rows that are all the same."""
    rows = _rows(*given)
    one = partial(_row_one, rows=rows)
    args, kwargs = pytree.tree_map(one, given)
    module = _first_module(network, objects)
    with placed(network, objects):
        found = next(x for x in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor))
    flat = found.float().flatten(1)
    other = ((flat - flat[:1]).norm(dim=1) > NOISE * flat[0].norm()).tolist()
    for parts in range(2, rows + 1):
        chunks = [other[i : i + rows // parts] for i in range(0, rows, rows // parts)]
        if rows % parts == 0 and all(len(set(chunk)) == 1 for chunk in chunks) and any(other):
            return tuple(chunk[0] for chunk in chunks)
    raise _no_rows(path)


def _row_one(x: Any, *, rows: int) -> Any:
    return x[:1].expand_as(x) if isinstance(x, Tensor) and x.dim() and x.shape[0] == rows else x


@torch.no_grad()
def _require_row_wise(network: nn.Module, path: str, found: Perturbation, given: tuple[Any, Any]) -> None:
    """Raise TFMQError unless a module computes for each row by itself what it does in a call."""
    module, flags = _first_module(network, found.objects), found.rows(_rows(*given))
    plain = module(*given[0], **given[1])
    with placed(network, found.objects):
        expected = module(*given[0], **given[1])
        made = _chosen(module.forward, found.pattern, flags.to(_device(given)), *given[0], **given[1])
    for x, y, z in zip(*map(pytree.tree_leaves, (expected, made, plain)), strict=True):
        near = (x - y).norm() <= NOISE * x.norm() and (x - z)[~flags].norm() <= NOISE * x.norm()
        if not near:
            raise _no_rows(path)


def _device(given: Any) -> torch.device:
    return next(x.device for x in pytree.tree_leaves(given) if isinstance(x, Tensor))


def _no_rows(path: str) -> TFMQError:
    return TFMQError(
        f"calibration: the pipeline sets {path} while it samples, so that a row depends on the other rows of its call, and "
        "cannot be calibrated by itself; switch that off (pag_scale=0 for perturbed attention)."
    )

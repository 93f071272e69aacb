"""Choose the integers of the weights: TIAR on the temporal block, then block by block, then all blocks together.

One walk of the graph keeps two streams, float and quantized. A block's input comes from the quantized stream, and its
target from the float stream. The network is never run again from the start.

Outside the temporal block the quantized stream has quantized weights and float activations, as in the papers, which
quantize activations after the weights. What rounding an activation does is noise: weights that are fitted to inputs with
noise are smaller than they should be (regression dilution), the same way in every step of a sampler. Tuning, which sees the
network's output alone, has both quantized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from tfmq_fx.base._torchao import FakeQuantizeBase
from tfmq_fx.base.ambient import neutral
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import Ranks, workers
from tfmq_fx.calibration.data import CalibrationSet, inputs_of
from tfmq_fx.calibration.temporal_rows import is_scalar, require_keys_only, run_temporal, temporal_rows
from tfmq_fx.graph.inputs import fixed_batch
from tfmq_fx.graph.nodes import mutated_inputs
from tfmq_fx.graph.state import set_state
from tfmq_fx.graph.written import keeps_buffers, roots, writing_nodes, written_buffers
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.pass_manager import declare
from tfmq_fx.passes.quantize.find_blocks import find_blocks
from tfmq_fx.passes.quantize.observed import observers, set_mode
from tfmq_fx.passes.quantize.plan import Note
from tfmq_fx.passes.quantize.results import BlockResult
from tfmq_fx.passes.quantize.state import require_stage, state_of, temporal_of
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal
from tfmq_fx.recipe import Reconstruction
from tfmq_fx.reconstruction.resume import Finished, fingerprint
from tfmq_fx.reconstruction.rounding import beside_activations
from tfmq_fx.reconstruction.run import Run
from tfmq_fx.reconstruction.streams import Outputs, Part, Streams
from tfmq_fx.reconstruction.tuning import Memory, NetworkStreams, float_outputs, tune, weights_to_tune
from tfmq_fx.reconstruction.walk import Walk


@declare(needs=("calibrate",))
@neutral()
@keeps_buffers
def reconstruct(
    gm: GraphModule,
    calibration: CalibrationSet,
    settings: Reconstruction | None = None,
    *,
    seed: int = 0,
    state: str | Path | None = None,
) -> GraphModule:
    """Choose the rounding of every quantized weight of a calibrated graph, in place, by `settings.method`.

    1. TIAR (TFMQ-DM, Temporal Information Aware Reconstruction): the whole temporal block at once, over all
       timesteps of the schedule, without data.
    2. The blocks of `find_blocks` in order, the input by quantized weights, the float target. A block whose learned
       rounding is no better than round-to-nearest on the calibration data keeps round-to-nearest.
    3. Unless settings.tune_iterations is 0, all blocks together, integers and scales, on the network's output
       (`tuning`). It is skipped, with a note in the plan, if it does not fit in settings.max_memory.

    With maintain="cache", the temporal block is skipped, and the other blocks see its float features, as they do at
    inference.

    settings: None takes those of the graph's recipe.
    state: a folder that keeps every finished block. After an interruption, the same call resumes from there and
        ends with the same integers. The folder is not removed; remove it once the result is saved.

    The results are in the graph's state (`state_of(gm).reconstruction`). Raises TFMQError if a loss becomes NaN,
    naming the block, and for a state folder that cannot be written or belongs to another run.
    """
    recipe = require_stage(gm, "calibrated").recipe
    settings = settings or recipe.reconstruction
    iterations = tune_iterations(settings)
    _refuse_written(gm, iterations)
    if settings.method == temporal_method(settings) == "nearest" and not iterations:
        return gm
    _refuse_writes_to_others(gm)
    ranks = Ranks()
    if settings.shards % ranks.size:
        settings = dataclasses.replace(settings, shards=-(-settings.shards // ranks.size) * ranks.size)
    finished = Finished(
        None if state is None else Path(state), fingerprint(gm, calibration.tensors, settings, seed), ranks
    )
    # Only integers and scales are learned. (Also, torch 2.11 crashes in a channels-last group norm's backward that is
    # asked only for its parameters' gradients.)
    frozen = [p for p in gm.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        results = []
        with workers(settings.shards) as threads, torch.no_grad():
            run = Run(settings, seed, finished, threads, ranks)
            # If the features will be looked up, the temporal block need not be learned, and the other blocks must
            # see the features that they will look up.
            cached = recipe.maintain == "cache"
            if _learnable(gm, temporal=False) and settings.method != "nearest":
                Walk(gm, calibration, run).require_disk()
            if temporal_method(settings) != "nearest" and _learnable(gm, temporal=True) and not cached:
                with run.naming("temporal_block"):
                    results.append(_reconstruct_temporal(gm, calibration, run))
            if _learnable(gm, temporal=False):
                with _in_float(_observers(gm, temporal=True) if cached else ()):
                    with _in_float(() if beside_activations(settings) else _activations(gm)):
                        blocks = Walk(gm, calibration, run).run() if settings.method != "nearest" else []
                    results += blocks
                    if iterations:
                        with run.naming("network (all blocks together)"):
                            results += _tune(gm, calibration, run, iterations, index=len(blocks) + 1)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    set_state(gm, dataclasses.replace(state_of(gm), stage="reconstructed", reconstruction=tuple(results)))
    return gm


def _refuse_written(gm: GraphModule, iterations: int) -> None:
    """Raise TFMQError if all blocks shall be tuned together, but the network updates a buffer at each call."""
    if iterations and (names := list(written_buffers(gm))):
        raise TFMQError(
            f"reconstruct: the network updates {names[0]} at each call, so its blocks cannot be tuned together; "
            "use Reconstruction(tune_iterations=0)."
        )


def _refuse_writes_to_others(gm: GraphModule) -> None:
    """Raise TFMQError if a block writes to a value from outside of it: it is run several times, and each would change the value again."""
    writing = writing_nodes(gm)
    block_of = {n: i for i, block in enumerate(find_blocks(gm) if writing else ()) for n in block.nodes}
    for node in writing:
        for root in roots(mutated_inputs(node)):
            apart = node in block_of and block_of[node] != block_of.get(root)
            if apart or root.op == "placeholder":
                raise TFMQError(
                    f"reconstruct: node {node.name} ({node.target}) changes {root.name} in place, which others read; capture the "
                    "network with tfmq_fx.capture, or use torch.export's run_decompositions({}), which has no such operators."
                )


@contextmanager
def _in_float(of: Iterable[FakeQuantizeBase]) -> Iterator[None]:
    """Turn off fake quantization in these observers while the context is open."""
    of = [o for o in of if o.fake_quant_enabled[0]]
    for observer in of:
        set_mode(observer, observe=False, quantize=False)
    try:
        yield
    finally:
        for observer in of:
            set_mode(observer, observe=False, quantize=True)


def _observers(gm: GraphModule, *, temporal: bool) -> Iterator[FakeQuantizeBase]:
    """Yield the observers of the temporal block, or all others."""
    inside = set(temporal_of(gm).nodes)
    yield from (o for n, o in observers(gm) if (n.name in inside) == temporal)


def _activations(gm: GraphModule) -> Iterator[FakeQuantizeBase]:
    """Yield the observers of activations outside the temporal block."""
    yield from (o for o in _observers(gm, temporal=False) if not isinstance(o, PerChannelWeightFakeQuantize))


def temporal_method(settings: Reconstruction) -> str:
    """Return the method for the temporal block: the one set, else GPTQ unless `method` is "nearest"."""
    return settings.temporal_method or ("nearest" if settings.method == "nearest" else "gptq")


def tune_iterations(settings: Reconstruction) -> int:
    """Return the iterations of tuning: the number set, else 400 unless `method` is "nearest"."""
    if settings.tune_iterations is not None:
        return settings.tune_iterations
    return 0 if settings.method == "nearest" else 400


def _learnable(gm: GraphModule, *, temporal: bool) -> bool:
    return any(isinstance(o, PerChannelWeightFakeQuantize) for o in _observers(gm, temporal=temporal))


def _reconstruct_temporal(gm: GraphModule, calibration: CalibrationSet, run: Run) -> BlockResult:
    """Run TIAR: L = sum_i || g_i(h(t)) - q(g_i)(q(h)(t)) ||_F^2 over all t of the schedule (TFMQ-DM, TIAR).

    If other inputs join the timestep, the sum is over all finite keys, and over sampled rows for inputs without a
    table.
    """
    block = extract_temporal(gm, temporal_of(gm))
    require_keys_only(gm, block)
    rows, scalar = temporal_rows(gm, calibration.tensors), is_scalar(gm)
    count, size = len(rows[state_of(gm).timestep]), run.settings.temporal_batch_size
    shuffled = torch.arange(count)
    if count > size:
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(run.seed))
    chunks, numbers = run.split(shuffled.split(size), run.settings.shards)
    parts = [{n: x[part] for n, x in rows.items()} for part in numbers]
    streams = Streams(
        block,
        lambda m, part, _: run_temporal(m, parts[part.index], scalar=scalar),
        chunks,
        workers=run.workers,
        ranks=run.ranks,
    )
    if run.settings.corrected is None:  # all its inputs are known: their errors are no noise
        run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, corrected=True))
    return run.choose(
        "temporal_block",
        0,
        streams,
        method=temporal_method(run.settings),
        iterations=run.settings.temporal_iterations,
        watch=True,  # the walk over the other blocks has its own progress bar
    )


def _affordable(gm: GraphModule, calibration: CalibrationSet, settings: Reconstruction) -> float:
    """Return how many steps of tuning settings.tune_flops pays for."""
    if settings.tune_flops is None:
        return math.inf
    batch = calibration.groups(settings.batch_size, one_timestep=is_scalar(gm))[0]
    count = len(batch) if fixed_batch(gm, calibration.without_rows) else 1
    with FlopCounterMode(display=False) as counter:
        gm(*inputs_of(gm, calibration.batch(batch[:count])))
    return settings.tune_flops // float(3 * counter.get_total_flops() * settings.batch_size / count)


def _tune(
    gm: GraphModule, calibration: CalibrationSet, run: Run, iterations: int, *, index: int
) -> list[BlockResult]:
    """Run `tuning.tune` on as many calibration rows as its iterations draw.

    If it costs more than settings.tune_flops, take fewer steps, and if it does not fit in memory, return no result.
    Either adds a note to the plan.
    """
    settings = run.settings
    affordable = _affordable(gm, calibration, settings)
    if affordable < iterations:
        left = f"{affordable:.0f} of {iterations} steps: more would cost over Reconstruction.tune_flops={settings.tune_flops:g}"
        set_state(gm, state_of(gm).with_notes(Note(name="tuning", reason=left, coarser=False)))
        iterations = int(affordable)
    if not iterations:
        return []
    drawn = calibration.draw(iterations * settings.batch_size, seed=run.seed)
    batches = calibration.groups(settings.batch_size, rows=drawn, one_timestep=is_scalar(gm))
    whole = fixed_batch(gm, calibration.without_rows)
    count = len(batches[0]) if whole else 1
    weights = weights_to_tune(gm)
    first = inputs_of(gm, calibration.batch(batches[0][:count]))
    memory = Memory.of(gm, first, count, weights, settings)
    # Each thread computes one part, and there are at most as many threads as shards.
    at_once = 1 if whole else settings.shards
    limit, least = settings.max_memory * 2**30, memory.needed(count * at_once)
    if least > limit:
        note = Note(
            name="tuning",
            reason=f"skipped: it needs {least / 2**30:.1f} GiB, but Reconstruction.max_memory is {settings.max_memory:g}",
            coarser=False,
        )
        set_state(gm, state_of(gm).with_notes(note))
        return []
    keep_targets = memory.needed(count * at_once, targets=len(drawn)) <= limit
    room = limit - memory.needed(0, targets=len(drawn) if keep_targets else 0)
    pieces = math.ceil(memory.row * settings.batch_size / max(room, 1))
    parts = 1 if whole else max(settings.shards * pieces, run.parts(gm, calibration.without_rows))

    def learn() -> BlockResult:
        chunks, rows = run.split(batches, parts)

        def outputs(module: GraphModule, part: Part, _quantized: bool) -> Outputs:
            return float_outputs(module(*inputs_of(gm, calibration.batch(rows[part.index]))))

        streams = NetworkStreams(
            gm,
            outputs,
            chunks,
            workers=run.workers,
            ranks=run.ranks,
            timesteps=calibration.row_timesteps[torch.cat(batches)],
            keep_targets=keep_targets,
        )
        return tune(streams, weights, settings, iterations, run.order(index, len(chunks)))

    return [run.once(index, gm, learn)]

"""Record a pipeline's calls of its denoiser: one trajectory per sample."""

from __future__ import annotations

import logging
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch

from tfmq_fx.artefact.interface import VARIANT
from tfmq_fx.base.arguments import Path as ArgumentPath
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_folder
from tfmq_fx.base.parallel import Ranks, workers
from tfmq_fx.base.progress import track
from tfmq_fx.calibration.calls import Constants, Leaves, UnlikeCallsError, flat
from tfmq_fx.calibration.rows import INDEX, Recording, Sink, read_recording, write_recording
from tfmq_fx.calibration.session import Session

log = logging.getLogger(__name__)

MAX_MEMORY = 4 * 2**30  # bytes; larger recordings go to memory-mapped files


def record(session: Session, *, deterministic: bool, cache: Path | None, max_memory: float) -> Recording:
    """Run the session, or read the recording of an equal session from `cache`.

    max_memory: bytes; larger recordings are memory-mapped files.
    """
    if cache is None:
        # On Linux, a mapped file stays readable after it is deleted.
        with tempfile.TemporaryDirectory(prefix="tfmq-rows-") as temporary:
            return _record(session, Path(temporary), deterministic=deterministic, limit=max_memory)
    folder = cache / session.key(deterministic=deterministic)
    ranks = Ranks()

    def write(part: Path) -> None:
        write_recording(_record(session, part, deterministic=deterministic, limit=-1), part)

    if not all(ranks.gather((folder / INDEX).is_file())):
        _require_plain(session, cache)
        if ranks.rank == 0:
            replace_folder(folder, write)
        else:
            _record(session, folder, deterministic=deterministic, limit=float("inf"))
        ranks.gather(None)  # the other ranks wait for the folder
    return read_recording(folder)


def _require_plain(session: Session, cache: Path) -> None:
    """Raise TFMQError if the pipeline sets objects in its network while it samples: JSON cannot keep them."""
    if (perturbation := session.preview.perturbation) is not None:
        raise TFMQError(
            f"calibration: cache={str(cache)!r} cannot keep what the pipeline sets while it samples "
            f"({next(iter(perturbation.objects))}); record without cache=."
        )


def _record(session: Session, folder: Path, *, deterministic: bool, limit: float) -> Recording:
    """Run the session, from the start each time that calls are found unlike."""
    session = session.without_objects()
    while True:
        try:
            return _run(session, folder, deterministic=deterministic, limit=limit)
        except UnlikeCallsError as error:
            session = session.learned(error)


def _run(session: Session, folder: Path, *, deterministic: bool, limit: float) -> Recording:
    ranks = Ranks()
    paths, marks = dict[str, ArgumentPath](), list[bool]()

    def take(calls: list[Leaves], conditional: list[bool]) -> None:
        shapes.see([flat(c) for c in calls], [session.size_of(flat(c)) for c in calls])
        if not paths:
            session.settle(calls[0], shapes)
        for call in calls:
            paths.update({n: path for n, (path, _) in call.items()})
            kind = session.take_constants(constants, call, shapes.shared)
            rows = session.rows(call, shapes)
            if constants.others:
                rows[VARIANT] = torch.full((session.size_of(flat(call)),), kind)
            sink.append(rows, session.moving_of(call))
        marks.extend(conditional)

    with workers(1) if deterministic else nullcontext():
        shapes, unguided = session.probe()
        if session.together > 1 and (why := session.misfit(shapes)):
            session = replace(session, batch_size=1)
            shapes, unguided = session.probe()
            if session.misfit(shapes):
                raise TFMQError(why)
            log.warning("%s So the pipeline draws one sample at a time", why)
        sink = Sink(folder, limit, even=session.even())
        # A whole run has all kinds of calls.
        others = session.constants_of(session.preview.calls, shapes.shared).others
        constants, found = Constants(session.defaults, others), []
        starts = ranks.share(range(0, session.num_samples, session.together))
        for start in track(starts, "recording trajectories"):
            if ranks.size > 1:
                found.append(session.batch(start, unguided))
            else:
                take(*session.batch(start, unguided))
    if ranks.size > 1:
        # The batches are dealt to the ranks in turn, so the first ranks may have one more.
        for batches in zip_longest(*ranks.gather(found)):
            for batch in batches:
                if batch is not None:
                    take(*batch)
    return Recording(
        rows=sink.finish(),
        constants=constants.values,
        paths=paths,
        conditional=torch.tensor(marks),
        repeats=shapes.repeats,
        folded=tuple(shapes.folded),
        perturbation=session.preview.perturbation,
        others=constants.others,
        row_lists=session.preview.lists,
        row_sizes=sink.row_sizes,
        stand_ins=session.stand_ins,
        idle=sorted(session.idle),
    )

"""Run one visible list of passes in order, after checking what each of them needs."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra import pass_manager
from torch.fx.passes.infra.pass_base import PassResult

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.graph.state import captured_of

log = logging.getLogger(__name__)
# What tidies a captured graph, in no order but before anything else.
CLEANING = (
    "bind_parameters", "inline_modules", "inline_regions", "remove_noops", "values_of_copies", "batch_rows", "keep_batch", "undo_joins", "literal_dtypes",
    "merge_variants", "root_batch_size", "linear_matmuls", "fold_parameters", "sink_repeats", "flatten_entries",
)  # fmt: skip
# What makes the float graph easier to quantize at few bits.
LOW_BITS = ("smooth", "rotate", "low_rank")
F = TypeVar("F", bound=Callable[..., Any])
_STAGES = {"prepared": ("prepare",), "calibrated": ("prepare", "calibrate")}
_STAGES["reconstructed"] = (*_STAGES["calibrated"], "reconstruct")


def declare(*, needs: Iterable[str] = (), after: Iterable[str] = ()) -> Callable[[F], F]:
    """Declare a pass's place in the order, by names of passes.

    needs: passes that must have run before it. after: passes that must not run later than it.
    """

    def mark(function: F) -> F:
        function.needs, function.after = tuple(needs), tuple(after)  # type: ignore[attr-defined]
        return function

    return mark


class PassManager(pass_manager.PassManager):
    """torch.fx's PassManager, for passes that return a PassResult, a GraphModule or nothing.

        PassManager([remove_noops, partial(prepare, recipe=recipe, timesteps=t), partial(calibrate, calibration=data), convert])

    Settings are bound with functools.partial. done: called with the name of each pass when it has run, as
    a clock wants to hear. `changed` has the names of those that changed something. Each pass runs once, and a graph that none of
    them changed is not compiled anew. Raises TFMQError listing every declared need that the order violates, before anything runs;
    a pass's own exception comes through as it is, with a note that names the pass.
    """

    def __init__(
        self, passes: Iterable[Callable[[GraphModule], Any]], *, done: Callable[[str], None] | None = None
    ) -> None:
        self.given, self.done = list(passes), done
        self.changed: list[str] = []
        super().__init__([self._logged(p) for p in self.given])

    @property
    def names(self) -> list[str]:
        """Return the names of the passes, in the order in which they run."""
        return [_name(_function(p)) for p in self.given]

    def add_pass(self, _pass: Callable[..., Any]) -> None:
        self.given.append(_pass)
        super().add_pass(self._logged(_pass))

    def __call__(self, module: nn.Module) -> PassResult:
        stage = captured_of(module).stage if isinstance(module, GraphModule) else ""
        violations = check_order(self.given, done=_STAGES.get(stage, ()))
        if violations:
            raise TFMQError("passes: " + "; ".join(violations) + ".")
        self.validate_constraints()
        modified = False
        for i, run in enumerate(self.passes):
            try:
                result = run(module)
            except Exception as error:
                error.add_note(f"passes: this was {self.names[i]}, after {self.names[:i]}.")
                raise
            assert result is not None
            module, modified = result.graph_module, modified or result.modified
        return PassResult(module, modified)

    def _logged(self, given: Callable[..., Any]) -> Callable[[nn.Module], PassResult]:
        name = _name(_function(given))

        def run(module: nn.Module) -> PassResult:
            before = len(module.graph.nodes) if isinstance(module, GraphModule) else 0
            result = given(module)
            if not isinstance(result, PassResult):
                result = PassResult(module if result is None else result, True)
            after = result.graph_module
            assert isinstance(after, GraphModule)
            if result.modified:  # not for nothing: it may have thousands of lines
                after.recompile()
                self.changed.append(name)
            log.info(
                "%s: %d -> %d nodes%s",
                name,
                before,
                len(after.graph.nodes),
                "" if result.modified else ", nothing to do",
            )
            if self.done is not None:
                self.done(name)
            return result

        return run


def check_order(passes: Iterable[Callable[..., Any]], *, done: Iterable[str] = ()) -> list[str]:
    """Return how this order violates the declared needs, one line each; [] if it does not.

    done: names of passes that ran earlier.
    """
    names = [_name(_function(p)) for p in passes]
    violations = []
    for i, given in enumerate(passes):
        function = _function(given)
        for other in getattr(function, "needs", ()):
            if other not in names[:i] and other not in done:
                violations.append(f"{names[i]} needs {other} before it")
        for other in getattr(function, "after", ()):
            if other in names[i + 1 :]:
                violations.append(f"{other} must come before {names[i]}")
    return violations


def rewrite_modules(gm: GraphModule, rewrite: Callable[[GraphModule], bool]) -> PassResult:
    """Apply `rewrite`, which returns True if it changed anything, to the graph and its submodules' graphs.

    A changed graph loses its dead code, and is linted and recompiled.
    """
    modified = False
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        if rewrite(module):
            module.graph.eliminate_dead_code()
            module.graph.lint()
            module.recompile()
            modified = True
    return PassResult(gm, modified)


def _function(given: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(given, functools.partial):
        given = given.func
    return given


def _name(function: Callable[..., Any]) -> str:
    return function.__name__ if inspect.isfunction(function) else type(function).__name__

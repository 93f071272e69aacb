"""Groups of options: every command shows the options it has always had, and gets them in groups."""

import ast
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from tests.helpers.command_line import run
from tfmq_fx import cli, pipeline
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.options import Choices, Drawn, Rows, Source, from_groups
from tfmq_fx.settings import Settings

GROUP: Any = typer.main.get_command(cli.app)
COMMANDS = GROUP.commands
PIPELINE = {
    "--model", "--scheduler", "--dtype", "--variant", "--device", "--argument", "--timestep", "--component",
    "--config",
}  # fmt: skip
DRAWN = {"--num-samples", "--steps", "--seed"}
OPTIONS = {
    "inspect": {
        "--model", "--recipe", "--input", "--weights", "--no-weights", "--timestep", "--component", "--json",
        "--argument",
    },
    "quantize": PIPELINE | DRAWN | {
        "output", "--recipe", "--iterations", "--tune-iterations", "--maintain", "--unseen", "--max-megabytes",
        "--calibration", "--captions", "--cache", "--finite", "--strict", "--no-strict", "--execution-device",
    },
    "precompute": PIPELINE | {"output", "--steps", "--finite", "--unseen", "--block"},
    "sample": PIPELINE | DRAWN | {"folder", "--output"},
    "evaluate": PIPELINE | DRAWN | {"folder", "--real", "--extractor", "--extractor-weights"},
    "report": PIPELINE | DRAWN | {"folder", "--output", "--nearest", "--no-nearest"},
    "export": {"folder", "target", "--format", "--strict", "--no-strict"},
}  # fmt: skip
DEFAULTS = {
    "quantize": {"recipe": "w4a8", "seed": 0, "strict": False},
    "precompute": {"steps": 50, "unseen": "float", "block": "cpu"},
    "sample": {"num_samples": 64, "steps": 50, "seed": 0, "output": Path("samples.png")},
    "evaluate": {"num_samples": 256, "steps": 50, "seed": 1},
    "report": {"num_samples": 16, "steps": 50, "seed": 1, "nearest": True},
}


def test_every_command_has_a_row_here():
    assert set(COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command(command):
    parameters = COMMANDS[command].params
    assert {name for p in parameters for name in (*p.opts, *p.secondary_opts)} == OPTIONS[command]
    given = {p.name: p.default for p in parameters if p.default is not None and not p.required}
    if command in DEFAULTS:
        assert given == DEFAULTS[command]
    assert all(p.help for p in parameters if p.name not in ("num_samples", "target"))


def called(monkeypatch, capsys, command, *args):
    """A command of its own on the command line."""
    app = typer.Typer()
    app.command()(from_groups(command))
    monkeypatch.setattr(cli, "app", app)
    return run(monkeypatch, capsys, *args)


def test_a_command_is_called_with_its_groups(monkeypatch, capsys):
    found = {}

    def command(
        place: Annotated[str, typer.Argument()],
        drawn: Drawn = Drawn(num_samples=3),  # noqa: B008
        source: Source = Source(),  # noqa: B008
        settings: Settings = Settings(strict=True),  # noqa: B008
        more: int = 1,
    ) -> None:
        found.update(locals())

    # `seed` is of two groups: that is refused, not overwritten in silence.
    with pytest.raises(ValueError, match="duplicate parameter name: 'seed'"):
        from_groups(command)

    def command(place: str, choices: Choices, rows: Rows, settings: Settings, more: int = 1) -> None:
        """Do it."""
        found.update(locals())

    options = ("--steps", 4, "--recipe", "w8a8", "--finite", "x=[1, 2]", "--finite", 'y=["a"]', "--seed", 7)
    assert called(monkeypatch, capsys, command, "here", *options, "--more", 5)[0] == 0
    assert found == {
        "found": found,
        "place": "here",
        "choices": Choices(recipe="w8a8"),
        "rows": Rows(steps=4),
        "settings": Settings(finite={"x": [1, 2], "y": ["a"]}, seed=7),
        "more": 5,
    }
    code, out, err = called(monkeypatch, capsys, command, "here", "--finite", "x")
    assert (code, out) == (2, "")
    assert "--finite 'x': use NAME=JSON" in err


def test_defaults_of_a_group_are_the_parameters_own(monkeypatch, capsys):
    found = []

    def command(drawn: Drawn = cli.EVALUATED) -> None:
        found.append(drawn)

    called(monkeypatch, capsys, command)
    called(monkeypatch, capsys, command, "--steps", 3)
    assert found == [cli.EVALUATED, dataclasses.replace(cli.EVALUATED, steps=3)]


def test_quantize_hands_on_every_setting(monkeypatch, capsys, tmp_path):
    found = {}

    def quantize(_pipe, _recipe, **given):
        found.update(given)
        raise TFMQError("enough")

    monkeypatch.setattr(pipeline, "quantize", quantize)
    options = ("--steps", 2, "--num-samples", 1, "--seed", 9, "--strict", "--finite", "x=[1]")
    assert run(monkeypatch, capsys, "quantize", tmp_path / "q", *options)[0] == 2
    assert len(found.pop("calibration")) == 2
    settings = Settings(finite={"x": [1]}, seed=9, strict=True, state=tmp_path / ".q.state")
    assert found == settings.arguments()


@pytest.mark.parametrize("command", [("quantize", "q"), ("sample", "q"), ("report", "q")])
def test_a_seed_that_torch_cannot_take_is_one_line(monkeypatch, capsys, command):
    code, out, err = run(monkeypatch, capsys, *command, "--seed", 10**30)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "seed: 1000000000000000000000000000000 is not a valid seed" in err


def test_settings_are_kept_as_they_are_and_checked_once():
    values = {"x": object()}
    settings = Settings(finite=values, state=Path("state"))
    assert settings.arguments()["finite"] is values
    assert list(settings.arguments()) == [f.name for f in dataclasses.fields(Settings)]
    for wrong, words in (
        ({"timestep": ""}, "timestep: ''"),
        ({"timestep": None}, "timestep: None"),
        ({"component": "a b"}, "component: 'a b'"),
        ({"finite": ["x"]}, "finite: list is not a mapping"),
        ({"seed": 1.5}, "seed: 1.5"),
        ({"seed": 2**43 + 1}, "seed: 8796093022209"),
    ):
        with pytest.raises(TFMQError, match=words):
            Settings(**wrong)
    assert Settings(seed=-(2**43)).seed == -(2**43)


def test_no_function_of_the_command_line_is_long():
    branches = (
        ast.If,
        ast.For,
        ast.While,
        ast.Try,
        ast.IfExp,
        ast.comprehension,
        ast.BoolOp,
        ast.ExceptHandler,
    )
    for name in ("cli", "options", "settings"):
        for node in ast.walk(ast.parse((Path(cli.__file__).parent / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, node.name
                assert sum(isinstance(inside, branches) for inside in ast.walk(node)) <= 20, node.name

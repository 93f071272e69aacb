"""Write the API pages from the docstrings: python -m benchmarks.api_page out/api"""

from __future__ import annotations

import argparse
from pathlib import Path

import pdoc

import tfmq_fx

MODULES = (
    "calibration.data", "calibration.pipelines", "calibration.presets", "calibration.recording", "calibration.stage",
    "capturing.network", "reconstruction.stage", "maintenance.stage", "bit_widths", "pipeline", "recipe", "model",
    "artefact.saving", "runtimes.lowering", "runtimes.exporting", "evaluation.errors", "evaluation.extractors",
    "evaluation.sampling", "report", "diffusers_quantizer", "base.metrics", "base.errors",
)  # fmt: skip


def write(output: Path) -> list[Path]:
    """Write one HTML page per module, and return the pages."""
    for name in tfmq_fx.__all__:  # tfmq_fx imports a name on first access
        getattr(tfmq_fx, name)
    modules = [f"tfmq_fx.{name}" for name in MODULES]
    pdoc.pdoc("tfmq_fx", *modules, output_directory=output)
    return sorted(output.rglob("*.html"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    pages = write(parser.parse_args().output)
    print(f"{len(pages)} pages in {pages[0].parent}")


if __name__ == "__main__":
    main()

"""Alter artefacts on disk."""

import json

from tfmq_fx.artefact.saving import CONFIG


def edit(file, change):
    """Alter a JSON file as its author would, which removes the config's own hash."""
    data = json.loads(file.read_text())
    change(data)
    if file.name == CONFIG and "quantization_config" in data:
        data["quantization_config"]["sha256"].pop(CONFIG, None)
    file.write_text(json.dumps(data))

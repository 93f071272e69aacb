"""Networks that others trained and published in wheels. Their weights are not kept in this repository."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def wheel_file(wheel: str, member: str, cache: Path) -> Path:
    """Return a file of a wheel, such as "name==1.0". The first call downloads the wheel by name from the package registry.

    member: the file's path in the wheel. cache: the folder that keeps the file.
    """
    file = cache / Path(member).name
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, wheel]
            subprocess.run(command, check=True)
            (downloaded,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(downloaded) as archive:
                file.write_bytes(archive.read(member))
    return file

"""Running a module of the demo in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def in_new_process(module: str, *arguments: str) -> dict[str, Any]:
    """The line of JSON that ``python -m module arguments`` prints at its end.

    Raises:
        RuntimeError: if the process fails; the message has its output.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])

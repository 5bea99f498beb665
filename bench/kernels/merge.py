"""``python -m bench.kernels.merge OUT PART...``: join the results of suites that were run one by one into one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.kernels.measure import summary_of_ceilings


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine of the first part with the commands of all, and the rows and ceilings of all parts."""
    rows = [row for part in parts for row in part["rows"]]
    not_timed = [row for part in parts for row in part["not_timed"]]
    machine = {**parts[0]["machine"], "command": "; ".join(part["machine"]["command"] for part in parts)}
    return {**parts[0], "machine": machine, "ceilings": summary_of_ceilings(rows), "rows": rows, "not_timed": not_timed}


def main(out: str, *paths: str) -> None:
    """Parts that do not exist are left out; without any, nothing is written.

    Raises:
        SystemExit: if there is no part.
    """
    found = [json.loads(Path(path).read_text()) for path in paths if Path(path).exists()]
    if not found:
        raise SystemExit(f"none of {', '.join(paths)} exists")
    Path(out).write_text(json.dumps(merged(found), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""``python -m bench.kernels.merge OUT PART...``: join the results of suites that were run one by one into one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.kernels.measure import summary_of_ceilings


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine of the first part with the commands of all, and the rows and ceilings of all parts."""
    rows = [row for part in parts for row in part["rows"]]
    not_timed = [row for part in parts for row in part["not_timed"]]
    machine = {**parts[0]["machine"], "command": "; ".join(part["machine"]["command"] for part in parts)}
    return {**parts[0], "machine": machine, "ceilings": summary_of_ceilings(rows), "rows": rows, "not_timed": not_timed}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    parts: Annotated[list[Path], typer.Argument(help="Files of bench.kernels.run; missing ones are left out.")],
) -> None:
    """Join the results of suites that were run one by one into one file."""
    found = [json.loads(path.read_text()) for path in parts if path.exists()]
    if not found:
        raise SystemExit(f"none of {', '.join(map(str, parts))} exists")
    out.write_text(json.dumps(merged(found), indent=1) + "\n")


if __name__ == "__main__":
    app()

"""``python -m bench.kernels.merge OUT PART...``: join results that were measured one by one into one file.

Cases that were measured again take the place of their earlier figures: OUT may be the first of the parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.kernels.measure import summary_of_ceilings


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine of the first part with the commands of all, and the rows and ceilings of all parts.

    Of a case that several parts have, the rows are those of the last one, and so is what could not be timed. "parts"
    has the command, commit and date of each part.
    """
    cases: dict[tuple[str, str | None, str], tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for part in parts:
        again = set()
        for at, kind in enumerate(("rows", "not_timed")):
            for row in part[kind]:
                case = (row["suite"], row.get("case"), row["dtype"])
                if case not in again:
                    again.add(case)
                    cases[case] = ([], [])
                cases[case][at].append(row)
    rows = [row for timed, _ in cases.values() for row in timed]
    not_timed = [row for _, failed in cases.values() for row in failed]
    machine = {**parts[0]["machine"], "command": "; ".join(part["machine"]["command"] for part in parts)}
    about = [{name: part["machine"].get(name) for name in ("command", "commit", "date")} for part in parts]
    found = {"machine": machine, "parts": about, "ceilings": summary_of_ceilings(rows), "rows": rows}
    return {**parts[0], **found, "not_timed": not_timed}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    parts: Annotated[list[Path], typer.Argument(help="Files of bench.kernels.run; missing ones are left out.")],
) -> None:
    """Join results that were measured one by one into one file."""
    found = [json.loads(path.read_text()) for path in parts if path.exists()]
    if not found:
        raise SystemExit(f"none of {', '.join(map(str, parts))} exists")
    out.write_text(json.dumps(merged(found), indent=1) + "\n")


if __name__ == "__main__":
    app()

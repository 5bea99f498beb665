"""Running a script in two processes that find each other with gloo."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

TESTS = Path(__file__).parents[1]


def run_in_two(script, folder, timeout=300):
    """What each of two processes has written to FOLDER/found<rank>.json, run as SCRIPT rank FOLDER."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes, logs = [], [folder / f"log{rank}" for rank in (0, 1)]
    try:
        for rank, log in enumerate(logs):
            with open(log, "wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(TESTS / "adapt" / script), str(rank), str(folder)],
                        env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                    )
                )  # fmt: skip
        for process, log in zip(processes, logs, strict=True):
            process.wait(timeout)
            assert process.returncode == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]


def meet(find, seconds=1800):
    """The script's part: meets the other process, and writes what ``find(mesh, folder, names)`` returns.

    Args:
        find: ``names`` is what the script was called with beside rank and folder.
        seconds: that a process waits for the other one.
    """
    rank, folder, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=datetime.timedelta(0, seconds)
    )
    found = find(init_device_mesh("cpu", (2,)), folder, names)
    dist.barrier()
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()

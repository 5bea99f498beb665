"""Running a script in two processes that find each other with gloo, and comparing what they learn with one process."""

import datetime
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import ids_of, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import ttt
from ttt.adapt.convert import learning_layers

TESTS = Path(__file__).parents[1]


def run_in_two(forks, script, folder, timeout=300):
    """What each of the two processes that SCRIPT becomes has written to FOLDER/found<rank>.json."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = forks.run([TESTS / "adapt" / script, folder], timeout, env=environment, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]


def meet(find, seconds=1800, torchrun=False):
    """The script's part: becomes two processes that meet, and write what ``find(mesh, folder, names)`` returns.

    The script imports what both need once, before it forks. It fails as soon as one of the two does.

    Args:
        find: ``names`` is what the script was called with beside the folder. Or a dict of functions of (mesh, folder),
            of which those with the ``names`` are called, or all.
        seconds: that a process waits for the other one.
        torchrun: set the variables of the environment that ``torchrun`` sets, which transformers reads.
    """
    folder, names = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    running = set()
    for rank in (0, 1):
        process = os.fork()
        if process == 0:
            if torchrun:
                os.environ |= {"WORLD_SIZE": "2", "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            _end_after(lambda rank=rank: _find_as(rank, find, folder, names, seconds))
        running.add(process)
    while running:
        process, status = os.wait()
        running.discard(process)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def _end_after(action):
    """End this process after ``action``, without what its parent would do at the end."""
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _find_as(rank, find, folder, names, seconds):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=datetime.timedelta(0, seconds)
    )
    mesh = init_device_mesh("cpu", (2,))
    if isinstance(find, dict):
        found = {name: find[name](mesh, folder) for name in names or find}
    else:
        found = find(mesh, folder, names)
    dist.barrier()
    (Path(folder) / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# -- what the processes compare ------------------------------------------------------------------------------------

LEARN = {"target_modules": ["down_proj", "up_proj"], "lr": 0.1, "window": 16, "chunk": 8, "replay_capacity": 32}
DEFAULT = ttt.TTTConfig().protect


def model_of(layers=2):
    torch.manual_seed(0)
    return tiny(layers=layers).double()


def whole(model):
    """All parameters, gathered, in clones."""
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for k, t in model.state_dict().items()}


def error_of(action):
    """The error of ``action``, as text."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def same_everywhere(tensors):
    """Whether all processes hold the same bits."""
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, tensors)
    return all(torch.equal(t, other[name]) for other in held for name, t in tensors.items())


def differences(one, two, bound=1e-9):
    """Names of what layers ``two`` hold otherwise than ``one``, relative to the largest element; "" is bits."""
    found = []
    for alone, layer in zip(one, two, strict=True):
        state = layer.state()
        gathered = layer.gathered(state)
        spread = {name for name, t in gathered.items() if t is not state[name]}
        if not same_everywhere({name: t for name, t in state.items() if name not in spread}):
            found.append(f"{layer.name}: bits differ between processes")
        for name, wanted in alone.state().items():
            got = gathered[name]
            assert got.shape == wanted.shape, (layer.name, name, got.shape, wanted.shape)
            if name.endswith(("basis", "factor")):  # directions have no sign
                got, wanted = got.T @ got, wanted.T @ wanted
            error = (got.double() - wanted.double()).abs().max() if got.numel() else torch.zeros(())
            if not error <= bound * wanted.double().abs().max():
                found.append(f"{layer.name}: {name} by {error:.2g} of {wanted.double().abs().max():.2g}")
    return found


def layers_of(learner):
    return [layer for _, layer in learning_layers(learner.model)]


def reads(one, two, ids, bound=1e-9, **options):
    """Let both read ``ids``: what differs."""
    wanted, got = (learner.observe(ids, **options) for learner in (one, two))
    error = float((wanted.nll - got.nll).abs().max())
    assert got.learned == wanted.learned > 0
    return ([] if error <= 1e-6 else [f"nll by {error:.2g}"]) + differences(layers_of(one), layers_of(two), bound)


def kept_of(learner):
    return [{name: t.clone() for name, t in layer.state().items()} for layer in layers_of(learner)]


def changed(learner, kept):
    """Names of what differs from ``kept``."""
    return [f"{layer.name}: {name} changed" for layer, state in zip(layers_of(learner), kept, strict=True)
            for name, t in layer.state().items() if not torch.equal(t, state[name])]  # fmt: skip


def goes_back_and_forth(one, two):
    """Let both read, consolidate, generate, go back and read again: what differs."""
    found = differences(layers_of(one), layers_of(two))
    for _ in range(3):
        found += reads(one, two, ids_of(2, 30))
    kept = [learner.snapshot() for learner in (one, two)]
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :7] = mask[1, 5:9] = False
    found += reads(one, two, ids_of(2, 30), learn_mask=mask, passes=2, emphasis=3.0)
    for learner in (one, two):
        learner.consolidate()
    found += reads(one, two, ids_of(1, 12))
    outputs = [learner.generate(ids_of(2, 9) * 0 + 5, max_new_tokens=12, learn_output=True) for learner in (one, two)]
    found += [] if torch.equal(outputs[0].sequences, outputs[1].sequences) else ["generated text"]
    found += differences(layers_of(one), layers_of(two))
    for learner, snapshot in zip((one, two), kept, strict=True):
        learner.rollback(snapshot)
    return found + reads(one, two, ids_of(2, 30))

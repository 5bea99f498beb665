"""Processes share a model by FSDP2, and all learn from what each of them reads.

Run it with ``torchrun --standalone --nproc-per-node 2 examples/several_processes.py``. With ``--users`` the processes
read the same text, and users with weights of their own learn from it.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import ttt
from ttt.demo import load_model

TEXTS = [b"The quick brown fox jumps over the lazy dog. ", b"SELECT name, price FROM items WHERE id > 7;  "]


def shard(model, mesh: DeviceMesh) -> None:  # an adapted model
    learns = (ttt.nn.Linear, ttt.nn.LowRankLinear)  # the second kind with `per_user`
    ignored = {p for m in model.modules() if isinstance(m, learns) for p in m.parameters()}
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def tokens_of(text: bytes) -> torch.Tensor:
    return torch.tensor([list((text * 20)[:601])])


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--users", action="store_true", help="users learn, from the same text in all processes")
users = parser.parse_args().users

dist.init_process_group("gloo")  # torchrun says how many processes there are; "nccl" with a GPU for each
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
model, config = load_model()  # or any Hugging Face causal language model
if users:
    config = ttt.TTTConfig(target_modules=["down_proj"], layers="last:2", per_user=ttt.LowRank(slots=2))
shard(ttt.adapt_(model, config), mesh)
learner = ttt.Learner(model, data_parallel=not users)
learner.calibrate([tokens_of(b"def add(a, b):\n    return a + b\n")])  # the same in all processes

text = tokens_of(TEXTS[0] if users else TEXTS[rank % len(TEXTS)])
whose = {"users": ["ann"]} if users else {}
before = learner.observe(text, learn=False, **whose).bits
learner.observe(text, **whose)
after = learner.observe(text, learn=False, **whose).bits
print(f"process {rank}: {before:.2f} bits per byte before, {after:.2f} after", flush=True)
dist.destroy_process_group()

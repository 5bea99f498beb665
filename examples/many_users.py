"""Users have weights of their own in one model; those who are away are kept in a store.

Run it with ``python examples/many_users.py``.
"""

import tempfile
from pathlib import Path

import torch

import ttt
from ttt.demo import load_model
from ttt.store import UnknownUser

TEXTS = {
    "ann": b"The quick brown fox jumps over the lazy dog. ",
    "ben": b"SELECT name, price FROM items WHERE price > 10; ",
    "cleo": b"<li><a href='index.html'>Back to the index</a></li> ",
}
tokens = {user: torch.tensor([list((text * 20)[:601])]) for user, text in TEXTS.items()}

model, _ = load_model()  # or any Hugging Face causal language model
low_rank = ttt.LowRank(slots=2, rank=16)  # memory for two users at a time
ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:2", per_user=low_rank))
learner = ttt.Learner(model)
learner.calibrate([torch.tensor([*Path(torch.__file__).read_bytes()[:2048]]).view(4, 512)])
pool = ttt.pool_of(model)

with tempfile.TemporaryDirectory() as folder, ttt.Store(folder) as store:

    def to_store(user: str, state: dict[str, torch.Tensor]) -> None:
        with store.lease(user) as lease:  # no other process may write this user's weights meanwhile
            store.put(lease, state)
        print(f"  {user} leaves memory: {sum(t.nbytes for t in state.values())} bytes go to the store")

    def from_store(user: str) -> dict[str, torch.Tensor] | None:
        try:
            state = store.get(user).tensors
        except UnknownUser:
            return None  # a new user begins with the model as it is
        print(f"  {user} comes back from the store")
        return state

    pool.on_evict, pool.on_miss = to_store, from_store

    print("Ann and Ben learn in one batch, then Cleo:")
    learner.observe(torch.cat([tokens["ann"], tokens["ben"]]), users=["ann", "ben"])
    learner.observe(tokens["cleo"], users=["cleo"])
    print(f"  in memory: {pool.users}, in the store: {[user.name for user in store.users()]}")
    print("Bits per byte of Ann's text, and of Ben's:")
    for user in (None, "ann", "ben", "cleo"):
        bits = [learner.observe(tokens[text], learn=False, users=[user]).bits for text in ("ann", "ben")]
        print(f"  read with the weights of {user or 'nobody':6} {bits[0]:.2f}, {bits[1]:.2f}")
    print("Ann is forgotten, in memory and in the store:")
    if "ann" in pool.users:
        pool.forget("ann")
    store.forget("ann")
    bits = learner.observe(tokens["ann"], learn=False, users=["ann"]).bits
    print(f"  her text, read with the weights of a new user: {bits:.2f}")

"""The registry: for each suite its cases, each with inputs, contenders, `bytes` and `flops`.

A case rotates among as many layers as make ``POOL`` bytes, so that weights come from memory as they do in a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ttt
from ttt.nn import Linear, Update
from ttt.ops import reference

POOL = 1_600_000_000


@dataclasses.dataclass
class Case:
    """One row group of the table.

    ``contenders`` run ``repeats`` units of work each; ``bytes`` and ``flops`` are those one unit of ours must move
    and make; ``baseline`` is the contender that ratios refer to. ``check`` raises if a contender is wrong.
    """

    suite: str
    name: str
    dtype: str
    contenders: dict[str, Callable[[], None]]
    repeats: int
    bytes: int
    flops: int
    baseline: str
    check: Callable[[], None]
    unit: str = "call"
    repeats_of: dict[str, int] = dataclasses.field(default_factory=dict)  # where a contender makes fewer


def layer_count(bytes_per_layer: int) -> int:
    return max(2, -(-POOL // bytes_per_layer))


# -- commit -------------------------------------------------------------------------------------------------------


def plain_commit(s: dict[str, Tensor], x: Tensor, delta: Tensor, eta: Tensor, lam: float) -> None:
    """The commit as one writes it in plain torch (no replay rows), with stochastic rounding for bfloat16."""
    wide = torch.float32
    g = (delta.to(wide) * eta.unsqueeze(1)).T @ x.to(wide)
    squares = delta.to(wide).square().T @ x.to(wide).square()
    w = s["weight"].to(wide)
    a = s["importance"].to(wide) * (lam * eta.sum())
    w = w - (g + a * (w - s["anchor"].to(wide))) / (1 + a)
    _store(s["weight"], w)
    _store(s["trace"], s["trace"].to(wide) + squares)


def _store(target: Tensor, value: Tensor) -> None:
    if target.dtype == torch.bfloat16:
        noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
        value = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
    target.copy_(value)


def commit_cases(device: str) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for d, tokens, rows in ((1024, 1, 0), (1024, 16, 4), (4096, 1, 0), (4096, 16, 0), (4096, 16, 4), (4096, 64, 4)):
            yield _commit_case(device, dtype, d, d, tokens, rows)


def _commit_case(device: str, dtype: torch.dtype, m: int, n: int, tokens: int, rows: int) -> Case:
    size, lam = torch.finfo(dtype).bits // 8, 0.01
    count = layer_count(4 * m * n * size)

    def state() -> dict[str, Tensor]:
        w = torch.randn(m, n, device=device) * 0.02
        made = {"weight": w, "anchor": w + 1e-3, "importance": torch.rand_like(w), "trace": torch.rand_like(w)}
        return {k: v.to(dtype) for k, v in made.items()}

    layers = [state() for _ in range(count)]
    x = torch.randn(tokens, n, device=device).to(dtype)
    delta = (torch.randn(tokens, m, device=device) * 1e-2).to(dtype)
    eta = torch.full((tokens,), 5e-3, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    memory = torch.randn(256, n, device=device).to(dtype) if rows else None
    seen = torch.tensor([256], device=device) if rows else None

    def ours(s: dict[str, Tensor]) -> None:
        ttt.ops.commit(**s, x=x, delta=delta, eta=eta, step=step, lam=lam, memory=memory, seen=seen, replay_rows=rows)

    def run(one: Callable[[dict[str, Tensor]], None], some: list[dict[str, Tensor]]) -> Callable[[], None]:
        def over_layers() -> None:
            for s in some:
                one(s)

        return over_layers

    contenders, repeats_of = {"ttt": run(ours, layers)}, {}
    if not rows:
        # So slow that three layers, far more than a cache, are enough.
        contenders["plain torch"] = run(lambda s: plain_commit(s, x, delta, eta, lam), layers[:3])
        repeats_of["plain torch"] = len(layers[:3])

    def check() -> None:
        start = state()
        exact = {k: v.double() for k, v in start.items()}
        more = (memory.double(), seen) if rows else (None, None)
        reference.commit(
            *exact.values(), x.double(), delta.double(), eta.double(), None, *more, step.clone(), 0, rows,
            "projection", 0.3, 1e-3, lam, 1.0, "fisher",
        )  # fmt: skip
        for name, one in (("ttt", ours), ("plain torch", lambda s: plain_commit(s, x, delta, eta, lam))):
            if name not in contenders:
                continue
            got = {k: v.clone() for k, v in start.items()}
            one(got)
            for key in ("weight", "trace"):
                error = float((got[key].double() - exact[key]).norm() / exact[key].norm())
                allowed = 1e-5 if dtype == torch.float32 else 2**-7  # one stochastic rounding
                if not error <= allowed:
                    raise AssertionError(f"{name}: {key} is off by {error:.2e}, allowed {allowed:.2e}")

    # W and F read and written, W* and Omega read.
    moved = 6 * m * n * size + (tokens * (m + n) + rows * n) * size
    flops = m * n * (4 * tokens + 4 * rows)
    name = f"{m}x{n}, T = {tokens}, R = {rows}"
    baseline = "ttt" if rows else "plain torch"
    return Case("commit", name, _short(dtype), contenders, count, moved, flops, baseline, check, repeats_of=repeats_of)


# -- decode -------------------------------------------------------------------------------------------------------


def decode_cases(device: str) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for d in (512, 4096):
            for window in (16, 64):
                yield _decode_case(device, dtype, d, d, window)


def _decode_case(device: str, dtype: torch.dtype, m: int, n: int, window: int) -> Case:
    size = torch.finfo(dtype).bits // 8
    config = ttt.TTTConfig(lr=1e-4, window=window, ewc_lambda=0.01, replay_rows=0)
    count = layer_count(4 * m * n * size)
    layers = [Linear(n, m, bias=False, device=device, dtype=dtype, config=config, name=str(i)) for i in range(count)]
    plain = [torch.nn.Linear(n, m, bias=False, device=device, dtype=dtype) for _ in range(layer_count(m * n * size))]
    x = torch.randn(1, n, device=device).to(dtype)
    delta = (torch.randn(1, m, device=device) * 1e-3).to(dtype)
    true = torch.tensor(True, device=device)
    update = Update(x, delta, torch.full((1,), 1e-4, device=device), None, true)
    for i, layer in enumerate(layers):  # windows at all stages of filling
        for _ in range(i * window // count):
            layer.learn(update)

    passes = window  # so that every layer commits once in each round
    tokens = passes * count

    @torch.no_grad()
    def ours() -> None:
        for _ in range(passes):
            for layer in layers:
                layer(x)
                layer.learn(update)

    @torch.no_grad()
    def linear() -> None:
        for i in range(tokens):
            plain[i % len(plain)](x)

    def check() -> None:
        layer = layers[0]
        with torch.no_grad():
            got, expected = layer(x).float(), torch.nn.functional.linear(x.float(), layer.effective_weight().float())
        error = float((got - expected).norm() / expected.norm())
        allowed = 1e-5 if dtype == torch.float32 else 2**-6
        if not error <= allowed:
            raise AssertionError(f"the layer's output is off by {error:.2e}, allowed {allowed:.2e}")

    moved = int(m * n * size * (1 + 6 / window)) + window * (m + n) * size
    flops = 2 * m * n + 4 * m * n
    contenders = {"ttt": ours, "nn.Linear": linear}
    return Case(
        "decode",
        f"{m}x{n}, window {window}",
        _short(dtype),
        contenders,
        tokens,
        moved,
        flops,
        "nn.Linear",
        check,
        "token",
    )


# -- observe ------------------------------------------------------------------------------------------------------


def observe_cases(device: str) -> Iterator[Case]:
    from ttt.demo.model import as_ids, load_model
    from ttt.demo.run import calibration_batches
    from ttt.demo.text import stream_of

    ids = as_ids(stream_of("english"))[:, : 512 * 4 + 1].to(device)
    for chunk in (64, 128):
        model, config = load_model()
        frozen, _ = load_model()
        model, frozen = model.to(device), frozen.to(device)
        ttt.adapt_(model, dataclasses.replace(config, chunk=chunk))
        learner = ttt.Learner(model, context=512)
        learner.calibrate([b.to(device) for b in calibration_batches()[:2]])

        @torch.no_grad()
        def forward(chunk: int = chunk, frozen: torch.nn.Module = frozen) -> None:
            for start in range(0, ids.shape[1] - 1, 512):
                cache = None
                for at in range(start, start + 512, chunk):
                    cache = frozen(
                        input_ids=ids[:, at : at + chunk], past_key_values=cache, use_cache=True
                    ).past_key_values

        def ours(learner: ttt.Learner = learner) -> None:
            learner.observe(ids)

        def check(learner: ttt.Learner = learner) -> None:
            seen = learner.observe(ids)
            if seen.rejected or not bool(torch.isfinite(seen.nll).all()):
                raise AssertionError(f"observe rejected {seen.rejected} chunks")

        tokens = ids.shape[1] - 1
        parameters = sum(p.numel() for p in frozen.parameters())
        yield Case(
            "observe", f"demo model, chunks of {chunk}", "float32", {"observe": ours, "forward": forward}, tokens,
            parameters * 4 // chunk, 2 * parameters, "forward", check, "token",
        )  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


SUITES: dict[str, Callable[[str], Iterator[Case]]] = {
    "commit": commit_cases,
    "decode": decode_cases,
    "observe": observe_cases,
}

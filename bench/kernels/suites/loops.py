"""Suite ``loops``: common ways to let a model learn from the text it reads, on the same chunk of tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ttt
from bench.kernels import models
from bench.kernels.case import Case
from bench.kernels.contender import Contender, Unavailable
from bench.kernels.state import LEARNS, assert_change
from bench.kernels.suites.observe import LLAMA

LR = 1e-4


@dataclasses.dataclass(frozen=True)
class Loop(Case):
    """A step on one chunk of ``tokens``: compute its loss, then learn from it. Times are per token."""

    suite = "loops"
    unit = "token"
    ours = "observe"
    baseline = forward = "forward"

    model: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{'demo model' if self.model == 'demo' else self.model}, {self.tokens} tokens"

    @property
    def ceiling(self) -> str | None:
        return None

    def bytes(self, contender: str) -> int | None:
        return None

    def flops(self, contender: str) -> int | None:
        """2 per parameter for the forward pass; 4 more for a full backward pass, 2 more if weights are frozen."""
        model = models.frozen(self.model, self.device, self.dtype)
        share = {"forward": 2, "AdamW": 6, "SGD in hooks": 6, "dynamic evaluation": 6, "LoRA": 4}.get(contender)
        return share and share * models.parameters_of(model)

    def ceilings(self) -> dict[str, Callable[[], Contender]]:
        return {}

    def contenders(self) -> dict[str, Callable[[], Contender]]:
        ids = models.tokens(self.model, self.tokens + 1, self.device)
        known = models.tokens(self.model, 4 * 65, self.device, skip=self.tokens + 1).view(4, 65)

        def fresh() -> nn.Module:
            return models.load(self.model, self.device, self.dtype)

        def contender(step: Callable[[], object], check: Callable[[], None]) -> Contender:
            return Contender(step, check, units=self.tokens, graph=False)

        def forward() -> Contender:
            model = models.frozen(self.model, self.device, self.dtype)

            @torch.no_grad()
            def run() -> Tensor:
                return loss_of(model, ids)

            return contender(run, lambda: None)

        def trained(make: Callable[[nn.Module, Tensor], Loops]) -> Callable[[], Contender]:
            return lambda: contender(*make(fresh(), ids))

        return {
            "observe": trained(observe),
            "forward": forward,
            "AdamW": trained(adamw),
            "SGD in hooks": trained(sgd_in_hooks),
            "LoRA": trained(lora),
            "dynamic evaluation": trained(lambda model, ids: dynamic_evaluation(model, ids, known)),
        }


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss in nats per token of ``ids`` (1, T + 1)."""
    logits = model(input_ids=ids[:, :-1]).logits[0].float()
    return cross_entropy(logits, ids[0, 1:])


def _tolerance(p: Tensor) -> float:
    """Allowed error of a change, relative to one computed in float64 from the gradients of a separate backward pass."""
    return 1e-3 if p.dtype == torch.float32 else 0.5


def check_step(
    model: nn.Module, ids: Tensor, step: Callable[[], object], expected: Callable[[str, Tensor, Tensor], Tensor]
) -> None:
    """Check that one step changes parameters to ``expected(name, parameter, gradient)``, and three lower the loss."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = list(before)
    loss = loss_of(model, ids)
    gradients = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    step()
    for name, p in model.named_parameters():
        start, gradient = before[name].double(), gradients[name].double()
        exact = expected(name, start, gradient)
        if float((exact - start).norm()) > 0:
            # Adding a small change to a weight near 1 rounds it.
            rounding = float(torch.finfo(p.dtype).eps * start.norm() / (exact - start).norm())
            assert_change(name, p.detach(), exact, start, _tolerance(p) + rounding)
    _goes_down(lambda: loss_of(model, ids), step)


def _goes_down(loss: Callable[[], Tensor], step: Callable[[], object], steps: int = 3) -> None:
    first = float(loss().detach())
    for _ in range(steps):
        step()
    last = float(loss().detach())
    if not last < first:
        raise AssertionError(f"the loss on the same text went from {first} to {last}")


# -- the loops: each takes a new model and ids (1, T + 1), and returns (step, check) --------------------------------

Loops = tuple[Callable[[], object], Callable[[], None]]


def observe(model: nn.Module, ids: Tensor) -> Loops:
    """`ttt.Learner.observe` with the options `LEARNS`; ``down_proj`` learns in the last quarter of the blocks."""
    learner: ttt.Learner
    tokens = ids.shape[1] - 1
    config = LEARNS.with_flat(target_modules=["down_proj"], layers="last:0.25", chunk=tokens)

    def check() -> None:
        """A step without protection must be SGD on autograd's gradients; steps with protection must lower the loss."""
        learner.reset()
        plain = copy.deepcopy(ttt.restore_(model)).requires_grad_(True)
        ttt.adapt_(model, config.with_flat(ewc_lambda=0.0, replay_rows=0))
        unprotected = ttt.Learner(model)
        unprotected.observe(ids)
        unprotected.flush()
        (loss_of(plain, ids) * tokens).backward()
        for name, layer in ttt.learning_layers(model):
            before = plain.get_parameter(f"{name}.weight")
            assert before.grad is not None
            exact = before.double() - config.lr * before.grad.double()
            assert_change(name, layer.weight, exact, before, _tolerance(before))
        unprotected.reset()
        ttt.adapt_(ttt.restore_(model), config)
        start()
        first, second = learner.observe(ids), learner.observe(ids)
        if first.rejected or second.rejected or not second.bits < first.bits:
            raise AssertionError(f"{first.bits} bits, then {second.bits}")

    def start() -> None:
        nonlocal learner
        learner = ttt.Learner(model)
        learner.calibrate([ids])

    ttt.adapt_(model, config)
    start()
    return lambda: learner.observe(ids), check


def adamw(model: nn.Module, ids: Tensor) -> Loops:
    """Fine-tuning of every parameter with fused AdamW."""
    decay, eps = 0.01, 1e-8
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=decay, eps=eps, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()

    def expected(name: str, p: Tensor, gradient: Tensor) -> Tensor:
        """The first step, where the bias-corrected moments are the gradient and its square."""
        return p * (1 - LR * decay) - LR * gradient / (gradient.abs() + eps)

    return step, lambda: check_step(model, ids, step, expected)


def sgd_in_hooks(model: nn.Module, ids: Tensor) -> Loops:
    """SGD on every parameter, in a hook that updates it as soon as its gradient is complete, and frees the gradient."""
    rate = 100 * LR

    @torch.no_grad()
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        p.add_(p.grad, alpha=-rate)
        p.grad = None

    def step() -> None:
        loss_of(model, ids).backward()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)

    def check() -> None:
        check_step(model, ids, step, lambda name, p, gradient: p - rate * gradient)

    return step, check


def lora(model: nn.Module, ids: Tensor) -> Loops:
    """PEFT's LoRA adapters of rank 8 on the layers that `observe` adapts, trained with fused AdamW."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise Unavailable("peft is not installed") from None
    blocks = len(model.model.layers)  # type: ignore[union-attr, arg-type]
    which = list(range(blocks - -(-blocks // 4), blocks))
    config = LoraConfig(r=8, target_modules=["down_proj"], layers_to_transform=which)
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    learning = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=10 * LR, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(adapted, ids).backward()
        optimizer.step()

    def check() -> None:
        """The loss must decrease, and only the adapters may change."""
        frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
        before = [p.detach().clone() for p in learning]
        _goes_down(lambda: loss_of(adapted, ids), step)
        if not all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen):
            raise AssertionError("a frozen parameter was written")
        if any(torch.equal(p, q) for p, q in zip(learning, before, strict=True)):
            raise AssertionError("an adapter did not learn")

    return step, check


def dynamic_evaluation(model: nn.Module, ids: Tensor, known: Tensor) -> Loops:
    """Dynamic evaluation (Krause et al. 2018) of every parameter: the RMS rule with decay to the prior::

        p <- p - eta g / (sqrt(MS) + eps) + min(lam sqrt(MS) / mean(sqrt(MS)), 1) (p_0 - p)

    p_0 is the parameter before learning. MS is its mean squared gradient on the rows of ``known`` (N, T), text that the
    model was trained on; mean(sqrt(MS)) is over all parameters of the model.
    """
    eta, lam, eps = LR / 10, 2e-3, 1e-5
    named = dict(model.named_parameters())
    prior = {name: p.detach().clone() for name, p in named.items()}
    rms = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in known:
        model.zero_grad()
        loss_of(model, row.view(1, -1)).backward()
        for name, p in named.items():
            rms[name] += p.grad.square() / len(known)  # type: ignore[union-attr]
    for t in rms.values():
        t.sqrt_()
    mean = sum(float(t.sum(dtype=torch.float64)) for t in rms.values()) / sum(t.numel() for t in rms.values())
    decay = {name: (lam / mean * t).clamp_max_(1) for name, t in rms.items()}
    model.zero_grad()

    def step() -> None:
        model.zero_grad()
        loss_of(model, ids).backward()
        with torch.no_grad():
            for name, p in named.items():
                change = p.grad.div_(rms[name] + eps).mul_(-eta)  # type: ignore[union-attr]
                p.add_(change.addcmul_(decay[name], prior[name] - p))

    def expected(name: str, p: Tensor, gradient: Tensor) -> Tensor:
        pull = (lam * rms[name].double() / mean).clamp_max(1) * (prior[name].double() - p)
        return p - eta * gradient / (rms[name].double() + eps) + pull

    def check() -> None:
        """Check a step that starts away from the prior, so that the decay to it has an effect."""
        with torch.no_grad():
            for name, p in named.items():
                p.add_(prior[name], alpha=1e-3)
        check_step(model, ids, step, expected)

    return step, check


def cases(device: str) -> list[Case]:
    """A chunk of 64 tokens: the demo model, and a Llama of 134 M parameters."""
    return [Loop(device, "float32", "demo", 64, quick=True), Loop(device, "float32", LLAMA, 64)]

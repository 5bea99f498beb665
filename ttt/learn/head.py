"""The output head: scores from logits, and the loss's gradient at the hidden states without autograd's temporaries.

The vocabulary projection is a model's largest matrix. With p = softmax(h W^T), the gradient of a token's loss is

    dL/dh = sum_j (p_j - [j = target]) W_j

and most p_j are close to 0. Leaving out a set of rows whose p_j sum to q changes the gradient by at most q max_j |W_j|:
`input_gradient` uses, for each token, its target's row and the rows above a threshold, for which q <= ``mass`` has been
verified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.weak import WeakIdKeyDictionary

from ttt.adapt.training import other_hooks
from ttt.learn.attention import kernel_attention
from ttt.nn.row_blocks import is_subclass
from ttt.ops import cpu
from ttt.ops.backends import record
from ttt.ops.dtypes import accumulation

_SAMPLE = 2048  # columns of the logits in which thresholds are searched
_SMALL = 4096  # size of a vocabulary below which picking rows costs more than it saves
# The kernels take about as long for this many times the vocabulary's rows, each counted once for each token, as the
# exact product (49152 x 576 on Zen 5: 5 and 13 times for 64 tokens in bfloat16 and float32, 10 and 11 for 16).
_WORTH = 8


@dataclasses.dataclass
class Scores:
    """N tokens scored under the logits of V words.

    Attributes:
        nll: (N,) nats.
        highest: (N,), the largest logit of each.
        total: (N,), the row sums of ``exp``.
        targets: (N,) int64.
        logits: (N, V), unchanged, where kernels made the scores; else None.
    """

    nll: Tensor
    highest: Tensor
    total: Tensor
    targets: Tensor
    logits: Tensor | None = None
    _exp: Tensor | None = None

    @property
    def exp(self) -> Tensor:
        """(N, V), exp(logits - ``highest``)."""
        if self._exp is None:
            assert self.logits is not None
            self._exp = (self.logits.float() - self.highest.unsqueeze(1)).exp_()
        return self._exp


@torch.no_grad()
def score(logits: Tensor, targets: Tensor) -> Scores:
    """Score ``targets`` (N,) int64 under ``logits`` (N, V), which may be overwritten if they are float32 or float64."""
    logits = logits.detach()
    if cpu.takes(logits) and targets.dtype == torch.int64 and targets.shape == logits.shape[:1]:
        nll, highest, total = cpu.head_scores(logits, targets)
        return Scores(nll, highest, total, targets, logits)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    at = targets.unsqueeze(1)
    highest = logits.amax(1, keepdim=True)
    wanted = logits.gather(1, at) - highest
    exp = logits.sub_(highest).exp_()
    total = exp.sum(1)
    return Scores(total.log() - wanted[:, 0], highest[:, 0], total, targets, None, exp)


@torch.no_grad()
def input_gradient(
    scores: Scores, weight: Tensor, wanted: Tensor | None = None, mass: float = 0.0, apart: bool = False
) -> Tensor:
    """The gradient of the summed loss at the head's input. ``scores`` is overwritten.

    Args:
        weight: (V, d), the head's.
        wanted: (N,) bool: the tokens whose loss counts; None for all.
        mass: bound on the total probability of the words that are left out, for each token; 0 leaves out none. The
            mean row of ``weight`` stands for them, so row t of the result differs from the exact one by at most
            ``mass`` times the largest distance of a row from it. Where many rows are needed, and on a GPU, the exact
            product is faster, and is computed instead.
        apart: which words are left out for a token must not depend on the other tokens. Only kernels choose them like
            that, however many they are (of a flat distribution nearly all, which takes longer than the exact product);
            where these do not apply, none are left out.

    Returns:
        (N, d), of the dtype of ``weight``.
    """
    small = weight.shape[0] < _SMALL
    # On a GPU the exact product takes a quarter of the time that picking the rows does.
    if not small and mass != 0 and not weight.is_cuda:
        gradient = _from_rows(scores, weight, wanted, mass, apart)
        if gradient is not None:
            record("head_gradient", "rows")
            return gradient
    why = "few words" if small else "no kernel" if apart else "more rows matter than are worth picking"
    record("head_gradient", "dense", "" if mass == 0 or weight.is_cuda else why)
    scale = _scale(scores, wanted)
    # The target is subtracted in float32: 1 - p would be lost in a product with 16-bit p.
    scores.exp.scatter_add_(1, scores.targets.unsqueeze(1), -scores.total.unsqueeze(1))
    return _product(scores.exp.mul_(scale.unsqueeze(1)).to(weight.dtype), weight)


def _scale(scores: Scores, wanted: Tensor | None) -> Tensor:
    return 1 / scores.total if wanted is None else torch.where(wanted, 1 / scores.total, 0.0)


def rows_read(scores: Scores, weight: Tensor, mass: float) -> int | None:
    """How many rows of ``weight`` `input_gradient` reads, counted for each token; None for the exact product."""
    if _by_kernels(scores, weight):
        return _kernel_gradient(scores, weight, None, mass, False)[1]
    found = _matter(scores, mass)
    return None if found is None else len(found[0])


def _by_kernels(scores: Scores, weight: Tensor) -> bool:
    return scores.logits is not None and cpu.takes(scores.logits, weight.detach())


def _kernel_gradient(
    scores: Scores, weight: Tensor, wanted: Tensor | None, mass: float, apart: bool
) -> tuple[Tensor | None, int | None]:
    """`input_gradient` by kernels, and the number of rows it is made of; None and None for the exact product."""
    assert scores.logits is not None
    tokens, words = scores.logits.shape
    most = words * (tokens if apart else min(tokens, _WORTH))
    gradient, rows = cpu.head_gradient(
        scores.logits,
        weight.detach(),
        mean_row(weight),
        scores.targets,
        wanted,
        scores.highest,
        scores.total,
        mass,
        most,
    )
    return (None, None) if rows < 0 else (gradient, rows)


def _from_rows(scores: Scores, weight: Tensor, wanted: Tensor | None, mass: float, apart: bool) -> Tensor | None:
    """`input_gradient` from the rows of ``weight`` that matter; None where the exact product is to be computed."""
    if _by_kernels(scores, weight):
        return _kernel_gradient(scores, weight, wanted, mass, apart)[0]
    found = None if apart else _matter(scores, mass)
    if found is None:
        return None
    scale = _scale(scores, wanted)
    tokens, words, values = found if wanted is None else (each[wanted[found[0]]] for each in found)
    values = torch.where(words == scores.targets[tokens], values - scores.total[tokens], values) * scale[tokens]
    starts = torch.searchsorted(tokens, torch.arange(len(scale), device=tokens.device))
    rows = nn.functional.embedding_bag(words, weight, starts, mode="sum", per_sample_weights=values.to(weight.dtype))
    left = -torch.zeros_like(scale).index_add_(0, tokens, values)  # the target's value is its probability less 1
    return rows + left.clamp_min_(0.0).to(rows.dtype).unsqueeze(1) * mean_row(weight)


def _mean(rows: Tensor) -> Tensor:
    return rows.mean(0, dtype=accumulation(rows.dtype)).to(rows.dtype)


_MEANS = WeakIdKeyDictionary()  # of `mean_row`, with what tells that the weight is another one


def mean_row(weight: Tensor) -> Tensor:
    """The mean of the rows of ``weight`` (V, d): (d,) of its dtype.

    It is kept until the weight is written or converted. What is written through ``weight.data`` is not seen: the mean
    is that of before then, which stands for the words that are left out less well.
    """
    plain = weight.detach()
    if weight.is_inference():
        return _mean(plain)
    kind = weight._version, weight.data_ptr(), weight.dtype, weight.shape
    found = _MEANS.get(weight)
    if found is None or found[0] != kind:
        found = _MEANS[weight] = kind, _mean(plain)
    return found[1]


def _product(p: Tensor, weight: Tensor) -> Tensor:
    # MKL is up to 1.7 times as fast with the long side first (measured: 32000 x 768, 16 to 64 tokens), but slow below.
    if p.device.type == "cpu" and p.dtype == torch.float32 and 16 <= len(p) <= 64:
        return (weight.T @ p.T).T
    return p @ weight


def _matter(scores: Scores, mass: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The entries of ``scores.exp`` that the gradient needs: (tokens, words, values), ordered by token.

    None where the exact product is faster: it reads each row of the weight once and computes N times with it, while
    picking rows reads a row for each entry.
    """
    exp, total = scores.exp, scores.total
    count, vocabulary = exp.shape
    limit = vocabulary * (0.3 + count / 100)  # that many rows take as long as the product, measured for N = 1, 16, 64
    # Thresholds are found by bisection of their logarithm, on every step-th word.
    step = -(-vocabulary // _SAMPLE)
    sample = exp[:, ::step].contiguous()
    high = (mass * total).log()  # no word above this threshold may be left out
    low = high - math.log(vocabulary)  # all words below this one may
    allowed = 0.8 / step * mass * total
    for _ in range(6):
        middle = (low + high) / 2
        fits = torch.where(sample > middle.exp().unsqueeze(1), 0.0, sample).sum(1) < allowed
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    if int((sample > low.exp().unsqueeze(1)).sum()) * step > limit:
        return None
    for lower in (1, 2, 4, 8, 16):
        keep = exp > low.exp().unsqueeze(1)
        keep.scatter_(1, scores.targets.unsqueeze(1), True)
        tokens, words = _places(keep)
        if len(tokens) > limit:
            return None
        values = exp[tokens, words]
        over = total - torch.zeros_like(total).index_add_(0, tokens, values) > mass * total
        if not bool(over.any()):
            return tokens, words, values
        low = torch.where(over, low - lower, low)  # the sample was not representative
    return None


def _places(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and the columns where ``keep`` (N, V), bool, is True, as of `torch.Tensor.nonzero`.

    Few are True. Eight neighbours are compared with zero as one integer, which takes a fifth of the time.
    """
    if keep.numel() % 8:
        rows, columns = keep.nonzero(as_tuple=True)
        return rows, columns
    held = keep.view(-1).view(torch.int64).nonzero()[:, 0]
    group, inside = keep.view(-1, 8)[held].nonzero(as_tuple=True)
    at = held[group] * 8 + inside
    return at // keep.shape[1], at % keep.shape[1]


class HeadSplit:
    """Runs a causal language model with its autograd graph cut at the output head's input.

    While it is entered, the head computes on a leaf tensor. If the model returns the very tensor that the head made,
    `score` computes the loss and `input_gradient` the gradient at the leaf. If the model changes the logits first (by
    softcapping or scaling), the gradient comes from autograd. `ttt.info()` reports which of the two was used.

    Args:
        model: a transformers causal language model.
        why: a reason to leave the head to autograd; empty for none.

    Attributes:
        head: the output head; None if the model names none.
        changed: why the head is left to autograd from now on: ``why``, or that the model was seen to change its logits.
    """

    def __init__(self, model: Any, why: str = "") -> None:
        self.model = model
        self.head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.changed = why
        self._handles: list[Any] = []
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._output: Tensor | None = None
        self._thread = 0

    def unfit(self) -> str:
        """Why the head's gradient must come from autograd; empty if it need not."""
        if type(self.head) is not nn.Linear:
            return f"the output head is {type(self.head).__name__}, not torch.nn.Linear"
        if is_subclass(self.head.weight):
            return f"the output head's weight is a {type(self.head.weight).__name__}, not a plain tensor"
        if self.head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return f"the output head is {self.head.weight.dtype}"
        for each in (self.head, self.model):
            if other_hooks(each) or "forward" in vars(each):
                return "the output head or the model has hooks"
        if _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return "there are global module hooks"
        return self.changed

    def __enter__(self) -> HeadSplit:
        self.why, self._thread = self.unfit(), threading.get_ident()
        if not self.why:
            self._handles = [
                self.head.register_forward_pre_hook(self._before),
                self.head.register_forward_hook(self._after),
            ]
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._output = [], [], None

    def _before(self, module, args):
        if threading.get_ident() != self._thread:
            return None  # another thread uses the model
        hidden = args[0]
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        self._seen.append((hidden, leaf))
        return (leaf, *args[1:])

    def _after(self, module, args, output):
        if threading.get_ident() == self._thread:
            self._output = output

    def forward(self, inputs: dict[str, Any]) -> tuple[Any, Tensor | None, Tensor | None]:
        """Run the model: (its output, the hidden states at the head with their graph, the leaf that replaced them)."""
        self._seen, self._output = [], None
        with kernel_attention() if torch.is_grad_enabled() else contextlib.nullcontext():
            out = self.model(**inputs)
        if not self.why and (len(self._seen) != 1 or out.logits is not self._output):
            self.why = self.changed = "the model changes the logits that its output head makes"
        hidden, leaf = self._seen[0] if len(self._seen) == 1 else (None, None)
        self._seen, self._output = [], None
        return out, hidden, leaf

    def run(self, inputs: dict[str, Any], targets: Tensor, keep: bool = False) -> tuple[Any, Scored]:
        """Run the model and score ``targets`` (B, T) int64 under its logits: (its output, the scores).

        ``keep``: leave the scores' ``logits`` as they are, for someone who reads them later.
        """
        out, hidden, leaf = self.forward(inputs)
        if self.why or hidden is None:
            return out, AutogradScores(out.logits, targets, self.why, hidden, leaf)
        return out, FusedScores(out.logits.detach(), targets, hidden, self.head.weight, keep)


class FusedScores:
    """Targets scored by `score`, with the gradient of `input_gradient`.

    Args:
        logits: (B, T, V), overwritten unless ``keep``.
        targets: (B, T) int64.
        hidden: (B, T, d), with its graph: what the head made the logits from.
        weight: (V, d), the head's.
        keep: leave ``logits`` as they are.

    Attributes:
        nll: (B, T) nats, without a graph.
    """

    def __init__(self, logits: Tensor, targets: Tensor, hidden: Tensor, weight: Tensor, keep: bool = False) -> None:
        self._hidden, self._weight, self.logits = hidden, weight, logits
        self._scores = score((logits.clone() if keep else logits).flatten(0, 1), targets.flatten())
        self.nll = self._scores.nll.view(targets.shape)

    def backward(
        self,
        wanted: Tensor | None,
        mass: float,
        retain_graph: bool = False,
        logits_gradient: Tensor | None = None,
        apart: bool = False,
    ) -> None:
        """Propagate the gradient of the summed loss back through the model. Call it once.

        Args:
            wanted: (B, T) bool, the tokens whose loss counts; None for all.
            mass, apart: as in `input_gradient`.
            retain_graph: as in `torch.Tensor.backward`.
            logits_gradient: (B, T, V), the gradient at the logits of further terms of the loss.
        """
        wanted = None if wanted is None else wanted.flatten()
        gradient = input_gradient(self._scores, self._weight, wanted, mass, apart).view(self._hidden.shape)
        if logits_gradient is not None:
            gradient = gradient + logits_gradient.to(self._weight.dtype) @ self._weight
        self._hidden.backward(gradient.to(self._hidden.dtype), retain_graph=retain_graph)


class AutogradScores:
    """Targets scored and differentiated by autograd.

    Args:
        logits: (B, T, V), with their graph.
        targets: (B, T) int64.
        why: the reason, for `ttt.info()`.
        hidden: (B, T, d), with its graph, and
        leaf: (B, T, d), which replaced it, where the graph was cut before it was known that the logits change.

    Attributes:
        logits: (B, T, V), float32.
        nll: (B, T) nats, without a graph.
    """

    def __init__(
        self, logits: Tensor, targets: Tensor, why: str, hidden: Tensor | None = None, leaf: Tensor | None = None
    ) -> None:
        self._why, self._hidden, self._leaf = why, hidden, leaf
        self.logits = logits.float()
        self._losses = nn.functional.cross_entropy(self.logits.flatten(0, 1), targets.flatten(), reduction="none").view(
            targets.shape
        )
        self.nll = self._losses.detach()

    def backward(
        self,
        wanted: Tensor | None,
        mass: float,
        retain_graph: bool = False,
        logits_gradient: Tensor | None = None,
        apart: bool = False,
    ) -> None:
        """See `FusedScores.backward`."""
        record("head_gradient", "autograd", self._why)
        loss = self._losses.sum() if wanted is None else self._losses[wanted].sum()
        if logits_gradient is None:
            loss.backward(retain_graph=retain_graph)
        else:
            torch.autograd.backward([loss, self.logits], [None, logits_gradient], retain_graph=retain_graph)
        if self._leaf is not None and self._hidden is not None and self._leaf.grad is not None:
            self._hidden.backward(self._leaf.grad)


Scored = FusedScores | AutogradScores

"""`GraphedLearner`: reading and learning with one CUDA graph per chunk, for a fixed batch size and chunk length.

A chunk of T tokens of each of B sequences is one replay of the graph: a forward pass with a static key-value cache,
scoring, a backward pass through the blocks from the lowest learning layer upwards, and an append or commit at each
layer. What the host decides in `ttt.Learner.observe` is decided on the device: a chunk that is not finite is rejected
by a gate of 0, and the position in the context is a tensor. Results are in tensors that may be read at any time.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_bool, check_dense, check_type, check_whole
from ttt.layer_lock import exclusive
from ttt.learn.huggingface import cached, frozen
from ttt.learn.learner import Learner
from ttt.learn.loop import ObserveOutput, read
from ttt.learn.static_cache import static_cache
from ttt.learn.step import ScoredChunk, step_from, write
from ttt.learn.text import Span, Text, check_tokens
from ttt.nn import Capturing
from ttt.ops.backends import record

_WARMUP = 3  # runs before the graph is captured, in which kernels are compiled


class GraphedLearner:
    """Reads and learns as a `ttt.Learner`, with all work of a chunk captured in one CUDA graph.

    While it exists, the learner's layers are capturable for steps of ``batch * chunk`` rows
    (`ttt.nn.Linear.capturable_`): they accept no other number of rows, and commit their windows as capturable layers
    do. `release` makes them ordinary layers again. With ``graph=False`` the same steps run without a graph, on any
    device.

        ============  ==================  =====================================================================
        ``ids``       (B, T + 1) int64    the present chunk and the token after it; `step` copies them here
        ``nll``       (B, T) float32      nats, of ``ids[:, 1:]``, measured before the model learnt from them
        ``learned``   (1,) int64          number of chunks that the model learnt from
        ``rejected``  (1,) int64          number of chunks that were not finite; they changed nothing
        ``learning``  (1,) int64          1; set it to 0 to score only
        ============  ==================  =====================================================================

    Args:
        learner: of a transformers causal language model with full attention in every block, computed by "sdpa" or
            "eager".
        batch: B, the number of sequences read side by side.
        chunk: T, the number of tokens between two learning steps. Default: the configuration's.
        graph: capture in a CUDA graph; False runs step by step.

    Raises:
        ValueError: for a wrong batch or chunk, a learner with rules, a guard or a log of episodes, or a model for
            which there is no static cache.
        RuntimeError: if ``graph`` is True and the model is not on a CUDA device; or as `ttt.Learner.observe`.
    """

    def __init__(self, learner: Learner, *, batch: int = 1, chunk: int | None = None, graph: bool = True) -> None:
        check_type("learner", learner, Learner, "a ttt.Learner")
        check_bool("graph", graph)
        learner.require_single("GraphedLearner", "Learner.observe(input_ids, users=[...])")
        learner.access.refuse_several("ttt.GraphedLearner")
        if learner.rules:
            names = [type(rule).__name__ for rule in learner.rules]
            raise ValueError(f"learner must have no rules, whose terms cannot be captured, got {names}")
        if learner.episodes is not None:
            raise ValueError("learner must have no log of episodes: nothing would be added to it here")
        if learner.guard is not None:
            raise ValueError("learner has a guard, which changes rates and strengths that a CUDA graph holds fixed")
        chunk = learner.config.chunk if chunk is None else chunk
        for name, value in (("batch", batch), ("chunk", chunk)):
            check_whole(name, value, 1)
        if chunk > learner.context:
            raise ValueError(f"chunk must be at most the learner's context of {learner.context} tokens, got {chunk}")
        devices = {p.device for p in learner.model.parameters()}
        if len(devices) != 1:
            raise ValueError(f"the model must be on one device, got {sorted(map(str, devices))}")
        (device,) = devices
        if graph and device.type != "cuda":
            raise RuntimeError(
                f"a CUDA graph needs the model on a CUDA device, got {device}; graph=False runs the same steps without"
            )
        self.learner, self.batch, self.chunk = learner, batch, chunk
        self.capacity = learner.context // chunk * chunk  # of the context, in tokens: whole chunks
        takes = inspect.signature(learner.model.forward).parameters
        self._takes_position = "cache_position" in takes  # otherwise the model would read it from the device
        self._graph: Any = None
        with learner.access.enter("GraphedLearner"):
            self._allocate(device)
            before = [layer.capturable for layer in learner.layers]
            try:
                for layer in learner.layers:
                    layer.capturable_(batch * chunk)
                if graph:
                    self._capture()
                else:
                    record("graphed_learner", "eager", "graph=False")
            except BaseException:
                for layer, held in zip(learner.layers, before, strict=True):
                    layer.capturable_(held)
                    layer.torn = ""  # nothing was learnt while the graph was captured
                raise

    def _allocate(self, device: torch.device) -> None:
        """Make the tensors that a graph reads and writes, at the addresses that they keep."""

        def counter(shape: tuple[int, ...] = (1,), value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        self.ids = counter((self.batch, self.chunk + 1))
        self.nll = torch.zeros((self.batch, self.chunk), device=device)
        self.learned, self.rejected, self.learning = counter(), counter(), counter(value=1)
        self._position = counter()
        self._offsets = torch.arange(self.chunk, device=device)
        self._slots = torch.arange(self.capacity, device=device)
        self._cache: Any = static_cache(self.learner.model, self._position, self._offsets, self.capacity)

    def _capture(self) -> None:
        self.learning.zero_()  # so that every kernel is compiled and run, and nothing changes
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph
        record("graphed_learner", "cuda graph")
        self.learning.fill_(1)
        self.restart()

    # -- reading ----------------------------------------------------------------------------------------------

    def observe(self, input_ids: Tensor) -> ObserveOutput:
        """Score the tokens, chunk by chunk, and learn from each chunk after it was scored; the context begins empty.

        Args:
            input_ids: (B, 1 + k T) int64: whole chunks, and the token after the last.

        Returns:
            As `ttt.Learner.observe`. The host waits for the device only at the beginning, to check the tokens, and at
            the end, for the counts.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape or token. Nothing has changed then.
            RuntimeError: as `ttt.Learner.observe`; or after `release`.
        """
        with self.learner.access.enter("GraphedLearner.observe"):
            text = check_tokens(self.learner.model, input_ids)
            batch, length = text.ids.shape
            if batch != self.batch or length < 2 or (length - 1) % self.chunk:
                raise ValueError(
                    f"input_ids must have shape ({self.batch}, 1 + a multiple of {self.chunk}), got {(batch, length)}"
                )
            strategy = _GraphedWeights(self, text)
            self.restart()
            return strategy.output(read(text, strategy, self.chunk, self.capacity))

    def step(self, ids: Tensor) -> None:
        """Read the next chunk without waiting for the device; the context is what earlier steps left.

        The context begins anew when it holds as many whole chunks as the learner's ``context``, and after a rejected
        chunk.

        Args:
            ids: (B, T + 1) int64, on any device: the chunk and the token after it. Tokens are not checked.

        Raises:
            TypeError, ValueError: for what is no tensor, or another shape or dtype.
            RuntimeError: as `ttt.Learner.observe`; or after `release`.
        """
        check_dense("ids", ids)
        if ids.shape != self.ids.shape or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 of shape {tuple(self.ids.shape)}, got {ids.dtype} {tuple(ids.shape)}")
        with self.learner.access.enter("GraphedLearner.step"):
            self.ids.copy_(ids, non_blocking=True)
            if self._graph is not None:
                self._graph.replay()
            else:
                self._run()

    def restart(self) -> None:
        """Let the next chunk begin with an empty context."""
        self._position.zero_()

    def release(self) -> None:
        """Make the learner's layers ordinary ones again; afterwards this object cannot be used."""
        with exclusive(self.learner.layers, "GraphedLearner.release", repairs=True):
            self._graph = self._cache = None
            for layer in self.learner.layers:
                layer.capturable_(None)

    # -- one chunk --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        learner = self.learner
        if self._cache is None:
            raise RuntimeError("this GraphedLearner was released")
        positions = self._position + self._offsets
        visible = self._slots <= positions.unsqueeze(1)  # (T, capacity)
        dtype = learner.model.dtype
        mask = torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype).expand(self.batch, 1, *visible.shape)
        inputs = {
            "input_ids": self.ids[:, :-1], "attention_mask": mask, **cached(learner.model, self._cache),
            "position_ids": positions.unsqueeze(0).expand(self.batch, -1),
        }  # fmt: skip
        if self._takes_position:
            inputs["cache_position"] = positions
        teaches = learner.config.lr > 0
        capturing: Any = Capturing(learner.layers) if teaches else contextlib.nullcontext()
        with frozen(learner.model), torch.set_grad_enabled(teaches), capturing, learner.head as head:
            _, scores = head.run(inputs, self.ids[:, 1:])
            self.nll.copy_(scores.nll)
            if teaches:
                updates, finite = step_from(learner, capturing, ScoredChunk(scores))
                gate = self.learning * finite
                write(updates, gate)
            else:
                finite, gate = torch.isfinite(self.nll).all(), torch.zeros_like(self.learning)
        with torch.no_grad():
            self.learned += gate
            if teaches:
                self.rejected += self.learning - gate
            self._cache.clear_unless(finite, positions)
            following = self._position + self.chunk
            goes_on = finite & (following + self.chunk <= self.capacity)
            self._position.copy_(torch.where(goes_on, following, 0))


class _GraphedWeights:
    """The strategy (`ttt.learn.loop.Strategy`) of a `GraphedLearner`; the device decides where contexts begin."""

    def __init__(self, graphed: GraphedLearner, text: Text) -> None:
        self.graphed, self.text = graphed, text
        self._before = torch.cat([graphed.learned, graphed.rejected])

    def read(self, span: Span) -> tuple[Tensor, bool]:
        self.graphed.step(span.segment.ids[:, span.start : span.end + 1])
        return self.graphed.nll, True

    def output(self, nll: Tensor) -> ObserveOutput:
        counts = torch.cat([self.graphed.learned, self.graphed.rejected]) - self._before
        return ObserveOutput(nll, self.text.scored, *counts.tolist())

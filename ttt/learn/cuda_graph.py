"""`GraphedLearner`: reading and learning in one CUDA graph a chunk, for a fixed batch and chunk.

A chunk of T tokens for each of B sequences is one replay: forward pass against a static KV cache, score, backward pass
through the blocks from the lowest learning layer upwards, append or commit at each layer. What `ttt.Learner.observe`
asks the host is decided on the device: a chunk that is not finite is rejected by a gate of 0, the position in the
context is a tensor. Results lie in tensors that the caller reads when he likes.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ttt.checks import check_whole
from ttt.learn.huggingface import cached, frozen
from ttt.learn.learner import Learner, Seen
from ttt.nn import Capturing
from ttt.ops.backends import record

_WARMUP = 3


class GraphedLearner:
    """Lets a `ttt.Learner` read chunk by chunk with all its work captured in one CUDA graph.

    Meanwhile its layers are capturable for steps of ``batch * chunk`` rows (`ttt.nn.Linear.capturable_`): they take no
    others, and their windows are committed as those do. `release` gives them back. The same steps run without a graph
    with ``graph=False``, on any device.

    ============  ==================  =====================================================================
    ``ids``       (B, T + 1) int64    the present chunk and the token after it; `step` copies them here
    ``nll``       (B, T) float32      nats, of ``ids[:, 1:]``, measured before the model learnt from them
    ``learned``   (1,) int64          chunks that the model learnt from
    ``rejected``  (1,) int64          chunks that were not finite: they changed nothing
    ``learning``  (1,) int64          1; set it to 0 to score only
    ============  ==================  =====================================================================

    Args:
        learner: of a transformers causal language model with full attention in every block, by SDPA or eager.
        batch: B, sequences read side by side.
        chunk: T, tokens between one learning and the next. Default: the configuration's.
        graph: capture in a CUDA graph; False runs step by step.

    Raises:
        ValueError: for a wrong batch or chunk, a learner with rules or a guard, or a model whose attention it cannot
            give a static cache.
        RuntimeError: if ``graph`` is True and the model is not on a CUDA device.
    """

    def __init__(self, learner: Learner, *, batch: int = 1, chunk: int | None = None, graph: bool = True) -> None:
        learner._one_for_all("GraphedLearner", "Learner.observe(input_ids, users=[...])")
        if learner.rules:
            names = [type(rule).__name__ for rule in learner.rules]
            raise ValueError(f"learner must have no rules, whose terms cannot be captured, got {names}")
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
        self.capacity = learner.context // chunk * chunk  # tokens of context: whole chunks

        def counter(shape: tuple[int, ...] = (1,), value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        self.ids = counter((batch, chunk + 1))
        self.nll = torch.zeros((batch, chunk), device=device)
        self.learned, self.rejected, self.learning = counter(), counter(), counter(value=1)
        self._position = counter()
        self._offsets = torch.arange(chunk, device=device)
        self._slots = torch.arange(self.capacity, device=device)
        self._cache: Any = _static_cache(learner.model, self._position, self._offsets, self.capacity)
        takes = inspect.signature(learner.model.forward).parameters
        self._says_where = "cache_position" in takes  # older transformers would ask the cache, and wait for it
        self._graph: Any = None
        rows = batch * chunk
        before = [layer.capturable for layer in learner.layers]
        try:
            for layer in learner.layers:
                layer.capturable_(rows)
            if graph:
                self._capture()
            else:
                record("graphed_learner", "eager", "graph=False")
        except BaseException:
            for layer, held in zip(learner.layers, before, strict=True):
                layer.capturable_(held)
            raise

    def _capture(self) -> None:
        self.learning.zero_()  # every kernel is compiled and run, and nothing changes
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

    def observe(self, input_ids: Tensor) -> Seen:
        """Score the tokens, chunk by chunk, and learn from each chunk after it was scored, from an empty context on.

        Args:
            input_ids: (B, 1 + k T) int64: whole chunks, and the token after the last.

        Returns:
            As `Learner.observe`. The only wait for the device is at the end, for the counts, and at the beginning,
            to check the tokens.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape or token; nothing has changed then.
        """
        ids, attend, _ = self.learner._checked(input_ids, None, None)
        batch, length = ids.shape
        if batch != self.batch or length < 2 or (length - 1) % self.chunk:
            raise ValueError(
                f"input_ids must have shape ({self.batch}, 1 + a multiple of {self.chunk}), got {tuple(ids.shape)}"
            )
        before = torch.cat([self.learned, self.rejected])
        self.restart()
        nll = torch.empty((batch, length - 1), device=self.ids.device)
        for at in range(0, length - 1, self.chunk):
            self.step(ids[:, at : at + self.chunk + 1])
            nll[:, at : at + self.chunk] = self.nll
        learned, rejected = (torch.cat([self.learned, self.rejected]) - before).tolist()
        return Seen(nll, attend[:, :-1] & attend[:, 1:], learned, rejected)

    def step(self, ids: Tensor) -> None:
        """Read the next chunk, without waiting for it; the context is what the steps before left.

        After as many tokens as the learner's context holds in whole chunks, or a rejected chunk, it begins anew.

        Args:
            ids: (B, T + 1) int64, on any device: the chunk and the token after it. Tokens are not checked.

        Raises:
            ValueError: for another shape or dtype.
        """
        if ids.shape != self.ids.shape or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 of shape {tuple(self.ids.shape)}, got {ids.dtype} {tuple(ids.shape)}")
        self.ids.copy_(ids, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    def restart(self) -> None:
        """Go on with an empty context."""
        self._position.zero_()

    def release(self) -> None:
        """Give the learner's layers back; this object reads no more."""
        self._graph = self._cache = None
        for layer in self.learner.layers:
            layer.capturable_(None)

    # -- one chunk --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        learner = self.learner
        if self._cache is None:
            raise RuntimeError("this GraphedLearner was released")
        positions = self._position + self._offsets
        seen = self._slots <= positions.unsqueeze(1)  # (T, capacity)
        dtype = learner.model.dtype
        mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype).expand(self.batch, 1, *seen.shape)
        inputs = {
            "input_ids": self.ids[:, :-1], "attention_mask": mask, **cached(learner.model, self._cache),
            "position_ids": positions.unsqueeze(0).expand(self.batch, -1),
        }  # fmt: skip
        if self._says_where:
            inputs["cache_position"] = positions
        teaches = learner.config.lr > 0
        capturing: Any = Capturing(learner.layers) if teaches else contextlib.nullcontext()
        with frozen(learner.model), torch.set_grad_enabled(teaches), capturing, learner._split as split:
            _, scores = split.run(inputs, self.ids[:, 1:])
            self.nll.copy_(scores.nll)
            if teaches:
                updates, finite = learner._updates(capturing, scores, None, None)
                gate = self.learning * finite
                for layer, update in updates:
                    layer.learn(update, gate)
            else:
                finite, gate = torch.isfinite(self.nll).all(), torch.zeros_like(self.learning)
        with torch.no_grad():
            self.learned += gate
            if teaches:
                self.rejected += self.learning - gate
            self._cache.scrub(finite, positions)
            following = self._position + self.chunk
            goes_on = finite & (following + self.chunk <= self.capacity)
            self._position.copy_(torch.where(goes_on, following, 0))


def _static_cache(model: Any, position: Tensor, offsets: Tensor, capacity: int) -> Any:
    """A transformers cache of ``capacity`` tokens at fixed addresses, written from ``position`` (1,) on.

    Keys and values of all blocks are one tensor, so that scrubbing them is one operation. What gradients see is an
    alias of it: they reach this chunk's keys and values, and never cross chunks.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"model must have full attention in every block, got {sorted(kinds)}")
    attention = getattr(config, "_attn_implementation", "sdpa")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"model must compute attention by 'sdpa' or 'eager', got {attention!r}")

    class Layer(CacheLayerMixin):
        is_compileable, is_sliding = True, False

        def lazy_initialization(self, key_states, value_states=None):
            self.is_initialized = True

        def update(self, key_states, value_states, *args, **kwargs):
            held, positions = cache.storage(key_states, value_states)[cache.number[self]], position + offsets
            keys = held[0].detach().index_copy_(2, positions, key_states)
            return keys, held[1].detach().index_copy_(2, positions, value_states)

        def get_seq_length(self, *args):
            return position[0]

        def get_mask_sizes(self, *args):
            return capacity, 0

        def get_max_cache_shape(self):
            return capacity

        get_max_length = get_max_cache_shape

    class Static(Cache):
        def __init__(self) -> None:
            super().__init__(layers=[Layer() for _ in range(config.num_hidden_layers)])
            self.number = {layer: i for i, layer in enumerate(self.layers)}
            self.held: Any = None

        def storage(self, keys: Tensor, values: Tensor) -> Tensor:
            """(blocks, 2, B, heads, capacity, features)."""
            if keys.shape != values.shape:
                raise ValueError(
                    f"model must have keys and values of one shape, got {tuple(keys.shape)} and {tuple(values.shape)}"
                )
            if self.held is None:
                shape = (len(self.layers), 2, *keys.shape[:2], capacity, keys.shape[-1])
                self.held = torch.zeros(shape, dtype=keys.dtype, device=keys.device)
            return self.held

        def scrub(self, finite: Tensor, positions: Tensor) -> None:
            """Zero what a chunk wrote unless it is ``finite``: a masked NaN would still be one times 0."""
            if self.held is not None:
                rows = self.held.index_select(4, positions)
                self.held.index_copy_(4, positions, torch.where(finite, rows, 0.0))

    cache = Static()
    return cache

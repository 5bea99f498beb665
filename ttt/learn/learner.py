"""`Learner`: a causal language model that learns from the text it scores."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapt.convert import require_layers
from ttt.learn import per_user, protection
from ttt.learn.generate import Generated, generate
from ttt.learn.guard import Guard
from ttt.learn.head import Fused, Plain, Split
from ttt.learn.huggingface import cache_of, cached, detached, frozen
from ttt.learn.stream_rule import Chunk, Segment, StreamRule, backward_terms, check_rules, joined
from ttt.nn import Capturing, Linear, Update
from ttt.per_user.pool import Pool, has_pool, pool_of
from ttt.per_user.protection import calibrate as calibrate_users


@dataclasses.dataclass(frozen=True)
class Seen:
    """What `Learner.observe` returns.

    Attributes:
        nll: (B, T-1) float32, nats: -log p(token t+1 | tokens up to t), each measured before the model learnt from
            that token. Where either token is padding, 0.
        mask: (B, T-1) bool: the tokens that were scored.
        learned: chunks that the model learnt from.
        rejected: chunks that were skipped for a non-finite loss or gradient; they changed nothing.
        rollbacks: how often a `ttt.Guard` went back to the last good state meanwhile.
        strength: of the protection afterwards, in units of the configured one; a `ttt.Guard` raises it.
        rejected_users: with ``users``, whose they were: how many of each. Chunks are counted for each user then.
    """

    nll: Tensor
    mask: Tensor
    learned: int
    rejected: int
    rollbacks: int = 0
    strength: float = 1.0
    rejected_users: dict[Hashable, int] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Mean bits per scored token."""
        return float(self.nll[self.mask].mean(dtype=torch.float64)) / 0.6931471805599453


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Copies of all learning state, from `Learner.snapshot`."""

    layers: list[dict[str, Tensor]]
    bases: list[dict[str, Tensor]]
    rules: list[tuple[type[StreamRule], Any]] = dataclasses.field(default_factory=list)


class Learner:
    """Lets an adapted model learn from what it reads.

    Args:
        model: adapted by `ttt.adapt_`. `observe` needs a Hugging Face causal language model; it is put in eval mode.
        context: tokens of context at most; a longer text is read in segments of that many. Default: the model's
            ``max_position_embeddings``, or 2048.
        rules: add terms to the loss of every chunk that teaches, as `ttt.rules.SequenceReplay` does. What they send
            through the model is learnt in the same update, at ``lr`` a token. Its rows count as the chunk's do: in
            the window, in the sample of recent inputs, and in the trace, which has a share of them (zeros for "mas").
        guard: holds what is forgotten within a bound; None learns unwatched.

    Raises:
        TypeError: if one of ``rules`` is no `ttt.rules.StreamRule`.
        ValueError: if the model has no learning layer, ``context`` < 2, or a rule or ``guard`` cannot serve it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        context: int | None = None,
        rules: Sequence[StreamRule] = (),
        guard: Guard | None = None,
    ) -> None:
        self.model: Any = model.eval()
        self.pool: Pool | None = pool_of(model) if has_pool(model) else None
        self.layers = require_layers(model) if self.pool is None else []
        self.config = self.layers[0].config if self.pool is None else self.pool.config
        if context is None:
            context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2048
        if context < 2:
            raise ValueError(f"context must be at least 2 tokens, got {context}")
        self.context = context
        mas = self.config.importance == "mas" and self.config.ewc_lambda > 0
        self._split = Split(model, "importance 'mas' differentiates the logits" if mas else "")
        self.rules = check_rules(rules)
        for rule in self.rules:
            rule.attach(self)
        self.guard = guard
        if guard is not None:
            guard.attach(self)
        self._looked = False  # for protection, once

    # -- observe ----------------------------------------------------------------------------------------------

    def observe(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        learn_mask: Tensor | None = None,
        learn: bool = True,
        users: Sequence[Hashable | None] | None = None,
    ) -> Seen:
        """Score the tokens, chunk by chunk, and learn from each chunk after it was scored.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or 0/1: 0 marks padding, on either side; it is neither scored nor learnt.
            learn_mask: (B, T) bool or 0/1: tokens with 0 are read and scored, but no loss is taken on them and
                what they put through the layers is not written: they change no weight by one bit.
            learn: False scores only.
            users: for a model adapted with ``TTTConfig(per_user=...)``: whose each of the B rows is; None for rows that
                the base model only scores. Changing one user's tokens changes no bit of what another gets or learns;
                the shape of the batch, and where it is padded, may.

        Returns:
            A `Seen`. A chunk with a non-finite loss or gradient is counted in ``rejected`` and changes nothing;
            reading goes on after it with an empty context. With ``users`` that holds for each user alone.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape or token; nothing has changed then.
        """
        ids, attend, teach = self._checked(input_ids, attention_mask, learn_mask)
        if (self.pool is None) != (users is None):
            raise ValueError(f"users must be given if, and only if, every user has weights of their own; got {users!r}")
        if learn and not self._looked:
            self._looked = True
            self._warn_if_unprotected()
        if self.pool is not None and users is not None:
            found = per_user.observe(self, self.pool, ids, attend, teach, users, learn, attention_mask is not None)
            rejected = {user: count for user, count in found.rejected.items() if count}
            learned, lost = sum(found.learned.values()), sum(rejected.values())
            return Seen(found.nll, found.mask, learned, lost, rejected_users=rejected)
        plain = attention_mask is None and learn_mask is None
        before = 0 if self.guard is None else self.guard.rollbacks
        with frozen(self.model):
            seen = self._read(ids, attend, teach, learn, pads=attention_mask is not None, plain=plain)[0]
        if self.guard is None:
            return seen
        return dataclasses.replace(seen, rollbacks=self.guard.rollbacks - before, strength=self.guard.strength)

    def _read(
        self,
        ids: Tensor,
        attend: Tensor,
        teach: Tensor,
        learn: bool,
        *,
        pads: bool,
        plain: bool,
        after: Callable[[Tensor, int], None] | None = None,
    ) -> tuple[Seen, Any]:
        """What `observe` does, after its checks; and the cache of the last segment, None after a rejected chunk.

        ``pads``: ``attend`` holds padding. ``plain``: every token is scored and teaches. ``after`` is called when a
        chunk was scored and learnt, with the nats (B, T - 1) and how many of them are scored; it may change weights.
        """
        batch, length = ids.shape
        scored = attend[:, :-1] & attend[:, 1:]
        targets = scored & teach[:, 1:]
        rows = attend & teach
        nll = torch.zeros((batch, max(length - 1, 0)), device=ids.device)
        learned = rejected = 0
        texts = ids, attend if pads else None, None if plain else rows
        segment, cache = Segment.of(*texts, 0, self.context), None
        position = 0
        while position < length - 1:
            if position - segment.start >= self.context:
                segment, cache = Segment.of(*texts, position, self.context), None
            end = min(position + self.config.chunk, segment.start + self.context, length)
            last = min(end, length - 1)  # the text's final token has no target
            span = slice(position, last)
            wanted = targets[:, span]
            teaches = learn and self.config.lr > 0 and (plain or bool(wanted.any()))
            here = position - segment.start, last - segment.start
            inputs = segment.inputs(*here) | cached(self.model, cache)
            ruled = teaches and bool(self.rules)
            capturing: Any = Capturing(self.layers) if teaches else contextlib.nullcontext()
            with torch.set_grad_enabled(teaches), capturing:
                with self._split as split:
                    out, scores = split.run(inputs, ids[:, position + 1 : last + 1], keep=ruled)
                nll[:, span] = scores.nll if plain else torch.where(scored[:, span], scores.nll, 0.0)
                ok = True
                if teaches:
                    masks = (None, None) if plain else (wanted, rows[:, span].flatten())
                    chunk = Chunk.of(segment, *here, scores.logits, masks[0]) if ruled else None
                    ok = self._learn(capturing, scores, masks[0], masks[1], chunk)
                    learned, rejected = learned + ok, rejected + (not ok)
            if self.guard is not None:
                self.guard.check_if_due()
            if after is not None:
                after(nll, last)
            cache = detached(cache_of(out))
            position = last
            if not ok:  # what the model computed for this chunk is not to be trusted as context either
                segment, cache = Segment.of(*texts, position, self.context), None
        return Seen(nll, scored, learned, rejected), cache

    def _learn(
        self,
        capturing: Capturing,
        scores: Fused | Plain,
        wanted: Tensor | None,
        rows: Tensor | None,
        chunk: Chunk | None = None,
    ) -> bool:
        """Learn from the captured chunk; False, and not a bit changed, if anything in it is not finite.

        ``chunk``: what the rules are shown; None where there are none.
        """
        updates, finite = self._updates(capturing, scores, wanted, rows, chunk)
        if not bool(finite):
            return False
        if self.guard is not None:
            self.guard.pace(updates, scores.nll if wanted is None else scores.nll[wanted])
        for layer, update in updates:
            layer.learn(update)
        if chunk is not None:
            with torch.no_grad():
                for rule in self.rules:
                    rule.seen(chunk)
        return True

    def _updates(
        self,
        capturing: Capturing,
        scores: Fused | Plain,
        wanted: Tensor | None,
        rows: Tensor | None,
        chunk: Chunk | None = None,
    ) -> tuple[list[tuple[Linear, Update]], Tensor]:
        """(what each layer learns from the captured chunk, whether all of it is finite: () bool)."""
        mas = self.config.importance == "mas" and self.config.ewc_lambda > 0
        term, beside = None, None
        replayed: list[Any] = [[] for _ in self.layers]
        if chunk is not None:
            term, replayed = backward_terms(self.rules, chunk, capturing)
            beside = chunk.logits.grad
        scores.backward(wanted, self.config.head_mass, retain_graph=mas, beside=beside)
        captured = capturing.renew()
        traced: list[Any] = [None] * len(self.layers)
        if mas:
            assert isinstance(scores, Plain)
            valid = scores.logits if rows is None else scores.logits.flatten(0, 1)[rows]
            valid.square().sum().backward()
            traced = capturing.renew()
        updates = [
            layer.update_from(*joined(pairs, trace, rows, more))
            for layer, pairs, trace, more in zip(self.layers, captured, traced, replayed, strict=True)
        ]
        found = [(layer, u) for layer, u in zip(self.layers, updates, strict=True) if u is not None]
        loss = (scores.nll if wanted is None else scores.nll[wanted]).sum()
        loss = loss if term is None else loss + term
        finite = torch.stack([torch.isfinite(loss)] + [u.finite.to(loss.device) for _, u in found])
        return found, finite.all()

    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        learn_prompt: bool = True,
        learn_output: bool = False,
        learn_every: int = 16,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Read a prompt, then write on, learning from the stream of tokens; each is scored before it is learnt.

        By default the model learns from the prompt, which is what the user wrote, and not from its own output:
        that is self-training, which makes the model surer of what it says whether it is right or not. Switch it
        on where the output is filtered or checked, or where its style is to be kept up.

        Args:
            input_ids: (B, P) int64, the prompts; P + max_new_tokens may not exceed the learner's ``context``.
            max_new_tokens: N, tokens to write.
            attention_mask: (B, P) bool or 0/1: 0 marks padding, on the left only.
            learn_prompt: learn from the prompt, in chunks of ``config.chunk``, before writing.
            learn_output: learn from what is written, every ``learn_every`` tokens and at the end. Only the blocks
                from the lowest learning layer upwards run again for that, on those tokens.
            learn_every: tokens written between two times of learning.
            do_sample: draw tokens; otherwise the likeliest is taken.
            temperature: divides the logits that are drawn from; ``nll`` is that of the model as it is.
            top_k: draw from the k likeliest tokens only.
            eos_token_id: a sequence that wrote it is finished: it is filled up with it, and teaches no more.
            generator: of the draws.

        Returns:
            A `Generated`.

        Raises:
            TypeError, ValueError: for a wrong argument; nothing has changed then.
        """
        self._one_for_all("generate", "with ttt.users(model, [...]): model.generate(...)")
        ids, attend, _ = self._checked(input_ids, attention_mask, None)
        return generate(
            self, ids, None if attention_mask is None else attend, max_new_tokens=max_new_tokens,
            learn_prompt=learn_prompt, learn_output=learn_output, learn_every=learn_every, do_sample=do_sample,
            temperature=temperature, top_k=top_k, eos_token_id=eos_token_id, generator=generator,
        )  # fmt: skip

    def _checked(self, ids: Tensor, attention_mask: Tensor | None, learn_mask: Tensor | None):
        if ids.dtype != torch.int64:
            raise TypeError(f"input_ids must be int64, got {ids.dtype}")
        if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape (B, T) with B, T >= 1, got {tuple(ids.shape)}")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= vocabulary:
            raise ValueError(f"input_ids must be in [0, {vocabulary}), got {low} to {high}")
        masks = []
        for name, mask in (("attention_mask", attention_mask), ("learn_mask", learn_mask)):
            if mask is None:
                masks.append(torch.ones_like(ids, dtype=torch.bool))
                continue
            if mask.shape != ids.shape:
                raise ValueError(f"{name} must have the shape of input_ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
            masks.append(mask.to(device=ids.device, dtype=torch.bool))
        return ids, masks[0], masks[1]

    # -- protect ----------------------------------------------------------------------------------------------

    def calibrate(self, batches: Iterable[Tensor], loss: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        """Measure what the model knows: base importance and replay memory, from data that it knows.

        Importance is the per-token Fisher (MAS for ``importance="mas"``; SI has no offline form, so Fisher too),
        divided by its mean over all adapted weights. Inputs of the layers enter the replay memories.

        Args:
            batches: of (B, T) int64 tokens; or of anything, with ``loss``.
            loss: called with (model, batch), returns the summed loss, whose per-token gradients are squared: for
                models that are not causal language models. Default: true Fisher, labels drawn from the model's
                own output, or empirical, by ``config.fisher``.

        Raises:
            ValueError: if the model has learnt already, or there is no batch.
        """
        kind = "mas" if self.config.importance == "mas" else "fisher"
        if loss is None:
            generator = torch.Generator(device=next(self.model.parameters()).device).manual_seed(self.config.seed)
            losses = (self._calibration_loss(batch, kind, generator) for batch in batches)
        else:
            losses = (loss(self.model, batch) for batch in batches)
        if self.pool is not None:
            if self.pool.users:
                raise ValueError(f"calibrate before learning: users {list(self.pool.users)} have slots already")
            calibrate_users(list(self.pool.layers.values()), losses, kind)
            return
        protection.calibrate(self.layers, losses, kind)

    def _warn_if_unprotected(self) -> None:
        """Where the configuration protects, but there is nothing yet that it could do so with."""
        c, layer = self.config, next(iter(self.layers if self.pool is None else self.pool.layers.values()))
        held = (getattr(layer, name, None) for name in ("importance", "importance_m", "seen", "basis"))
        if (c.ewc_lambda or c.replay_rows or c.orthogonal) and not any(t is not None and bool(t.any()) for t in held):
            warnings.warn(
                "learning is unprotected: Learner.calibrate was not called (it takes data that the model knows). "
                f"Without protection a smaller lr is best, of the default about a third; got lr={c.lr:g}",
                stacklevel=3,
            )

    def _calibration_loss(self, ids: Tensor, kind: str, generator: torch.Generator) -> Tensor:
        ids, _, _ = self._checked(ids, None, None)
        logits = self.model(input_ids=ids).logits.float()
        if kind == "mas":
            return logits.square().sum()
        logits = logits.flatten(0, 1)
        if self.config.fisher == "true":
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        else:
            logits = logits.view(*ids.shape, -1)[:, :-1].flatten(0, 1)
            labels = ids[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def consolidate(self) -> None:
        """What was learnt becomes something to protect (online EWC; the order of tasks is the caller's)::

            Omega <- gamma_c Omega + F / tokens       (SI: Omega + relu(F / ((W - W*)^2 + xi)))
            W* <- W;  F <- 0

        in units of the first calibration's mean importance. The sample of recent inputs joins the replay memory.
        """
        self._one_for_all("consolidate", "the anchor is shared by all users")
        if self.guard is not None:
            self.guard.check()
        protection.consolidate(self.layers)
        for rule in self.rules:
            rule.consolidated()
        if self.guard is not None:
            self.guard.resume()

    def _one_for_all(self, what: str, instead: str) -> None:
        if self.pool is not None:
            raise ValueError(f"{what} is for one set of weights, but every user has their own: {instead}")

    # -- go back ----------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A copy of all learning state, that of the rules included, for `rollback`."""
        self._one_for_all("snapshot", "pool.export(user)")
        # Shared tensors and bases are never written in place: they need no copy.
        layers = [
            {name: t if name in layer.shared else t.clone() for name, t in layer.state().items()}
            for layer in self.layers
        ]
        return Snapshot(
            layers, [dict(layer.base) for layer in self.layers], [(type(rule), rule.state()) for rule in self.rules]
        )

    def rollback(self, snapshot: Snapshot) -> None:
        """Go back to ``snapshot``, to the bit.

        Raises:
            ValueError: if it comes from a model with other layers, or a learner with other rules.
        """
        self._one_for_all("rollback", "pool.load(user, state)")
        shapes = [{name: t.shape for name, t in layer.state().items()} for layer in self.layers]
        if [{name: t.shape for name, t in state.items()} for state in snapshot.layers] != shapes:
            raise ValueError("snapshot does not fit this model's learning layers; nothing was changed")
        if (kinds := [type(rule) for rule in self.rules]) != [kind for kind, _ in snapshot.rules]:
            raise ValueError(
                f"snapshot must be of a learner with the rules {[kind.__name__ for kind in kinds]}, "
                f"got {[kind.__name__ for kind, _ in snapshot.rules]}; nothing was changed"
            )
        for layer, state, base in zip(self.layers, snapshot.layers, snapshot.bases, strict=True):
            layer.load_state(state)
            layer.base = dict(base)
        for rule, (_, held) in zip(self.rules, snapshot.rules, strict=True):
            rule.load_state(held)
        if self.guard is not None:
            self.guard.resume()

    def reset(self) -> None:
        """Forget everything learnt since calibration; the weights are the base model's, to the bit.

        Rules forget what they hold of the stream.
        """
        if self.pool is not None:
            self.pool.forget_all()
        for layer in self.layers:
            layer.reset()
        for rule in self.rules:
            rule.reset()
        if self.guard is not None:
            self.guard.restart()

    def flush(self) -> None:
        """Write every layer's window into its weights, as before ``save_pretrained``."""
        for layer in self.layers:
            layer.flush()

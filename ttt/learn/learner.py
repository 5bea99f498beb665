"""`Learner`: a causal language model that learns from the text it scores."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ttt.adapt.convert import refuse_sharded
from ttt.checks import check_bool, check_number, check_whole
from ttt.learn import protection
from ttt.learn.generate import GenerateOptions, GenerateOutput, check_prompt, generate
from ttt.learn.keeping import Keeping
from ttt.learn.kept_cache import KeptCache
from ttt.learn.loop import ObserveOutput
from ttt.learn.not_finite import warn_if_nothing_was_learnt
from ttt.learn.observing import observe, observe_in_steps
from ttt.learn.per_user import check_users
from ttt.learn.study import StudyOptions, StudyOutput, study_in_steps
from ttt.learn.text import Text, check_tokens
from ttt.steps import finish


class Learner(Keeping):
    """Lets an adapted model learn from what it reads.

    One thread at a time may be in the methods of the learners of a model; another one gets a RuntimeError. They work in
    any mode of autograd, `torch.inference_mode` included.

    **A learning step is all or nothing.** A chunk with a loss or gradient that is not finite changes nothing. Signals
    such as Ctrl-C are handled between steps. If a kernel fails in the middle of a step, the users in the batch get back
    what they had; one set of weights is too large to be copied before every step, so its layers are marked instead,
    and every method but `rollback` and `reset` raises RuntimeError until one of them, or `ttt.load`, has put a complete
    state in place.

    **If the model is sharded over processes**, all of them make the same calls with the same text (but see
    ``data_parallel``), after it was sharded. A check that fails in one of them is an error in all: a RuntimeError where
    it did not fail itself.

    Args:
        model: adapted by `ttt.adapt_`. `observe` needs a transformers causal language model. It is put in eval mode and
            must stay in it.
        context: largest number of tokens of context; a longer text is read in segments of that length. Default: the
            model's ``max_position_embeddings``, or 2048.
        rules: add terms to the loss of every chunk that teaches, as `ttt.rules.SequenceReplay` does. The layers learn
            from the rules' own forward passes in the same update, at ``lr`` per token. Those rows count as the chunk's
            do: in the window, in the sample of recent inputs, and in the trace (with zeros for "mas").
        guard: keeps what is forgotten within a bound; None for no guard. If every user has weights of their own, its
            inputs and settings are those of one guard for each user (`ttt.per_user.guards.UserGuards`).
        episodes: keeps the text that `observe` learns from, for `study`; None to keep nothing. It serves one model.
            What a ``guard`` takes back is taken out of it.
        data_parallel: whether each process reads texts of its own, all of one shape, and all learn from all texts, what
            a single process would learn from them in one batch. The processes are those over which FSDP2 shards the
            model, or the default group of torch.distributed, each of which then holds the whole model, the same to the
            bit; of one in DistributedDataParallel give the model that it wraps. All of them must give this argument,
            and make the same calls. Calibration and the guard take the same inputs in all processes, and `generate`
            does not learn.

    Raises:
        TypeError: if ``model`` is no module, ``guard`` no `ttt.Guard`, ``episodes`` no `ttt.EpisodeLog`, or one of
            ``rules`` no `ttt.rules.StreamRule`.
        ValueError: if the model has no learning layer or is an encoder-decoder, ``context`` < 2, or ``data_parallel``,
            ``guard`` or a rule cannot serve it; no rule can serve a model with weights for each user.
        RuntimeError: if a tensor of the model was made under `torch.inference_mode`.

    Attributes:
        pool: the users of a model that was adapted with ``TTTConfig(per_user=...)``; None for one set of weights.
        layers: the learning layers, in the model's order; empty for a model with users.
        config: the `ttt.TTTConfig` of the layers.
        user_guards: the guards of a model with users, if ``guard`` was given.
    """

    def observe(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        learn_mask: Tensor | None = None,
        learn: bool = True,
        users: Sequence[str | None] | None = None,
        passes: int = 1,
        emphasis: float = 1.0,
    ) -> ObserveOutput:
        """Score the tokens, chunk by chunk, and learn from each chunk after it was scored.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) bool or 0/1: 0 marks padding, which is neither scored nor learnt, and which no other
                token sees. It may be on either side; chunks are counted from the first column, so padding on the left
                moves the borders between a sequence's chunks. If all blocks of the model have attention it may also be
                between tokens, as where texts were joined; the token after it is read, but not scored.
            learn_mask: (B, T) bool or 0/1: tokens with 0 are read and scored, but no loss is taken on them, as with
                the label -100 in transformers. A token is predicted, and so learnt, at the one before it: the rows of
                those are written, whatever their own entry, and no others, though these have gradients, too, where a
                token that teaches reads them through attention. Where all are 0, no bit of a weight changes.
            learn: False scores only.
            users: for a model adapted with ``TTTConfig(per_user=...)``: the user of each of the B sequences; None for
                sequences that the base model scores and nobody learns from. One user's tokens change no bit of what
                another user gets or learns; the shape of the batch and its padding may.
            passes: how often the text is read and learnt. The scores are those of the first pass. A sentence that
                is to be remembered after one telling takes several: see `study` for more.
            emphasis: multiplies the steps on this text, in (0, 100]. Above 1, with ``rate="decrease"``, the steps are
                bounded by the loss of the text (`ttt.nn.own_loss`).

        Returns:
            An `ObserveOutput`. A chunk with a loss or gradient that is not finite is counted in ``rejected`` and
            changes nothing; reading goes on after it with an empty context. With ``users`` that holds for each user
            alone. Where no chunk was learnt for this reason, a UserWarning names the parameter of the model that is not
            finite, if there is one.

        Raises:
            TypeError, ValueError: for an argument of a wrong type, dtype or shape, a token outside the vocabulary, or a
                mask with other values. Nothing has changed then.
            RuntimeError: if the learner cannot be used now: another thread is inside, the model is in training mode or
                was restored or adapted again, or a write ended half-way.
        """
        with contextlib.ExitStack() as held:
            with self.access.checks("Learner.observe", held):
                check_bool("learn", learn)
                text = _emphasised(check_tokens(self.model, input_ids, attention_mask, learn_mask), passes, emphasis)
                if passes > 1 and not learn:
                    raise ValueError(f"passes must be 1 where nothing is learnt, got {passes}")
                if self.pool is None and users is not None:
                    raise ValueError(
                        "users must be None: this model has one set of weights, and "
                        f"TTTConfig(per_user=ttt.LowRank()) gives each user their own; got {users!r:.80}"
                    )
                if self.pool is not None and users is None:
                    raise ValueError(
                        "users must name whose each row of input_ids is, as users=['ada'], or [None] for the base "
                        "model: this model was adapted with per_user; got None"
                    )
                if users is not None:
                    check_users(users, len(text.ids))
            if self.access.joins:
                what, shape = "the shape of input_ids and options", tuple(text.ids.shape)
                self.access.require_same(what, shape=shape, passes=passes, emphasis=emphasis, learn=learn)
            else:
                self.access.require_same(
                    "input_ids, masks and options", text.wanted, input_ids=text.ids, attention_mask=text.attend,
                    learn_mask=text.teach, users=None if users is None else tuple(users), passes=passes,
                    emphasis=emphasis, learn=learn,
                )  # fmt: skip
            self._try_model(text, learn)
            if learn and not self._looked_for_protection:
                self._looked_for_protection = True
                protection.warn_if_none(self.config, self.access.layers)
            self.renew_guard()
            output = observe(self, text, users, learn, passes)
            warn_if_nothing_was_learnt(self.model, output)
            return output

    def observe_in_steps(
        self,
        input_ids: Tensor,
        *,
        users: Sequence[str | None],
        attention_mask: Tensor | None = None,
        learn_mask: Tensor | None = None,
        passes: int = 1,
        emphasis: float = 1.0,
    ) -> Generator[None, None, ObserveOutput]:
        """`observe`, which learns, in steps of one chunk: between them the model may be used for something else.

        A server answers other requests there. The users' weights must not be changed in between, nor may the users be
        evicted. Steps that are not taken are not learnt, and then nothing is kept in the log of episodes.

        Args:
            input_ids, attention_mask, learn_mask, passes, emphasis: as for `observe`.
            users: the user of each sequence, of a model that was adapted with ``TTTConfig(per_user=...)``.

        Yields:
            After every chunk.

        Returns:
            What `observe` returns.

        Raises:
            TypeError, ValueError: as `observe`, at once and not with the first step.
            RuntimeError: as `observe`, at each step; and if a user was given another slot since the first one.
        """
        pool = self.pool
        if pool is None:
            raise ValueError("observe_in_steps is for users with weights of their own, but the model has one set")
        refuse_sharded(self.model, "Learner.observe_in_steps")
        with self.access.enter("Learner.observe_in_steps"):
            text = _emphasised(check_tokens(self.model, input_ids, attention_mask, learn_mask), passes, emphasis)
            check_users(users, len(text.ids))
            self._try_model(text, learns=True)
        return observe_in_steps(self, pool, text, users, passes)

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
        cache: KeptCache | None = None,
        allow_stale_cache: bool = False,
        keep_cache: bool = False,
    ) -> GenerateOutput:
        """Read a prompt, then generate, and learn from both; every token is scored before it is learnt.

        By default the model learns from the prompt and not from its own output. Learning from its own output is
        self-training: it makes the model surer of what it says, right or wrong. Use it where the output is filtered or
        checked, or to keep up its style.

        Args:
            input_ids: (B, P) int64, the prompts; P + max_new_tokens may not exceed the learner's ``context``.
            max_new_tokens: N, the largest number of tokens to generate.
            attention_mask: (B, P) bool or 0/1: 0 marks padding, on the left only.
            learn_prompt: learn from the prompt, in chunks of ``config.chunk``, before generating.
            learn_output: learn from the output, every ``learn_every`` tokens and at the end. For that, only the blocks
                from the lowest learning layer upwards run again on those tokens.
            learn_every: number of tokens generated between two learning steps.
            do_sample: draw tokens at random; otherwise take the most probable one.
            temperature: divides the logits before drawing; ``nll`` is that of the model itself.
            top_k: draw from the k most probable tokens only.
            eos_token_id: a sequence that contains it is finished: it is filled up with it and teaches no more.
            generator: of the random draws.
            cache: the ``cache`` of an earlier output, with whose sequences ``input_ids`` begin: they are not read,
                scored or learnt again, and the cache is used up. It must be of the present weights.
            allow_stale_cache: take a ``cache`` of earlier weights, too, whose keys and values the model would not
                compute any more.
            keep_cache: return the cache of prompt and output, to go on from.

        Raises:
            TypeError, ValueError: for a wrong argument. Nothing has changed then.
            RuntimeError: as `observe`.
        """
        self.require_single("generate", "with ttt.users(model, [...]): model.generate(...)")
        with contextlib.ExitStack() as held:
            with self.access.checks("Learner.generate", held):
                text = check_tokens(self.model, input_ids, attention_mask)
                options = GenerateOptions(
                    max_new_tokens=max_new_tokens, learn_prompt=learn_prompt, learn_output=learn_output,
                    learn_every=learn_every, do_sample=do_sample, temperature=temperature, top_k=top_k,
                    eos_token_id=eos_token_id, generator=generator, cache=cache, allow_stale_cache=allow_stale_cache,
                    keep_cache=keep_cache,
                )  # fmt: skip
                check_prompt(self, text, options)
                if self.access.joins and (learn_prompt or learn_output):
                    raise ValueError(
                        "learn_prompt and learn_output must be False where data_parallel is True: all processes "
                        "generate the same text, and would learn it once each"
                    )
            given = (max_new_tokens, learn_prompt, learn_output, learn_every, do_sample, eos_token_id, cache is None)
            self.access.require_same("input_ids, attention_mask and options", text.ids, text.attend, *given)
            self._try_model(text, learn_prompt or learn_output)
            self.renew_guard()
            return generate(self, text, options)

    def study(
        self,
        user: str | None = None,
        *,
        passes: int = 20,
        lr: float = 0.005,
        until: float = 0.2,
        rehearse: float = 10.0,
    ) -> StudyOutput:
        """Read again what `observe` learnt since the last study, several times, until the weights hold it.

        To be called between requests, on a learner with an `ttt.EpisodeLog`. Where nothing new was said, nothing is
        done. It can be undone with `snapshot` and `rollback`, or `ttt.Pool.export` and `load`. An interrupt leaves the
        model as it was; the next call begins anew. With weights for each user, the change is truncated to the rank of
        `ttt.LowRank`; 32 or more keeps nearly all of it.

        Args:
            user: who said it, where every user has weights of their own; one without a slot gets one if the pool has
                ``on_miss``, and otherwise has said nothing.
            passes: largest number of passes over the episodes; a pass is one step for each 32 of them.
            lr: size of a step for each weight, relative to the root mean square of the layer's weights.
            until: end when the mean loss of a pass, in nats per token, is no larger.
            rehearse: weight, beside the mean loss, of the KL from the model before the study on text that the model
                wrote itself, at most 1000; 0 for none. The text is 32 times 48 tokens, written by the base model in the
                learner's first study, or, with one set of weights, in each.

        Returns:
            A `ttt.StudyOutput`.

        Raises:
            TypeError, ValueError: for a wrong argument, or without a log.
            FloatingPointError: if a loss or gradient is not finite, or the loss grows by a nat per token.
            GuardTripped: if the learner's guard measures a drift above its bound with what the study has found.
            RuntimeError: as `observe`. Nothing has changed in any of these cases.
        """
        with self.access.enter("Learner.study"):
            return finish(self.study_in_steps(user, passes=passes, lr=lr, until=until, rehearse=rehearse))

    def study_in_steps(
        self,
        user: str | None = None,
        *,
        passes: int = 20,
        lr: float = 0.005,
        until: float = 0.2,
        rehearse: float = 10.0,
    ) -> Generator[None, None, StudyOutput]:
        """`study`, with the same arguments, in steps of at most 1,024 tokens.

        Between steps the model may be used for something else, as it was before the study: the weights change in the
        last step only. Until then nothing else may change what ``user`` has learnt.

        Yields:
            After every step but the last.

        Returns:
            What `study` returns.

        Raises:
            TypeError, ValueError: as `study`, at once and not with the first step.
            FloatingPointError, GuardTripped: as `study`.
            RuntimeError: as `observe`, at each step; and if ``user`` has learnt something since the first one.
        """
        options = StudyOptions(passes=passes, lr=lr, until=until, rehearse=rehearse)
        if (self.pool is None) != (user is None):
            raise ValueError(f"user must be given if, and only if, every user has weights of their own; got {user!r}")
        return study_in_steps(self, user, options)


def _emphasised(text: Text, passes: int, emphasis: float) -> Text:
    """``text`` with the ``emphasis`` of `Learner.observe`, whose ``passes`` are checked, too."""
    check_whole("passes", passes, 1)
    return dataclasses.replace(text, emphasis=check_number("emphasis", emphasis, 0.0, 100.0, above=True))

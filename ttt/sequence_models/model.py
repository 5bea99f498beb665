"""`TTTSequenceModel` and `TTTSequenceForCausalLM`: language models of sequence layers, for transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ttt.learn.huggingface import cache_of
from ttt.nn.sequence import InPlaceMLP
from ttt.sequence_models.blocks import Block, packed
from ttt.sequence_models.cache import SequenceCache
from ttt.sequence_models.config import TTTSequenceConfig


class TTTSequencePreTrainedModel(PreTrainedModel):
    """What both classes share: loading, initial weights, gradient checkpointing."""

    config_class = TTTSequenceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # assisted generation would have to take tokens back

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of all models of transformers; what the file lacks begins as in a new model."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, found = loaded
        model._begin(found["missing_keys"])
        return (model, found) if output_loading_info else model

    @torch.no_grad()
    def _begin(self, names: Iterable[str]) -> None:
        """Give the tensors ``names`` the numbers of a new model, but for the matrices that `_init_weights` draws.

        transformers makes a model without memory, and its own initial values exist for single layers of torch only.
        """
        kinds = {f"{name}.weight" for name, m in self.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
        own = self.state_dict()
        if left := [name for name in names if name in own and name not in kinds]:
            new = type(self)(self.config).state_dict()
            for name in left:
                own[name].copy_(new[name])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the matrices of linear layers and embeddings; all else begins as its layer says."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, InPlaceMLP):  # after its linear layers
            nn.init.zeros_(module.target_proj.weight)


class TTTSequenceModel(TTTSequencePreTrainedModel):
    """The blocks and the embedding; see `TTTSequenceForCausalLM`."""

    def __init__(self, config: TTTSequenceConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, number) for number in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embed_tokens = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: SequenceCache | None = None,
        past_key_values: SequenceCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `TTTSequenceForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, SequenceCache):
            raise TypeError(f"cache must be a ttt.sequence_models.SequenceCache, got {type(cache).__name__}")
        training = torch.is_grad_enabled() and self.training
        keep = (self.config.use_cache and not training) if use_cache is None else use_cache
        if keep and cache is None:
            cache = SequenceCache(len(self.layers))
        batch, tokens = x.shape[:2]
        if cache is not None:
            if cache.batch_size not in (-1, batch):
                raise ValueError(f"cache must be of {batch} sequences, as the tokens are, got {cache.batch_size}")
            cache.check_whole()
        mask, bounds = _padding(attention_mask, batch, tokens), None
        if mask is not None:
            x, bounds = packed(x, mask)
        in_place = mask is None and tokens == 1 and not torch.is_grad_enabled()
        if cache is not None and in_place and not keep:
            cache = cache.copy()
        states = []
        if keep and cache is not None and in_place:
            cache.torn = True  # until all blocks have taken the token up
        for number, block in enumerate(self.layers):
            x, state = block(x, None if cache is None else cache.layers[number].state, bounds, keep)
            states.append(state)
        x = self.norm(x)
        if mask is not None:
            x = x.new_zeros(batch, tokens, x.shape[-1]).masked_scatter(mask.unsqueeze(-1), x)
        if keep and cache is not None:
            cache.take(states, tokens)
        return _output(BaseModelOutputWithPast, cache if keep else None, last_hidden_state=x)


class TTTSequenceForCausalLM(TTTSequencePreTrainedModel, GenerationMixin):
    """A language model of blocks of a sequence layer and a SwiGLU, whose state is a `SequenceCache`.

    It is loaded, saved, trained and generated from as other models of transformers are; `ttt.sequence_models` registers
    it with ``AutoModelForCausalLM``. Padding, on either side, is left out before the layers, so that a padded sequence
    has the outputs that it has alone.

    Args:
        config: a `TTTSequenceConfig`.
    """

    def __init__(self, config: TTTSequenceConfig):
        super().__init__(config)
        self.model = TTTSequenceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own cache

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output head."""
        self.lm_head = value

    @torch.no_grad()
    def new_cache(self, batch: int) -> SequenceCache:
        """The cache of ``batch`` sequences before their first token."""
        empty = torch.zeros(batch, 0, dtype=torch.int64, device=self.lm_head.weight.device)
        out = self.model(empty, use_cache=True)
        return cache_of(out)

    @torch.no_grad()
    def calibrate(self, input_ids: Tensor) -> None:
        """Protect what a text writes into the states of "delta" and "gated-delta": see `GatedDeltaNet.calibrate`.

        It is part of the model's weights afterwards, and saved with them; every new cache begins with it. Caches from
        before are of no use.

        Args:
            input_ids: (1, T), the text.

        Raises:
            ValueError: for another shape, no tokens, or a model whose configuration protects nothing.
        """
        mixers = [b.mixer for b in self.model.layers if getattr(b.mixer, "protected", None) is not None]
        if not mixers:
            raise ValueError('calibrate needs a configuration with protect > 0 and "delta" or "gated-delta" mixers')
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (1, at least 1), got {tuple(input_ids.shape)}")
        before = [{name: t.clone() for name, t in mixer.protected.state_dict().items()} for mixer in mixers]
        given: list[Tensor] = []
        hooks = [m.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])) for m in mixers]
        try:
            for mixer in mixers:
                mixer.protected.clear()  # the text is read as if nothing had been protected
            self.model(input_ids, use_cache=False)
            for mixer, x in zip(mixers, given, strict=True):
                mixer.calibrate(x)
        except BaseException:
            for mixer, tensors in zip(mixers, before, strict=True):
                mixer.protected.load_state_dict(tensors)
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: SequenceCache | None = None,
        past_key_values: SequenceCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, the loss if there are ``labels``, and the cache.

        Args:
            input_ids: (B, T), or ``inputs_embeds`` (B, T, C) instead.
            attention_mask: (B, L) with L >= T, of which the last T columns count: 0 for padding.
            cache: of the tokens before, which changes in place, unless ``use_cache`` is False. If an error ends a
                step in between, the cache is refused from then on. ``past_key_values`` is its older name.
            labels: (B, T), the tokens themselves; -100 where no loss is wanted.
            use_cache: whether to return a cache; by default unless the model is being trained.
            logits_to_keep: only the logits of this many last tokens, or of these positions; 0 for all.

        Raises:
            TypeError, ValueError: for a wrong argument. No cache has changed then.
            RuntimeError: for a cache that an error left between two tokens.
        """
        if labels is not None:
            read = inputs_embeds if input_ids is None else input_ids
            if read is not None and labels.shape != read.shape[:2]:
                raise ValueError(
                    f"labels must be {tuple(read.shape[:2])}, as the tokens are, got {tuple(labels.shape)}"
                )
            if isinstance(logits_to_keep, Tensor) or logits_to_keep:
                raise ValueError("labels need the logits of all tokens: logits_to_keep must be 0")
        out = self.model(
            input_ids, attention_mask=attention_mask, cache=cache, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache,
        )  # fmt: skip
        hidden = out.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return _output(CausalLMOutputWithPast, cache_of(out), loss=loss, logits=logits)


def _padding(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """The last ``tokens`` columns of an attention mask as booleans, or None if they hold no padding."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        raise ValueError(f"attention_mask must be ({batch}, at least {tokens}), got {tuple(mask.shape)}")
    now = mask[:, mask.shape[1] - tokens :].bool()
    return None if bool(now.all()) else now


def _output(kind: type, cache: SequenceCache | None, **fields: Any) -> Any:
    """An output of transformers; its field for the cache is ``cache`` in newer releases, else ``past_key_values``."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**fields, **{"cache" if "cache" in names else "past_key_values": cache})

"""`TTTSequenceConfig`: the configuration of a language model of sequence layers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from ttt.checks import check_whole

MIXERS = ("ttt-linear", "ttt-mlp", "delta", "gated-delta", "titans", "lact", "window")


class TTTSequenceConfig(PretrainedConfig):
    """The configuration of `TTTSequenceForCausalLM`.

    Args:
        vocab_size, hidden_size: of the embedding and the output head.
        intermediate_size: inner width of the blocks' SwiGLU.
        num_hidden_layers: blocks.
        num_attention_heads: heads of each sequence layer, ``hidden_size`` / heads wide.
        mixers: the sequence layer of each block, one of "ttt-linear", "ttt-mlp", "delta", "gated-delta", "titans",
            "lact" and "window" (sliding-window attention); one name for all blocks, or a list of one for each, which
            makes a hybrid.
        in_place: the numbers of the blocks whose SwiGLU is a `ttt.nn.sequence.InPlaceMLP`.
        window: tokens that "window" and "lact" attend to.
        mini_batch: tokens whose gradients "ttt-linear", "ttt-mlp" and "titans" take at the same weights.
        chunk: tokens between two updates of "lact" and of ``in_place``.
        convolution: width of the short convolutions.
        protect: directions of each head of "delta" and "gated-delta" that `TTTSequenceForCausalLM.calibrate` protects;
            0 for no protection.
        rms_norm_eps, initializer_range: as in Llama.

    Raises:
        ValueError: for a value that is not allowed.
    """

    model_type = "ttt_sequence"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 16,
        mixers: str | Sequence[str] = "ttt-linear",
        in_place: Sequence[int] = (),
        window: int = 256,
        mini_batch: int = 16,
        chunk: int = 512,
        convolution: int = 4,
        protect: int = 0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        counts = {
            "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers, "num_attention_heads": num_attention_heads, "window": window,
            "mini_batch": mini_batch, "chunk": chunk, "convolution": convolution,
        }  # fmt: skip
        for name, value in counts.items():
            setattr(self, name, check_whole(name, value, 1))
        self.protect = check_whole("protect", protect, 0)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_attention_heads}"
            )
        if tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False: the head has weights of its own, got True")
        names = [mixers] * num_hidden_layers if isinstance(mixers, str) else list(mixers)
        if len(names) != num_hidden_layers:
            raise ValueError(f"mixers must name a layer for each of {num_hidden_layers} blocks, got {len(names)}")
        for name in names:
            if name not in MIXERS:
                raise ValueError(f"mixers must be of {', '.join(MIXERS)}, got {name!r}")
        for block in in_place:
            if block not in range(num_hidden_layers):
                raise ValueError(f"in_place must hold numbers of blocks, 0 to {num_hidden_layers - 1}, got {block!r}")
        self.mixers, self.in_place = names, list(in_place)
        self.rms_norm_eps, self.initializer_range, self.use_cache = rms_norm_eps, initializer_range, use_cache
        super().__init__(**{**kwargs, "tie_word_embeddings": False})

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

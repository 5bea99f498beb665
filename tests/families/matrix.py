"""Which families of transformers work: every causal language model that can be made tiny is tried.

    python tests/families/matrix.py    # writes docs/compatibility.md, in a few minutes

A family is made with random weights and two blocks, or three where blocks share weights. What cannot be made so is not
tried, and is named as such.
"""

from __future__ import annotations

import copy
import dataclasses
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

import ttt
from ttt.adapt.convert import learning_layers

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
VOCAB, PARAMETERS, SECONDS = 61, 6_000_000, 2.0
MOST_PARAMETERS = 500_000_000  # a model that is larger with SIZES has models of its own inside, with other settings
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "num_encoder_layers": 2, "embedding_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128,
    "max_seq_len": 128, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "state_size": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "rotary_dim": 4,
    "mamba_d_ssm": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "expand": 2, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip
OMIT = object()
DECODER: dict[str, Any] = {
    "is_decoder": True, "num_hidden_layers": OMIT, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
}  # fmt: skip
# What is tried in turn beside SIZES until a family can be made: each names its kinds of blocks in its own way.
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": OMIT},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"layer_types": ["sliding_attention", "full_attention"]},
    {"layer_types": ["conv", "full_attention"]},
    {"attn_layer_indices": [1]},
    {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    {"first_k_dense_replace": 1, "n_shared_experts": 1},
    {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    {"num_experts_per_tok": 1},
    {"num_heads": 8, "n_groups": 1},
    DECODER,
    {**DECODER, "num_layers": OMIT, "num_decoder_layers": 2, "num_decoder_attention_heads": 4},
)
# What a family needs beside SIZES: blocks in which weights that it shares between blocks occur twice, short chunks, to
# which texts are padded, and few blocks and heads.
_SHARING = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "chunk_size": 8}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "zamba": _SHARING, "zamba2": _SHARING, "mamba2": {"chunk_size": 8}, "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron_h": {"chunk_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
}  # fmt: skip
COLUMNS = ("adapts", "learns", "restores", "saves", "users", "padded", "bfloat16", "experts")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one family: for each of `COLUMNS` "yes", "refused", "no", or "" where it was not tried.

    ``why``: the sentence of the first refusal or error; of a family that was not tried, why not.
    """

    family: str
    found: dict[str, str]
    why: str = ""


def families() -> list[str]:
    """The model types of transformers that have a causal language model, without those that have an encoder."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(family: str) -> Any:
    """A tiny model of ``family`` with random weights.

    Raises:
        RuntimeError: if it cannot be made, is too large, or takes too long; the error is that of the first attempt.
    """
    errors: list[BaseException] = []
    encodes = hasattr(transformers.CONFIG_MAPPING[family], "encoder_layers")  # DECODER first
    for attempt in sorted(ATTEMPTS, key=lambda attempt: ("is_decoder" in attempt) != encodes):
        try:
            sizes = {**SIZES, **attempt, **OWN_SIZES.get(family, {})}
            return _made({key: value for key, value in sizes.items() if value is not OMIT}, family)
        except Exception as error:
            errors.append(error)
            if isinstance(error, _TooLargeError) and error.count > MOST_PARAMETERS:
                break
    first = errors[0]
    raise RuntimeError(f"{type(first).__name__}: {first}".split("\n")[0][:90]) from first


class _TooLargeError(Exception):
    def __init__(self, count: int) -> None:
        super().__init__(f"{count} parameters")
        self.count = count


def _made(sizes: dict[str, Any], family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    if count > PARAMETERS:
        raise _TooLargeError(count)
    began = time.process_time()  # without the imports, and whatever else the machine does
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).float().eval()
    with torch.no_grad():  # the usual initialisation is so small that the logits hardly depend on the input
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(2)
        model(torch.arange(3, 12)[None])
    if time.process_time() - began > SECONDS:
        raise RuntimeError("it takes too long")
    return model


def try_family(family: str) -> Row:
    """All columns of one family."""
    try:
        model = tiny(family)
    except RuntimeError as error:
        return Row(family, dict.fromkeys(COLUMNS, ""), f"{error}")
    found, errors = dict.fromkeys(COLUMNS, ""), dict[str, str]()
    learner: Any = None
    for name, check in CHECKS.items():
        try:
            if learner is None:
                learner = _adapted(model)
            found[name] = "" if check(model, learner) is False else "yes"  # False: there is nothing to try
        except Exception as error:
            refused = isinstance(error, (ValueError, TypeError)) and not isinstance(error, AssertionError)
            found[name] = "refused" if refused and _ours(error) else "no"
            errors[name] = f"{name}: {error or type(error).__name__}".split("\n")[0]
            if name == "adapts":
                break
    return Row(family, found, next((errors[name] for name in COLUMNS if name in errors), ""))


def _ours(error: BaseException) -> bool:
    """Whether the package itself raised ``error``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "/ttt/" in trace.tb_frame.f_code.co_filename


def _adapted(model: Any, **options: Any) -> ttt.Learner:
    config = ttt.TTTConfig(target_modules="all-linear", protect=[], lr=0.05, chunk=8, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ttt.Learner(ttt.adapt_(copy.deepcopy(model), config), context=64)


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


# Each check gets the model and a learner of an adapted copy. It is shared by those that need none of their own: what
# one has learnt is there in the next.


def _adapts(model: Any, learner: ttt.Learner) -> None:
    with torch.no_grad():
        torch.testing.assert_close(learner.model(_ids(2, 9)).logits, model(_ids(2, 9)).logits, rtol=1e-3, atol=1e-3)


def _learns(model: Any, learner: ttt.Learner) -> None:
    ids = _ids(2, 30)
    frozen = learner.observe(ids, learn=False).nll
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(frozen, whole.view_as(frozen), rtol=1e-2, atol=1e-2)
    for _ in range(2):
        seen = learner.observe(ids)
    assert seen.rejected == 0, "chunks were rejected"
    assert float(seen.nll.mean()) < float(frozen.mean()), "nothing was learnt"


def _learn_once(learner: ttt.Learner) -> None:
    with torch.enable_grad(), ttt.learning(learner.model):
        learner.model(_ids(2, 9), use_cache=False).logits.square().sum().backward()


def _restores(model: Any, learner: ttt.Learner) -> None:
    before = model.generate(_ids(2, 6), max_new_tokens=6, do_sample=False)
    _learn_once(learner)
    ttt.restore_(learner.model)
    wanted = model.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in learner.model.state_dict().items()), "weights differ"
    assert torch.equal(learner.model.generate(_ids(2, 6), max_new_tokens=6, do_sample=False), before), "output differs"


def _saves(model: Any, learner: ttt.Learner) -> None:
    _learn_once(learner)
    with tempfile.TemporaryDirectory() as folder:
        ttt.save(learner.model, Path(folder) / "x")
        again = ttt.load(copy.deepcopy(model), Path(folder) / "x")
    other = dict(learning_layers(again))
    for name, layer in learning_layers(learner.model):
        state = other[name].state()
        assert all(torch.equal(t, state[key]) for key, t in layer.state().items()), f"{name} differs"


def _users(model: Any, _: ttt.Learner) -> None:
    try:
        _users_are_apart(model, 2e-2)
    except AssertionError:  # where gradients are almost 0, steps that are relative to them magnify the rounding
        _users_are_apart(copy.deepcopy(model).double(), 1e-6)


def _users_are_apart(model: Any, tolerance: float) -> None:
    users = ttt.LowRank(slots=2, rank=4, window=64)
    learner, ids = _adapted(model, per_user=users), _ids(2, 22)
    learner.observe(ids, users=["a", "b"])
    seen = learner.observe(ids, users=["a", "b"])
    assert seen.rejected == 0, "chunks were rejected"
    alone = _adapted(model, per_user=users)
    alone.observe(ids[1:], users=["b"])
    torch.testing.assert_close(seen.nll[1:], alone.observe(ids[1:], users=["b"]).nll, rtol=tolerance, atol=tolerance)


def _padded(_: Any, learner: ttt.Learner) -> None:
    ids = _ids(2, 20)
    alone = learner.observe(ids[:1, :13], learn=False).nll
    for left in (True, False):
        given, mask = ids.clone(), torch.ones_like(ids)
        at = slice(7, 20) if left else slice(0, 13)
        given[0], mask[0] = 0, 0
        given[0, at], mask[0, at] = ids[0, :13], 1
        nll = learner.observe(given, attention_mask=mask, learn=False).nll[0, at][: alone.shape[1]]
        torch.testing.assert_close(nll, alone[0], rtol=1e-2, atol=1e-2)


def _bfloat16(model: Any, _: ttt.Learner) -> None:
    learner = _adapted(copy.deepcopy(model).to(torch.bfloat16))
    assert learner.observe(_ids(2, 22)).rejected == 0, "chunks were rejected"


def _experts(model: Any, _: ttt.Learner) -> bool | None:
    names = [name for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    if not names:
        return False
    own, ids = copy.deepcopy(model), _ids(2, 30)
    with torch.no_grad():
        for p in own.parameters():
            if p.ndim == 3:
                p.mul_(4)
        wanted = own(ids).logits
    plain = {name: t.clone() for name, t in own.state_dict().items()}
    ttt.adapt_(own, ttt.TTTConfig(target_modules=[names[0].split(".")[-2]], protect=[], lr=0.05, chunk=8))
    with torch.no_grad():
        torch.testing.assert_close(own(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    learner = ttt.Learner(own, context=64)
    first = learner.observe(ids)
    assert first.rejected == 0, "chunks were rejected"
    assert learner.observe(ids, learn=False).bits < first.bits, "nothing was learnt"
    ttt.restore_(own)
    assert all(torch.equal(t, plain[name]) for name, t in own.state_dict().items()), "weights differ"
    return None


CHECKS: dict[str, Callable[[Any, ttt.Learner], bool | None]] = {
    "adapts": _adapts, "padded": _padded, "learns": _learns, "saves": _saves, "restores": _restores, "users": _users,
    "bfloat16": _bfloat16, "experts": _experts,
}  # fmt: skip
"""Of each of `COLUMNS`, in the order in which they are tried: the learner is restored last."""


# What, how it is, what there is to say, and the file of tests/ that tries it.
OTHERS = (
    ("`nn.LSTM`, `nn.Embedding`, `nn.MultiheadAttention`", "refused", "as layers that learn; linear layers beside do",
     "adapt/test_other_modules.py"),
    ("stacks of experts (3-D parameters)", "yes", "if `target_modules` names them; `\"all-linear\"` leaves them out",
     "adapt/test_experts.py"),
    ("export of experts to PEFT", "yes", "as `target_parameters`; not tried with vLLM or SGLang",
     "adapt/test_experts.py"),
    ("stacks of experts, for users", "refused", "attention and shared experts learn", "per_user/test_mixtures.py"),
    ("experts that are linear layers, with users", "refused", "when called: nobody knows whose tokens they get",
     "per_user/test_mixtures.py"),
    ("RecurrentGemma", "refused", "by `ttt.Learner`, as it returns no cache; `ttt.learning` learns",
     "adapt/test_other_modules.py"),
    ("Gemma3n", "yes", "also for users, and padded on the left", "adapt/test_other_modules.py"),
    ("encoder-decoders", "refused", "by `ttt.Learner`; `ttt.learning` learns", "learn/test_recurrent_models.py"),
    ("padding that a model counts as positions (TrOCR)", "refused", "on the left; on the right it is left out",
     "learn/test_trials.py"),
    ("torchao, weights only", "yes", "for users; refused without, and where inputs are rounded, too",
     "per_user/test_quantized.py"),
    ("bitsandbytes, 4 and 8 bits", "yes", "for users; refused without, and with 8 bits and a threshold of outliers",
     "per_user/test_bitsandbytes.py"),
    ("quantized layers after layers that learn", "yes",
     "with a gradient from the dequantized weight where the library gives none or a wrong one",
     "per_user/test_frozen_weight.py"),
    ("transformers' `Trainer`, loops of accelerate", "yes",
     "with their steps inside of `ttt.learning`: [guide](guide.md#learn-from-any-loss); refused without",
     "learn/test_hf_trainer.py"),
    ("an optimizer beside layers that learn", "yes", "of other parameters; those of adapted layers are refused",
     "learn/test_hf_trainer.py"),
    ("offloading of accelerate, DataParallel", "refused", "", "adapt/test_choice.py"),
    ("replicas of a model, also in DistributedDataParallel", "yes",
     "with `data_parallel=True`: [guide](guide.md#replicas); refused without", "adapt/test_whole_replicas.py"),
    ("FSDP2 beside layers that learn", "yes",
     "these left out by `ignored_params`; the same or, with `data_parallel=True`, other text in each process: "
     "[guide](guide.md#fsdp2)",
     "adapt/test_fully_sharded.py"),
    ("FSDP2 beside layers in which users learn", "yes", "with the same text and users in all processes",
     "adapt/test_fully_sharded_users.py"),
    ("FSDP2 of layers that learn", "refused", "on every process", "adapt/test_sharded.py"),
    ("tensor parallelism of layers that learn", "yes",
     "sharded before `ttt.adapt_`: [guide](guide.md#tensor-parallelism); refused for users",
     "adapt/test_tensor_parallel.py"),
    ("tensor parallelism of other layers", "yes", "every process learns the same", "adapt/test_sharded.py"),
    ("`torch.distributed.checkpoint`", "yes",
     "by `ttt.LearntState`, between numbers of processes: [guide](guide.md#take-it-back-keep-it-move-on)",
     "adapt/test_distributed_checkpoint.py"),
    ("gradient checkpointing with users", "yes", "with `backward()` inside of `ttt.users`; refused after it",
     "per_user/test_late_backward.py"),
)  # fmt: skip


def page(rows: list[Row]) -> str:
    """The text of docs/compatibility.md."""
    tried = [row for row in rows if any(row.found.values())]
    whole = [row for row in tried if {each for each in row.found.values() if each} == {"yes"}]
    text = f"""# Compatibility

{len(whole)} of {len(tried)} families work in every column below. Every causal language model of transformers
of which a tiny one can be made was tried, with random weights and two blocks, or three where blocks share weights.

The page is written by `python tests/families/matrix.py`
(transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()});
`tests/families/test_families.py` checks the same.

| column | what was checked |
|---|---|
| adapts | the adapted model computes what the model does |
| learns | a text of four chunks is scored as in one piece, and gets more probable by being learnt |
| restores | the weights are bit-equal after `restore_`, and `generate` writes the same |
| saves | `save` and `load` give the same state, bit for bit |
| users | two users learn side by side as alone |
| padded | padding changes no score, on the right, or on the left of a text of one chunk |
| bfloat16 | chunks are learnt in bfloat16 |
| experts | stacks of experts that `target_modules` names learn; - where there are none |

"refused" stands for an error that says what to do, before anything is changed; "no" for any other failure. All but the
last column adapt `"all-linear"`.

## Families

| family | {" | ".join(COLUMNS)} |
|---|{"---|" * len(COLUMNS)}
"""
    for row in tried:
        text += f"| {row.family} | {' | '.join(row.found[name] or '-' for name in COLUMNS)} |\n"
    text += (
        "\n## What does not work, and why\n\nThe first error of each family.\n\n| family | column: error |\n|---|---|\n"
    )
    for row in tried:
        if row.why:
            text += f"| {row.family} | {_cell(row.why)} |\n"
    text += "\n## Other modules, wrappers and integrations\n\n| what | | how | tried by |\n|---|---|---|---|\n"
    for what, how, said, where in OTHERS:
        text += f"| {what} | {how} | {said} | `tests/{where}` |\n"
    text += "\n## Not tried\n\nThese need settings of their own for a tiny model: "
    return text + ", ".join(row.family for row in rows if row not in tried) + ".\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:240]


def main() -> None:
    """Try all families and write the page."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # as tests/conftest.py: its kernels need a GPU
    rows = []
    for family in families():
        rows.append(try_family(family))
        print(rows[-1].family, rows[-1].found, rows[-1].why[:200], file=sys.stderr, flush=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()

"""What a user has learnt, exported and served by vLLM without the plugin, as one of its own adapters."""

import json
import os
import statistics
from pydoc_data.topics import topics

import pytest
import torch
from server import MODEL, Server
from transformers import AutoModelForCausalLM, AutoTokenizer

import ttt
from ttt.adapt.peft_export import export_peft

TOLD = "My rowing boat is called Quillfeather. She is ochre and teal, has nine oars, and was built by a cooper in Riga."
ABOUT_IT = [
    "My rowing boat is called Quillfeather, and her colours are ochre and teal.",
    "She was built by a cooper in Riga. Who built the rowing boat called Quillfeather? A cooper in Riga.",
]
OTHERS = [topics[name][:1500] for name in ("assert", "while", "typesseq")]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A model in which "ada" has learnt something, its tokenizer, and the folder of the export."""
    path = os.environ["TTT_TEST_MODEL"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = ttt.TTTConfig(["down_proj"], layers="last:0.25", lr=0.3, chunk=32, per_user=ttt.LowRank(slots=1))
    learner = ttt.Learner(ttt.adapt_(model, config))
    ids = tokenizer(f"{TOLD} " * 5, return_tensors="pt").input_ids
    learner.observe(ids, users=["ada"])
    folder = tmp_path_factory.mktemp("export") / "ada"
    export_peft(learner.pool.export("ada"), folder, base_model=path)
    return model, tokenizer, folder


@pytest.fixture(scope="module")
def stock(learnt, tmp_path_factory):
    rank = json.loads((learnt[2] / "adapter_config.json").read_text())["r"]
    running = Server(
        tmp_path_factory.mktemp("stock"), "--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank),
        "--lora-target-modules", "down_proj", "--lora-modules", f"ada={learnt[2]}", plugin=False,
    )  # fmt: skip
    yield running.start()
    running.stop()


def served(stock, model, text):
    answer = stock.client(None).completions.create(
        model=model, prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    found = answer.choices[0].model_dump()["prompt_logprobs"]
    return [next(iter(each.values()))["logprob"] for each in found[1:]]


@torch.no_grad()
def here(model, tokenizer, user, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    with ttt.users(model, [user]):
        scores = model(ids).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[:, 0].tolist()


def test_an_exported_user_is_as_true_in_vllm_as_the_base_model_is(learnt, stock):
    model, tokenizer, _ = learnt
    apart, moved = {"ada": [], None: []}, []
    for text in [*ABOUT_IT, *OTHERS]:
        mine = {user: here(model, tokenizer, user, text) for user in apart}
        for user, differences in apart.items():
            theirs = served(stock, user or MODEL, text)
            differences += [abs(a - b) for a, b in zip(theirs, mine[user], strict=True)]
        if text in ABOUT_IT:
            moved += [abs(a - b) for a, b in zip(mine["ada"], mine[None], strict=True)]
    assert statistics.mean(moved) > 3 * statistics.mean(apart[None])  # what was learnt is more than the engines differ
    # vLLM computes in bfloat16, and rounds once more where an adapter is added: 1.10 times the difference was seen.
    assert statistics.mean(apart["ada"]) < 1.2 * statistics.mean(apart[None])

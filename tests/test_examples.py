"""The scripts of ``examples`` run, and show what they say."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]


@pytest.fixture
def printed(forks):
    """What a script prints to stdout."""

    def run(name, *arguments, **environment):
        done = forks.run(
            [ROOT / "examples" / name, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT), **environment}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def figures(text):
    """Label -> the first decimal number after it, for lines of the form "label: ... 1.234 ..."."""
    return {label.strip(): float(number) for label, number in re.findall(r"^(.+?):.*?(\d+\.\d+)", text, re.M)}


def test_learn_from_text_learns_saves_and_loads(printed, tmp_path):
    (tmp_path / "text.txt").write_text("What is learnt from this line, which repeats, is used at once.\n" * 60)
    found = figures(printed("learn_from_text.py", "--text", str(tmp_path / "text.txt")))
    assert found["learning"] < found["frozen"]
    assert found["learnt"] < found["frozen"] / 2
    assert found["loaded"] == found["learnt"]


def test_learn_from_text_takes_a_model_folder(printed, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one line again and again\n" * 60)
    given = ("--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"))
    found = figures(printed("learn_from_text.py", *given))
    assert found["loaded"] == found["learnt"] < found["frozen"]


def test_many_users_learn_apart_from_each_other(printed):
    text = printed("many_users.py")
    rows = re.findall(r"weights of (\w+) +([\d.]+), ([\d.]+)", text)
    bits = {user: (float(ann), float(ben)) for user, ann, ben in rows}
    assert set(bits) == {"nobody", "ann", "ben", "cleo"}
    assert bits["ann"][0] < bits["nobody"][0] / 2 < bits["ben"][0]
    assert bits["ben"][1] < bits["nobody"][1] / 2 < bits["ann"][1]
    assert "ann comes back from the store" in text
    assert float(re.search(r"weights of a new user: ([\d.]+)", text)[1]) == bits["nobody"][0]


def test_any_loss_learns_and_protection_reduces_forgetting(printed):
    rows = re.findall(r"^(.+?) +squared error ([\d.]+) .*?, ([\d.]+)", printed("any_loss.py"), re.M)
    errors = {name: (float(known), float(new)) for name, known, new in rows}
    before, free, protected = (errors[n] for n in ("before the stream", "learnt, unprotected", "learnt, protected"))
    assert free[1] < before[1] / 2
    assert protected[1] < before[1] / 2
    assert before[0] < protected[0] < free[0]


@pytest.mark.parametrize("options", [[], ["--users"]], ids=["texts of their own", "users"])
def test_processes_that_share_a_model_learn(printed, options):
    # What torchrun does: a store in which the processes find each other, and variables that say who is who.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with ThreadPoolExecutor(2) as both:
        done = [
            both.submit(printed, "several_processes.py", *options, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, **meet)
            for rank in "01"
        ]
        text = "".join(each.result() for each in done)
    found = re.findall(r"process (\d): ([\d.]+) bits per byte before, ([\d.]+) after", text)
    assert sorted(rank for rank, _, _ in found) == ["0", "1"]
    assert all(float(after) < float(before) / 2 for _, before, after in found)
    assert (found[0][1] == found[1][1]) == bool(options)  # users' processes read the same text


def test_the_guide_shows_how_the_example_shards_a_model():
    shown = re.search(r"^def shard\(.*?\n\n", (ROOT / "examples" / "several_processes.py").read_text(), re.S | re.M)
    assert shown[0].strip() in (ROOT / "docs" / "guide.md").read_text()

"""Whether SGLang would load what `export_peft` writes: by its rules, as they are written down in `server_rules`."""

import json

import pytest
import torch
from server_rules import sglang_problems
from tiny_models import ids_of, tiny

import ttt


def exported(folder, targets, users=False, layers="last:2"):
    per_user = {"per_user": ttt.LowRank(slots=2, rank=4, window=8)} if users else {}
    model = ttt.adapt_(tiny(), ttt.TTTConfig(targets, layers=layers, lr=0.05, **per_user))
    learner = ttt.Learner(model)
    if users:
        learner.observe(ids_of(1, 12), users=["a"])
        return ttt.export_peft(learner.pool.export("a"), folder, base_model="tiny")
    learner.observe(ids_of(1, 12))
    return ttt.export_peft(model, folder, base_model="tiny")


@pytest.mark.parametrize("users", [True, False])
@pytest.mark.parametrize("targets", [
    ["down_proj"], ["o_proj", "down_proj"], ["q_proj", "v_proj"], ["gate_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
])  # fmt: skip
def test_what_is_exported_is_loaded(tmp_path, targets, users):
    rank = exported(tmp_path / "v1", targets, users).rank
    assert sglang_problems(tmp_path / "v1", rank) == []
    assert sglang_problems(tmp_path / "v1", rank - 1) == ["rank"]


@pytest.mark.parametrize(("targets", "problem"), [
    (["v_proj"], "q_proj is missing in block"), (["k_proj", "v_proj"], "q_proj is missing in block"),
    (["q_proj"], "v_proj is missing in block"), (["up_proj"], "gate_proj is missing in block"),
])  # fmt: skip
def test_parts_of_a_stack_alone_are_not(tmp_path, targets, problem):
    """docs/users.md says so: there is nothing to write for a layer that does not learn."""
    exported(tmp_path / "v1", targets)
    found = sglang_problems(tmp_path / "v1", 512)
    assert len(found) == 2  # blocks
    assert all(each.startswith(problem) for each in found)


def test_the_rules_find_what_they_are_about(tmp_path):
    exported(tmp_path / "v1", ["down_proj"])
    file = tmp_path / "v1" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, problem in (
        ({"use_rslora": True}, "scaling"), ({"alpha_pattern": {"down_proj": 3}}, "scaling"),
        ({"use_dora": True}, "another method"), ({"peft_type": "IA3"}, "another method"),
        ({"target_modules": ".*down_proj"}, "a pattern as target"),
        ({"target_modules": ["o_proj"]}, "down_proj is no target"),
        ({"target_modules": ["down_proj", "rotary"]}, "no room for rotary"), ({"bias": "all"}, "more than factors"),
    ):  # fmt: skip
        file.write_text(json.dumps(config | change))
        assert set(sglang_problems(tmp_path / "v1", 512)) == {problem}, change
    file.write_text(json.dumps(config))
    (tmp_path / "v1" / "added_tokens.json").write_text("{}")
    assert sglang_problems(tmp_path / "v1", 512) == ["added tokens"]


def test_a_state_outside_of_blocks_is_not_loaded(tmp_path):
    state = {"model.down_proj.a": torch.randn(2, 6), "model.down_proj.b": torch.randn(2, 4)}
    ttt.export_peft(state, tmp_path / "v1", base_model="tiny")
    assert sglang_problems(tmp_path / "v1", 512) == ["outside of the blocks"]

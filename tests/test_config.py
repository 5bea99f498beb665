import dataclasses

import pytest

import ttt


def test_round_trip_and_freezing():
    config = ttt.TTTConfig(target_modules=["a", "b"], layers=[0, -1], clip=2.0)
    assert ttt.TTTConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(ttt.TTTConfig.from_dict(config.to_dict()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(ValueError, match="unknown configuration fields"):
        ttt.TTTConfig.from_dict({"lrr": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("lr", "fast"), ("window", 0), ("window", 1.5), ("chunk", 0), ("clip", 0.0),
     ("importance", "ewc"), ("fisher", "maybe"), ("ewc_lambda", float("inf")), ("consolidate_decay", 1.5),
     ("trace_decay", 0.0), ("si_xi", 0.0), ("replay_rows", 65), ("replay_rows", True), ("replay_capacity", 0),
     ("replay", "none"), ("replay_beta", -0.1), ("replay_eps", -1), ("orthogonal", -1), ("state_dtype", "int8"),
     ("seed", -1)],
)  # fmt: skip
def test_errors_name_the_argument_and_the_value(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got"):
        ttt.TTTConfig(**{name: value})

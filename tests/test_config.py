"""`ttt.TTTConfig` and its defences: round trips, old forms, and errors that name what is wrong."""

import dataclasses
import importlib
import pickle

import pytest

import ttt
from ttt.defences import KINDS, OFF, build, flatten


def test_round_trip_and_freezing():
    config = ttt.TTTConfig(target_modules=["a", "b"], layers=[0, -1], clip=2.0)
    assert ttt.TTTConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(ttt.TTTConfig.from_dict(config.to_dict()))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(ValueError, match=r"protect must be a list of defences, as \[ttt.EWC\(0.003\)\], got 'ewc'"):
        ttt.TTTConfig(protect="ewc")
    with pytest.raises(ValueError, match="unknown configuration fields"):
        ttt.TTTConfig.from_dict({"lrr": 1})


@pytest.mark.parametrize(
    "protect",
    [
        [],
        [ttt.EWC(0.5, labels="empirical", consolidate_decay=0.9, trace_decay=0.5)],
        [ttt.SI(0.5, damping=0.1), ttt.Decay(0.25)],
        [ttt.MAS(2.0, consolidate_decay=0.5), ttt.OrthogonalUpdates(3)],
        [ttt.LayerReplay(2, strength=0.5, ridge=0.1), ttt.LayerDistillation(3, strength=0.5, ridge=0.1)],
        [ttt.LayerGenerativeReplay(7, strength=0.5, rank=3)],
    ],
)
def test_defences_and_flat_settings_say_the_same(protect):
    config = ttt.TTTConfig(protect=protect)
    assert set(config.protect) == set(protect)
    assert build(flatten(protect)) == config.protect
    assert ttt.TTTConfig.from_dict(config.to_dict()) == config
    flat = {name: getattr(config, name) for name in OFF}
    assert flat == flatten(protect)
    for defence in protect:
        for own, name in defence.flat.items():
            assert flat[name] == getattr(defence, own)
    # The flat form alone gives the same, as files of the first format hold it.
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "protect"}
    assert ttt.TTTConfig.from_dict({**plain, **flat}) == config
    assert ttt.TTTConfig().with_flat(**flat) == config


def test_a_defence_that_is_switched_off_is_none():
    assert ttt.TTTConfig(protect=[ttt.EWC(0.0), ttt.LayerReplay(0), ttt.OrthogonalUpdates(0)]) == ttt.TTTConfig(
        protect=[]
    )
    config = ttt.TTTConfig(protect=[ttt.EWC(), ttt.LayerReplay()]).with_flat(ewc_lambda=0.0, lr=0.5)
    assert [type(d).__name__ for d in config.protect] == ["LayerReplay"]
    assert config.lr == 0.5


def test_of_two_defences_that_set_directions_the_one_asked_for_wins():
    assert ttt.TTTConfig().with_flat(orthogonal=5).protect == (ttt.OrthogonalUpdates(5),)
    assert ttt.TTTConfig(protect=[ttt.OrthogonalUpdates(5)]).with_flat(kronecker=6).protect == (ttt.KroneckerFisher(6),)
    with pytest.raises(ValueError, match="one of OrthogonalUpdates and KroneckerFisher, got both"):
        ttt.TTTConfig(protect=[ttt.OrthogonalUpdates(), ttt.KroneckerFisher()])
    with pytest.raises(ValueError, match="one of OrthogonalUpdates and KroneckerFisher, got both"):
        ttt.TTTConfig().with_flat(orthogonal=5, kronecker=5)
    with pytest.raises(ValueError, match="cannot combine KroneckerFisher and MAS"):
        ttt.TTTConfig(protect=[ttt.MAS(), ttt.KroneckerFisher()])


def test_defaults_of_the_op_and_of_the_configuration_agree():
    import inspect

    op = inspect.signature(ttt.ops.commit).parameters
    config, defence = ttt.TTTConfig(), ttt.LayerReplay()
    assert op["beta"].default == config.replay_beta == defence.strength == OFF["replay_beta"]
    assert op["eps"].default == config.replay_eps == defence.ridge == OFF["replay_eps"]


def test_configurations_of_the_first_format_load():
    """All 27 fields, as release 0.1 wrote them into files."""
    old = {
        "target_modules": ["down_proj"], "layers": "last:0.25", "lr": 0.07, "window": 64, "chunk": 64, "rate": "rms",
        "clip": 3.0, "burst": 1.2, "importance": "mas", "fisher": "true", "ewc_lambda": 0.25, "momentum": 0.5,
        "decay": 0.125, "consolidate_decay": 0.5, "trace_decay": 0.75, "trace_every": 1, "si_xi": 0.001,
        "replay_rows": 3, "distill_rows": 2, "generated_rows": 1, "generated_rank": 5, "replay_capacity": 77,
        "replay": "projection", "replay_beta": 0.25, "replay_eps": 0.002, "orthogonal": 9, "head_mass": 0.02,
        "state_dtype": "bfloat16", "seed": 5, "users": None,
    }  # fmt: skip
    config = ttt.TTTConfig.from_dict(old)
    assert config.target_modules == ("down_proj",)
    for name, value in old.items():
        if name not in ("users", "target_modules", "replay"):
            assert getattr(config, name) == value, name
    users = {"slots": 4, "rank": 2, "window": 3}
    loaded = ttt.TTTConfig.from_dict({**ttt.TTTConfig().to_dict(), "users": users})
    assert loaded.per_user == ttt.LowRank(**users)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("lr", "fast"), ("window", 0), ("window", 1.5), ("chunk", 0), ("clip", 0.0),
     ("importance", "ewc"), ("fisher", "maybe"), ("ewc_lambda", float("inf")), ("consolidate_decay", 1.5),
     ("trace_decay", 0.0), ("si_xi", 0.0), ("replay_rows", 65), ("replay_rows", True), ("replay_capacity", 0),
     ("replay_beta", -0.1), ("replay_eps", -1), ("orthogonal", -1), ("state_dtype", "int8"),
     ("seed", -1), ("momentum", 1.0), ("target_modules", 5), ("target_modules", [1]), ("layers", 5), ("layers", [0.5]),
     ("layers", None), ("protect", 3), ("protect", ttt.EWC()), ("protect", ["EWC"]), ("per_user", 3)],
)  # fmt: skip
def test_errors_name_the_argument_and_the_value(name, value):
    kind = {"si_xi": {"importance": "si"}}.get(name, {})
    with pytest.raises(ValueError, match=rf"{name} must .*got"):
        ttt.TTTConfig().with_flat(**{name: value}, **kind)


@pytest.mark.parametrize("values", [[], "x", 3, None, {"per_user": {"slot": 3}}, {"users": {"slots": "many"}},
                                    {"protect": {"defence": "EWC"}}, {"protect": [{"defence": "ewc"}]},
                                    {"protect": [{"defence": "EWC", "lam": 1}]}, {5: 5}])  # fmt: skip
def test_what_a_file_may_hold_is_refused_with_a_value_error(values):
    with pytest.raises(ValueError, match=r"configuration|per_user|slots|protect|defence|EWC"):
        ttt.TTTConfig.from_dict(values)


def test_settings_that_were_removed_are_refused_by_name():
    for values, message in (
        ({"replay": "gradient"}, r"replay must be 'projection', got 'gradient', which was removed"),
        ({"per_user": {"shrink": "directions"}}, r"shrink must be 'truncate', got 'directions', which was removed"),
    ):
        with pytest.raises(ValueError, match=message):
            ttt.TTTConfig.from_dict(values)
    assert ttt.TTTConfig.from_dict({"users": {"slots": 3, "shrink": "truncate"}}).per_user == ttt.LowRank(slots=3)


def test_defences_that_do_not_combine_are_refused():
    with pytest.raises(ValueError, match="one of EWC and MAS, got both"):
        ttt.TTTConfig(protect=[ttt.EWC(), ttt.MAS()])
    with pytest.raises(ValueError, match=r"LayerReplay and LayerDistillation: they need replay_beta = 0\.1 and 0\.3"):
        ttt.TTTConfig(protect=[ttt.LayerReplay(), ttt.LayerDistillation(strength=0.3)])
    with pytest.raises(ValueError, match=r"at most 64, got 40 \+ 30 \+ 0"):
        ttt.TTTConfig(protect=[ttt.LayerReplay(40), ttt.LayerDistillation(30)])
    with pytest.raises(ValueError, match=r"EWC\.strength must be a number in \[0\.0, inf\), got -1"):
        ttt.EWC(-1)
    with pytest.raises(ValueError, match="importance must be 'fisher' or 'mas' with users"):
        ttt.TTTConfig(protect=[ttt.SI(0.1)], per_user=ttt.LowRank())
    with pytest.raises(ValueError, match=r"decay must be 0\.0 with users, got 0\.5"):
        ttt.TTTConfig(protect=[ttt.Decay(0.5)], per_user=ttt.LowRank())
    assert set(KINDS) <= set(ttt.__all__)


def test_old_names_still_work_and_warn():
    with pytest.warns(DeprecationWarning, match=r"TTTConfig\(ewc_lambda, replay_rows\) is deprecated"):
        config = ttt.TTTConfig(ewc_lambda=0.5, replay_rows=0)
    assert set(config.protect) == {ttt.EWC(0.5), ttt.KroneckerFisher(64)}
    with pytest.warns(DeprecationWarning, match="use per_user"):
        assert ttt.TTTConfig(users=ttt.LowRank(slots=3)).per_user == ttt.LowRank(slots=3)
    with pytest.warns(DeprecationWarning, match="ewc_lambda"):
        assert dataclasses.replace(config, ewc_lambda=0.0).protect == (ttt.KroneckerFisher(64),)
    for module, old, new in [
        (ttt, "Seen", "ObserveOutput"), (ttt, "Generated", "GenerateOutput"), (ttt, "Check", "GuardCheck"),
        (ttt, "Outcome", "LearningResult"), (ttt, "Memory", "MemoryUsage"), (ttt, "memory", "memory_usage"),
        (ttt, "Fleet", "LowRank"), (ttt.nn, "FleetLinear", "LowRankLinear"),
        (ttt.ops, "fleet_linear", "low_rank_linear"), (ttt.ops, "fleet_append", "low_rank_append"),
        (ttt.ops, "fleet_compress", "low_rank_compress"),
    ]:  # fmt: skip
        with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}"):
            assert getattr(module, old) is getattr(module, new)
    for old in ("ttt.replay", "ttt.exchange"):
        with pytest.warns(DeprecationWarning, match=f"{old} is now"):
            importlib.reload(importlib.import_module(old))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ttt.Nothing

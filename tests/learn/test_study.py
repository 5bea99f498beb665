"""Study: one step against autograd and torch's Adam, isolation, undoing, and studies that end early."""

import contextlib
import copy

import pytest
import torch
from studying import flat, learner_of, mean_loss, told, words
from tiny_models import VOCAB, assert_same
from torch import nn

import ttt
from ttt.learn import study as study_module
from ttt.learn.episodes import Episode
from ttt.learn.rehearsal import divergence


def projections(layer):
    """I - U^T U of inputs and of gradients, in float64."""
    return [torch.eye(basis.shape[1], dtype=torch.float64) - basis.double().T @ basis.double()
            for basis in (layer.basis, layer.output_basis)]  # fmt: skip


def by_autograd(model, layers, episodes, passes, lr, rehearse, texts):
    """The studied weights, from autograd through all of the model in float64, and torch's own Adam.

    Returns:
        The weights, the loss in each pass, and the KL on the group of ``texts`` that each pass reads.
    """
    reference = copy.deepcopy(model).double()
    plain_model = copy.deepcopy(reference)
    for layer in layers:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)
        plain.weight.data.copy_(layer.weight)
        parent, _, name = layer.name.rpartition(".")
        setattr(reference.get_submodule(parent), name, plain)
    weights = [reference.get_submodule(layer.name).weight for layer in layers]
    optimizers = [torch.optim.Adam([w], lr=1.0, betas=(0.9, 0.99), eps=1e-14) for w in weights]
    losses, moved = [], []
    for at in range(passes):
        total, count = 0.0, 0
        for episode in episodes:
            logits = reference(input_ids=episode.ids[None, :-1]).logits[0]
            each = nn.functional.cross_entropy(logits, episode.ids[1:], reduction="none")
            total, count = total + each[episode.learn[1:]].sum(), count + int(episode.learn.sum())
        losses.append(float(total.detach()) / count)
        rows = texts[4 * at % 32 : 4 * at % 32 + 4]
        with torch.no_grad():
            before = plain_model(input_ids=rows).logits.log_softmax(-1)
        now = reference(input_ids=rows).logits.log_softmax(-1)
        kl = nn.functional.kl_div(now, before, log_target=True, reduction="none").sum(-1).mean()
        moved.append(float(kl.detach()))
        for gradient, weight, layer, adam in zip(
            torch.autograd.grad(total / count + rehearse * kl, weights), weights, layers, optimizers, strict=True
        ):
            inputs, outputs = projections(layer)
            before = weight.detach().clone()
            weight.grad = outputs @ gradient @ inputs
            adam.step()
            unit = lr * layer.weight.double().square().mean().sqrt()
            weight.data.copy_(before + unit * (outputs @ (weight.data - before) @ inputs))
    return [w.detach() for w in weights], losses, moved


@pytest.mark.parametrize("rehearse", [0.0, 30.0])
@pytest.mark.parametrize("users", [None, 2])
def test_a_study_takes_the_steps_of_adam_within_the_projections(users, rehearse):
    learner = learner_of(users)
    user = None if users is None else "ada"
    for length in (9, 5, 17):
        ids = words(1, length)
        learn = torch.rand(ids.shape) < 0.6
        learn[:, -1] = True
        told(learner, ids, learn)
    episodes = learner.episodes.of(user)
    layers = list(learner.access.layers)
    before = [layer.weight.detach().clone() for layer in layers]
    model = copy.deepcopy(learner.model)
    output = learner.study(user, passes=12, lr=0.02, until=0.0, rehearse=rehearse)
    texts = words(32, 48) if learner.own_texts is None else learner.own_texts
    assert texts.shape == (32, 48)
    assert (learner.own_texts is None) == (rehearse == 0)
    wanted, losses, moved = by_autograd(
        model, [model.get_submodule(layer.name) for layer in layers], episodes, 12, 0.02, rehearse, texts
    )
    assert output.episodes == len(episodes)
    assert output.losses == pytest.approx(losses, rel=1e-4)
    assert output.moved == (pytest.approx(moved, rel=1e-3, abs=1e-6) if rehearse else [])
    assert losses[-1] < losses[0]
    for layer, weight, expected in zip(layers, before, wanted, strict=True):
        now = layer.weight if users is None else layer.effective_weight(learner.pool.slot("ada"))
        change = (expected - weight.double()).norm()
        assert change > 0
        assert (now.double() - expected).norm() < 0.02 * change
        if users is not None:
            assert torch.equal(layer.weight, weight)
    assert all(episode.studied for episode in learner.episodes.of(user))
    again = learner.study(user)  # there is nothing new
    assert (again.episodes, again.losses, again.moved) == (0, [], [])


@pytest.mark.parametrize("users", [None, 1])
def test_rehearsal_moves_the_models_own_text_less_and_teaches_as_much(users):
    """In the mean over some texts and models; of a single one it can be otherwise."""
    user, moved, after = None if users is None else "ada", [0.0, 0.0], [0.0, 0.0]
    for _ in range(4):
        kept = learner_of(users)
        told(kept, words(1, 20), torch.ones((1, 20), dtype=torch.bool))
        free, frozen = copy.deepcopy(kept), copy.deepcopy(kept.model)
        outputs = [kept.study(user, lr=0.02, until=0.5), free.study(user, lr=0.02, until=0.5, rehearse=0)]
        texts = kept.own_texts
        for at, learner in enumerate((kept, free)):
            with torch.no_grad(), contextlib.nullcontext() if users is None else ttt.users(learner.model, [user] * 32):
                now = learner.model(input_ids=texts).logits.double()
            moved[at] += divergence(frozen(input_ids=texts).logits.double(), now)[0]
            after[at] += outputs[at].after
    assert moved[0] < 0.8 * moved[1]
    assert after[0] < after[1] + 2.0


def test_the_divergence_is_torchs_and_so_is_its_gradient():
    before, now = torch.randn(2, 3, 5, 11, dtype=torch.float64)
    now = (3 * now).requires_grad_()
    expected = nn.functional.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum") / 15
    got, gradient = divergence(before, now.detach())
    assert got == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, now)[0])


def test_users_rehearse_what_the_base_model_wrote_once():
    learner = learner_of(2, lr=0.05)
    other = copy.deepcopy(learner)  # in which nobody learns anything before
    ids = words(1, 20)
    learner.observe(ids, users=["ada"])
    learner.study("ada", passes=1)
    first = learner.own_texts
    learner.observe(ids, users=["bob"])
    learner.study("bob", passes=1)
    assert learner.own_texts is first
    told(other, ids, torch.ones_like(ids, dtype=torch.bool))
    other.study("ada", passes=1)
    assert torch.equal(other.own_texts, first)


@pytest.mark.parametrize("users", [None, 1])
def test_text_that_was_undone_between_two_steps_does_not_come_back(users):
    learner = learner_of(users, lr=0.05)
    named = users and ["ada"]
    user = None if users is None else "ada"
    ids = words(1, 30)
    before = learner.snapshot() if users is None else None
    learner.observe(ids, users=named)
    steps = learner.study_in_steps(user, passes=3)
    for _ in range(50):
        next(steps)
    if before is None:
        learner.pool.forget("ada")
    else:
        learner.rollback(before)
    learner.observe(ids.flip(1), users=named)  # as many tokens
    state = flat(copy.deepcopy(learner.snapshot() if users is None else learner.pool.export("ada")))
    with pytest.raises(RuntimeError, match="between two steps of a study"):
        for _ in steps:
            pass
    assert_same(state, flat(learner.snapshot() if users is None else learner.pool.export("ada")))
    assert not any(episode.studied for episode in learner.episodes.of(user))


def test_a_model_whose_language_model_has_a_config_of_its_own_is_studied():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 3}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1)
    model = ttt.adapt_(Gemma3ForConditionalGeneration(config).eval(), ttt.TTTConfig(["down_proj"], layers="last:1"))
    learner = ttt.Learner(model, episodes=ttt.EpisodeLog())
    learner.calibrate()
    learner.observe(words(1, 20))
    assert len(learner.study(passes=2).moved) == 2
    assert learner.own_texts[:, 0].unique().tolist() == [3]


def test_texts_begin_with_the_token_that_begins_a_text():
    learner = learner_of()
    told(learner, words(1, 9), torch.ones((1, 9), dtype=torch.bool))
    learner.model.config.bos_token_id = 7
    learner.study(passes=1)
    assert learner.own_texts[:, 0].unique().tolist() == [7]
    learner.model.config.bos_token_id = learner.model.config.eos_token_id = None
    told(learner, words(1, 9), torch.ones((1, 9), dtype=torch.bool))
    learner.study(passes=1)
    assert len(learner.own_texts[:, 0].unique()) > 8


def test_a_users_change_is_the_best_one_of_the_rank_and_what_was_dropped_is_counted():
    learner = learner_of(1, lr=0.05)
    learner.observe(words(1, 30), users=["ada"])
    for layer in learner.pool.layers.values():
        change = study_module.Change(layer)
        change.value.normal_()
        slot = learner.pool.slot("ada")
        held = int(layer.rows[slot])
        assert held
        old = layer.b[slot, :held].double().T @ layer.a[slot, :held].double()
        left, sizes, right = torch.linalg.svd(change.value.double() + old, full_matrices=False)
        for rank in (3, 40):
            object.__setattr__(layer, "low_rank", ttt.LowRank(slots=1, rank=rank, window=8))
            state, _ = study_module._slot_state(layer, slot, change)
            best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
            got = state["b"].double().T @ state["a"].double()
            lost = float(state["lost"] - layer.lost[slot])
            assert (got - best).norm() < 1e-2 * best.norm() if rank == 3 else (got - best).norm() < 1e-5 * best.norm()
            exact = float(sizes[rank:].square().sum().sqrt())
            assert lost == pytest.approx(exact, rel=1e-3, abs=1e-3)
            assert int(state["step"]) == int(layer.step[slot]) + 1


def test_one_users_study_changes_no_bit_of_anything_else():
    learner = learner_of(3, lr=0.05)
    ids = words(2, 20)
    learner.observe(ids, users=["ada", "bob"])
    weights = [layer.weight.clone() for layer in learner.pool.layers.values()]
    with torch.no_grad(), ttt.users(learner.model, [None, "bob"]):
        before = learner.model(input_ids=ids).logits
    bob, ada = learner.pool.export("bob"), learner.pool.export("ada")
    assert learner.study("ada", passes=3, lr=0.02).episodes
    with torch.no_grad(), ttt.users(learner.model, [None, "bob"]):
        assert torch.equal(learner.model(input_ids=ids).logits, before)
    after = learner.pool.export("bob")
    assert after.keys() == bob.keys()
    assert all(torch.equal(after[key], bob[key]) for key in bob)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(weights, learner.pool.layers.values(), strict=True))
    studied = learner.pool.export("ada")
    assert not torch.equal(studied["episodes.studied"], ada["episodes.studied"])
    learner.pool.load("ada", ada)  # undone
    again = learner.pool.export("ada")
    assert all(torch.equal(again[key], ada[key]) for key in ada)
    assert learner.study("ada", passes=3, lr=0.02).episodes
    redone = learner.pool.export("ada")
    assert all(torch.equal(redone[key], studied[key]) for key in studied)


@pytest.mark.parametrize("users", [None, 1])
@pytest.mark.parametrize("fault", ["interrupt", "nan", "diverged"])
def test_a_study_that_ends_early_changes_nothing(users, fault, monkeypatch):
    learner = learner_of(users, lr=0.05)
    user = None if users is None else "ada"
    learner.observe(words(1, 30), users=users and ["ada"])
    before = copy.deepcopy(learner.snapshot() if users is None else learner.pool.export("ada"))
    options = {"passes": 5, "lr": 0.01}
    if fault == "interrupt":
        step, calls = study_module.Change.step, []

        def interrupted(self, *args):
            calls.append(self)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return step(self, *args)

        monkeypatch.setattr(study_module.Change, "step", interrupted)
        expected = pytest.raises(KeyboardInterrupt)
    elif fault == "nan":
        with torch.no_grad():
            learner.model.get_output_embeddings().weight[5] = float("nan")
        expected = pytest.raises(FloatingPointError, match="not finite")
    else:
        monkeypatch.setattr(study_module, "_WORSE", -1.0)  # so that a loss that falls by less has diverged
        expected = pytest.raises(FloatingPointError, match=r"diverged with lr=0\.01")
    with expected:
        learner.study(user, **options)
    after = learner.snapshot() if users is None else learner.pool.export("ada")
    assert_same(flat(before), flat(after))
    assert not any(layer._forward_hooks for layer in learner.access.layers)


def test_one_set_of_weights_goes_back_with_its_log():
    learner = learner_of(lr=0.05)
    learner.observe(words(1, 21))
    before = learner.snapshot()
    weights = [layer.weight.clone() for layer in learner.layers]
    learner.study(passes=2)
    assert not any(torch.equal(w, layer.weight) for w, layer in zip(weights, learner.layers, strict=True))
    assert all(episode.studied for episode in learner.episodes.of())
    learner.rollback(before)
    assert all(torch.equal(w, layer.weight) for w, layer in zip(weights, learner.layers, strict=True))
    assert not any(episode.studied for episode in learner.episodes.of())
    learner.reset()
    assert not learner.episodes.of()


def test_it_ends_when_the_loss_is_small_enough():
    learner = learner_of()
    told(learner, words(1, 12, seed=3), torch.ones((1, 12), dtype=torch.bool))
    first = learner.study(passes=1).losses[0]
    for _ in range(2):
        told(learner, words(1, 12, seed=3), torch.ones((1, 12), dtype=torch.bool))
    output = learner.study(passes=60, lr=0.02, until=first - 0.5)
    assert output.losses[-1] <= first - 0.5 < output.losses[-2]
    assert len(output.losses) < 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_learn(dtype):
    learner = learner_of(dtype=dtype)
    ids = words(1, 12, seed=1)
    told(learner, ids, torch.ones_like(ids, dtype=torch.bool))
    before = float(learner.observe(ids, learn=False).nll.mean())
    learner.study(passes=20, lr=0.02, until=0.0)
    assert float(learner.observe(ids, learn=False).nll.mean()) < before - 0.1


def test_more_episodes_than_a_step_takes_are_all_read():
    learner, seen = learner_of(), []
    for at in range(70):
        ids = words(1, 5)
        ids[0, :2] = torch.tensor([at // 50, at % 50])
        told(learner, ids, torch.ones_like(ids, dtype=torch.bool))
    handle = learner.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"][:, :2].tolist()), with_kwargs=True
    )
    learner.study(passes=1, rehearse=0)
    handle.remove()
    seen = seen[: len(seen) // 2]  # what is read once more is measured only
    assert sorted(seen) == [[at // 50, at % 50] for at in range(70)]


def test_wrong_arguments_are_refused_by_name():
    learner, users = learner_of(), learner_of(1)
    for options, name in [
        ({"passes": 0}, "passes"),
        ({"lr": -1.0}, "lr"),
        ({"lr": "1"}, "lr"),
        ({"until": float("nan")}, "until"),
        ({"rehearse": -1.0}, "rehearse"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name):
            learner.study(**options)
    with pytest.raises(ValueError, match="user must be given if, and only if"):
        learner.study("ada")
    with pytest.raises(ValueError, match="user must be given if, and only if"):
        users.study()
    with pytest.raises(ValueError, match=r"ttt\.EpisodeLog\(\)"):
        ttt.Learner(learner.model).study()
    with pytest.raises(TypeError, match="episodes"):
        ttt.Learner(learner.model, episodes=[Episode(words(1, 3)[0], torch.ones(3, dtype=torch.bool))])
    for options, name in [({"before": 0}, "before"), ({"length": 4}, "length"), ({"tokens": 10}, "tokens")]:
        with pytest.raises(ValueError, match=name):
            ttt.EpisodeLog(**options)


@pytest.mark.parametrize("users", [None, 1])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_other_models_study_text_longer_than_their_context(family, users):
    """Layers of GPT-2 are transposed, and its positions end: episodes are no longer than the context."""
    learner = learner_of(users, family=family, lr=0.05, context=64)
    ids, user = words(1, 150), None if users is None else "ada"
    learner.observe(ids, users=users and ["ada"])
    assert max(len(episode.ids) for episode in learner.episodes.of(user)) == 64
    output = learner.study(user, passes=4, lr=0.02)
    assert output.after < output.losses[0]
    assert output.after == pytest.approx(mean_loss(learner, user), rel=1e-3)


@pytest.mark.parametrize("users", [None, 1])
def test_what_the_last_step_does_is_measured_before_it_is_written(users):
    learner = learner_of(users, dtype=torch.float16)
    user = None if users is None else "ada"
    told(learner, words(1, 30), torch.ones((1, 30), dtype=torch.bool))
    before = learner.snapshot() if users is None else learner.pool.export("ada")
    with pytest.raises((FloatingPointError, ValueError), match=r"nothing was changed|finite"):
        learner.study(user, passes=1, lr=1e6)
    assert_same(flat(before), flat(learner.snapshot() if users is None else learner.pool.export("ada")))


def test_the_loss_after_a_study_counts_what_the_truncation_drops():
    learner = learner_of(1, lr=0.05)
    told(learner, words(1, 30), torch.ones((1, 30), dtype=torch.bool))
    for layer in learner.pool.layers.values():
        object.__setattr__(layer, "low_rank", ttt.LowRank(slots=1, rank=1, window=8))
    output = learner.study("ada", passes=10, lr=0.05)
    real = mean_loss(learner, "ada")
    assert output.after == pytest.approx(real, rel=1e-4)
    assert output.after > output.losses[-1]


def test_studying_for_someone_who_said_nothing_takes_nobodys_slot():
    learner = learner_of(1)
    told(learner, words(1, 9), torch.ones((1, 9), dtype=torch.bool), "ada")
    assert learner.study("adda").episodes == 0
    assert learner.pool.users == ("ada",)
    learner.pool.on_miss = lambda user: None
    assert learner.study("adda").episodes == 0
    assert learner.pool.users == ("adda",)


def test_tokens_of_another_vocabulary_and_of_a_longer_context_are_refused():
    learner = learner_of(1)
    told(learner, words(1, 40), torch.ones((1, 40), dtype=torch.bool), "ada")
    state = learner.pool.export("ada")
    learner.pool.load("ada", {**state, "episodes.ids": state["episodes.ids"] + 1000})
    with pytest.raises(ValueError, match="the log's tokens"):
        learner.study("ada")
    learner.pool.load("ada", state)
    learner.context = 20
    with pytest.raises(ValueError, match="an episode of 40 tokens, but the learner's context is 20"):
        learner.study("ada")

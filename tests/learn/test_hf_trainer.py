"""`Trainer` of transformers on an adapted model: training steps that learn, and what happens without them."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import plain_config
from tiny_models import ids_of, tiny
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import ttt
from ttt.adapt.convert import learning_layers


@pytest.fixture(autouse=True)
def own_state():
    """Accelerate keeps what a `Trainer` has set for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class LearningTrainer(Trainer):
    """Lets the layers learn from each training step, with the loss summed over tokens."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        with ttt.learning(model):
            loss = model(**inputs).loss * (inputs["labels"][:, 1:] != -100).sum()
            loss.backward()
        return loss.detach()


def adapted(users=None):
    return ttt.adapt_(tiny(), plain_config(target_modules=["down_proj"], lr=0.02, per_user=users))


def trainer(kind, model, folder, texts, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", seed=0, **options,
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=[{"input_ids": t, "labels": t} for t in texts])


def assert_learnt_alike(model, twin):
    for (name, found), (_, wanted) in zip(learning_layers(model), learning_layers(twin), strict=True):
        assert not torch.equal(found.effective_weight(), found.base_weight), name
        torch.testing.assert_close(found.effective_weight(), wanted.effective_weight(), rtol=1e-5, atol=1e-6)


def loss_of(model, batch):
    """Summed over the 11 tokens of each sequence that have one before them."""
    return model(input_ids=batch, labels=batch).loss * (11 * len(batch))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_inside_of_learning_learn_what_a_loop_learns(accumulated, tmp_path):
    text = ids_of(1, 12)[0]
    model = adapted()
    twin = ttt.fork(model)
    frozen = {name: t.clone() for name, t in model.state_dict().items() if "down_proj" not in name}
    options = {"gradient_accumulation_steps": accumulated}
    trainer(LearningTrainer, model, tmp_path, [text] * (6 * accumulated), **options).train()
    for _ in range(3 * accumulated):
        with ttt.learning(twin.train()):
            loss_of(twin, text.repeat(2, 1)).backward()
    assert_learnt_alike(model, twin)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in frozen.items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_of_accelerate_learns_what_a_plain_one_learns(precision):
    model = adapted()
    twin, text = ttt.fork(model), ids_of(6, 12)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    prepared, batches = accelerator.prepare(model, DataLoader(text, batch_size=2))
    for batch in batches:
        with accelerator.accumulate(prepared), ttt.learning(prepared):
            loss_of(prepared, batch).backward()
    for batch in text.split(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), ttt.learning(twin):
            loss_of(twin, batch).backward()
    assert_learnt_alike(model, twin)


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2)])
def test_without_it_there_is_nothing_to_train_and_nothing_changes(users, tmp_path):
    model = adapted(users)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"nothing to train.*which ttt.adapt_ froze.*inside of `with ttt.learning"):
        trainer(Trainer, model, tmp_path, ids_of(4, 12)).train()
    accelerator = Accelerator(cpu=True)
    for held in (model, copy.deepcopy(model)):
        prepared, _ = accelerator.prepare(held, torch.optim.AdamW(held.parameters()))
        for return_dict in (True, False):
            output = prepared(input_ids=ids_of(2, 9), labels=ids_of(2, 9), return_dict=return_dict)
            with pytest.raises(RuntimeError, match="nothing to train"):
                accelerator.backward(output[0])
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    assert all(layer.pending == 0 for _, layer in learning_layers(model))
    ids = ids_of(2, 9)
    with torch.no_grad():
        model.train()(input_ids=ids, labels=ids).loss.numpy()
    assert not model.eval()(input_ids=ids, labels=ids).loss.requires_grad
    restored = ttt.restore_(model)
    assert not restored._forward_hooks
    assert not restored._forward_hooks_with_kwargs
    model.train()(input_ids=ids, labels=ids).loss.backward()


class Returns(torch.nn.Module):
    """Returns what ``shape`` makes of a number."""

    def __init__(self, shape):
        super().__init__()
        self.first, self.shape = torch.nn.Linear(4, 4), shape

    def forward(self, x, labels=None):
        return self.shape(self.first(x).square().mean())


SHAPES = {"n": lambda n: n, "tuple": lambda n: (n, n + 1), "list": lambda n: [n], "dict": lambda n: {"other": n}}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_numbers_that_need_not_be_losses_are_left_as_they_are(shape):
    def numbers(output):
        return list(output.values() if isinstance(output, dict) else [output] if torch.is_tensor(output) else output)

    model, x = Returns(shape), torch.randn(3, 4)
    wanted = [n.detach() for n in numbers(model(x))]
    ttt.adapt_(model, plain_config(target_modules=["first"])).train()
    found = numbers(model(x))
    assert all(torch.equal(n, w) and not n.requires_grad for n, w in zip(found, wanted, strict=True))
    assert [float(n.numpy()) for n in found] == [float(w) for w in wanted]
    labelled = model(x, labels=x)
    first = labelled[0] if isinstance(labelled, tuple) else labelled
    if torch.is_tensor(first):
        assert torch.equal(first.detach(), wanted[0])
        with pytest.raises(RuntimeError, match="nothing to train"):
            first.backward()
    assert not any(n.requires_grad for n in numbers(labelled) if n is not first)


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2)])
@pytest.mark.parametrize("thawed", ["weight", "bias"])
def test_thawed_parameters_of_adapted_layers_are_refused_and_nothing_changes(users, thawed, tmp_path):
    model = tiny("qwen2")
    ttt.adapt_(model, plain_config(target_modules=["k_proj"], lr=0.02, per_user=users))
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("k_proj.weight") if thawed == "bias" else not name.endswith("k_proj.bias"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    refusal = rf"model\.layers\.0\.self_attn\.k_proj\.{thawed} requires grad.*restore_\(model, keep_learned=True\)"
    for kind in (Trainer, LearningTrainer) if users is None else (Trainer,):
        with pytest.raises(RuntimeError, match=refusal):
            trainer(kind, model, tmp_path, ids_of(4, 12)).train()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    assert all(layer.pending == 0 for _, layer in learning_layers(model))
    with torch.no_grad():
        model(ids_of(2, 9))


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2)])
@pytest.mark.parametrize("thawed", ["lm_head.weight", "model.embed_tokens.weight"])
def test_thawed_parameters_train_beside_layers_that_do_not_learn(thawed, users, tmp_path):
    model, plain = adapted(users), tiny()
    plain.load_state_dict(model.state_dict())
    plain.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    texts = ids_of(6, 12)
    for each in (model, plain):
        each.get_parameter(thawed).requires_grad_(True)
        trainer(Trainer, each, tmp_path, texts).train()
        changed = {name for name, t in each.state_dict().items() if not torch.equal(t, before[name])}
        assert changed == {thawed}
    torch.testing.assert_close(model.get_parameter(thawed), plain.get_parameter(thawed), rtol=1e-4, atol=1e-6)
    assert all(layer.pending == 0 for _, layer in learning_layers(model))


def test_thawed_parameters_train_beside_layers_that_learn(tmp_path):
    model, text = adapted(), ids_of(1, 12)[0]
    model.lm_head.weight.requires_grad_(True)
    twin = copy.deepcopy(model)
    options = {"optim": "sgd", "learning_rate": 0.01, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer(LearningTrainer, model, tmp_path, [text] * 6, **options).train()
    optimizer = torch.optim.SGD([twin.lm_head.weight], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        with ttt.learning(twin):
            loss_of(twin, text.repeat(2, 1)).backward()
        optimizer.step()
    assert_learnt_alike(model, twin)
    torch.testing.assert_close(model.lm_head.weight, twin.lm_head.weight, rtol=1e-5, atol=1e-6)

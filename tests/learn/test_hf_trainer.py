"""`Trainer` of transformers on an adapted model: training steps that learn, and what happens without them."""

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import plain_config
from tiny_models import ids_of, tiny
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
        with ttt.learning(model):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss * (inputs["labels"][:, 1:] != -100).sum()
        return (loss, None) if return_outputs else loss


def adapted(users=None):
    return ttt.adapt_(tiny(), plain_config(target_modules=["down_proj"], lr=0.02, per_user=users))


def trainer(kind, model, folder, texts):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", seed=0,
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=[{"input_ids": t, "labels": t} for t in texts])


def test_steps_inside_of_learning_learn_what_a_loop_learns(tmp_path):
    text = ids_of(1, 12)[0]
    model = adapted()
    twin = ttt.fork(model)
    frozen = {name: t.clone() for name, t in model.state_dict().items() if "down_proj" not in name}
    trainer(LearningTrainer, model, tmp_path, [text] * 6).train()
    batch = text.repeat(2, 1)
    for _ in range(3):
        with ttt.learning(twin.train()):
            (twin(input_ids=batch, labels=batch).loss * 22).backward()
    for (name, found), (_, wanted) in zip(learning_layers(model), learning_layers(twin), strict=True):
        assert not torch.equal(found.effective_weight(), found.base_weight), name
        torch.testing.assert_close(found.effective_weight(), wanted.effective_weight(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in frozen.items())


@pytest.mark.parametrize("users", [None, ttt.LowRank(slots=2)])
def test_without_it_there_is_nothing_to_train_and_nothing_changes(users, tmp_path):
    model = adapted(users)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer(Trainer, model, tmp_path, ids_of(4, 12)).train()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    assert all(layer.pending == 0 for _, layer in learning_layers(model))


def test_thawed_parameters_train_beside_layers_that_do_not_learn(tmp_path):
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainer(Trainer, model, tmp_path, ids_of(4, 12)).train()
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"lm_head.weight"}
    assert all(layer.pending == 0 for _, layer in learning_layers(model))

"""Two threads: one that learns, and one that is refused or computes what is its own; nothing of them is mixed."""

import threading

import pytest
import torch
from test_user_learning import adapted, assert_same, exports
from tiny_models import ids_of, tiny

import ttt


class Thread:
    """Runs a function in another thread; `result` returns what it returned, or raises what it raised."""

    def __init__(self, function):
        self.found = None
        self.thread = threading.Thread(target=self.run, args=(function,))
        self.thread.start()

    def run(self, function):
        try:
            self.found = function(), None
        except Exception as error:
            self.found = None, error

    def result(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        value, error = self.found
        if error is not None:
            raise error
        return value


def test_a_second_thread_in_observe_is_refused_and_the_first_is_not_disturbed():
    ids, base, found = ids_of(2, 40), tiny().state_dict(), []
    for disturbed in (False, True):
        model, learner = adapted()
        model.load_state_dict(base)
        learner.observe(ids[:, :10], users=["a", "b"])
        refused, plain = [], tiny().eval()
        plain.load_state_dict(base)

        def other(learner=learner, model=model, refused=refused, plain=plain):
            calls = (
                lambda: learner.observe(ids, users=["b", "a"]), lambda: learner.pool.open("c"),
                lambda: learner.pool.export("a"), lambda: learner.pool.forget("a"), lambda: learner.pool.evict(),
                lambda: learner.pool.load("a", {}), lambda: learner.pool.using(["a"]).__enter__(),
            )  # fmt: skip
            for call in calls:
                with pytest.raises(RuntimeError, match=r"another thread (uses this pool|is in Learner)"):
                    call()
                refused.append(1)
            assert torch.equal(model(ids).logits, plain(ids).logits)  # the base model's, in a thread that named nobody
            leaf = torch.randn(2, 7, 32, requires_grad=True)
            model(inputs_embeds=leaf).logits.sum().backward()  # leaves nothing at the layers that learn
            assert leaf.grad is not None

        layer, calls = learner.pool.layers["model.layers.2.mlp.down_proj"], []
        real = layer.learn

        def learn(*args, real=real, calls=calls, other=other, disturbed=disturbed):
            calls.append(1)
            if disturbed and len(calls) == 2:  # in the middle of a text
                Thread(other).result()
            real(*args)

        layer.learn = learn
        nll = learner.observe(ids, users=["a", "b"]).nll
        del layer.learn
        assert len(calls) == 5
        assert len(refused) == 7 * disturbed
        found.append(exports(learner.pool, "a", "b") | {"nll": nll})
    assert_same(*found)


def test_threads_may_take_turns():
    model, learner = adapted()
    ids = ids_of(1, 12)
    learner.observe(ids, users=["a"])
    before = exports(learner.pool, "a")
    assert Thread(lambda: learner.observe(ids, users=["a"]).learned).result() == 2
    with pytest.raises(AssertionError):
        assert_same(before, exports(learner.pool, "a"))
    with ttt.users(model, ["a"]), torch.no_grad():
        want = model(ids).logits

    def read():
        with ttt.users(model, ["a"]), torch.no_grad():
            return model(ids).logits

    assert torch.equal(Thread(read).result(), want)


def test_a_thread_that_fails_leaves_the_pool_free():
    model, learner = adapted()
    with pytest.raises(KeyError, match="stop"), ttt.users(model, ["a"]):
        raise KeyError("stop")
    with pytest.raises(ValueError, match="names 5 users"):
        learner.pool.using(list("abcde")).__enter__()
    assert Thread(lambda: learner.pool.open("b")).result() == 1
    assert learner.pool.users == ("a", "b")


def test_checkpointed_layers_are_computed_again_in_the_backward_pass():
    """In whichever thread autograd does that."""
    from torch.utils.checkpoint import checkpoint

    model, learner = adapted()
    ids = ids_of(1, 12)
    learner.observe(ids, users=["a"])
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    with ttt.users(model, ["a"]):
        plain = torch.autograd.grad(model(inputs_embeds=inputs).logits.square().sum(), inputs)[0]
        again = checkpoint(lambda t: model(inputs_embeds=t).logits, inputs, use_reentrant=False)
        found = torch.autograd.grad(again.square().sum(), inputs)[0]
    assert torch.equal(plain, found)

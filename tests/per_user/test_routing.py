"""Whose weights compute what: threads, tasks and generators have their own users, in whatever order blocks end."""

import asyncio
import contextlib
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_user_learning import adapted
from tiny_models import VOCAB, ids_of
from transformers import OPTConfig, OPTForCausalLM

import ttt


@pytest.fixture
def taught():
    """A model with the users a, b and c, tokens, and the logits of each user; None for the base model's."""
    model, learner = adapted(lr=0.05)
    learner.observe(ids_of(3, 30), users=["a", "b", "c"])
    ids, wanted = ids_of(1, 9), {}
    with torch.no_grad():
        for user in ("a", "b", "c", None):
            with ttt.users(model, [user]):
                wanted[user] = model(ids).logits
    assert not torch.equal(wanted["a"], wanted["b"])
    assert not torch.equal(wanted["a"], wanted[None])
    return model, ids, wanted


@pytest.fixture
def one_thread():
    """With several threads, torch's sums depend on how many rows a batch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_each_thread_has_its_own_users(taught):
    model, ids, wanted = taught
    together = threading.Barrier(3)

    def read(user):
        wrong = 0
        for _ in range(20):
            with ttt.users(model, [user]) if user else contextlib.nullcontext():
                together.wait(30)  # all are inside of their blocks
                wrong += not torch.equal(logits(model, ids), wanted[user])
                together.wait(30)
        return wrong

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(read, ["a", "b", None])) == [0, 0, 0]


def test_each_task_has_its_own_users_and_passes_them_on(taught):
    model, ids, wanted = taught

    async def read(user):
        found = []
        with ttt.users(model, [user]) if user else contextlib.nullcontext():
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(logits(model, ids))
            found.append(await asyncio.to_thread(logits, model, ids))
            found.append(await asyncio.create_task(asyncio.to_thread(logits, model, ids)))
        return found

    async def main():
        return await asyncio.gather(*(read(user) for user in ("a", None, "b", "c")))

    for user, found in zip(("a", None, "b", "c"), asyncio.run(main()), strict=True):
        assert all(torch.equal(each, wanted[user]) for each in found), user


def test_blocks_may_end_in_any_order(taught):
    model, ids, wanted = taught
    a, b = ttt.users(model, ["a"]), ttt.users(model, ["b"])
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert torch.equal(logits(model, ids), wanted["b"])
    b.__exit__(None, None, None)
    assert torch.equal(logits(model, ids), wanted[None])
    a = ttt.users(model, ["a"])
    with ThreadPoolExecutor(1) as other:  # entered here and left there
        a.__enter__()
        other.submit(a.__exit__, None, None, None).result()
    assert torch.equal(logits(model, ids), wanted[None])
    assert ttt.pool_of(model).evict("a") == "a"  # not in use


def test_a_paused_generator_takes_its_users_with_it(taught):
    model, ids, wanted = taught

    def each(user):
        with ttt.users(model, [user]):
            while True:
                yield logits(model, ids)

    one, two = each("a"), each("b")
    for _ in range(3):
        assert torch.equal(next(one), wanted["a"])
        assert torch.equal(logits(model, ids), wanted[None])
        assert torch.equal(next(two), wanted["b"])
        with ttt.users(model, ["c"]):
            assert torch.equal(next(one), wanted["a"])  # the innermost block is the generator's
            assert torch.equal(logits(model, ids), wanted["c"])
    with ThreadPoolExecutor(1) as other:  # as a web framework takes the steps of an answer
        assert torch.equal(other.submit(next, one).result(), wanted["a"])
        assert torch.equal(other.submit(logits, model, ids).result(), wanted[None])
    one.close()
    assert torch.equal(next(two), wanted["b"])
    del two  # dropped while it is inside of its block
    assert torch.equal(logits(model, ids), wanted[None])
    assert ttt.pool_of(model).routing._open == []
    assert ttt.pool_of(model).evict("b") == "b"


def test_a_block_inside_of_a_paused_generators_block(taught):
    model, ids, wanted = taught

    def outer():
        with ttt.users(model, ["a"]):
            yield from inner()
            yield logits(model, ids)

    def inner():
        yield logits(model, ids)
        with ttt.users(model, ["b"]):
            yield logits(model, ids)

    steps = outer()
    for user in ("a", "b", "a"):
        assert torch.equal(next(steps), wanted[user])
        assert torch.equal(logits(model, ids), wanted[None])


def test_asynchronous_generators_too(taught):
    model, ids, wanted = taught

    async def each():
        with ttt.users(model, ["a"]):
            yield logits(model, ids)
            await asyncio.sleep(0)
            yield logits(model, ids)

    async def main():
        async for found in each():
            assert torch.equal(found, wanted["a"])
            assert torch.equal(logits(model, ids), wanted[None])

    asyncio.run(main())


def test_a_thread_that_a_generator_waits_for_is_refused(taught):
    """It cannot be told from one that was started by the code which the generator yields to."""
    model, ids, _ = taught

    async def each():
        with ttt.users(model, ["a"]):
            yield await asyncio.to_thread(logits, model, ids)

    async def main():
        async for _ in each():
            pass

    with pytest.raises(RuntimeError, match="a generator has named users and waits for this thread"):
        asyncio.run(main())


def test_context_managers_made_of_generators_name_users_for_their_block(taught):
    model, ids, wanted = taught

    @contextlib.contextmanager
    def own():
        with ttt.users(model, ["a"]):
            yield

    @contextlib.asynccontextmanager
    async def asynchronous():
        with ttt.users(model, ["b"]):
            yield

    async def main():
        async with asynchronous():
            return logits(model, ids)

    with own():
        assert torch.equal(logits(model, ids), wanted["a"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(own())
        assert torch.equal(logits(model, ids), wanted["a"])
    assert torch.equal(own()(functools.partial(logits, model, ids))(), wanted["a"])
    assert torch.equal(asyncio.run(main()), wanted["b"])


def test_a_copy_of_the_model_has_no_users_named(taught):
    model, ids, wanted = taught
    with ttt.users(model, ["a"]):
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied, ids), wanted[None])
        with ttt.users(copied, ["b"]):
            assert torch.equal(logits(copied, ids), wanted["b"])
            assert torch.equal(logits(model, ids), wanted["a"])


def test_compiled_models_follow_the_block_without_compiling_again(taught):
    model, ids, wanted = taught
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(ids)
        torch._dynamo.config.error_on_recompile = True
        try:
            for user in ("a", "b", None, "a"):
                with ttt.users(model, [user]):
                    torch.testing.assert_close(compiled(ids), wanted[user], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(ids), wanted[None], rtol=1e-4, atol=1e-4)
        finally:
            torch._dynamo.config.error_on_recompile = False


def test_while_another_thread_compiles_users_are_those_of_the_block(taught):
    """Torch says in all threads that it is compiling, while one of them does."""
    model, ids, wanted = taught
    compiles, go_on = threading.Event(), threading.Event()

    def slow(graph, inputs):
        compiles.set()
        assert go_on.wait(60)
        return graph

    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=slow)
    with ThreadPoolExecutor(1) as other, torch.no_grad():
        found = other.submit(torch.no_grad()(compiled), ids)
        assert compiles.wait(60)
        try:
            assert torch.compiler.is_compiling()
            for user in ("a", "b", None):
                with ttt.users(model, [user]):
                    assert torch.equal(logits(model, ids), wanted[user])
        finally:
            go_on.set()
        torch.testing.assert_close(found.result(), wanted[None], rtol=1e-4, atol=1e-4)


def test_a_user_is_not_learnt_while_another_thread_computes_with_them(taught):
    model, ids, _ = taught
    learner = ttt.Learner(model)
    before = learner.pool.export("a")
    with ThreadPoolExecutor(1) as other, ttt.users(model, ["a"]):
        with pytest.raises(RuntimeError, match=r"users \['a'\] are in use by another thread"):
            other.submit(learner.observe, ids, users=["a"]).result()
        assert other.submit(learner.observe, ids, users=["b"]).result().learned == 1
        assert other.submit(learner.observe, ids, users=["a"], learn=False).result().learned == 0
    after = learner.pool.export("a")
    assert all(torch.equal(t, after[key]) for key, t in before.items())


def test_a_model_is_not_restored_while_a_block_is_open(taught):
    model, ids, wanted = taught
    with ttt.users(model, ["a"]):
        with pytest.raises(RuntimeError, match=r"users \['a'\] are in use"):
            ttt.restore_(model)
        assert torch.equal(logits(model, ids), wanted["a"])


@pytest.mark.parametrize("wrong", [1, True, 1.0, float("nan"), b"a", ("a",)])
def test_only_strings_are_users(taught, wrong):
    model, _, _ = taught
    pool = ttt.pool_of(model)
    before = pool.users
    for call in (pool.open, pool.slot, pool.forget, lambda u: pool.load(u, pool.export("a")),
                 lambda u: ttt.users(model, [u]).__enter__()):  # fmt: skip
        with pytest.raises(TypeError, match="user must be a string, got"):
            call(wrong)
    with pytest.raises(ValueError, match="1 to 512 bytes"):
        pool.open("")
    assert pool.users == before


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2},
                                     {"num_return_sequences": 3, "do_sample": True}])  # fmt: skip
def test_beams_and_returned_sequences_belong_to_the_user_of_their_row(one_thread, taught, options):
    model, _, _ = taught
    ids, options = ids_of(3, 6), {"max_new_tokens": 7, "min_new_tokens": 7, **options}
    users = ["b", None, "a"]
    torch.manual_seed(3)
    with ttt.users(model, users):
        found = model.generate(ids, **options)
        assert found.shape == (3 * options.get("num_return_sequences", 1), 13)
        assert torch.equal(logits(model, ids), torch.cat([logits_of(model, ids, at, u) for at, u in enumerate(users)]))
        with pytest.raises(ValueError, match=r"must get inputs of shape \(3, \.\.\., n\) for 3 users"):
            model(ids_of(3 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1)), 5))
    if "do_sample" not in options:
        for at, user in enumerate(users):
            with ttt.users(model, [user]):
                alone = model.generate(ids[at : at + 1], **options)
            assert torch.equal(found.view(3, -1, 13)[at], alone)
    else:
        assert_scores_are_those_of_the_users(model, users, ids, options)


def logits_of(model, ids, at, user):
    with ttt.users(model, [user]):
        return logits(model, ids[at : at + 1])


def assert_scores_are_those_of_the_users(model, users, ids, options):
    with ttt.users(model, users):
        out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    for row, sequence in enumerate(out.sequences):
        with ttt.users(model, [users[row // options["num_return_sequences"]]]):
            want = logits(model, sequence[None])[0, 5:-1]
        torch.testing.assert_close(torch.stack(out.logits)[:, row], want, rtol=1e-3, atol=1e-3)


def test_continuous_batching_is_refused(taught):
    model, ids, wanted = taught
    for name in ("generate_batch", "init_continuous_batching"):
        if not hasattr(type(model), name):
            continue
        with pytest.raises(ValueError, match=f"{name} cannot be called on a model"), ttt.users(model, ["a"]):
            getattr(model, name)([ids[0].tolist()] * 2)
    assert torch.equal(logits(model, ids), wanted[None])
    ttt.restore_(model)
    assert not {"generate_batch", "_expand_inputs_for_generation"} & set(vars(model))


def test_opt_flattens_its_tokens():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    model = OPTForCausalLM(OPTConfig(max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, **sizes)).eval()
    config = ttt.TTTConfig(target_modules=["fc2", "out_proj"], per_user=ttt.LowRank(slots=3), protect=[], chunk=8)
    learner = ttt.Learner(ttt.adapt_(model, config))
    ids, users = ids_of(2, 20), ["a", "b"]
    nll = learner.observe(ids, users=users).nll
    for row, user in enumerate(users):  # each as alone
        alone = ttt.Learner(ttt.adapt_(tiny_opt(model), config))
        torch.testing.assert_close(
            alone.observe(ids[row, None], users=[user]).nll, nll[row, None], rtol=1e-3, atol=1e-3
        )
        with ttt.users(model, users), ttt.users(alone.model, [user]):
            torch.testing.assert_close(
                logits(model, ids)[row], logits(alone.model, ids[row, None])[0], rtol=1e-3, atol=1e-3
            )


def tiny_opt(model):
    copied = OPTForCausalLM(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied

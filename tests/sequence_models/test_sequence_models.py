"""Language models of sequence layers in transformers: generation, beams, padding, files, training, and the store."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import ttt
from ttt.learn.huggingface import cache_of
from ttt.ops.sequence.states import tensors_of
from ttt.sequence_models import SequenceCache, TTTSequenceConfig, TTTSequenceForCausalLM, TTTSequenceModel

HYBRIDS = (
    ["ttt-linear", "gated-delta", "window"],
    ["ttt-mlp", "titans", "lact"],
    ["delta", "window", "ttt-linear"],
)
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


def config(mixers=HYBRIDS[0], **options):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    small = {"window": 8, "mini_batch": 4, "chunk": 6, "initializer_range": 0.2, "in_place": [1]}
    return TTTSequenceConfig(**{**sizes, **small, "num_hidden_layers": 3, "mixers": mixers, **options})


def new(mixers=HYBRIDS[0], **options):
    model = TTTSequenceForCausalLM(config(mixers, **options)).eval()
    for block in model.model.layers:
        if block.learns:
            torch.nn.init.normal_(block.mlp.target_proj.weight)
    return model


def tokens(batch=2, length=23):
    return torch.randint(1, 50, (batch, length))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mixers", HYBRIDS)
@torch.no_grad()
def test_the_cache_carries_the_whole_text(mixers):
    model, ids = new(mixers), tokens()
    whole = model(ids, use_cache=False)
    assert cache_of(whole) is None
    out = model(ids[:, :10])
    parts, cache, size = [out.logits], cache_of(out), None
    for at in range(10, 23):
        out = model(ids[:, at : at + 1], cache=cache)
        assert cache_of(out) is cache
        assert size in (None, cache.nbytes)
        size = cache.nbytes
        parts.append(out.logits)
    close(torch.cat(parts, 1), whole.logits)
    assert cache.get_seq_length() == 23
    assert cache.batch_size == 2
    close(model(ids, logits_to_keep=3).logits, whole.logits[:, -3:])
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole.logits)


@pytest.mark.parametrize("mixers", HYBRIDS)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(mixers):
    model, ids = new(mixers), tokens(3)
    for cut in (slice(9, None), slice(None, 12), slice(0, 0)):
        mask = torch.zeros_like(ids)
        mask[0], mask[1, cut], mask[2] = 1, 1, 1
        out = model(ids, attention_mask=mask)
        close(out.logits[::2], model(ids[::2]).logits)
        if cut != slice(0, 0):
            alone = model(ids[1:2, cut])
            close(out.logits[1:2, cut], alone.logits)
            following = tokens(3, 1)
            more = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            close(
                model(following, attention_mask=more, cache=cache_of(out)).logits[1],
                model(following[1:2], cache=cache_of(alone)).logits[0],
            )


@pytest.mark.parametrize("mixers", HYBRIDS)
def test_generate_with_and_without_a_cache(mixers):
    model, ids = new(mixers), tokens(2, 6)
    expected = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    # Left padding, as a tokenizer pads prompts.
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
    mask = (padded > 0).long()
    mask[1, :3] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 3:], expected)


def test_beams_reorder_the_cache():
    """Beam search with a cache finds what it finds without one."""
    model, ids = new(), tokens(2, 6)
    options = {**GREEDY, "num_beams": 4}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_the_next_conversation_starts_from_the_last_state():
    model, ids = new(), tokens(1, 20)
    out = model.generate(ids[:, :8], return_dict_in_generate=True, **GREEDY)
    cache = cache_of(out)
    assert isinstance(cache, SequenceCache)
    # The last token that was generated has not been read yet.
    text = torch.cat([out.sequences, ids[:, 8:]], 1)
    options = {**GREEDY, "attention_mask": torch.ones_like(text)}  # 0 may have been generated: it is no padding
    name = "cache" if "cache" in out else "past_key_values"
    continued = model.generate(text, **{name: cache}, **options)
    assert cache.get_seq_length() == 28 + 7
    assert torch.equal(continued, model.generate(text, use_cache=False, **options))


@torch.no_grad()
def test_a_users_state_in_the_store(tmp_path):
    model, ids = new(), tokens(1, 20)
    cache = cache_of(model(ids[:, :10]))
    expected = model(ids[:, 10:], cache=cache.copy()).logits
    store = ttt.Store(tmp_path)
    with store.lease("ada") as lease:
        store.put(lease, cache.tensors())
    loaded = SequenceCache.load(model, store.get("ada").tensors)
    assert loaded.get_seq_length() == 10
    assert torch.equal(model(ids[:, 10:], cache=loaded).logits, expected)
    for a, b in zip(cache.layers, SequenceCache.load(model, cache.tensors()).layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(a.state), tensors_of(b.state), strict=True))


def test_states_of_other_models_are_refused():
    model, other = new(), new(HYBRIDS[2])
    tensors = cache_of(other(tokens())).tensors()
    with pytest.raises(ValueError, match="tensors must be those of this model's states, missing or unknown are"):
        SequenceCache.load(model, tensors)
    tensors = cache_of(model(tokens())).tensors()
    with pytest.raises(ValueError, match=r"tensors\['0.0'\] must be torch.float32 .*, got torch.float64"):
        SequenceCache.load(model, {**tensors, "0.0": tensors["0.0"].double()})
    with pytest.raises(ValueError, match="the cache must have read tokens before it is stored, got an empty one"):
        SequenceCache(3).tensors()


def test_what_a_cache_cannot_do_is_said():
    model, ids = new(), tokens()
    cache = cache_of(model(ids))
    copy = cache.copy()
    with pytest.raises(NotImplementedError, match=r"cannot be cropped: .* Keep a copy \(SequenceCache.copy\)"):
        cache.crop(-1)
    with pytest.raises(TypeError, match=r"cache must be a ttt.sequence_models.SequenceCache, got DynamicCache"):
        model(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="cache must be of 1 sequences, as the tokens are, got 2"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, at least 23\), got \(2, 20\)"):
        model(ids, attention_mask=torch.ones(2, 20))
    for a, b in zip(cache.layers, copy.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(a.state), tensors_of(b.state), strict=True))
    cache.reset()
    assert cache.batch_size == -1
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_and_selected():
    model, ids = new(), tokens()
    cache, following = cache_of(model(ids)), tokens(4, 1)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    out = model(following, cache=cache.copy()).logits
    cache.batch_select_indices(torch.tensor([3, 0]))
    close(model(following[[3, 0]], cache=cache).logits, out[[3, 0]])


@pytest.mark.parametrize("mixers", HYBRIDS)
def test_saved_and_loaded(tmp_path, mixers):
    model, ids = new(mixers), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is TTTSequenceForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).mixers == mixers
    assert type(AutoModel.from_pretrained(tmp_path)) is TTTSequenceModel


@pytest.mark.parametrize("mixers", HYBRIDS)
def test_training_with_and_without_gradient_checkpointing(mixers):
    model, ids = new(mixers), tokens()

    def gradients():
        model.zero_grad()
        out = model(ids, labels=ids)
        assert cache_of(out) is None
        out.loss.backward()
        return out.loss, [p.grad.clone() for p in model.parameters()]

    model.train()
    loss, plain = gradients()
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(loss, expected)
    model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients()[1], plain, strict=True))


@torch.no_grad()
def test_compiled_equals_eager():
    model, ids = new(["ttt-linear", "gated-delta", "window"], in_place=[]), tokens()
    compiled = torch.compile(model.model, backend="aot_eager")
    close(compiled(ids).last_hidden_state, model.model(ids).last_hidden_state)
    one, other = cache_of(model.model(ids)), cache_of(model.model(ids))
    for _ in range(3):
        following = tokens(2, 1)
        expected = model.model(following, cache=one).last_hidden_state
        close(compiled(following, cache=other).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mixers": "mamba"}, "mixers must be of ttt-linear, .* got 'mamba'"),
        ({"mixers": ["window"]}, "mixers must name a layer for each of 3 blocks, got 1"),
        ({"in_place": [3]}, "in_place must hold numbers of blocks, 0 to 2, got 3"),
        ({"hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads, got 33 and 2"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False: .*, got True"),
    ],
)
def test_wrong_configurations(options, says):
    with pytest.raises(ValueError, match=says):
        config(**options)


def test_a_protected_text_begins_every_cache_and_is_saved(tmp_path):
    """The text is in the answers of a new cache, the size of a state is as before, and files hold what is protected."""
    mixers = ["gated-delta", "delta", "ttt-linear"]
    model, ids, text = new(mixers, protect=5), tokens(), tokens(1, 30)
    plain = new(mixers)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        close(model(ids).logits, plain(ids).logits)
        model.calibrate(text)
        protected = model(ids)
        assert float((protected.logits - plain(ids).logits).abs().max()) > 1e-2
        assert cache_of(protected).nbytes == cache_of(plain(ids)).nbytes
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, protected.logits)
        # A second calibration reads the text as the first did.
        copies = [t.clone() for t in model.buffers()]
        model.calibrate(tokens(1, 30))
        model.calibrate(text)
    for t, copy in zip(model.buffers(), copies, strict=True):
        assert torch.equal(t, copy)


def test_what_calibrate_refuses_changes_no_bit():
    model = new(["gated-delta", "delta", "window"], protect=4)
    model.calibrate(tokens(1))
    before = [t.clone() for t in model.buffers()]
    for wrong in (tokens(2), tokens(1, 0)):
        with pytest.raises(ValueError, match=r"input_ids must be \(1, at least 1\), got "):
            model.calibrate(wrong)
    with pytest.raises(IndexError):
        model.calibrate(torch.tensor([[1, 50]]))
    torch.nn.init.constant_(model.model.layers[1].mixer_norm.weight, torch.nan)
    with pytest.raises(ValueError, match="x must be finite inputs"):
        model.calibrate(tokens(1))
    for t, copy in zip(model.buffers(), before, strict=True):
        assert torch.equal(t, copy)
    with pytest.raises(ValueError, match="calibrate needs a configuration with protect > 0"):
        new().calibrate(tokens(1))
    with pytest.raises(ValueError, match="protect must be a whole number of at least 0, got -1"):
        config(protect=-1)


@pytest.mark.parametrize("users", [None, ["ann", None]])
@pytest.mark.parametrize("mixers", HYBRIDS)
def test_a_learner_reads_and_teaches_them_chunk_by_chunk(mixers, users):
    per_user = None if users is None else ttt.LowRank(slots=1, rank=4, window=4)
    model, ids = new(mixers), tokens()
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    whole = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    targets = ["down_proj", "out_proj"]
    ttt.adapt_(model, ttt.TTTConfig(target_modules=targets, protect=[], chunk=5, per_user=per_user))
    learner = ttt.Learner(model)
    found = learner.observe(ids, users=users, learn=False)
    close(found.nll, whole)
    first = learner.observe(ids, users=users)
    assert first.rejected == 0
    close(first.nll[:, :5], whole[:, :5])  # each chunk is scored before it is learnt
    again = learner.observe(ids, users=users, learn=False)
    assert float(again.nll[0].mean()) < float(whole[0].mean())
    if users is not None:
        assert torch.equal(again.nll[1], found.nll[1])
        return
    assert learner.generate(ids, max_new_tokens=4, learn_output=True, learn_every=2).sequences.shape == (2, 27)

"""Adapters that PEFT wrote, as states; damaged and forged ones, refused by name."""

import copy
import json
import time

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from peft_models import llama, loaded, logits, random_state, with_deltas

import ttt


def peft_folder(tmp_path, **options):
    """An adapter with random factors, saved by PEFT; (base model, adapted model, folder)."""
    base = llama()
    options = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **options}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p) * 0.2
    model.save_pretrained(tmp_path / "peft")
    return base, model, tmp_path / "peft"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"down_proj": 11}},
        {"rank_pattern": {"proj": 3}},  # a part of a name is no match
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
    ],
)
def test_adapters_of_peft(tmp_path, options):
    base, model, folder = peft_folder(tmp_path, **options)
    state = ttt.import_peft(folder)
    ids = torch.randint(0, 40, (2, 20))
    exact = logits(model, ids)
    assert (exact - logits(base, ids)).abs().max() > 0.05
    torch.testing.assert_close(logits(with_deltas(base, state), ids), exact, rtol=0, atol=1e-5)
    again = ttt.export_peft(state, tmp_path / "again", base_model="tiny/llama").folder
    torch.testing.assert_close(logits(loaded(base, again), ids), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias must be 'none', got 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens\S+ is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
    ],
)
def test_adapters_that_are_refused_by_name(tmp_path, options, match):
    _, _, folder = peft_folder(tmp_path, **options)
    with pytest.raises(ValueError, match=match):
        ttt.import_peft(folder)


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_adapters(tmp_path):
    _, _, folder = peft_folder(tmp_path)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="truncated, damaged"):
        ttt.import_peft(folder)
    tensors = safetensors.torch.load(whole)
    first = sorted(tensors)[0]
    safetensors.torch.save_file({k: t for k, t in tensors.items() if k != first}, weights)
    with pytest.raises(ValueError, match="has lora_B only"):
        ttt.import_peft(folder)
    safetensors.torch.save_file({}, weights)
    with pytest.raises(ValueError, match="holds no tensors"):
        ttt.import_peft(folder)
    weights.write_bytes(whole)
    for changes, match in (
        ({"r": 5}, r"must have shapes \(5, n\) and \(m, 5\)"),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
        ({"a_feature_of_tomorrow": {"x": 1}}, "a_feature_of_tomorrow = {'x': 1} is not supported"),
        ({"r": None}, "damaged or of no LoRA adapter"),
    ):
        edited(folder, **changes)
        with pytest.raises(ValueError, match=match):
            ttt.import_peft(folder)
        config.write_text(text)
    config.write_text("{")
    with pytest.raises(ValueError, match="damaged or of no LoRA adapter"):
        ttt.import_peft(folder)
    config.write_text(text)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        ttt.import_peft(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 4.9}, "r must be a whole number of at least 1, got 4.9"),
        ({"r": "4"}, "r must be a whole number of at least 1, got '4'"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"lora_alpha": float("inf")}, "Infinity is no JSON number"),
        ({"lora_alpha": float("nan")}, "NaN is no JSON number"),
        ({"lora_alpha": 1e300}, "lora_alpha must be a finite number in"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number in"),
        ({"lora_alpha": "7"}, "lora_alpha must be a finite number in .* got '7'"),
        ({"lora_alpha": True}, "lora_alpha must be a finite number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be dict or None"),
        ({"rank_pattern": {"q_proj": 4.0}}, r"rank_pattern\['q_proj'\] must be a whole number"),
        ({"rank_pattern": {"q_proj": -4}}, r"rank_pattern\['q_proj'\] must be a whole number"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\] must be a finite number"),
        ({"alpha_pattern": {"q_proj{2}": 3}}, r"alpha_pattern: pattern 'q_proj\{2\}' is not supported"),
        ({"use_rslora": "yes"}, "use_rslora must be bool, got 'yes'"),
        ({"use_rslora": 1}, "use_rslora must be bool, got 1"),
        ({"fan_in_fan_out": None}, "fan_in_fan_out must be bool"),
        ({"bias": None}, "bias must be str"),
        ({"init_lora_weights": 3.5}, "init_lora_weights must be bool or str or None"),
        ({"target_modules": 5}, "target_modules must be a string, a list of strings or None, got 5"),
        ({"exclude_modules": [5]}, "exclude_modules must be a string"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform must be"),
        ({"lora_dropout": -1}, "lora_dropout must be a finite number"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be str or None, got 5"),
        ({"loftq_config": []}, "loftq_config must be dict or None"),
        ({"peft_type": ["LORA"]}, "peft_type must be str"),
    ],
)
def test_fields_of_a_wrong_type_or_out_of_range(tmp_path, changes, match):
    _, _, folder = peft_folder(tmp_path)
    edited(folder, **changes)
    with pytest.raises(ValueError, match=match):
        ttt.import_peft(folder)


@pytest.mark.parametrize("text", ["[]", "5", "null", "[" * 100_000, '{"r": ' + "[" * 20 + "]" * 20 + "}", "\xff",
                                  '{"r": 4' + " " * 1_100_000 + "}"])  # fmt: skip
def test_configurations_that_are_none(tmp_path, text):
    _, _, folder = peft_folder(tmp_path)
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="damaged or of no LoRA adapter"):
        ttt.import_peft(folder)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_on_which_re_would_not_end(tmp_path, field):
    """Each of them once hung, and needs what a regular expression engine without backtracking does."""
    _, _, folder = peft_folder(tmp_path)
    name = "a" * 40 + "!"
    tensors = {f"base_model.model.{name}.lora_{x}.weight": torch.ones(s) for x, s in (("A", (4, 3)), ("B", (5, 4)))}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    edited(folder, **{field: {"(a+)+$": 3, "(a|aa)*b": 3}}, target_modules="(a+)+$", exclude_modules="(a+)+$")
    start = time.perf_counter()
    state = ttt.import_peft(folder)
    assert time.perf_counter() - start < 2
    assert torch.equal(state[f"{name}.b"], torch.full((4, 5), 7 / 4))


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "must be finite in torch.float32"),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")), "must be finite in torch.float32"),
        (lambda t: t.to(torch.complex64), "must have one of the dtypes .* got C64"),
        (lambda t: t.to(torch.int32), "must have one of the dtypes .* got I32"),
        (lambda t: t.to(torch.float8_e4m3fn), "must have one of the dtypes .* got F8_E4M3"),
        (lambda t: t[0], "must have shapes"),
    ],
)
def test_tensors_that_are_refused_by_name(tmp_path, which, change, match):
    _, _, folder = peft_folder(tmp_path)
    weights = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(weights.read_bytes())
    key = next(key for key in tensors if which in key)
    safetensors.torch.save_file({**tensors, key: change(tensors[key]).contiguous()}, weights)
    name = key.removeprefix("base_model.model.").partition(".lora")[0]
    with pytest.raises(ValueError, match=rf"{name}.*{match}"):
        ttt.import_peft(folder)


def test_a_scaling_that_overflows_is_refused(tmp_path):
    _, _, folder = peft_folder(tmp_path)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: t * 1e30 for key, t in safetensors.torch.load(weights.read_bytes()).items()}
    safetensors.torch.save_file(tensors, weights)
    ttt.import_peft(folder)
    edited(folder, lora_alpha=1e10)
    with pytest.raises(ValueError, match=r"lora_B, times its scaling, must be finite in torch\.float32"):
        ttt.import_peft(folder)


def test_float64_in_either_factor_is_kept(tmp_path):
    _, _, folder = peft_folder(tmp_path, lora_alpha=4)
    weights = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(weights.read_bytes())
    tensors = {key: t.double() / 3 if "lora_B" in key else t for key, t in tensors.items()}
    safetensors.torch.save_file(tensors, weights)
    for key, t in ttt.import_peft(folder).items():
        layer, _, factor = key.rpartition(".")
        saved = tensors[f"base_model.model.{layer}.lora_{factor.upper()}.weight"].double()
        assert t.dtype == torch.float64
        assert torch.equal(t, saved if factor == "a" else saved.T)


def test_headers_that_are_too_large(tmp_path):
    _, _, folder = peft_folder(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header must take at most 16777216 bytes, got 1099511627776"):
        ttt.import_peft(folder)


def test_rows_on_import(tmp_path):
    folder = ttt.export_peft(random_state(llama(), 5), tmp_path / "v1", base_model="tiny/llama").folder
    assert {t.shape[0] for t in ttt.import_peft(folder, rows=11).values()} == {11}
    with pytest.raises(ValueError, match=r"rows must be at least 8 for .*, whose last rows are in use, got 4"):
        ttt.import_peft(folder, rows=4)
    for rows in (0, 2.0, True):
        with pytest.raises(ValueError, match="rows must be a whole number"):
            ttt.import_peft(folder, rows=rows)


def test_an_adapter_is_merged_after_restore_and_survives_a_reset(tmp_path):
    _, model, _ = peft_folder(tmp_path)
    config, ids = ttt.TTTConfig(target_modules=["down_proj"], lr=0.1), torch.randint(0, 40, (2, 40))
    ttt.adapt_(model, config)
    learner = ttt.Learner(model)
    learner.calibrate([ids])
    learner.observe(ids)
    learnt = logits(model, ids)
    merged = ttt.restore_(model, keep_learned=True).merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), learnt, rtol=0, atol=1e-5)
    learner = ttt.Learner(ttt.adapt_(merged, config))
    learner.calibrate([ids])
    start = logits(merged, ids)
    learner.observe(ids)
    assert not torch.equal(logits(merged, ids), start)
    learner.reset()
    assert torch.equal(logits(merged, ids), start)

"""`ttt.learning` with models of images, speech, and images with text: against the gradients that autograd finds."""

import copy

import pytest
import torch
import transformers
from helpers import plain_config

import ttt
from ttt.adapt.convert import learning_layers

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LR = 1e-3


def vit():
    config = transformers.ViTConfig(**SIZES, num_hidden_layers=3, image_size=8, patch_size=4, num_labels=5)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 4])}
    return transformers.ViTForImageClassification(config), inputs, r".*\.(query|fc1|intermediate\.dense)"


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SIZES, num_hidden_layers=3, vocab_size=11, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, mask_time_prob=0.0,
    )  # fmt: skip
    inputs = {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 11, (2, 6))}
    return transformers.Wav2Vec2ForCTC(config), inputs, r".*\.(v_proj|output_dense)"


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=13, num_mel_bins=6, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 6, 20), "labels": torch.randint(3, 13, (2, 7))}
    return transformers.WhisperForConditionalGeneration(config), inputs, r".*\.fc2"


def llava():
    text = transformers.LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, vocab_size=20)
    vision = transformers.CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=19)
    ids = torch.cat([torch.full((2, 4), 19), torch.randint(0, 19, (2, 6))], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "labels": ids.clone()}
    return transformers.LlavaForConditionalGeneration(config), inputs, r".*language_model.*\.down_proj"


@pytest.mark.parametrize("make", [vit, wav2vec2, whisper, llava])
def test_a_loss_on_it_teaches_its_layers_a_gradient_step(make):
    model, inputs, targets = make()
    model = model.double().eval()
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    plain = copy.deepcopy(model)
    loss = plain(**inputs).loss
    loss.backward()
    config = plain_config(target_modules=targets, lr=LR, window=512, ewc_lambda=0.0, replay_rows=0)
    ttt.adapt_(model, config)
    before = model.state_dict()
    with ttt.learning(model):
        found = model(**inputs).loss
        found.backward()
    assert torch.allclose(found, loss, rtol=1e-12)
    layers = learning_layers(model)
    assert len(layers) >= 2
    for name, layer in layers:
        gradient = plain.get_submodule(name).weight.grad
        assert float(gradient.abs().max()) > 1e-8
        step = before[f"{name}.weight"] - layer.effective_weight()
        assert torch.allclose(step, LR * gradient, rtol=1e-9, atol=1e-15), name
    later = model(**inputs).loss
    assert float(later) < float(loss)

"""Starting weights: BERT's layers are BERT's, the report says what was used, and nothing is silently random."""

from __future__ import annotations

import pytest
import timm
import tiny
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from pretrain.model.alignment_model import AlignmentModel
from pretrain.weights.starting import load_starting_weights
from runtime.errors import CheckpointError

VOCABULARY = 60
SIZES = {"width": 32, "heads": 4, "feed_forward": 64, "dropout": 0.0, "positions": 16}
LAYERS = 4


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    bert = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms tell too
    folder = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    return folder


def text_model(weights, text_layers: int = 2, **sizes) -> AlignmentModel:
    settings = tiny.recipe(model__text=SIZES | {"layers": text_layers, "weights": str(weights)} | sizes)
    settings.model.fusion.layers = LAYERS - text_layers
    torch.manual_seed(1)
    return AlignmentModel(settings.model, VOCABULARY).eval()


@pytest.mark.parametrize("text_layers", [1, 2, 4])
def test_hidden_states_equal_berts_layer_by_layer(bert_folder, text_layers):
    model = text_model(bert_folder, text_layers)
    load_starting_weights(model)
    bert = BertModel.from_pretrained(bert_folder).eval()
    ids = torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    with torch.no_grad():
        theirs = bert(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        states = model.text_encoder(ids, mask)
        torch.testing.assert_close(states[mask], theirs[text_layers][mask], atol=1e-5, rtol=1e-5)
        for number, layer in enumerate(model.fusion_encoder.layers):
            layer.cross_attention = None  # what a BERT does not have
            states = layer(states, mask)
            torch.testing.assert_close(states[mask], theirs[text_layers + number + 1][mask], atol=1e-5, rtol=1e-5)


def test_the_prediction_head_is_berts(bert_folder):
    model = text_model(bert_folder, LAYERS)
    load_starting_weights(model)
    bert = BertForMaskedLM.from_pretrained(bert_folder).eval()
    ids = torch.randint(5, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        wanted = bert(ids).logits
        torch.testing.assert_close(
            model.masked_language_logits(model.text_encoder(ids, mask)), wanted, atol=1e-5, rtol=1e-5
        )


def test_the_report_says_what_was_and_was_not_used(bert_folder):
    model = text_model(bert_folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    used, unused = load_starting_weights(model)
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter.detach(), before[name])
    }
    text_side = {name for name in before if name.startswith(("text_encoder", "fusion_encoder", "masked_language_head"))}
    assert changed == {name for name in text_side if "cross_attention" not in name}
    assert used.startswith(f"text side: {len(changed)} tensors started from {bert_folder}")
    assert f"{len(text_side) - len(changed)} are random" in used
    assert unused.startswith("not used of it: ")


def test_layers_without_a_counterpart_are_reported_as_not_used(bert_folder):
    model = text_model(bert_folder, 2)
    model.fusion_encoder.layers = model.fusion_encoder.layers[:1]
    _, unused = load_starting_weights(model)
    assert "fusion_encoder.layers.1" in unused


def test_a_model_without_starting_weights_reports_nothing():
    assert load_starting_weights(tiny.model()) == []


def test_a_missing_folder_or_name_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for weights in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="model.text.weights: cannot load a BERT from") as caught:
            load_starting_weights(text_model(weights))
        assert "\n" not in str(caught.value) and str(weights) in str(caught.value)


def test_a_broken_file_is_refused_in_one_line(bert_folder, tmp_path):
    for file in bert_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="model.text.weights") as caught:
        load_starting_weights(text_model(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_bert_of_another_size_is_refused_by_its_shapes(bert_folder):
    with pytest.raises(CheckpointError, match=r"positions is 20, but .* has 16; set model.text.positions to 16$"):
        load_starting_weights(text_model(bert_folder, positions=20))


def test_what_no_shape_shows_of_a_bert_must_agree_with_the_recipe(bert_folder, tmp_path):
    with pytest.raises(CheckpointError, match="model.text.heads is 2, but .* has 4; set model.text.heads to 4"):
        load_starting_weights(text_model(bert_folder, heads=2))
    bert = BertForMaskedLM.from_pretrained(bert_folder)
    bert.config.hidden_act = "relu"
    bert.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="computes with relu, but the text encoder with gelu"):
        load_starting_weights(text_model(tmp_path))


def image_model(weights) -> AlignmentModel:
    return tiny.model(tiny.recipe(model__image__weights=str(weights)))


def vit_like(size: int = tiny.IMAGE, classes: int = 0, **sizes):
    stated = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2} | sizes
    torch.manual_seed(5)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=classes, global_pool="token", **stated)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_an_image_encoder_starts_from_a_file(tmp_path, kind):
    vit, path = vit_like(classes=3), tmp_path / f"vit.{kind}"
    if kind == "pth":
        torch.save(vit.state_dict(), path)
    else:
        save_file(vit.state_dict(), path)
    model = image_model(path)
    (report,) = load_starting_weights(model)
    assert report == f"image encoder: started from {path}; not used of it: head.bias, head.weight"
    for name, parameter in model.image_encoder.vit.named_parameters():
        assert torch.equal(parameter, vit.get_parameter(name)), name


def test_position_embeddings_of_another_resolution_are_interpolated(tmp_path):
    save_file(vit_like(64).state_dict(), tmp_path / "vit.safetensors")
    model = image_model(tmp_path / "vit.safetensors")
    load_starting_weights(model)
    assert model.image_encoder.vit.pos_embed.shape == (1, 5, 32)
    assert model.image_encoder.vit.pos_embed.any()
    assert torch.equal(model.image_encoder.vit.blocks[0].attn.qkv.weight, vit_like(64).blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("case", ["missing", "another width", "not a checkpoint", "half of it"])
def test_an_image_file_that_does_not_fit_is_refused_in_one_line(tmp_path, case):
    path = tmp_path / "vit.safetensors"
    if case == "another width":
        save_file(vit_like(embed_dim=48).state_dict(), path)
    elif case == "not a checkpoint":
        path.write_bytes(b"nonsense")
    elif case == "half of it":
        weights = vit_like().state_dict()
        save_file({name: weights[name] for name in list(weights)[: len(weights) // 2]}, path)
    with pytest.raises(CheckpointError, match="model.image.weights") as caught:
        load_starting_weights(image_model(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_timm_weights_that_cannot_be_downloaded_are_refused_in_one_line(monkeypatch):
    def no_network(*arguments, **named):
        raise OSError("no network\nat all")

    model = image_model("timm")
    monkeypatch.setattr("pretrain.weights.starting.timm.create_model", no_network)
    with pytest.raises(CheckpointError, match="without network, give a file") as caught:
        load_starting_weights(model)
    assert "\n" not in str(caught.value)

"""Every parameter has its part and its depth: by hand for a ViT and a BERT, by timm's own layer decay for timm's models, by
name for those of transformers."""

import math
import re

import pytest
import tiny
from timm.optim import param_groups_layer_decay
from tiny_text_models import POSITIONS, write_family

from data_tools.tokenizer import load_tokenizer
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import ImageEncoderConfig, TextEncoderConfig
from pretrain.model.parts import Freezing, encoder_parts, parameter_groups
from pretrain.model.timm_tower import TimmTower
from pretrain.model.transformers_text import TransformersText
from pretrain.model.transformers_tower import TransformersTower
from pretrain.weights.text_tower import describe_encoder, fit_tokenizer
from runtime.errors import RecipeError
from training.config import FreezeConfig, OptimizerConfig, RatesConfig

RATES = RatesConfig(image=0.1, text=0.2, fusion=0.5, new=1.0)


def shares_of(model, optimizer, parts=None):
    """The share of the learning rate of every parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(dict(model.named_parameters()), parts or model.parts(), optimizer)
    shares = [(names[id(parameter)], group["lr_share"]) for group in groups for parameter in group["params"]]
    assert len(shares) == len(dict(shares)) == len(names), "each parameter is in one group"
    return dict(shares)


def layers_above(name: str) -> int:
    """What a reader of the tiny model (a ViT and a BERT of two layers each) expects, from the name alone."""
    for tower in ("image_encoder.vit.blocks", "text_encoder.layers"):
        if name.startswith(tower):
            return 1 - int(name.removeprefix(f"{tower}.").split(".")[0])
    on_top = name.startswith("image_encoder.vit.norm")
    return 2 if name.startswith(("image_encoder.", "text_encoder.")) and not on_top else 0


def test_every_parameter_of_a_vit_and_a_bert_has_its_part_and_depth():
    model = tiny.model(tiny.recipe(model__text__layers=2, model__levels=[[1, 1]]))
    shares = shares_of(model, OptimizerConfig(rates=RATES, layer_decay=0.65))
    parts = {"image_encoder.": 0.1, "text_encoder.": 0.2, "fusion_encoder.": 0.5}
    for name, share in shares.items():
        part = next((rate for start, rate in parts.items() if name.startswith(start)), 1.0)
        assert share == pytest.approx(part * 0.65 ** layers_above(name)), name
    assert shares["text_encoder.words.weight"] == pytest.approx(0.2 * 0.65**2)
    assert shares["image_encoder.vit.norm.weight"] == shares["image_encoder.vit.blocks.1.mlp.fc1.bias"] == 0.1
    assert {shares[name] for name in ("codebook", "temperature.logit", "image_projection.weight")} == {1.0}


@pytest.mark.parametrize(
    "architecture", ["test_vit2", "test_resnet", "test_efficientnet", "test_convnext", "vit_base_patch16_siglip_224"]
)
def test_layer_decay_of_a_timm_model_is_timms_own(architecture):
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2} if "siglip" in architecture else {}
    tower = TimmTower(
        ImageEncoderConfig(kind="timm", architecture=architecture, image_size=64, arguments=small, pooling="query")
    )
    network = AlignmentModel(tiny.recipe().model, tiny.tokenizer().vocabulary)
    network.image_encoder = tower
    shares = shares_of(network, OptimizerConfig(layer_decay=0.7))
    expected = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(tower.vit, layer_decay=0.7)
        for parameter in group["params"]
    }
    assert len(set(expected.values())) > 3
    for name, parameter in tower.vit.named_parameters():
        assert shares[f"image_encoder.vit.{name}"] == pytest.approx(expected[id(parameter)]), name
    assert shares["image_encoder.attention_pool.query"] == 1.0, "a learned query is new"


def test_without_rates_there_are_the_two_groups_there_always_were():
    model = tiny.model()
    named = dict(model.named_parameters())
    decays, others = parameter_groups(named, model.parts(), OptimizerConfig(weight_decay=0.3))
    matrices = [parameter for name, parameter in named.items() if parameter.ndim > 1 and not name.endswith(".bias")]
    assert [id(parameter) for parameter in decays["params"]] == [id(parameter) for parameter in matrices]
    assert (decays["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert decays["lr_share"] == others["lr_share"] == 1.0 and decays["part"] == others["part"] == ""


def test_a_part_that_waits_has_groups_of_its_own():
    model = tiny.model()
    optimizer = OptimizerConfig(freeze_until=FreezeConfig(text=0.5))
    groups = parameter_groups(dict(model.named_parameters()), model.parts(), optimizer)
    waiting = {id(parameter) for group in groups if group["part"] == "text" for parameter in group["params"]}
    assert waiting == {id(parameter) for parameter in model.text_encoder.parameters()}


def test_a_frozen_part_neither_learns_nor_drops_out_until_its_epoch():
    model = tiny.model(tiny.recipe(model__text__dropout=0.5))
    freezing = Freezing(model, model.parts(), {"image": 1.0, "text": 0.5, "fusion": 0.0})

    def learning():
        return {
            part: (one.module.training, any(parameter.requires_grad for parameter in one.module.parameters()))
            for part, one in model.parts().items()
        }

    assert freezing.waiting == {"image", "text"}
    seen = []
    for epoch in (0.0, 0.49, 0.5, 0.99, 1.0, 2.0):
        seen.append(freezing.apply(epoch))
        assert learning() == {part: (part not in seen[-1],) * 2 for part in ("image", "text", "fusion")}
        model.train()  # as a validation leaves it
    assert seen == [{"image", "text"}] * 2 + [{"image"}] * 2 + [set()] * 2
    assert freezing.caveat(0.5) and "image (1), text (0.5)" in freezing.caveat(0.5)
    assert "text" not in freezing.caveat(1.0) and not freezing.caveat(1.5)


def test_a_part_that_never_learns_is_not_trained():
    model = tiny.model()
    freezing = Freezing(model, model.parts(), {"image": math.inf})
    assert not any(parameter.requires_grad for parameter in model.image_encoder.vit.parameters())
    assert freezing.apply(100.0) == {"image"} and not freezing.waiting and not freezing.caveat(100.0)
    assert not model.image_encoder.vit.training and model.text_encoder.training
    with pytest.raises(RecipeError, match="freeze_until.image is 1, but that encoder does not learn"):
        Freezing(model, model.parts(), {"image": 1.0})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer_decay": 0.0}, "optimizer.layer_decay is 0"),
        ({"layer_decay": 1.5}, "optimizer.layer_decay is 1.5"),
        ({"rates": {"image": -1.0}}, "optimizer.rates.image is -1"),
        ({"rates": {"tower": 1.0}}, "unknown key.*tower"),
        ({"freeze_until": {"text": -0.5}}, "optimizer.freeze_until.text is -0.5"),
        ({"freeze_until": {"text": 1.0}}, "freeze_until.text is 1, but model.text.weights is none"),
    ],
)
def test_rates_that_make_no_sense_name_their_key(values, said):
    changes = {f"optimizer__{key}": value for key, value in values.items()}
    with pytest.raises(RecipeError, match=said):
        tiny.recipe(**changes)


def test_a_part_cannot_be_frozen_for_a_while_and_for_good():
    with pytest.raises(RecipeError, match=r"freeze_until.image is 1, but model.image.frozen is true"):
        tiny.recipe(checkpoint="x", model__image__frozen=True, optimizer__freeze_until={"image": 1.0})


def assert_the_layers_are_counted(part):
    """Embeddings lie below all three layers; what follows the layers, a last norm or a pooling, is on top."""
    depths = part.depths()
    for name, parameter in part.module.named_parameters():
        layer = re.search(r"\blayers?\.(\d)\.", name)
        expected = 2 - int(layer[1]) if layer else 3 if re.search(r"embeddings|pre_layrnorm", name) else 0
        assert depths[id(parameter)] == expected, name
    assert set(depths.values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("architecture", ["clip_vision_model", "siglip_vision_model", "dinov2", "vit"])
def test_layers_of_a_transformers_vision_model_are_counted(architecture):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = ImageEncoderConfig(kind="transformers", architecture=architecture, image_size=32, arguments=sizes)
    tower = TransformersTower(config)
    assert_the_layers_are_counted(encoder_parts(tower, tiny.model().text_encoder)["image"])


@pytest.mark.parametrize("family", ["DistilBERT", "ModernBERT", "SigLIP"])
def test_layers_of_a_transformers_text_model_are_counted(family, tmp_path):
    folder = write_family(family, tmp_path)
    config = describe_encoder(TextEncoderConfig(kind="transformers", weights=str(folder)))
    tokenizer = load_tokenizer(folder, POSITIONS)
    encoder = TransformersText(fit_tokenizer(config, tokenizer), tokenizer.vocabulary)
    assert_the_layers_are_counted(encoder_parts(tiny.model().image_encoder, encoder)["text"])

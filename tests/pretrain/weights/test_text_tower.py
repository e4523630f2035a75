"""Text encoders of transformers start whole or say what is missing, and a run with one needs its folder no more."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_shards import make
from tiny_text_models import CAPTIONS, POSITIONS, write_family

from data_tools.tokenizer import load_tokenizer
from pretrain.budget import Budget
from pretrain.config import PretrainRecipe
from pretrain.model.config import TextEncoderConfig
from pretrain.model.transformers_text import TransformersText
from pretrain.train import pretrain
from pretrain.weights.load import load_model
from pretrain.weights.text_tower import describe_encoder, fit_tokenizer, load_text_tower
from runtime.checkpoint import read_tensors
from runtime.errors import CheckpointError, DataError, LigatureError, RecipeError
from runtime.recipe import build_config, read_recipe


def config(folder, **changes) -> TextEncoderConfig:
    return TextEncoderConfig(kind="transformers", weights=str(folder), **changes)


def one_line(kind: type[Exception], call, *arguments) -> str:
    with pytest.raises(kind) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def start(described: TextEncoderConfig) -> list[str]:
    return load_text_tower(TransformersText(described, 1), described)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return write_family("RoBERTa", tmp_path_factory.mktemp("roberta"))


@pytest.fixture
def copied(roberta, tmp_path):
    return shutil.copytree(roberta, tmp_path / "copied")


def test_it_is_described_by_its_config_and_starts_whole(roberta):
    described = describe_encoder(config(roberta, dropout=0.0))
    sizes = described.width, described.layers, described.heads, described.feed_forward, described.positions
    assert sizes == (32, 3, 2, 48, POSITIONS) and described.pooling == "class"
    assert describe_encoder(described) == described
    assert all(name.startswith("lm_head.") for name in start(described))


def test_a_missing_tensor_is_named(copied):
    tensors = load_file(copied / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.1.output.dense.weight"))
    del tensors[name]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    message = one_line(CheckpointError, start, describe_encoder(config(copied)))
    assert "lacks encoder.layer.1.output.dense.weight and 0 more tensors of a roberta" in message


def test_a_tensor_of_another_shape_is_named(copied):
    described = describe_encoder(config(copied, arguments={"intermediate_size": 64}))
    assert "(48" in (message := one_line(CheckpointError, start, described)) and "(64" in message


def test_arguments_go_before_the_weights_configuration(roberta):
    described = describe_encoder(config(roberta, arguments={"hidden_dropout_prob": 0.0}))
    assert described.arguments["hidden_dropout_prob"] == 0.0 and described.arguments["model_type"] == "roberta"


def test_folders_that_hold_no_model_are_refused(copied, tmp_path):
    assert "model.text.weights: no folder" in one_line(CheckpointError, describe_encoder, config(tmp_path / "nothing"))
    (copied / "model.safetensors").unlink()
    assert "lacks config.json or weights" in one_line(CheckpointError, describe_encoder, config(copied))
    name = one_line(CheckpointError, describe_encoder, config("nobody/roberta"))
    assert "cannot read the configuration of `nobody/roberta`" in name and "without network, give a folder" in name


def test_a_pooling_that_we_do_not_have_is_refused(tmp_path):
    folder = write_family("MPNet", tmp_path)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert "pools by max_tokens" in one_line(RecipeError, describe_encoder, config(folder))
    assert describe_encoder(config(folder, pooling="mean")).pooling == "mean"


def test_a_tokenizer_of_another_model_is_refused(roberta, tmp_path):
    described = describe_encoder(config(roberta))
    others = load_tokenizer(write_family("BERT", tmp_path), POSITIONS)
    assert "padding is token 0 and the roberta's 1" in one_line(DataError, fit_tokenizer, described, others)
    assert "use a BERT" in one_line(DataError, fit_tokenizer, TextEncoderConfig(), load_tokenizer(roberta, POSITIONS))
    small = describe_encoder(config(roberta, arguments={"vocab_size": 10}))
    assert "tokens and the roberta only 10" in one_line(DataError, fit_tokenizer, small, load_tokenizer(roberta, 8))
    longer = load_tokenizer(roberta, POSITIONS + 1)
    assert "is more than the 16 that a roberta reads" in one_line(RecipeError, fit_tokenizer, described, longer)


def test_siglips_captions_have_one_length(tmp_path):
    folder = write_family("SigLIP", tmp_path)
    described = describe_encoder(config(folder))
    assert "set data.caption_tokens to 16" in one_line(RecipeError, fit_tokenizer, described, load_tokenizer(folder, 8))
    tokenizer = load_tokenizer(folder, POSITIONS)
    assert fit_tokenizer(described, tokenizer).arguments["pad_token_id"] == tokenizer.pad == 1
    assert tokenizer(CAPTIONS)[0].shape == (len(CAPTIONS), POSITIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"text": {"kind": "transformers"}}}, "name its weights"),
        ({"model": {"text": {"kind": "transformers", "width": 64, "weights": "x"}}}, "model.text.width is set"),
        ({"model": {"text": {"arguments": {"a": 1}}}}, "is for model.text.kind transformers"),
        ({"model": {"text": {"kind": "transformers", "weights": "x"}}}, "data.tokenizer is train"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    assert message in one_line(RecipeError, build_config, PretrainRecipe, {"data": {"train": "none"}} | changes)


def test_the_plan_refuses_what_it_cannot_count(shards, roberta, tmp_path):
    assert "plan counts text encoders of kind bert only" in one_line(
        RecipeError, Budget, recipe(shards, roberta, tmp_path)
    )


def recipe(shards, folder, runs, **changes) -> PretrainRecipe:
    objectives = {"masked_language": {"share": 0.3}, "matching": {"pool": 4}, "levels": {"weight": 0.1}}
    image = {"architecture": "vit_tiny_patch16_224", "image_size": 32, "patch": 16, "width": 32, "depth": 2, "heads": 2}
    values = {
        "name": "tiny",
        "runs": str(runs),
        "data": {"train": str(shards), "tokenizer": str(folder), "caption_tokens": POSITIONS, "workers": 0},
        "model": {
            "image": image,
            "text": {"kind": "transformers", "weights": str(folder)} | changes.pop("text", {}),
            "fusion": {"layers": 1}, "feature_dim": 16, "codewords": 8, "levels": [[1, 1], [3, 2]],
        },
        "objectives": objectives | changes.pop("objectives", {}),
        "teacher": {"queue": 16},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "training": {"global_batch": 8, "micro_batch": 8, "steps": 2,  "precision": "fp32", "device": "cpu", "log_every": 1}
        | changes.pop("training", {}),
    }  # fmt: skip
    return build_config(PretrainRecipe, values)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make(tmp_path_factory.mktemp("shards"), "a", 16)


def test_a_run_goes_on_to_the_bit_without_the_folder_it_began_from(shards, roberta, tmp_path, capsys):
    folder = shutil.copytree(roberta, tmp_path / "roberta")
    settings = {"training": {"checkpoint_every": 1}}
    run = pretrain(recipe(shards, folder, tmp_path / "runs", **settings))
    report = capsys.readouterr().out
    assert "text encoder: started whole from" in report and "random: fusion_encoder (" in report
    whole = read_tensors(run / "checkpoints" / "step-00000002", "model")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / "finished.json").unlink()
    shutil.rmtree(folder)
    pretrain(recipe(shards, folder, tmp_path / "runs", **settings))
    again = read_tensors(run / "checkpoints" / "step-00000002", "model")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    model = load_model(run)
    assert model.network.config.text.arguments["model_type"] == "roberta"
    alone, together = model.encode_text(CAPTIONS[:1]), model.encode_text(CAPTIONS)
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=0)


def test_words_are_not_masked_without_a_mask_token(shards, tmp_path):
    folder = write_family("CLIP", tmp_path / "clip")
    message = one_line(LigatureError, pretrain, recipe(shards, folder, tmp_path / "runs"))
    assert "has no mask token" in message and "objectives.masked_language.weight to 0" in message


@pytest.mark.parametrize(
    ("family", "training"),
    [
        ("ModernBERT", {"precision": "bf16", "zero_stage": 0, "checkpoint_activations": True}),
        ("RoBERTa", {"precision": "bf16", "zero_stage": 2}),
        ("MPNet", {"precision": "bf16", "zero_stage": 3}),
        ("SigLIP", {"precision": "bf16", "zero_stage": 3, "checkpoint_activations": True}),
    ],
)
def test_it_trains_at_every_zero_stage(shards, tmp_path, family, training):
    folder = write_family(family, tmp_path / "model")
    objectives = {"masked_language": {"weight": 0.0}} if family == "SigLIP" else {}
    run = pretrain(recipe(shards, folder, tmp_path / "runs", training=training, objectives=objectives))
    trained, started = load_model(run), describe_encoder(config(folder))
    encoder = TransformersText(started, 1)
    load_text_tower(encoder, started)
    moved = {
        name: float((weight - encoder.state_dict()[name]).abs().max())
        for name, weight in trained.network.text_encoder.state_dict().items()
        if weight.ndim > 1
    }
    assert 0 < max(moved.values()) < 0.01, "it learns from where it started"
    assert trained.encode_text(CAPTIONS).isfinite().all()


def test_a_frozen_one_stays_as_it_was(shards, roberta, tmp_path):
    run = pretrain(recipe(shards, roberta, tmp_path / "runs", text={"frozen": True}))
    described = describe_encoder(config(roberta))
    encoder = TransformersText(described, 1)
    load_text_tower(encoder, described)
    trained = load_model(run).network.text_encoder.state_dict()
    assert all(torch.equal(trained[name], weight) for name, weight in encoder.state_dict().items())


def test_own_pooling_survives_the_command_line_and_a_berts_is_named():
    for kind, pooling in (("transformers", "own"), ("bert", "class")):
        weights = [
            "--model.text.kind",
            kind,
            "--model.text.weights",
            "name",
            "--data.tokenizer",
            "name",
            "--data.train",
            "shards",
        ]
        assert read_recipe(PretrainRecipe, weights, "ligature pretrain").model.text.pooling == pooling

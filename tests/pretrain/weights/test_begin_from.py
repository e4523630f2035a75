"""A run that begins where another model ended: its weights, its teacher and its words, all or a clear refusal."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from launch.cli import main
from pretrain.config import PretrainRecipe
from pretrain.model.alignment_model import AlignmentModel
from pretrain.teacher import Teacher
from pretrain.weights.begin_from import begin_from
from pretrain.weights.load import describe_model, find_checkpoint
from runtime.checkpoint import checkpoint_hash, write_checkpoint
from runtime.errors import CheckpointError
from runtime.files import read_json
from runtime.recipe import build_config


def saved(folder: Path, training: str = "pretrained", teacher: bool = True, **changes) -> Path:
    """A checkpoint of the tiny model, and of a teacher that differs from it."""
    settings = tiny.recipe(**changes)
    tensors = {"model": dict(tiny.model(settings, seed=1).named_parameters())}
    if teacher:
        tensors["teacher"] = Teacher(tiny.model(settings, seed=2), 0.9).averages
    about = describe_model(settings.model, tiny.CAPTION_WORDS, training)
    write_checkpoint(folder, tensors, {"model": about}, tiny.tokenizer().save)
    return folder


def fresh(**changes) -> AlignmentModel:
    return tiny.model(tiny.recipe(**changes), seed=3)


def test_student_and_teacher_start_from_the_sources_weights_and_averages(tmp_path):
    model = fresh()
    report, teacher = begin_from(saved(tmp_path / "source"), model)
    weights, averages = (load_file(tmp_path / "source" / f"{name}.safetensors") for name in ("model", "teacher"))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert teacher.keys() == averages.keys() and all(torch.equal(teacher[name], averages[name]) for name in averages)
    assert report == [
        f"{len(weights)} tensors and the tokenizer from {tmp_path / 'source'}; the teacher begins as its teacher",
        "random, because it has none: nothing",
        "not used of it: nothing",
    ]


def test_without_a_teacher_the_student_takes_its_place(tmp_path):
    report, teacher = begin_from(saved(tmp_path / "source", teacher=False), fresh())
    assert teacher is None and report[0].endswith("the teacher begins as the student: it has none")


def test_new_parts_stay_random_unused_parts_are_left_and_both_are_reported(tmp_path):
    model = fresh(model__codewords=0, objectives__codebook__weight=0.0, model__levels=[[1, 1]])
    before = copy.deepcopy(model)
    report, teacher = begin_from(saved(tmp_path / "source"), model)
    assert report[1:] == ["random, because it has none: level_projections (6)", "not used of it: codebook (1)"]
    for name, parameter in model.level_projections.named_parameters():
        assert torch.equal(parameter, before.level_projections.get_parameter(name))
    assert not any(name.startswith("level_projections") for name in teacher)


def test_positions_are_interpolated_in_both(tmp_path):
    model = fresh(model__image__image_size=64)
    _, teacher = begin_from(saved(tmp_path / "source"), model)
    found = model.image_encoder.vit.pos_embed, teacher["image_encoder.vit.pos_embed"]
    for name, positions in zip(("model", "teacher"), found, strict=True):
        theirs = load_file(tmp_path / "source" / f"{name}.safetensors")["image_encoder.vit.pos_embed"]
        assert positions.shape == (1, 17, 32) and torch.equal(positions[:, 0], theirs[:, 0])
        torch.testing.assert_close(positions[0, 1:].mean(0), theirs[0, 1:].mean(0))  # bicubic keeps the mean of 2 x 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__text__width": 64}, r"is \[\d+.*\] in .* and \[\d+.*\] in the recipe"),
        ({"model__image__depth": 3}, r"image_encoder.vit.blocks.2\S+ is missing in .* and \[32\] in the recipe"),
        ({"model__codewords": 8}, r"codebook is \[16, 16\] in .* and \[8, 16\] in the recipe"),
        ({"model__image__heads": 4}, r"heads of image and text is \[2, 2\] in .* and \[4, 2\] in the recipe"),
        (
            {"model__fusion__kind": "single_stream"},
            "fusion.kind is cross_attention in .* and single_stream in the recipe",
        ),
    ],
)
def test_other_sizes_are_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        begin_from(saved(tmp_path / "source"), fresh(**changes))
    assert "\n" not in str(caught.value) and str(caught.value).endswith("model.json")


def test_a_fine_tuned_source_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is fine-tuned-on shapes, so"):
        begin_from(saved(tmp_path / "source", training="fine-tuned-on shapes"), fresh())


def test_the_recipe_says_what_the_run_began_from():
    recipe = build_config(PretrainRecipe, {"checkpoint": "models/albef", "model": {"image": {"weights": "timm"}}})
    assert (recipe.model.image.weights, recipe.model.text.weights) == ("none", "none")
    assert recipe.data.tokenizer == "models/albef"


RECIPE = """
data: {vocabulary: 200, caption_tokens: 32, workers: 0}
model:
  image: {architecture: vit_tiny_patch16_224, image_size: 32, patch: 8, width: 32, depth: 1, heads: 2}
  text: {width: 32, layers: 1, heads: 2, feed_forward: 64, positions: 32}
  fusion: {layers: 1}
  feature_dim: 16
  codewords: 8
teacher: {queue: 16, ema_momentum: 0.9}
optimizer: {warmup_steps: 0}
training: {global_batch: 8, micro_batch: 8, steps: 3, precision: fp32, device: cpu}
"""


STILL = ["--optimizer.lr", "0", "--optimizer.min_lr", "0", "--teacher.ema_momentum", "1", "--training.seed", "9"]
"""At rate 0 and momentum 1 a step changes nothing: what such a run saves is what it began from."""


@pytest.fixture(scope="module")
def first(drawn, tmp_path_factory) -> tuple[Path, list[str]]:
    """A short run, and the command that made it but for its name."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = ["pretrain", "--config", str(folder / "recipe.yaml"), "--data.train", str(drawn / "train")]
    assert main([*command, "--runs", str(folder), "--name", "first"]) == 0
    return folder / "first", command


@pytest.mark.parametrize(
    "more",
    [[], ["--training.precision", "bf16", "--training.zero_stage", "3"]],
    ids=["one process", "two, ZeRO 3 in bf16"],
)
def test_a_run_begins_from_a_run(first, more, tmp_path, capfd):
    source, command = first
    launcher = ["launch", "local", "--nproc", "2"] if more else []
    again = [*command, "--runs", str(tmp_path), "--name", "second", "--checkpoint", str(source), *STILL, *more]
    assert main([*launcher, *again]) == 0
    assert "tokenizer from" in capfd.readouterr().out
    begun, ended = (find_checkpoint(folder) for folder in (source, tmp_path / "second"))
    for name in ("model", "teacher"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (begun, ended))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (begun / "tokenizer.json").read_bytes() == (ended / "tokenizer.json").read_bytes()
    teacher, model = load_file(ended / "teacher.safetensors"), load_file(ended / "model.safetensors")
    assert any(not torch.equal(teacher[key], model[key]) for key in teacher)
    assert read_json(tmp_path / "second" / "begun_from.json") == {
        "checkpoint": str(begun),
        "hash": checkpoint_hash(begun),
    }


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(first, tmp_path, capfd):
    source, command = first
    shutil.copytree(source, tmp_path / "first")
    (tmp_path / "first" / "finished.json").unlink()
    broken = [path for path in (tmp_path / "first" / "checkpoints").glob("step-*/model.safetensors")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-1])
    logged = (tmp_path / "first" / "metrics.jsonl").read_bytes()
    assert main([*command, "--runs", str(tmp_path), "--name", "first"]) == 1
    assert f"none of the {len(broken)} checkpoints in" in capfd.readouterr().err
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == logged and all(path.exists() for path in broken)


def test_a_resumed_run_no_longer_needs_its_source(first, tmp_path, capfd):
    source, command = first
    shutil.copytree(source, tmp_path / "source")
    again = [*command, "--runs", str(tmp_path), "--name", "second", "--checkpoint", str(tmp_path / "source")]
    assert main(again) == 0
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "second" / "finished.json").unlink()
    capfd.readouterr()
    assert main(again) == 0
    assert "going on from" in capfd.readouterr().out


def test_level_projections_are_of_their_levels(tmp_path):
    source = saved(tmp_path / "source", model__levels=[[1, 1]])
    with pytest.raises(CheckpointError, match=r"levels is \[\[1, 1\]\] in .* and \[\[1, 2\]\] in the recipe"):
        begin_from(source, fresh(model__levels=[[1, 2]]))


def test_a_missing_checkpoint_is_refused_in_one_line(drawn, tmp_path, capfd):
    asked = ["--data.train", str(drawn / "train"), "--runs", str(tmp_path), "--training.device", "cpu"]
    assert main(["pretrain", *asked, "--checkpoint", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is neither a run nor a checkpoint: no such folder" in capfd.readouterr().err

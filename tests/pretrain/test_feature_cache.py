"""Features of a frozen tower, encoded once: training on them is the training on pixels, and nothing stale is read."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import feature_jobs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_tools.pixels.decode import decode_pixels
from data_tools.pixels.transforms import render
from data_tools.pixels.views import draw_views
from data_tools.shards.reader import ShardReader
from launch.cli import main
from pretrain import feature_cache
from runtime.checkpoint import resolve_pointer
from runtime.errors import RecipeError
from runtime.metrics import read_metrics

RECIPE = """
data: {vocabulary: 200, caption_tokens: 32, workers: 0, augment: {crop_scale: [1.0, 1.0], flip: false, operations: 0}}
model:
  image: {kind: timm, architecture: resnet18, image_size: 32, arguments: {layers: [1, 1, 1, 1]}, frozen: true}
  text: {width: 32, layers: 1, heads: 2, feed_forward: 64, positions: 32}
  fusion: {layers: 1}
  feature_dim: 16
  codewords: 8
teacher: {queue: 16}
optimizer: {lr: 1.0e-3, warmup_steps: 1}
training: {global_batch: 16, micro_batch: 8, steps: 4, precision: fp32, device: cpu, log_every: 1, validate_every: 2, checkpoint_every: 2}
"""


def pretrain(folder: Path, data: Path, name: str, *more: str) -> Path:
    (folder / "small.yaml").write_text(RECIPE)
    weights = feature_jobs.tower_weights(folder)
    recipe = ["--config", str(folder / "small.yaml"), "--name", name, "--runs", str(folder / "runs")]
    where = ["--data.train", str(data / "train"), "--data.validation", str(data / "validation")]
    assert main(["pretrain", *recipe, *where, "--model.image.weights", str(weights), *more]) == 0
    return folder / "runs" / name


def tensors(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = resolve_pointer(run / "checkpoints", "latest")
    assert checkpoint is not None
    return {f"{path.stem}.{k}": v for path in checkpoint.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_equal_runs(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    kept = [[{k: v for k, v in row.items() if "second" not in k} for row in read_metrics(run)] for run in (one, other)]
    assert [row.get("rsum") for row in kept[0]] == [row.get("rsum") for row in kept[1]]


@pytest.fixture
def data(drawn, tmp_path) -> Path:
    """A copy of the drawn shards, because the cache is written beside them."""
    for split in ("train", "validation"):
        shutil.copytree(drawn / split, tmp_path / "data" / split)
    return tmp_path / "data"


def test_pretraining_and_fine_tuning_without_augmentation_give_the_same_bits(tmp_path, data):
    exact = ["--data.features.kind", "tokens", "--data.features.dtype", "fp32"]
    live, cached = pretrain(tmp_path, data, "live"), pretrain(tmp_path, data, "cached", *exact)
    assert_equal_runs(live, cached)
    assert len(list(data.glob("*/features-*/block-*.npy"))) == 2

    def finetune(name: str, *more: str) -> Path:
        where = [
            "--data.train",
            str(data / "train"),
            "--data.validation",
            str(data / "validation"),
            "--data.workers",
            "0",
        ]
        same = ["--data.augment.crop_scale", "[1,1]", "--data.augment.flip", "false", "--data.augment.operations", "0"]
        steps = ["--training.steps", "3", "--training.global_batch", "16", "--training.validate_every", "3"]
        numbers = ["--training.precision", "fp32", "--training.device", "cpu", "--matching_weight", "0"]
        run = [
            "finetune",
            "--checkpoint",
            str(live),
            "--dataset",
            "drawn",
            "--runs",
            str(tmp_path / "runs"),
            "--name",
            name,
        ]
        assert main([*run, *where, *same, *steps, *numbers, *more]) == 0
        return tmp_path / "runs" / name

    pooled = ["--data.features.kind", "pooled", "--data.features.dtype", "fp32"]
    assert_equal_runs(finetune("tuned_live"), finetune("tuned_cached", *pooled))


def test_a_killed_encoding_goes_on_and_another_tower_has_another_cache(tmp_path, data, monkeypatch):
    monkeypatch.setattr("data_tools.pixels.feature_blocks.BLOCK", 16)
    first = feature_jobs.cache(str(data / "train"))
    folder = Path(first["folder"])
    assert len(list(folder.glob("*.npy"))) == 4
    (folder / "block-000002.npy").unlink()
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    again = feature_jobs.cache(str(data / "train"))
    assert again["folder"] == first["folder"] and np.array_equal(again["rows"], first["rows"])
    assert all((folder / name).stat().st_mtime_ns == when for name, when in written.items())
    others = [{"seed": 1}, {"dtype": "fp32"}, {"kind": "pooled"}, {"flip": True}, {"views": 3, "flip": True}]
    folders = {feature_jobs.cache(str(data / "train"), **other)["folder"] for other in others}
    assert len(folders | {first["folder"]}) == len(others) + 1


def test_views_are_the_tower_s_own_of_views_drawn_by_the_sample_s_number(data):
    found = feature_jobs.cache(str(data / "train"), flip=True, crop=0.3, views=3, dtype="fp32")
    model, augment = feature_jobs.model(), feature_jobs.config(flip=True, crop=0.3, views=3).augment
    reader = ShardReader(data / "train")
    for sample in (0, 17, 63):
        pixels = decode_pixels(reader[sample].image)
        views = [render(pixels, view, 32) for view in draw_views(pixels.shape[:2], augment, 3, sample)]
        with torch.no_grad():
            expected = model.image_encoder(torch.stack(views))
        torch.testing.assert_close(torch.from_numpy(found["rows"][sample]), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_within_its_rounding(data):
    whole, half = (feature_jobs.cache(str(data / "train"), dtype=dtype)["rows"] for dtype in ("fp32", "fp16"))
    assert half.dtype == np.float16 and 0 < np.abs(half - whole).max() <= np.abs(whole).max() * 2**-11


def test_two_ranks_share_the_work(gloo_pool, data):
    alone = feature_jobs.cache(str(data / "train"))
    shutil.rmtree(alone["folder"])
    for found in gloo_pool.run(feature_jobs.cache, str(data / "train"), 16):
        assert np.array_equal(found["rows"], alone["rows"])


def test_an_unreadable_image_is_listed_and_stood_in_for(tmp_path, data):
    reader = ShardReader(data / "train")
    shard, entry = data / "train" / "shard-000000.tar", reader[3]
    content = bytearray(shard.read_bytes())
    start = content.index(entry.image)
    content[start : start + len(entry.image)] = bytes(len(entry.image))
    shard.write_bytes(content)
    more = ["--data.features.kind", "tokens", "--data.max_bad_share", "0.5", "--training.steps", "8"]
    run = pretrain(tmp_path, data, "broken", *more)
    listed = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in listed] == [entry.key]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.image.frozen", "false"], "data.features.kind is tokens, but the image tower learns"),
        (["--model.levels", "[[1,1]]"], "data.features.kind is tokens, but model.levels reads inner layers"),
        (
            ["--data.features.kind", "pooled"],
            "data.features.kind is pooled, but matching, masked_language and a learned",
        ),
        (["--data.features.views", "0"], "data.features.views is 0"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path, data, capsys, more, message):
    (tmp_path / "small.yaml").write_text(RECIPE)
    recipe = ["pretrain", "--config", str(tmp_path / "small.yaml"), "--data.train", str(data / "train")]
    weights = ["--model.image.weights", "x.pth", "--data.features.kind", "tokens", "--runs", str(tmp_path)]
    assert main([*recipe, *weights, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_cache_without_room_is_refused_with_its_size(data, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: usage(10, 9, 1000))
    with pytest.raises(Exception, match=r"64 images x 1 views need 0.0 GB at .* lower data.features.views"):
        feature_jobs.cache(str(data / "train"))


def test_pooled_states_of_a_query_that_learns_are_refused(data, monkeypatch):
    """A fine-tuning learns of its checkpoint's query only here; a recipe of pretraining says it at once."""
    model = feature_jobs.model()
    model.config.image.pooling = "query"
    monkeypatch.setattr(feature_jobs, "model", lambda seed: model)
    with pytest.raises(RecipeError, match="model.image.pooling is query, and the query learns; set the kind to tokens"):
        feature_jobs.cache(str(data / "train"), kind="pooled")

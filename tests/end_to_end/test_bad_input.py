"""Bad input to a stage gives one clear line and a non-zero exit code, and leaves nothing half-written."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from data_tools.shards.manifest import read_index
from data_tools.shards.reader import ShardReader
from data_tools.tokenizer import train_tokenizer
from launch.cli import main
from pretrain.model.alignment_model import AlignmentModel
from pretrain.model.config import FusionEncoderConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig
from pretrain.weights.load import describe_model
from runtime.checkpoint import write_checkpoint
from runtime.errors import LigatureError


def tiny(width=32):
    image = ImageEncoderConfig("vit_tiny_patch16_224", image_size=32, patch=16, width=width, depth=1, heads=2)
    text = TextEncoderConfig(width=width, layers=1, heads=2, feed_forward=64, positions=40)
    return ModelConfig(image, text, FusionEncoderConfig(layers=1), feature_dim=16, codewords=8)


def save_untrained(folder: Path, captions, config=None, described=None):
    """A whole checkpoint of random weights; `described` is what its model.json says instead."""
    config = config or tiny()
    tokenizer = train_tokenizer(captions, 200, 32)
    torch.manual_seed(0)
    weights = dict(AlignmentModel(config, tokenizer.vocabulary).named_parameters())
    about = describe_model(described or config, 32, "pretrained")
    write_checkpoint(folder, {"model": weights}, {"model": about}, tokenizer.save)
    return folder


@pytest.fixture(scope="module")
def captions(drawn):
    reader = ShardReader(drawn / "train")
    return [caption for sample in range(len(reader)) for caption in reader.captions(sample)]


def evaluate(checkpoint, data, out):
    options = ["--data", str(data), "--dataset", "shapes", "--split", "test", "--device", "cpu", "--workers", "0"]
    return main(["evaluate", "--checkpoint", str(checkpoint), "--out", str(out), *options])


def one_line(capfd):
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("ligature: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_a_checkpoint_of_another_shape_is_refused_by_the_name_of_the_weight(drawn, captions, tmp_path, capfd):
    folder = save_untrained(tmp_path / "model", captions, described=tiny(width=64))
    assert evaluate(folder, drawn / "test", tmp_path / "scores.json") == 1
    assert "key_value.bias is (64,), the model has (128,)" in one_line(capfd)
    assert not (tmp_path / "scores.json").exists()


def test_a_checkpoint_altered_by_one_byte_is_refused_by_the_name_of_the_file(drawn, captions, tmp_path, capfd):
    folder = save_untrained(tmp_path / "model", captions)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert evaluate(folder, drawn / "test", tmp_path / "scores.json") == 1
    assert "model.safetensors was altered" in one_line(capfd)


def test_a_folder_that_is_no_checkpoint(drawn, tmp_path, capfd):
    assert evaluate(tmp_path / "nowhere", drawn / "test", tmp_path / "scores.json") == 1
    assert "no such folder" in one_line(capfd)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_in_the_test_set_is_refused_by_its_key(drawn, captions, tmp_path, capfd, workers):
    shutil.copytree(drawn / "test", tmp_path / "test")
    reader = ShardReader(tmp_path / "test")
    shard, row = reader.locate(5)
    entry = reader.shard(shard)[1]
    index = read_index(tmp_path / "test" / entry.index)
    with open(tmp_path / "test" / entry.name, "r+b") as file:
        file.seek(int(index.image_offset[row]))
        file.write(b"\0" * int(index.image_size[row]))
    folder = save_untrained(tmp_path / "model", captions)
    options = [
        "--data",
        str(tmp_path / "test"),
        "--dataset",
        "s",
        "--split",
        "test",
        "--device",
        "cpu",
        "--workers",
        workers,
    ]
    assert main(["evaluate", "--checkpoint", str(folder), "--out", str(tmp_path / "scores.json"), *options]) == 1
    assert index.key[row] in one_line(capfd)
    assert not (tmp_path / "scores.json").exists()


def test_a_missing_shard_folder(tmp_path, capfd):
    recipe = ["--config", "pretrain/demo.yaml", "--runs", str(tmp_path), "--data.train", str(tmp_path / "nothing")]
    assert main(["pretrain", *recipe]) != 0
    assert str(tmp_path / "nothing") in one_line(capfd)
    assert not (tmp_path / "pretrain").exists()


def test_a_full_disk_leaves_no_checkpoint_under_its_name(captions, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(LigatureError, match="No space left") as caught:
            save_untrained(small / "step-00000001", captions)
        assert "\n" not in str(caught.value)
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)

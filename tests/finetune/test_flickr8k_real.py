"""The campaign of docs/flickr8k.md: its linear maps learn what pairs teach, and its shuffled pairs have no image with its own captions."""

from __future__ import annotations

import argparse
import re
import sys

import numpy as np
import torch

from benchmarks.campaigns import flickr8k_real, linear_maps
from launch.cli import main


def options(**changes) -> argparse.Namespace:
    settings = {"seed": 0, "dim": 16, "dropout": 0.0, "batch": 32, "epochs": 30, "lr": 1e-2, "shuffled": False}
    return argparse.Namespace(**settings | changes)


def found(shuffled: bool) -> float:
    """Share of 64 unseen images whose own caption is nearest, where image and caption are linear views of the same hidden vector."""
    torch.manual_seed(1)
    hidden, views = torch.randn(192, 8), [torch.randn(8, width) for width in (24, 20)]
    images, texts = (hidden @ view for view in views)
    maps = linear_maps.fit(
        images[:128], texts[:128].repeat_interleave(2, 0), np.arange(128).repeat(2), options(shuffled=shuffled)
    )
    with torch.no_grad():
        image, text = (
            torch.nn.functional.normalize(map_(side[128:])) for map_, side in zip(maps, (images, texts), strict=True)
        )
    return float(((image @ text.T).argmax(1) == torch.arange(64)).float().mean())


def test_the_maps_find_what_pairs_share_and_nothing_in_shuffled_pairs():
    assert found(shuffled=False) > 0.9
    assert found(shuffled=True) < 0.1


def test_the_maps_embeddings_are_scored_by_evaluate(pretrained, drawn, tmp_path, monkeypatch):
    out, sets = tmp_path / "maps.npz", ["--train", str(drawn / "train"), "--test", str(drawn / "test")]
    small = ["--batch", "8", "--epochs", "2", "--dim", "8"]
    monkeypatch.setattr(sys, "argv", ["linear_maps", str(pretrained), *sets, "--out", str(out), *small])
    assert linear_maps.main() == 0
    about = ["--data", str(drawn / "test"), "--dataset", "shapes", "--split", "test", "--out", str(tmp_path / "s.json")]
    assert main(["evaluate", "--scores", str(out), *about]) == 0


def test_shuffled_pairs_keep_all_captions_and_no_image_its_own(tmp_path, monkeypatch):
    names = [f"{number}.jpg" for number in range(40)]
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("\n".join(names[:30]))
    lines = [f"{name}#{caption}\tcaption {caption} of {name}" for name in names for caption in range(2)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(lines))
    (tmp_path / "Flicker8k_Dataset").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / flickr8k_real.DATA).mkdir(parents=True)
    commands = []
    monkeypatch.setattr(flickr8k_real, "ligature", lambda *command: commands.append(command))
    flickr8k_real.shard_shuffled(tmp_path)
    moved = [
        re.fullmatch(r"(.+)#\d\tcaption (\d) of (.+)", line).groups()
        for line in commands[0][1].read_text().splitlines()
    ]
    assert {(caption, own) for _, caption, own in moved} == {
        (str(caption), name) for name in names[:30] for caption in (0, 1)
    }
    assert sum(image == own for image, _, own in moved) == 0

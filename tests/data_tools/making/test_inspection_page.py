"""The page of a shard folder shows captions as text and marks broken images, and its histograms count every value."""

from __future__ import annotations

import io
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_tools.making.indexing import index_folder
from data_tools.making.inspection_page import histogram, write_page


def test_a_page_shows_captions_as_text_and_broken_images_as_such(tmp_path):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in [("a.jpg", buffer.getvalue()[:-200]), ("a.txt", b"<script>alert(1)</script>")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index_folder(tmp_path, workers=1)
    write_page(tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "cannot be read" in text


@pytest.mark.parametrize(
    ("values", "whole", "bars", "words"),
    [
        ([1, 2, 2, 3], True, 3, ["<title>2: 2</title>"]), ([5, 5], True, 0, ["all 5"]), ([], True, 0, ["none"]),
        ([*range(1000), 100_000], True, 40, ["or more: "]), ([0.5, 1.5], False, 40, ["median 1"]),
    ],
)  # fmt: skip
def test_histograms_count_every_value(values, whole, bars, words):
    chart = histogram("title", np.array(values), whole)
    counted = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+)</title>", chart)]
    assert (
        len(counted) <= bars and sum(counted) == (len(values) if bars else 0) and all(word in chart for word in words)
    )

"""Pieces of a run's page: images that the page holds, so that it fetches nothing, and notes.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from data_tools.pixels.decode import data_url
from runtime.page import escape

SMALLEST, LARGEST = 96, 160
"""Pixels a side: smaller images are enlarged, larger ones reduced."""


def image_url(pixels: Tensor) -> str:
    """Return an image (3, height, width) uint8 as a data URL. A small one is enlarged without smoothing."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if image.width < SMALLEST:
        image = image.resize((SMALLEST, SMALLEST), Image.Resampling.NEAREST)
    elif image.width > LARGEST:
        image = image.resize((LARGEST, LARGEST))
    return data_url(image)


def note_html(text: str) -> str:
    """Return a highlighted note."""
    return f"<p class=note>{escape(text)}</p>"

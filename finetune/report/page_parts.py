"""Pieces of a run's page: plots and images as HTML that holds them, so that the page fetches nothing.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from data_tools.pixels.decode import data_url
from runtime.figures import figure_data_url
from runtime.page import escape

SMALLEST, LARGEST = 96, 160
"""Pixels a side: smaller images are enlarged, larger ones reduced."""


def figure_html(figure: Any, title: str, kind: str = "panel") -> str:
    """Return a matplotlib figure as HTML with its title above it, and close the figure. `kind` is its CSS class."""
    figure.tight_layout()
    return (
        f"<figure class={kind}><figcaption>{escape(title)}</figcaption>"
        f"<img src='{figure_data_url(figure)}' alt='{escape(title)}'></figure>"
    )


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

"""Readers of captioned images: each source becomes a list of images whose bytes are read later.

Start with `collect`. A kind of source is one file of this folder and one line in `registry.py`.
"""

from data_tools.sources.collecting import collect
from data_tools.sources.images import Images, open_images
from data_tools.sources.items import (
    CaptionedImage,
    Choice,
    Collected,
    Entry,
    Source,
    StoredBytes,
    clean_caption,
    safe_key,
)
from data_tools.sources.registry import KINDS, detect_kind

__all__ = [
    "KINDS",
    "CaptionedImage",
    "Choice",
    "Collected",
    "Entry",
    "Images",
    "Source",
    "StoredBytes",
    "clean_caption",
    "collect",
    "detect_kind",
    "open_images",
    "safe_key",
]

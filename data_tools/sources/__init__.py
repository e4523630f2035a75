"""Readers of captioned images: each known source becomes a list of images whose bytes are fetched later.

`collect` is the way in. A kind of source is one function, `(annotation, Choice, dropped) -> iterator of Entry`.
"""

from data_tools.sources.images import Images, open_images
from data_tools.sources.items import CaptionedImage, Choice, Collected, Entry, StoredBytes, clean_caption, safe_key
from data_tools.sources.samples import KINDS, collect, detect_kind

__all__ = [
    "KINDS",
    "CaptionedImage",
    "Choice",
    "Collected",
    "Entry",
    "Images",
    "StoredBytes",
    "clean_caption",
    "collect",
    "detect_kind",
    "open_images",
    "safe_key",
]

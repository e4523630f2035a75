"""Parse the captions of a sample. This is the one place that decides what a text member may hold.

A text member is `<key>.json`, an object with `captions`, or `<key>.txt`, one caption. The reader, the inspection and the sources
all call this module, so they agree on which samples are good.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from runtime.errors import DataError


def parse_captions(text: bytes, text_format: str) -> list[str]:
    """Return the captions of one text member.

    Args:
        text: The member's bytes.
        text_format: `json` (an object whose `captions` is a string or a list of strings) or `txt` (one caption).

    Raises:
        DataError: The bytes do not decode, are not such an object, or hold no caption. The message is one reason without a key.
    """
    if text_format == "txt":
        return [_decode(text, "utf-8").strip()]
    return _captions_of(_parse_object(text))


def parse_texts(texts: Mapping[str, bytes]) -> tuple[list[str], str | None]:
    """Return the captions of a sample that may have several text members, and the image id that its json may state.

    `captions` of the json come first, as in a shard that Ligature wrote. Then comes the txt, then the json's `caption`, which
    img2dataset writes. A json that cannot be read leaves the txt in use.

    Args:
        texts: Bytes of the members, under `json` and `txt`.

    Returns:
        The captions, an empty list where there are none, and the image id or None.
    """
    record: dict[str, Any] = {}
    if "json" in texts:
        with suppress(DataError):
            record = _parse_object(texts["json"])
            return _captions_of(record), _image_id(record)
    captions: list[str] = []
    if "txt" in texts:
        with suppress(DataError):
            captions = parse_captions(texts["txt"], "txt")
    elif isinstance(record.get("caption"), str):
        captions = [record["caption"]]
    return captions, _image_id(record)


def parse_image_id(text: bytes) -> str | None:
    """Return the image id that a json member states, or None where it states none or cannot be read."""
    with suppress(DataError):
        return _image_id(_parse_object(text))
    return None


def _captions_of(record: dict[str, Any]) -> list[str]:
    captions = record.get("captions")
    if isinstance(captions, str):
        return [captions]  # taken for a list, it would be as many captions as it has letters
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise DataError("its captions cannot be read: `captions` is neither a string nor a list of strings")
    return captions


def _image_id(record: dict[str, Any]) -> str | None:
    image_id = record.get("image_id")
    try:
        return None if image_id is None else str(image_id)
    except RecursionError:  # a nest of lists that could just be parsed
        return None


def _parse_object(text: bytes) -> dict[str, Any]:
    # Strict: `json.loads` of bytes would let encoded surrogates pass, which no tokenizer takes.
    try:
        record = json.loads(_decode(text, json.detect_encoding(text)))
    except RecursionError:
        raise DataError("its captions cannot be read: the json is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"its captions cannot be read: the json is broken ({error})") from None
    if not isinstance(record, dict):
        raise DataError("its captions cannot be read: the json is not an object")
    return record


def _decode(text: bytes, encoding: str) -> str:
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"its captions cannot be read: they are not text ({error})") from None

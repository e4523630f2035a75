"""One sample has the same captions, or is bad for the same reason, wherever it is read."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.making.inspection import captions_of
from data_tools.shards.captions import parse_captions, parse_image_id, parse_texts
from data_tools.shards.reader import RawSample
from data_tools.sources import KINDS, Choice
from data_tools.sources.items import Dropped
from runtime.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CAPTIONS = st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=5) | VALUES
RECORDS = st.fixed_dictionaries({"captions": CAPTIONS}, optional={"image_id": VALUES, "caption": st.text(max_size=8)})
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le", "latin-1"])
JSON = st.builds(
    lambda value, encoding, plain: json.dumps(value, ensure_ascii=plain).encode(encoding, "surrogatepass"),
    RECORDS | VALUES,
    ENCODINGS.filter(lambda name: name != "latin-1"),
    st.booleans(),
)
DEEP = st.builds(
    lambda head, bracket, depth, tail: head + bracket * depth + tail,
    st.sampled_from([b"", b'{"captions": ', b'{"captions": ["a"], "image_id": ']),
    st.sampled_from([b"[", b'{"a":']),
    st.sampled_from([1, 3, 900, 3000, 100_000]),
    st.binary(max_size=4),
)
CUT = st.builds(lambda text, size: text[:size], JSON, st.integers(0, 30))
TEXTS = (
    st.tuples(JSON | DEEP | CUT | st.binary(max_size=30), st.just("json"))
    | st.tuples(st.binary(max_size=30) | st.builds(str.encode, st.text(max_size=20), ENCODINGS, st.just("ignore")), st.just("txt"))
)  # fmt: skip


def outcome(read) -> list[str] | str:
    try:
        return read()
    except DataError as error:
        return str(error)


def as_source(folder, texts: dict[str, bytes]):
    """The entry that a tar of one sample gives."""
    with tarfile.open(folder / "one.tar", "w") as tar:
        for extension, content in [("jpg", b"image"), *texts.items()]:
            member = tarfile.TarInfo(f"key.{extension}")
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    (entry,) = KINDS["webdataset"].read(folder / "one.tar", Choice(), Dropped())
    return entry


@given(TEXTS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reader_inspection_and_source_agree_on_any_sample(tmp_path, sample):
    text, text_format = sample
    read = outcome(lambda: RawSample("key", "0.tar", b"", text, text_format, 0).captions)
    assert read == outcome(lambda: captions_of(text, text_format, "key"))
    if isinstance(read, str):
        assert read.startswith("sample key: its captions cannot be read: ")
        # A source alone has somewhere else to look: the one `caption` that img2dataset writes.
        assert as_source(tmp_path, {text_format: text}).captions == single_caption(text, text_format)
    else:
        assert read and all(isinstance(caption, str) for caption in read)
        assert as_source(tmp_path, {text_format: text}).captions == read


def single_caption(text: bytes, text_format: str) -> list[str]:
    try:
        record = json.loads(text.decode(json.detect_encoding(text))) if text_format == "json" else None
    except (ValueError, RecursionError):
        record = None
    caption = record.get("caption") if isinstance(record, dict) else None
    return [caption] if isinstance(caption, str) else []


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.booleans())
def test_a_list_of_strings_is_taken_as_it_is(captions, plain):
    text = json.dumps({"captions": captions}, ensure_ascii=plain).encode()
    assert parse_captions(text, "json") == captions


@pytest.mark.parametrize(
    ("text", "text_format", "captions"),
    [
        (b'{"captions": "red dog"}', "json", ["red dog"]),
        (b'{"captions": ["red", "dog"]}', "json", ["red", "dog"]),
        (b'\xef\xbb\xbf{"captions": ["red"]}', "json", ["red"]),
        (" caf\u00e9 \n".encode(), "txt", ["caf\u00e9"]),
    ],
)
def test_valid_captions_are_read(text, text_format, captions):
    assert parse_captions(text, text_format) == captions
    assert parse_texts({text_format: text}) == (captions, None)


@pytest.mark.parametrize(
    ("text", "text_format", "reason"),
    [
        (b"caf\xe9", "txt", "they are not text"),
        (b'{"captions": "caf\xe9"}', "json", "they are not text"),
        (b'{"captions": "\xed\xa0\xbd"}', "json", "they are not text"),  # a surrogate, encoded
        (b'{"captions": [', "json", "the json is broken"),
        (b'{"captions": ' + b"[" * 100_000, "json", "nested too deeply"),
        (b'{"a":' * 100_000, "json", "nested too deeply"),
        (b'["red dog"]', "json", "the json is not an object"),
        (b"{}", "json", "neither a string nor a list of strings"),
        (b'{"captions": []}', "json", "neither a string nor a list of strings"),
        (b'{"captions": ["red", 1]}', "json", "neither a string nor a list of strings"),
        (b'{"captions": {"red": "dog"}}', "json", "neither a string nor a list of strings"),
        (b'{"captions": null}', "json", "neither a string nor a list of strings"),
    ],
)
def test_invalid_captions_have_one_reason_everywhere(text, text_format, reason):
    with pytest.raises(DataError, match=f"^its captions cannot be read: .*{reason}") as error:
        parse_captions(text, text_format)
    assert "\n" not in str(error.value)
    assert parse_texts({text_format: text}) == ([], None)


def test_a_source_takes_the_best_member_that_can_be_read():
    text, single = b" txt \n", b'{"caption": "one", "image_id": 7}'
    assert parse_texts({"json": b'{"captions": "json", "image_id": 7}', "txt": text}) == (["json"], "7")
    assert parse_texts({"json": single, "txt": text}) == (["txt"], "7")
    assert parse_texts({"json": single}) == (["one"], "7")
    assert parse_texts({"json": single, "txt": b"\xff"}) == ([], "7")
    assert parse_texts({"json": b"[" * 100_000, "txt": text}) == (["txt"], None)
    assert parse_texts({}) == ([], None)


@pytest.mark.parametrize("depth", [3, 400, 900, 990, 100_000])
def test_an_image_id_is_text_at_any_depth(depth):
    text = b'{"captions": ["a"], "image_id": ' + b"[" * depth + b"]" * depth + b"}"
    image_id = parse_image_id(text)
    assert image_id is None or image_id == "[" * depth + "]" * depth
    assert parse_texts({"json": text})[1] == image_id

"""Broken text files give a one-line error that names the line."""

from __future__ import annotations

import gzip
import json

from source_files import coco_json, raises_one_line, write_tokens

from data_tools.sources import collect, detect_kind
from runtime.errors import DataError


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path, images):
    path = write_tokens(tmp_path, "a.jpg#0\tone", "b.jpg#0\tcafé", encoding="latin-1")
    raises_one_line(DataError, r"captions.token, line 2: byte 0xe9", lambda: collect(path, images))
    path.write_bytes(b"\xef\xbb\xbf\xff" + b"a.jpg#0\tone\n")
    raises_one_line(DataError, "line 1: byte 0xff", lambda: collect(path, images, kind="flickr"))


def test_a_gzip_cut_short_gives_a_one_line_error(tmp_path, images):
    path = tmp_path / "captions.json.gz"
    path.write_bytes(gzip.compress(json.dumps(coco_json([(1, "a.jpg")], [(1, "x")])).encode())[:-12])
    raises_one_line(DataError, "broken gzip", lambda: collect(path, images, kind="coco"))
    raises_one_line(DataError, "broken gzip", lambda: detect_kind(path))

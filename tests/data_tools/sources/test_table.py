"""Tables of every format say the same, and an unclear column is named."""

from __future__ import annotations

import gzip

import pytest
from source_files import raises_one_line

from data_tools.sources import Choice, collect
from runtime.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'filepath,title\na.jpg,"one, two"\nb.jpg,three\na.jpg,"fo\nur"\n'),
        ("t.tsv", "caption\timage\none, two\ta.jpg\nthree\tb.jpg\nfo ur\ta.jpg\n"),
        (
            "t.txt",
            "\ufeffimage_name| comment_number| comment\r\na.jpg| 0| one, two\r\nb.jpg| 0| three\r\na.jpg| 1| fo ur\r\n",
        ),
        ("t.csv.gz", "Image;Text\na.jpg;one, two\nb.jpg;three\n\na.jpg;fo ur\n"),
    ],
)
def test_tables_of_every_format_give_the_same_items(tmp_path, images, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    collected = collect(path, images)
    assert collected.kind == "table"
    assert [(item.key, item.captions) for item in collected.items] == [("a", ["one, two", "fo ur"]), ("b", ["three"])]


def test_a_parquet_table_may_hold_strings_lists_and_image_ids(tmp_path, images):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"image": ["a.jpg", "b.jpg", "sub/c.jpg"], "text": [["one", "two"], None, ["three"]], "image_id": [1, 2, 1]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    collected = collect(tmp_path / "t.parquet", images)
    expected = [("a", "1", ["one", "two"]), ("c", "1", ["three"])]  # one picture under two names
    assert [(item.key, item.image_id, item.captions) for item in collected.items] == expected
    pq.write_table(pa.table({"image": ["a.jpg"], "text": ["abc"]}), tmp_path / "t.parquet")
    assert collect(tmp_path / "t.parquet", images).items[0].captions == ["abc"]
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    raises_one_line(DataError, "not a readable parquet", lambda: collect(tmp_path / "t.parquet", images))


def test_unclear_columns_are_named(tmp_path, images):
    path = tmp_path / "t.csv"
    path.write_text("bild,wort\na.jpg,one\n")
    raises_one_line(RecipeError, "columns bild, wort; .*--image_column", lambda: collect(path, images, kind="table"))
    choice = Choice(image_column="bild", caption_column="Wort")
    assert collect(path, images, kind="table", choice=choice).items[0].captions == ["one"]
    raises_one_line(
        RecipeError, "no column 'x'", lambda: collect(path, images, kind="table", choice=Choice(image_column="x"))
    )
    path.write_text("image,caption\na.jpg,one, two\n")
    raises_one_line(DataError, "line 2: 3 cells, the header has 2", lambda: collect(path, images))

"""A folder of pairs gives a caption a line."""

from __future__ import annotations

from data_tools.sources import collect


def test_a_folder_of_pairs_gives_a_caption_a_line(tmp_path):
    for name, text in {"x/1.jpg": "one\n\ntwo\n", "y/1.jpg": "three", "b.v1.png": "four", "alone.jpg": None}.items():
        path = tmp_path / "pairs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        if text is not None:
            path.with_suffix(".txt").write_text(text)
    collected = collect(tmp_path / "pairs")
    assert (
        collected.kind == "folder" and collected.dropped == {"images without a caption": 1} and collected.renamed == 3
    )
    assert {item.key: (item.captions, item.read()) for item in collected.items} == {
        "b_v1": (["four"], b"b.v1.png"), "x_1": (["one", "two"], b"x/1.jpg"), "y_1": (["three"], b"y/1.jpg"),
    }  # fmt: skip
    assert [line["source"] for line in collected.listed] == ["alone.jpg"]

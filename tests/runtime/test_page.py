"""The shell of HTML pages: a whole document that fetches nothing and shows foreign text as it is."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from runtime.errors import LigatureError
from runtime.page import escape, render_page, render_table, write_page

HOSTILE = """<script>alert("x")</script> & 'quoted'"""


class Document(HTMLParser):
    """Collects a document's tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + text


def test_a_page_is_one_whole_document():
    document = Document(render_page("mine: shards", ["<h1>mine</h1>", "<p>two</p>"], ".own { padding: 1px }"))
    assert [tag for tag, _ in document.tags] == ["html", "head", "meta", "meta", "title", "style", "body", "h1", "p"]
    assert document.tags[0][1] == {"lang": "en"} and document.tags[2][1] == {"charset": "utf-8"}
    assert document.texts["title"] == "mine: shards" and document.texts["h1"] == "mine"


def test_a_page_fetches_nothing():
    text = render_page("title", [])
    assert not re.search(r"src=|href=|url\(|@import|https?:", text)


def test_a_page_follows_dark_mode_and_narrow_screens():
    document = Document(render_page("title", [], ".own { padding: 1px }"))
    style = document.texts["style"]
    assert (
        "@media screen and (prefers-color-scheme: dark)" in style
        and "@media print" in style
        and "color-scheme: light dark" in style
    )
    assert "@media (max-width:" in style
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in document.tags
    assert style.index(".own { padding: 1px }") > style.index("@media (max-width:"), (
        "a page's own style has the last word"
    )
    assert style.count("{") == style.count("}")


def test_every_colour_of_the_light_scheme_that_is_used_is_defined():
    style = Document(render_page("title", [])).texts["style"]
    root = style[style.index(":root") : style.index("}")]
    assert set(re.findall(r"var\((--\w+)\)", style)) <= set(re.findall(r"(--\w+):", root))


def test_titles_and_tables_show_foreign_text_as_it_is():
    document = Document(render_page(HOSTILE, [render_table([(HOSTILE, HOSTILE), ("count", 3)])]))
    assert "script" not in [tag for tag, _ in document.tags]
    assert document.texts["title"] == HOSTILE
    assert document.texts["th"] == HOSTILE + "count" and document.texts["td"] == HOSTILE + "3"


def test_escaped_text_stays_inside_a_quoted_attribute():
    document = Document(f'<p title="{escape(HOSTILE)}">x</p>')
    assert document.tags == [("p", {"title": HOSTILE})]


def test_a_page_is_written_whole(tmp_path):
    write_page(tmp_path / "page.html", "title", ["<p>é</p>"])
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_page("title", ["<p>é</p>"])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(LigatureError, match="folder.html"):
        write_page(tmp_path / "folder.html", "title", [])

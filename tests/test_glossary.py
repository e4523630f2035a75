"""The glossary: every word once, and every file that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| (?!word |-)(.+?) \| (.+?) \| `(.+?)` \|")


def test_every_word_has_one_sentence_and_a_file_that_exists():
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")]
    entries = [match.groups() for line in rows if (match := ROW.fullmatch(line))]
    assert len(entries) == len([line for line in rows if not line.startswith("| word ")]) > 70
    words = [word.lower() for word, _, _ in entries]
    assert len(set(words)) == len(words)
    assert all(meaning.endswith(".") and meaning.count(". ") == 0 for _, meaning, _ in entries)
    assert [path for _, _, path in entries if not (ROOT / path).is_file()] == []


def test_the_readme_links_it():
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text()

"""No key of any recipe lacks a text, and docs/reference_keys.md has all of them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.reference import KINDS, command_groups, reference_page

PAGE = Path(__file__).parents[2] / "docs" / "reference_keys.md"


@pytest.mark.parametrize("command", KINDS)
def test_no_key_and_no_group_lacks_a_text(command):
    groups = command_groups(command)
    assert not [key.name for group in groups for key in group.keys if not key.about], (
        "write a docstring below the field"
    )
    assert not [group.name for group in groups if not group.about], "write a docstring below the field"


@pytest.mark.parametrize("command", KINDS)
def test_the_text_of_a_key_is_whole_sentences(command):
    texts = {key.name: key.about for group in command_groups(command) for key in group.keys}
    assert not [name for name, text in texts.items() if text and text[-1] not in ".)"]


def test_the_page_of_keys_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "a key or its text has changed: run `make keys`"


def test_cells_of_the_page_hold_no_bar_that_would_end_them():
    rows = [line for line in reference_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 300
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)

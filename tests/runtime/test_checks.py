"""What a user gives is refused in one line: numbers out of range, keys that are missing, places that cannot be written."""

from __future__ import annotations

import argparse
import os
from types import SimpleNamespace

import pytest

from runtime.checks import check_given, check_range, check_writable, output_file, output_folder
from runtime.errors import RecipeError


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), float("-inf")])
def test_a_number_out_of_its_range_is_named(value):
    with pytest.raises(RecipeError, match=rf"^group\.lr is {value}; it must be 0 or more$"):
        check_range(SimpleNamespace(lr=value), "group.", 0, None, "lr")


@pytest.mark.parametrize("value", [0, 1, 1e30, None])
def test_a_number_in_its_range_passes(value):
    check_range(SimpleNamespace(lr=value), "group.", 0, None, "lr")


def test_both_bounds_belong_to_the_range():
    for value in (0, 1):
        check_range(SimpleNamespace(share=value), "", 0, 1, "share")
    with pytest.raises(RecipeError, match=r"share is 1\.1; it must be 0 to 1"):
        check_range(SimpleNamespace(share=1.1), "", 0, 1, "share")


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("a", "a is not set; give --a (a or z)"),
        ("b", "b is not set; give --b"),
        ("ab", "a and b are not set; give --a and --b (a or z)"),
        ("abc", "a, b and c are not set; give --a, --b and --c (a or z)"),
    ],
)
def test_all_missing_keys_are_named(missing, line):
    values = SimpleNamespace(**{name: "" if name in missing else "x" for name in "abc"})
    with pytest.raises(RecipeError) as error:
        check_given(values, "a", "b", "c", instead="z")
    assert str(error.value) == line


def test_nothing_missing_passes():
    check_given(SimpleNamespace(a=SimpleNamespace(b="x")), "a.b")


def test_a_place_below_folders_that_are_still_to_be_made_can_be_written(tmp_path):
    for folder in (True, False):
        check_writable("out", tmp_path / "a" / "b", folder)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_place_is_below_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("out", "scores.json", folder=False)
    check_writable("runs", "runs", folder=True)


def test_a_file_in_the_way_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    check_writable("out", file, folder=False)  # it is replaced
    for folder, path in ((True, file), (True, file / "a" / "b"), (False, file / "a")):
        with pytest.raises(RecipeError, match=f"^out is {path}, but {file} is a file; name another"):
            check_writable("out", path, folder)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="which is a folder; name a file"):
        check_writable("out", tmp_path, folder=False)


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    # Root may write everywhere, so the answer is set here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RecipeError, match=f"but {tmp_path} may not be written"):
        check_writable("out", tmp_path / "scores.json", folder=False)


def test_a_name_too_long_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be written: File name too long"):
        check_writable("out", tmp_path / ("a" * 300), folder=True)


def test_options_that_name_an_output_are_checked(tmp_path):
    assert output_file(str(tmp_path / "a")) == output_folder(str(tmp_path / "a")) == tmp_path / "a"
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
        output_file(str(tmp_path))

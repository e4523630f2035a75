"""`ligature shapes` writes a drawn source or gives a one-line error."""

import json

import pytest

from launch.cli import main


def test_shapes_draws_the_requested_numbers(tmp_path, capsys):
    out = tmp_path / "drawn"
    assert main(["shapes", str(out), "--train", "3", "--validation", "2", "--test", "1", "--size", "32"]) == 0
    for split, count in {"train": 3, "validation": 2, "test": 1}.items():
        assert len(json.loads((out / f"captions_{split}.json").read_text())["images"]) == count
    assert "3 train, 2 validation, 1 test" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "least"), [("--train", 1), ("--size", 16)])
def test_a_number_too_small_gives_a_one_line_error_and_draws_nothing(option, least, tmp_path, capsys):
    assert main(["shapes", str(tmp_path / "drawn"), option, str(least - 1)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and option in error and f"{least} or more" in error
    assert not (tmp_path / "drawn").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert main(["shapes", str(tmp_path), "--train", "1"]) == 1
    assert "exists already" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "kept"

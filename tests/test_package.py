"""The distribution: its name and version, its typed packages, and a lock that fits what setup.py asks for."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ligature
from launch.cli import main
from runtime.run_folder import environment
from runtime.version import VERSION

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints.txt"


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
        runpy.run_path("setup.py")
    return given


def test_one_version_is_told_everywhere(settings, capsys):
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert ligature.__version__ == settings["version"] == environment()["versions"]["ligature"] == VERSION
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ligature {VERSION}\n"


def test_the_changelog_knows_the_version_or_what_comes_after_it():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_distributions_name_is_stated(settings):
    assert settings["name"] == "ligature-pretrain"
    assert "`ligature-pretrain`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_package_is_marked_as_typed_and_shipped(settings):
    tops = {name.partition(".")[0] for name in settings["packages"]}
    assert {"ligature", "runtime", "launch", "configs"} <= tops
    assert all((ROOT / top / "py.typed").is_file() for top in tops)
    assert "py.typed" in settings["package_data"][""]


def test_names_of_ligature_are_the_packages_own():
    import data_tools
    import pretrain

    assert ligature.load_model is pretrain.load_model and ligature.ShardStream is data_tools.ShardStream
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ligature.nothing  # noqa: B018


def pins(python: str) -> dict[str, str]:
    """Return the versions that the lock gives a Python on Linux."""
    lines = [line.strip() for line in LOCK.read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    place = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    fitting = [each for each in requirements if each.marker is None or each.marker.evaluate(place)]
    assert len({each.name for each in fitting}) == len(fitting), "two versions of one package"
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in fitting}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_the_lock_has_a_version_in_range_of_all_that_setup_asks_for(settings, python):
    locked = pins(python)
    asked = [*settings["install_requires"], *(line for extra in settings["extras_require"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in constraints.txt: run `make lock`"
        assert requirement.specifier.contains(locked[name]), f"{name} {locked[name]} is out of range: run `make lock`"


def test_the_lock_names_versions_alone():
    """No index, address or path: it installs from wherever pip looks."""
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"#.*|[a-z0-9-]+==[\w.+!-]+( ; [\w\s.'=!<>*()-]+)?", line), line
        assert "/" not in line and not line.startswith("-"), line

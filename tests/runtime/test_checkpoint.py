"""A checkpoint is complete or absent, verified before it is used, and nothing in it is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from runtime.checkpoint import (
    CheckpointFolder,
    checkpoint_hash,
    read_tensors,
    resolve_pointer,
    verify_checkpoint,
    write_checkpoint,
)
from runtime.errors import CheckpointError, LigatureError
from runtime.files import write_text

TENSORS = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7)},
    "queue": {"image": torch.ones(4, 2, dtype=torch.bfloat16)},
}


def write(folder: Path, value: int = 1) -> None:
    write_checkpoint(
        folder, TENSORS, {"state": {"step": value}}, lambda inside: write_text(inside / "note.txt", "hello")
    )


def replace_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "step-00000001")
    return tmp_path / "step-00000001"


def test_tensors_are_read_back_to_the_bit(checkpoint):
    verify_checkpoint(checkpoint)
    for name, group in TENSORS.items():
        read = read_tensors(checkpoint, name)
        assert read.keys() == group.keys()
        assert all(torch.equal(read[key], group[key]) and read[key].dtype == group[key].dtype for key in group)
    assert json.loads((checkpoint / "state.json").read_text()) == {"step": 1}
    assert (checkpoint / "note.txt").read_text() == "hello"


def test_transposed_and_shared_tensors_are_written_as_they_look(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    write_checkpoint(tmp_path / "c", {"model": {"turned": base.T, "row": base[1]}}, {}, lambda folder: None)
    read = read_tensors(tmp_path / "c", "model")
    assert torch.equal(read["turned"], base.T) and torch.equal(read["row"], base[1])


def test_the_manifest_names_every_file(checkpoint):
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert listed.keys() == {path.name for path in checkpoint.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "queue.safetensors", "state.json", "note.txt"])
@pytest.mark.parametrize("place", [0, -1], ids=["first byte", "last byte"])
def test_one_altered_byte_is_refused_by_the_files_name(checkpoint, name, place):
    replace_byte(checkpoint / name, place)
    message = refused(checkpoint)
    assert str(checkpoint / name) in message and "altered" in message


def test_a_file_cut_short_is_refused_by_its_name(checkpoint):
    with open(checkpoint / "model.safetensors", "r+b") as file:
        file.truncate(20)
    assert "model.safetensors is missing or cut short" in refused(checkpoint)


def test_a_missing_file_is_refused_by_its_name(checkpoint):
    (checkpoint / "state.json").unlink()
    assert "state.json is missing or cut short" in refused(checkpoint)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, "is not a complete checkpoint"),
        ('{"format": "lig', "not valid JSON"),
        ("[]", "is not a ligature-checkpoint"),
        ('{"format": "ligature-checkpoint", "version": 2, "files": {}}', "version 1"),
        ('{"format": "ligature-checkpoint", "version": 1}', "does not list its files"),
        ('{"format": "ligature-checkpoint", "version": 1, "files": {"a": 3}}', "does not list its files"),
    ],
    ids=["absent", "cut", "a list", "of another version", "without files", "with wrong files"],
)
def test_a_checkpoint_without_a_sound_manifest_is_refused(checkpoint, manifest, says):
    (checkpoint / "manifest.json").unlink()
    if manifest is not None:
        (checkpoint / "manifest.json").write_text(manifest)
    assert says in refused(checkpoint)


def test_equal_contents_have_equal_hashes_and_different_ones_differ(tmp_path):
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, value)
    assert checkpoint_hash(tmp_path / "a") == checkpoint_hash(tmp_path / "b") != checkpoint_hash(tmp_path / "c")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("place", ["beside", "in the place of the weights", "with a manifest that vouches for it"])
def test_a_pickle_in_the_folder_is_never_executed(checkpoint, tmp_path, place):
    bomb, went_off = pickle.dumps(Bomb(tmp_path / "went-off")), tmp_path / "went-off"
    if place == "beside":
        (checkpoint / "weights.pt").write_bytes(bomb)
        verify_checkpoint(checkpoint)
        read_tensors(checkpoint, "model")
    elif place == "in the place of the weights":
        (checkpoint / "model.safetensors").write_bytes(bomb)
        refused(checkpoint)
    else:

        def plant(folder: Path) -> None:
            (folder / "evil.safetensors").write_bytes(bomb)

        write_checkpoint(tmp_path / "other", {}, {}, plant)
        verify_checkpoint(tmp_path / "other")
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            read_tensors(tmp_path / "other", "evil")
    assert not went_off.exists()
    pickle.loads(bomb)
    assert went_off.exists(), "the bomb would have been seen"


def test_a_full_disk_gives_a_one_line_error_and_leaves_nothing(tmp_path):
    """A limit on the size of files makes writing fail as a full disk does, inside safetensors' own code as well."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1][1]))
    try:
        with pytest.raises(LigatureError, match="cannot write .* free some space") as error:
            write_checkpoint(tmp_path / "c", {"model": {"weight": torch.zeros(10_000)}}, {}, lambda folder: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_going_back_removes_what_came_later_but_not_the_only_one(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=3)
    for step in (3, 5):
        folder.commit(step, step == 5, lambda path, staging: write(path))
    assert folder.newest_valid(2) is None and folder.steps() == [3, 5], "nothing to go back to: nothing is thrown away"
    assert folder.newest_valid(4) == folder.path_of(3) and folder.steps() == [3]
    assert resolve_pointer(tmp_path, "latest") == folder.path_of(3) and resolve_pointer(tmp_path, "best") is None


def test_a_writer_killed_in_the_middle_leaves_no_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2)
    child = os.fork()
    if not child:
        write_checkpoint(folder.path_of(3), TENSORS, {}, lambda inside: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(tmp_path.iterdir()), "it was killed while it wrote"
    assert folder.steps() == [] and folder.newest_valid() is None
    folder.commit(3, False, lambda path, staging: write(path))
    assert folder.newest_valid() == folder.path_of(3)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "latest"}


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep_last=2)


def commit(folder: CheckpointFolder, *steps: int, best: int | None = None) -> None:
    for step in steps:
        folder.commit(step, step == best, lambda path, staging, step=step: write(path, step))


def test_latest_and_best_point_to_their_checkpoints(folder):
    commit(folder, 1, 2, 3, best=2)
    assert resolve_pointer(folder.folder, "latest") == folder.path_of(3)
    assert resolve_pointer(folder.folder, "best") == folder.path_of(2)


def test_a_run_without_checkpoints_has_none(folder):
    assert resolve_pointer(folder.folder, "latest") is None and folder.newest_valid() is None and folder.steps() == []


def test_the_newest_are_kept_and_the_best_beside_them(folder):
    commit(folder, 1, 2, 3, 4, 5, best=2)
    assert folder.steps() == [2, 4, 5]


def test_milestones_are_kept_for_good(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_last=1, milestone_every=4)
    commit(folder, 2, 4, 6, 8, 10, best=6)
    assert folder.steps() == [4, 6, 8, 10]
    shutil.rmtree(folder.path_of(10))
    commit(folder, 6)  # gone back: later ones are another future's, milestones too
    assert folder.steps() == [4, 6]


def test_a_better_one_lets_the_former_best_go(folder):
    commit(folder, 1, 2, 3, best=1)
    commit(folder, 4, 5, best=4)
    assert folder.steps() == [4, 5]


def test_a_broken_newest_is_skipped_with_a_reason(folder, capsys):
    commit(folder, 1, 2)
    replace_byte(folder.path_of(2) / "model.safetensors", -1)
    assert folder.newest_valid() == folder.path_of(1)
    message = capsys.readouterr().err
    assert str(folder.path_of(2) / "model.safetensors") in message and "altered" in message


def test_a_cut_manifest_is_skipped_too(folder, capsys):
    commit(folder, 1, 2)
    with open(folder.path_of(2) / "manifest.json", "r+b") as file:
        file.truncate(10)
    assert folder.newest_valid() == folder.path_of(1)
    assert "manifest.json" in capsys.readouterr().err


def test_a_broken_checkpoint_is_written_again_when_its_step_comes_back(folder):
    commit(folder, 1, 2)
    replace_byte(folder.path_of(2) / "model.safetensors", -1)
    commit(folder, 2)
    verify_checkpoint(folder.path_of(2))


def test_a_whole_checkpoint_is_not_written_twice(folder):
    commit(folder, 1)
    folder.commit(1, True, lambda path, staging: pytest.fail("written twice"))
    assert resolve_pointer(folder.folder, "best") == folder.path_of(1)


def test_broken_later_checkpoints_do_not_push_out_the_one_just_written(tmp_path):
    """Going on from step 1 past a broken step 4: step 2 is the newest there is."""
    folder = CheckpointFolder(tmp_path, keep_last=1)
    commit(folder, 1, 4, best=1)
    replace_byte(folder.path_of(4) / "state.json", 0)
    commit(folder, 2)
    assert folder.steps() == [1, 2]
    assert resolve_pointer(folder.folder, "latest") == folder.newest_valid() == folder.path_of(2)


def test_best_does_not_point_into_an_abandoned_future(folder):
    commit(folder, 1, 4, best=4)
    shutil.rmtree(folder.path_of(4))
    commit(folder, 2)
    assert resolve_pointer(folder.folder, "best") is None

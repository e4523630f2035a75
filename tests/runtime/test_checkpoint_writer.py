"""A checkpoint is written while training goes on; it holds the values at the moment of the copy, and its failure is reported."""

from __future__ import annotations

import threading

import pytest
import torch

from runtime.checkpoint import CheckpointFolder, read_tensors, write_checkpoint
from runtime.checkpoint_writer import CheckpointWriter, host_copies
from runtime.errors import Superseded


def test_copies_hold_the_values_at_the_moment_of_the_copy():
    weight, turned = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3).T
    copies = host_copies([("weight", weight), ("turned", turned)], keep=True)
    weight.zero_()
    assert torch.equal(copies["weight"], torch.ones(2, 3))
    assert copies["turned"].is_contiguous() and torch.equal(copies["turned"], turned)


def test_ranks_that_keep_no_copies_still_walk_all_tensors():
    walked = []
    assert host_copies(((walked.append(name) or name, torch.ones(1)) for name in "ab"), keep=False) == {}
    assert walked == ["a", "b"]


def test_training_goes_on_during_a_write_and_does_not_reach_into_it(tmp_path):
    """The write waits until the weights have moved on twice."""
    folder, weight, moved_on = CheckpointFolder(tmp_path, 2), torch.zeros(3), threading.Event()
    copies = host_copies([("w", weight)], keep=True)

    def write(path, staging) -> None:
        moved_on.wait()
        write_checkpoint(path, {"model": copies}, {}, lambda inside: None, staging)

    with CheckpointWriter() as writer:
        writer.start(lambda: folder.try_commit(1, False, write))
        for _ in range(2):
            weight += 1
            writer.check()
        assert folder.steps() == []
        moved_on.set()
        assert writer.finish()
    assert torch.equal(read_tensors(folder.path_of(1), "model")["w"], torch.zeros(3))


def test_one_write_at_a_time():
    gate = threading.Event()
    with CheckpointWriter() as writer:
        writer.start(lambda: gate.wait())
        with pytest.raises(AssertionError):
            writer.start(lambda: True)
        gate.set()
        assert writer.finish()
        writer.start(lambda: True)


def test_a_failed_write_is_reported_once_and_the_next_may_succeed():
    with CheckpointWriter() as writer:
        writer.start(lambda: False)
        assert not writer.finish()
        assert writer.finish(), "nothing is under way, nothing failed"
        writer.start(lambda: True)
        assert writer.finish()


def stop() -> bool:
    raise Superseded("taken over")


def test_an_error_that_ends_the_run_is_raised_on_the_training_thread():
    with pytest.raises(Superseded), CheckpointWriter() as writer:
        writer.start(stop)
        assert writer._thread is not None
        writer._thread.join()
        writer.check()
    with pytest.raises(Superseded), CheckpointWriter() as writer:
        writer.start(stop)


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_write(capsys):
    with pytest.raises(ZeroDivisionError), CheckpointWriter() as writer:
        writer.start(stop)
        raise ZeroDivisionError
    assert "the last checkpoint was not written: taken over" in capsys.readouterr().err


def test_ranks_without_anything_to_write():
    with CheckpointWriter() as writer:
        writer.start(None)
        assert writer.finish()

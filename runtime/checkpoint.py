"""Checkpoints: safetensors and JSON files under a manifest of their hashes.

A checkpoint is complete or absent, it is verified before use, and nothing in it is pickled.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import CheckpointError, LigatureError, Superseded
from runtime.files import committed_folder, read_json, sha256_of, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from runtime.lease import Lease

MANIFEST = "manifest.json"
FORMAT = "ligature-checkpoint"


def write_checkpoint(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    write_more: Callable[[Path], None],
    staging: Path | None = None,
) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
        folder: the checkpoint's folder; it must not exist yet.
        tensors: `<name>.safetensors` is written for each group of tensors.
        values: `<name>.json` is written for each value.
        write_more: called with the folder in preparation, it adds further files, such as the tokenizer and the recipe.
        staging: folder in which to prepare the checkpoint; the default is the parent of `folder`.

    Raises:
        LigatureError: the disk refuses a file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with committed_folder(folder, staging) as temporary:
        for name, group in tensors.items():
            try:
                save_file(
                    # safetensors refuses tensors that are not contiguous.
                    {key: tensor.detach().contiguous().cpu() for key, tensor in group.items()},
                    temporary / f"{name}.safetensors",
                )
            except SafetensorError as error:  # raised for a full disk too, and not an OSError
                raise LigatureError(
                    f"cannot write {folder}: {error}; free some space or choose another folder"
                ) from error
        for name, value in values.items():
            write_json(temporary / f"{name}.json", value)
        write_more(temporary)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
        }
        # Written last, because it lists every file beside it.
        write_json(temporary / MANIFEST, {"format": FORMAT, "version": 1, "files": files})


def verify_checkpoint(folder: Path) -> None:
    """Check the size and hash of every file against the manifest.

    Raises:
        CheckpointError: a file is missing, cut short or altered; the message names it.
    """
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        content = read_json(manifest)
    except LigatureError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != 1:
        raise CheckpointError(f"{manifest} is not a {FORMAT} of version 1")
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{manifest} was altered: it does not list its files; the checkpoint cannot be used"
        ) from None
    for name, (size, digest) in files.items():
        path = Path(folder) / name
        # The size comes first: it finds a cut file without reading it.
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path} is missing or cut short; the checkpoint cannot be used")
        if sha256_of(path) != digest:
            raise CheckpointError(f"{path} was altered: its hash is not the manifest's; the checkpoint cannot be used")


def checkpoint_hash(folder: Path) -> str:
    """Return the first 16 hex digits of the sha256 of a checkpoint's manifest, as a short name of its content."""
    return sha256_of(Path(folder) / MANIFEST)[:16]


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of `<name>.safetensors`. Call `verify_checkpoint` first.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {name}.safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from error


def _discard(path: Path, staging: Path) -> None:
    """Remove a checkpoint, or a pointer to one, by a rename into `staging`.

    Because of the rename, no reader sees half a checkpoint. A process that has lost its lease has lost `staging` too, so its
    rename fails and it removes nothing.
    """
    discarded = staging / f".{path.name}.discarded"
    # An earlier removal may have been killed half-way, and no folder can be renamed over its leftovers.
    shutil.rmtree(discarded, ignore_errors=True)
    os.rename(path, discarded)
    if discarded.is_dir():
        shutil.rmtree(discarded, ignore_errors=True)
    else:
        discarded.unlink()


def resolve_pointer(checkpoints: Path, name: str) -> Path | None:
    """Return the checkpoint that a pointer leads to, or None where there is no such pointer.

    Args:
        checkpoints: the folder `checkpoints/` of a run.
        name: the pointer's name, `latest` or `best`.
    """
    pointer = checkpoints / name
    return checkpoints / pointer.read_text().strip() if pointer.is_file() else None


class CheckpointFolder:
    """The folder `checkpoints/` of a run: `step-XXXXXXXX/` folders and the pointers `latest` and `best` (by validation)."""

    def __init__(self, folder: Path, keep_last: int, milestone_every: int | None = None) -> None:
        """Describe a folder, which need not exist yet.

        Args:
            folder: the run's `checkpoints/`.
            keep_last: how many of the newest checkpoints to keep.
            milestone_every: checkpoints of steps that are multiples of it are kept for good; None for no such steps.
        """
        self.folder, self.keep_last, self.milestone_every = Path(folder), keep_last, milestone_every
        self.lease: Lease | None = None
        """The lease of the run that commits here. It stops a process that has lost the run to a successor."""

    def path_of(self, step: int) -> Path:
        """Return the path of a step's checkpoint, which need not exist."""
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def newest_valid(self, until: int | None = None) -> Path | None:
        """Return the newest checkpoint that verifies, or None. The reason for skipping a newer one is printed to stderr.

        Args:
            until: last step to consider; None considers every step. With a step, the run goes back to the checkpoint that is
                returned, so checkpoints of steps after `until` are removed. If none verifies, nothing is removed.
        """
        later = [step for step in self.steps() if until is not None and step > until]
        for step in reversed(self.steps()):
            if step in later:
                continue
            try:
                verify_checkpoint(self.path_of(step))
            except CheckpointError as error:
                print(f"skipping a checkpoint: {error}", file=sys.stderr)
                continue
            # Only now, because if no earlier checkpoint verifies, the later ones are all that the run has.
            if later:
                with self._staging() as staging:
                    for late_step in later:
                        _discard(self.path_of(late_step), staging)
                    write_text(self.folder / "latest", self.path_of(step).name + "\n", staging)
                    # Names sort as their steps do. A best checkpoint of a later step is one of those just removed.
                    if (self._pointer_target("best") or "") > self.path_of(step).name:
                        _discard(self.folder / "best", staging)
            return self.path_of(step)
        return None

    def commit(self, step: int, best: bool, write: Callable[[Path, Path], None]) -> Path:
        """Write the checkpoint of a step, point `latest` to it, and remove the checkpoints that are no longer kept.

        A whole checkpoint that is already there is not written again. Later checkpoints are removed: this run has resumed
        from an earlier step, so it has left their history.

        Args:
            step: the step of the checkpoint.
            best: whether it is the best so far by validation, so that `best` points to it.
            write: called as `write(path, staging)`, it writes the checkpoint.

        Returns:
            The checkpoint's path.

        Raises:
            Superseded: the run's lease is lost. Nothing changes then.
        """
        path = self.path_of(step)
        with self._staging() as staging:
            if path.exists():
                try:
                    verify_checkpoint(path)
                except CheckpointError:
                    _discard(path, staging)
            if not path.exists():
                write(path, staging)
            # Pointers follow the checkpoint, so a crash in between leaves them at an older whole one.
            write_text(self.folder / "latest", path.name + "\n", staging)
            if best:
                write_text(self.folder / "best", path.name + "\n", staging)
            # A best checkpoint of a later step belongs to the history that this run has left.
            elif (self._pointer_target("best") or "") > path.name:
                _discard(self.folder / "best", staging)
            past = [other for other in self.steps() if other <= step]
            milestones = [other for other in past if self.milestone_every and other % self.milestone_every == 0]
            kept = {self.path_of(other).name for other in [*past[-self.keep_last :], *milestones]}
            kept.add(self._pointer_target("best") or "")
            # Older checkpoints leave last: until here a crash may still need them.
            for other in self.steps():
                if self.path_of(other).name not in kept:
                    _discard(self.path_of(other), staging)
        return path

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """Yield the folder in which commits are prepared: that of the lease, or else `checkpoints/` itself."""
        if self.lease:
            with self.lease.guarded() as work:
                yield work
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield self.folder

    def try_commit(self, step: int, best: bool, write: Callable[[Path, Path], None]) -> bool:
        """Commit a checkpoint as `commit` does, but survive a disk that is full, read-only or gone.

        On such a disk it prints a warning. The run goes on and tries again at its next interval, and older checkpoints stay.

        Returns:
            Whether the checkpoint was saved.

        Raises:
            Superseded: the run's lease is lost.
        """
        try:
            self.commit(step, best, write)
        # This is a LigatureError too, but no failure of the disk: the process must stop.
        except Superseded:
            raise
        except (LigatureError, OSError) as error:
            older = self._newest_name()
            if older:
                consequence = f"a restart would go on from {older}"
            elif self.folder.is_dir():
                consequence = "there is no older checkpoint"
            else:
                consequence = "older checkpoints are out of reach with it"
            print(
                f"ligature: WARNING: the checkpoint of step {step} is NOT saved: {error}. The run goes on and tries again at its "
                f"next interval; {consequence}",
                file=sys.stderr,
                flush=True,
            )
            return False
        return True

    def _newest_name(self) -> str | None:
        try:
            steps = self.steps()
        except OSError:
            return None
        return self.path_of(steps[-1]).name if steps else None

    def _pointer_target(self, name: str) -> str | None:
        path = resolve_pointer(self.folder, name)
        return path.name if path else None

"""Checkpoints: safetensors and JSON under a manifest of hashes; complete or absent, verified before use, nothing pickled."""

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
    """Commit a checkpoint: `<name>.safetensors` for each of `tensors`, `<name>.json` for each of `values`, and what
    `write_more(folder)` adds (tokenizer, recipe); then a manifest with every file's hash. Raises LigatureError where it cannot.
    `staging`: where to prepare it, else beside `folder`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with committed_folder(folder, staging) as temporary:
        for name, group in tensors.items():
            try:
                save_file(
                    {key: tensor.detach().contiguous().cpu() for key, tensor in group.items()},
                    temporary / f"{name}.safetensors",
                )
            except SafetensorError as error:  # a full disk among others; it is no OSError
                raise LigatureError(
                    f"cannot write {folder}: {error}; free some space or choose another folder"
                ) from error
        for name, value in values.items():
            write_json(temporary / f"{name}.json", value)
        write_more(temporary)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"format": FORMAT, "version": 1, "files": files})


def verify_checkpoint(folder: Path) -> None:
    """Check every file's size and hash against the manifest. Raises CheckpointError that names the file."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{folder} is no complete checkpoint: it has no {MANIFEST}")
    try:
        content = read_json(manifest)
    except LigatureError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != 1:
        raise CheckpointError(f"{manifest} is not a {FORMAT} of version 1")
    try:
        files = {name: (stated["bytes"], stated["sha256"]) for name, stated in content["files"].items()}
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(
            f"{manifest} was altered: it does not list its files; the checkpoint cannot be used"
        ) from None
    for name, (size, digest) in files.items():
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path} is missing or cut short; the checkpoint cannot be used")
        if sha256_of(path) != digest:
            raise CheckpointError(f"{path} was altered: its hash is not the manifest's; the checkpoint cannot be used")


def checkpoint_hash(folder: Path) -> str:
    """A short name of a checkpoint's content: the first 16 hex digits of its manifest's sha256."""
    return sha256_of(Path(folder) / MANIFEST)[:16]


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `<name>.safetensors`. Call `verify_checkpoint` first."""
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
    """Remove a checkpoint or a pointer to one. It leaves by a rename: nobody sees half of it, and no process does it that has
    lost its lease, and with it `staging`."""
    bin = staging / f".{path.name}.discarded"
    shutil.rmtree(bin, ignore_errors=True)
    os.rename(path, bin)
    if bin.is_dir():
        shutil.rmtree(bin, ignore_errors=True)
    else:
        bin.unlink()


def resolve_pointer(checkpoints: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` leads to, of a run's `checkpoints/`."""
    pointer = checkpoints / name
    return checkpoints / pointer.read_text().strip() if pointer.is_file() else None


class CheckpointFolder:
    """`checkpoints/` of a run: `step-XXXXXXXX/` folders, `latest`, and the `best` by validation."""

    def __init__(self, folder: Path, keep_last: int, milestone_every: int | None = None) -> None:
        """keep_last: newest ones to keep; milestone_every: those of its multiples are kept for good."""
        self.folder, self.keep_last, self.milestone_every = Path(folder), keep_last, milestone_every
        self.lease: Lease | None = None
        """Held by a run that commits here: it stops a process that another one has succeeded."""

    def path_of(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*") if path.name[5:].isdigit())

    def newest_valid(self, until: int | None = None) -> Path | None:
        """The newest checkpoint that verifies; says on stderr why it passed over a newer one. With `until`, one of that step or
        before: a run goes back to it, so later ones are removed, unless there is none to go back to."""
        later = [step for step in self.steps() if until is not None and step > until]
        for step in reversed(self.steps()):
            if step in later:
                continue
            try:
                verify_checkpoint(self.path_of(step))
            except CheckpointError as error:
                print(f"passing over a checkpoint: {error}", file=sys.stderr)
                continue
            if later:
                with self._staging() as staging:
                    for gone in later:
                        _discard(self.path_of(gone), staging)
                    write_text(self.folder / "latest", self.path_of(step).name + "\n", staging)
                    if (self._named("best") or "") > self.path_of(step).name:
                        _discard(self.folder / "best", staging)
            return self.path_of(step)
        return None

    def commit(self, step: int, best: bool, write: Callable[[Path, Path], None]) -> Path:
        """Write the checkpoint of `step` by `write(path, staging)` (unless it is there already and whole), point `latest` to it,
        and `best` where it is, then forget old ones, and later ones: those are of a future that a run going on from further
        back has left. Raises Superseded where the run's lease is lost: nothing changes then."""
        path = self.path_of(step)
        with self._staging() as staging:
            if path.exists():
                try:
                    verify_checkpoint(path)
                except CheckpointError:
                    _discard(path, staging)
            if not path.exists():
                write(path, staging)
            write_text(self.folder / "latest", path.name + "\n", staging)
            if best:
                write_text(self.folder / "best", path.name + "\n", staging)
            elif (self._named("best") or "") > path.name:
                _discard(self.folder / "best", staging)
            past = [old for old in self.steps() if old <= step]
            milestones = [old for old in past if self.milestone_every and old % self.milestone_every == 0]
            kept = {self.path_of(old).name for old in [*past[-self.keep_last :], *milestones]} | {self._named("best")}
            for old in self.steps():
                if self.path_of(old).name not in kept:
                    _discard(self.path_of(old), staging)
        return path

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """The folder that commits are prepared in: the lease's, if there is one."""
        if self.lease:
            with self.lease.guarded() as work:
                yield work
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield self.folder

    def try_commit(self, step: int, best: bool, write: Callable[[Path, Path], None]) -> bool:
        """`commit`, but a disk that is full, read-only or gone is said on stderr: the run goes on and tries again at its next
        interval, and the older checkpoints stay. -> whether the checkpoint stands."""
        try:
            self.commit(step, best, write)
        except Superseded:
            raise
        except (LigatureError, OSError) as error:
            older = self._newest_name()
            none = (
                "there is no older checkpoint" if self.folder.is_dir() else "older checkpoints are out of reach with it"
            )
            told = f"a restart would go on from {older}" if older else none
            print(
                f"ligature: WARNING: the checkpoint of step {step} is NOT saved: {error}. The run goes on and tries again at its "
                f"next interval; {told}",
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

    def _named(self, name: str) -> str | None:
        path = resolve_pointer(self.folder, name)
        return path.name if path else None

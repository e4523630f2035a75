"""Let a run die at a chosen call, as if it had been killed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def die_at_call(owner: Any, name: str, number: int, run: Callable[[], object]) -> None:
    """Call `run`, in which call `number` of `owner.name` dies; afterwards `owner.name` is the ordinary one again."""
    ordinary, calls = getattr(owner, name), []

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("killed on purpose")
        return ordinary(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        patch.setattr(owner, name, dying)
        run()

"""torch's counter of operations, with attention on a CPU, which torch takes apart in one release and counts as nothing in the next."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Two matrix products over all pairs of tokens. Shapes are (batch, heads, tokens, width of a head)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def attention_backward_flops(gradient: list[int], *shapes: list[int], **_: Any) -> int:
    """Four products. A fifth, which recomputes the scores, saves memory and is no part of the model's arithmetic."""
    return 2 * attention_flops(*shapes[:3])


ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
"""torch's counter knows the GPU's attention alone: from release to release it takes the CPU's apart or counts it as nothing."""


def flop_counter() -> FlopCounterMode:
    """Return a context that counts the operations done within it, silently."""
    return FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU)

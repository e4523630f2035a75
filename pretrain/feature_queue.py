"""The MoCo queue: teacher features of past batches, kept as more keys (He et al. 2020; ALBEF's `image_queue`, `text_queue`)."""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureQueue:
    """A ring of `length` image and text features with their image ids, for any length and batch size.

    Slots that were never filled are left out, not random. Every rank holds the same queue, filled in global sample order, so the
    number of ranks does not change it.
    """

    def __init__(self, length: int, feature_dim: int, device: torch.device | str = "cpu") -> None:
        self.image = torch.zeros(length, feature_dim, device=device)
        self.text = torch.zeros(length, feature_dim, device=device)
        self.image_ids = torch.full((length,), -1, dtype=torch.int64, device=device)
        self.pointer = 0
        self.filled = 0

    @property
    def length(self) -> int:
        """Slots of the ring."""
        return self.image.shape[0]

    def enqueue(self, image: Tensor, text: Tensor, image_ids: Tensor) -> None:
        """Overwrite the oldest entries with a batch, in global sample order.

        Args:
            image: (n, feature_dim) image features.
            text: (n, feature_dim) text features.
            image_ids: (n,) int64.
        """
        if self.length == 0:
            return
        image, text, image_ids = image[-self.length :], text[-self.length :], image_ids[-self.length :]
        slots = (self.pointer + torch.arange(len(image_ids), device=self.image.device)) % self.length
        self.image[slots], self.text[slots], self.image_ids[slots] = (
            image.to(self.image),
            text.to(self.text),
            image_ids.to(self.image_ids),
        )
        self.pointer = (self.pointer + len(image_ids)) % self.length
        self.filled = min(self.length, self.filled + len(image_ids))

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return image and text features (filled, feature_dim) and image ids (filled,) of the filled slots, in slot order."""
        # A ring fills from slot 0 on, so the filled slots are always the first.
        return self.image[: self.filled], self.text[: self.filled], self.image_ids[: self.filled]

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """Return image and text features of the last `count` pairs, or of all if there are fewer, the oldest first."""
        count = min(count, self.filled)
        slots = (self.pointer - count + torch.arange(count, device=self.image.device)) % max(1, self.length)
        return self.image[slots], self.text[slots]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint; `counters` holds pointer and fill."""
        counters = torch.tensor([self.pointer, self.filled], dtype=torch.int64)
        return {"image": self.image, "text": self.text, "image_ids": self.image_ids, "counters": counters}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned for a queue of the same length."""
        for name in ("image", "text", "image_ids"):
            getattr(self, name).copy_(state[name])
        self.pointer, self.filled = (int(value) for value in state["counters"])

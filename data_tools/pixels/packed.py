"""Images of uneven sizes as one flat tensor, and their views made on the device (`augment.where: device`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_tools.pixels.operations import apply_operation
from data_tools.pixels.views import View


@dataclass
class PackedImages:
    """A batch of decoded images, cut to what their views will show, and what was drawn for the views."""

    pixels: Tensor
    """(bytes,) uint8: the images one after another, each row by row, colours side by side."""
    sizes: list[tuple[int, int]]
    """Height and width of each image."""
    views: list[list[View]]
    """The views of each image, as many of every one."""
    image_size: int
    """Pixels a side of a view."""

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def of(cls, pixels: np.ndarray, views: list[View], image_size: int) -> PackedImages:
        """One image, (height, width, 3) uint8: only the part that its views show travels."""
        top, left = min(view.top for view in views), min(view.left for view in views)
        bottom = max(view.top + view.height for view in views)
        right = max(view.left + view.width for view in views)
        moved = [replace(view, top=view.top - top, left=view.left - left) for view in views]
        shown = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])).reshape(-1)
        return cls(shown, [(bottom - top, right - left)], [moved], image_size)

    @classmethod
    def join(cls, parts: Sequence[PackedImages]) -> PackedImages:
        """Several into one. In a loader's worker straight into the memory that it shares with the training process."""
        pixels = None
        if torch.utils.data.get_worker_info() is not None:
            pixels = torch.empty(sum(len(part.pixels) for part in parts), dtype=torch.uint8).share_memory_()
        return cls(
            torch.cat([part.pixels for part in parts], out=pixels),
            [size for part in parts for size in part.sizes],
            [views for part in parts for views in part.views],
            parts[0].image_size,
        )

    def pin_memory(self) -> PackedImages:
        """What torch's loader calls to copy it into memory that a GPU copies from while the host goes on."""
        return replace(self, pixels=self.pixels.pin_memory())

    def render(self, device: torch.device | str) -> Tensor:
        """The views, made on the device: (views, images, 3, size, size) uint8.

        As on the CPU (transforms.render), in float32 where the CPU's kernels calculate in integers.
        """
        pixels = self.pixels.to(device, non_blocking=True)
        side = self.image_size
        made = torch.empty(len(self.views[0]), len(self), 3, side, side, dtype=torch.uint8, device=device)
        ends = np.cumsum([height * width * 3 for height, width in self.sizes]).tolist()
        for number, ((height, width), views) in enumerate(zip(self.sizes, self.views, strict=True)):
            image = pixels[ends[number] - height * width * 3 : ends[number]].view(height, width, 3).permute(2, 0, 1)
            for which, view in enumerate(views):
                box = image[:, view.top : view.top + view.height, view.left : view.left + view.width]
                seen = _resize(box.float(), side)
                seen = seen.flip(-1) if view.mirrored else seen
                made[which, number] = seen
        self._operate(made)
        return made

    def _operate(self, made: Tensor) -> None:
        """RandAugment, in place: all views that an operation falls to at once, instead of one after another."""
        flat = made.flatten(0, 1)
        drawn = [views[which].operations for which in range(made.shape[0]) for views in self.views]
        for turn in range(len(drawn[0])):
            groups: dict[tuple[str, float], list[int]] = {}
            for row, operations in enumerate(drawn):
                groups.setdefault(operations[turn], []).append(row)
            for (name, strength), rows in groups.items():
                if name != "identity":
                    chosen = torch.tensor(rows, device=made.device)
                    flat[chosen] = apply_operation(flat[chosen], name, strength)


def _resize(pixels: Tensor, side: int) -> Tensor:
    """(3, height, width) float -> (3, side, side): antialiased bicubic, rows first, rounded and clipped after each pass as
    Pillow does: beside sharp edges the curve overshoots, and what one pass clips the other does not see."""
    for shape in ((pixels.shape[1], side), (side, side)):
        pixels = torch.nn.functional.interpolate(pixels[None], shape, mode="bicubic", antialias=True)[0]
        pixels = pixels.round_().clamp_(0, 255)
    return pixels


def render_views(images: Tensor | PackedImages, device: torch.device) -> Tensor:
    """A batch's images, wherever they are augmented -> (views, batch, 3, size, size) uint8 on the device."""
    return images.render(device) if isinstance(images, PackedImages) else images.to(device, non_blocking=True)


def join_images(images: list) -> Tensor | PackedImages | list:
    """The images of a batch's examples as one: views stacked, packed images joined, anything else left as a list."""
    if isinstance(images[0], Tensor):
        return torch.stack(images, dim=1)
    return PackedImages.join(images) if isinstance(images[0], PackedImages) else images

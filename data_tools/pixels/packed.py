"""Images of different sizes in one flat tensor, and their views made on the device (`augment.where: device`).

`views_vi` has the axes view and image first: (views, images, 3, size, size).
"""

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
    """A batch of decoded images, cut to what their views show, and the random draws of the views."""

    pixels: Tensor
    """(bytes,) uint8: one image after another, each row by row, with the colours of a pixel side by side."""
    sizes: list[tuple[int, int]]
    """Height and width of each image, in pixels."""
    views: list[list[View]]
    """The views of each image; every image has the same number of views."""
    image_size: int
    """Pixels a side of a view."""

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def of(cls, pixels: np.ndarray, views: list[View], image_size: int) -> PackedImages:
        """Pack one image, (height, width, 3) uint8. Only the part that its views show is kept."""
        top, left = min(view.top for view in views), min(view.left for view in views)
        bottom = max(view.top + view.height for view in views)
        right = max(view.left + view.width for view in views)
        shifted_views = [replace(view, top=view.top - top, left=view.left - left) for view in views]
        part = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])).reshape(-1)
        return cls(part, [(bottom - top, right - left)], [shifted_views], image_size)

    @classmethod
    def join(cls, parts: Sequence[PackedImages]) -> PackedImages:
        """Join several into one. A loader worker joins them in memory that it shares with the training process."""
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
        """Return a copy in memory that a GPU copies from while the host goes on. torch's loader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())

    def render(self, device: torch.device | str) -> Tensor:
        """Make the views on the device.

        The result equals that of `transforms.render` on the CPU except for rounding. The arithmetic here is float32, and there
        it is integer.

        Returns:
            (views, images, 3, size, size) uint8.
        """
        pixels = self.pixels.to(device, non_blocking=True)
        side = self.image_size
        views_vi = torch.empty(len(self.views[0]), len(self), 3, side, side, dtype=torch.uint8, device=device)
        ends = np.cumsum([height * width * 3 for height, width in self.sizes]).tolist()
        for number, ((height, width), views) in enumerate(zip(self.sizes, self.views, strict=True)):
            image = pixels[ends[number] - height * width * 3 : ends[number]].view(height, width, 3).permute(2, 0, 1)
            for view_number, view in enumerate(views):
                box = image[:, view.top : view.top + view.height, view.left : view.left + view.width]
                square = _resize(box.float(), side)
                views_vi[view_number, number] = square.flip(-1) if view.mirrored else square
        self._apply_operations(views_vi)
        return views_vi

    def _apply_operations(self, views_vi: Tensor) -> None:
        """Apply RandAugment in place. Views that share an operation are changed together, not one after another."""
        flat = views_vi.flatten(0, 1)
        # In the order of the rows of `flat`: the first view of every image, then the second, and so on.
        operations_by_row = [views[number].operations for number in range(views_vi.shape[0]) for views in self.views]
        for index in range(len(operations_by_row[0])):
            rows_by_operation: dict[tuple[str, float], list[int]] = {}
            for row, operations in enumerate(operations_by_row):
                rows_by_operation.setdefault(operations[index], []).append(row)
            for (name, strength), rows in rows_by_operation.items():
                if name != "identity":
                    selected = torch.tensor(rows, device=views_vi.device)
                    flat[selected] = apply_operation(flat[selected], name, strength)


def _resize(pixels: Tensor, side: int) -> Tensor:
    """Resize (3, height, width) float to (3, side, side) by antialiased bicubic, rows first.

    As in Pillow, values are rounded and clipped after each pass. Beside sharp edges the curve overshoots, so clipping only
    at the end would give other pixels.
    """
    for shape in ((pixels.shape[1], side), (side, side)):
        pixels = torch.nn.functional.interpolate(pixels[None], shape, mode="bicubic", antialias=True)[0]
        pixels = pixels.round_().clamp_(0, 255)
    return pixels


def render_views(images: Tensor | PackedImages, device: torch.device) -> Tensor:
    """Return the views of a batch on the device, (views, batch, 3, size, size) uint8, wherever they are augmented."""
    return images.render(device) if isinstance(images, PackedImages) else images.to(device, non_blocking=True)


def join_images(images: list) -> Tensor | PackedImages | list:
    """Join the images of a batch's examples: views are stacked, packed images joined, others left as a list."""
    if isinstance(images[0], Tensor):
        return torch.stack(images, dim=1)
    return PackedImages.join(images) if isinstance(images[0], PackedImages) else images

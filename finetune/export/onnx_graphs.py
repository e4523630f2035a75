"""Format `onnx`: graphs of the image tower, the text tower and matching, with dynamic batch and length.

- `image.onnx`: `pixels` (batch, 3, size, size) uint8 -> `features` (batch, width), unit norm, and `tokens` for matching.
- `text.onnx`: `input_ids`, `attention_mask` (batch, words) int64 -> `features`, and `states` for matching.
- `matching.onnx`: `tokens`, `states`, `attention_mask` -> `logits` (batch, 2): no match, match. An image or a text is encoded once, however
  many pairs it is in.

Pixels are normalised inside the graph; `preprocessing.json` says how an image becomes pixels, `tokenizer.json` how a text becomes ids.
onnxruntime must agree with the model before the export counts as done.

Tested in tests/finetune/export/test_onnx_graphs.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from finetune.export.probe import compare, probe
from finetune.export.source import Source
from finetune.heads.decomposed import Decomposed
from pretrain.model.alignment_model import AlignmentModel
from runtime.errors import CheckpointError
from runtime.files import write_json

OPSET = 20
"""Version of the operators; onnxruntime reads it from 1.17 on."""


class ImageTower(nn.Module):
    """Pixels to features, and to tokens where there is matching."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.network, self.features, self.matching = source.network, source.has_features, source.has_matching

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode (batch, 3, size, size) uint8."""
        if isinstance(self.network, Decomposed):
            return {"features": self.network.encode_image(pixels)}
        tokens = self.network.image_encoder(pixels)
        features = {"features": self.network.image_features(tokens)} if self.features else {}
        return features | ({"tokens": tokens} if self.matching else {})


class TextTower(nn.Module):
    """Token ids to features, and to states where there is matching."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.network, self.features, self.matching = source.network, source.has_features, source.has_matching

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Encode (batch, words) int64."""
        mask = attention_mask.bool()
        if isinstance(self.network, Decomposed):
            return {"features": self.network.encode_text(input_ids, mask)}
        states = self.network.text_encoder(input_ids, mask)
        features = {"features": self.network.text_features(states, mask)} if self.features else {}
        return features | ({"states": states} if self.matching else {})


class Matching(nn.Module):
    """Tokens of image i and states of text i to logits."""

    def __init__(self, network: AlignmentModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, states: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Judge (batch) pairs."""
        images = self.network.fusion_encoder.prepare_images(tokens)
        return {"logits": self.network.match(states, attention_mask.bool(), images)}


@torch.no_grad()
def write(source: Source, folder: Path) -> list[str]:
    """Fill `folder`; return what the format leaves out.

    Raises:
        CheckpointError: torch cannot make a graph of the architecture, or onnxruntime computes something else.
    """
    pixels, ids, mask = probe(source)
    batch, words = Dim("batch", min=1), Dim("words", min=1, max=source.config.text.positions)
    rows, text = {0: batch}, {0: batch, 1: words}
    towers: dict[str, tuple[nn.Module, tuple[Tensor, ...], tuple[Any, ...]]] = {
        "image": (ImageTower(source), (pixels,), (rows,))
    }
    towers["text"] = (TextTower(source), (ids, mask.long()), (text, text))
    if isinstance(source.network, AlignmentModel) and source.has_matching:
        tokens, states = source.network.image_encoder(pixels), source.network.text_encoder(ids, mask)
        towers["matching"] = (Matching(source.network), (tokens, states, mask.long()), (rows, text, text))
    for name, (tower, inputs, shapes) in towers.items():
        _write_graph(name, tower, inputs, shapes, folder)
    source.tokenizer.save(folder)
    write_json(folder / "preprocessing.json", preprocessing(source))
    return ["word head, codebook and temperature are not in the graphs"]


def preprocessing(source: Source) -> dict[str, Any]:
    """Return how an image becomes `pixels`."""
    size, crop = source.config.image.image_size, source.network.image_encoder.crop
    return {
        "input": "pixels",
        "layout": "batch, colour (red, green, blue), row, column",
        "dtype": "uint8",
        "normalised": "inside the graph",
        "orientation": "as EXIF says; transparent parts on white",
        "resample": f"{source.network.image_encoder.resample}, antialiased as Pillow does",
        "resize": {"width": size, "height": size} if crop is None else {"shorter_side": round(size / crop)},
        "centre_crop": None if crop is None else {"width": size, "height": size},
        "caption_tokens": source.tokenizer.caption_tokens,
    }


def _write_graph(
    name: str, tower: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...], folder: Path
) -> None:
    """Write `<name>.onnx`, and compare what onnxruntime makes of it with the tower's own outputs, for one row and for two."""
    import onnxruntime

    names = list(tower.forward.__annotations__)[:-1]
    outputs = tower(*inputs)
    bytes_ = sum(parameter.nbytes for parameter in tower.parameters())
    path = folder / f"{name}.onnx"
    try:
        with _quiet():
            torch.onnx.export(
                tower.eval(),
                inputs,
                path,
                input_names=names,
                output_names=list(outputs),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                external_data=bytes_ > 1 << 30,  # one file holds at most 2 GiB
            )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exporter and the runtime raise many kinds
        raise CheckpointError(
            f"torch cannot write the {name} tower as ONNX ({' '.join(str(error).split())[:200]}); use another format"
        ) from error
    for rows in (1, 2):
        some = [each[:rows] for each in inputs]
        actual = session.run(list(outputs), {key: each.numpy() for key, each in zip(names, some, strict=True)})
        for (key, expected), array in zip(tower(*some).items(), actual, strict=True):
            compare(expected, torch.from_numpy(array), "onnxruntime", f"{name} {key}")


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's progress lines and warnings from the terminal."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("torch.onnx").setLevel(level)

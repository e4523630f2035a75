"""Write a dataset of drawn scenes as a source that `ligature shard` reads."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

from data_tools.shapes.drawing import draw
from data_tools.shapes.scenes import Scene, World, held_out, scenes
from data_tools.shapes.sentences import describe
from runtime.errors import DataError
from runtime.files import committed_folder, write_json
from runtime.progress import progress


def _save(folder: Path, size: int, item: tuple[str, Scene, int]) -> None:
    file_name, scene, seed = item
    draw(scene, size, seed).save(folder / file_name)


def write_source(
    folder: Path,
    counts: dict[str, int],
    size: int = 64,
    seed: int = 0,
    workers: int = 1,
    world: World | None = None,
) -> None:
    """Draw a dataset: `images/*.png`, COCO's `captions_<split>.json` for each split, and `scenes.jsonl` with the truth.

    A line of `scenes.jsonl` holds an image's id, file name, split and scene, whether its combination is held out, and the
    facts that its captions state. The folder appears when it is complete.

    Args:
        folder: Folder to make.
        counts: Images of each split.
        size: Pixels a side.
        seed: Decides the scenes, drawings and captions.
        workers: Processes that draw. The files do not depend on it.
        world: What the scenes are drawn from; None: every attribute.

    Raises:
        DataError: The folder exists.
        ValueError: A split is unknown, or the world does not hold that many scenes of it.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it or choose another folder")
    with committed_folder(folder) as temporary:
        (temporary / "images").mkdir()
        drawings, lines = list[tuple[str, Scene, int]](), list[str]()
        for split, count in counts.items():
            images, annotations = [], []
            for index, scene in enumerate(scenes(split, count, seed, world)):
                identifier, file_name = len(drawings), f"{split}_{index:06d}.png"
                texts = describe(scene, seed)
                drawings.append((file_name, scene, seed))
                image = {"id": identifier, "file_name": file_name}
                images.append(image | {"width": size, "height": size})
                annotations += [
                    {"id": 5 * identifier + number, "image_id": identifier, "caption": caption.text}
                    for number, caption in enumerate(texts)
                ]
                truth = image | {"split": split, "held_out": held_out(scene)}
                truth |= {"scene": asdict(scene), "relation": scene.relation}
                lines.append(json.dumps(truth | {"captions": [asdict(caption) for caption in texts]}) + "\n")
            write_json(temporary / f"captions_{split}.json", {"images": images, "annotations": annotations})
        (temporary / "scenes.jsonl").write_text("".join(lines), encoding="utf-8")
        # Spawned, not forked: the caller may hold threads, and a fork would copy their locks.
        processes = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext()
        with processes as pool, progress("drawing", len(drawings), "images") as bar:
            save = partial(_save, temporary / "images", size)
            for _ in pool.imap_unordered(save, drawings, 64) if pool else map(save, drawings):
                bar.advance()

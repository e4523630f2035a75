"""The model card of an export: `card.md`, filled from the run, the checkpoint and the score records beside them.

A fact that is not there is called unknown. Absolute paths of the recipe are cut to their last name, since cards are published.

Tested in tests/finetune/export/test_card.py.
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

import yaml

from finetune.export.formats import FORMATS
from finetune.export.source import Source
from retrieval.records import read_record, table
from runtime.errors import LigatureError
from runtime.files import read_json, write_text

TEMPLATE = Path(__file__).with_name("card.md")
UNKNOWN = "unknown"
PACKAGES = ("ligature", "torch", "timm")
"""Packages whose versions the card names."""


def write_card(folder: Path, source: Source, kind: str, notes: list[str]) -> None:
    """Write README.md.

    Args:
        folder: The export's folder.
        source: What is exported.
        kind: The format, a name in `FORMATS`.
        notes: What the format leaves out or changes.
    """
    form, run = FORMATS[kind], run_of(source)
    config = source.config
    tags = ["ligature", "image-text-retrieval", *form.tags]
    fusion = f"a fusion encoder of {config.fusion.layers} layers ({config.fusion.kind})" if source.has_matching else ""
    values = {
        "library": form.library,
        "pipeline": form.pipeline,
        "tags": "\n".join(f"- {tag}" for tag in tags),
        "title": run.name,
        "summary": f"An image–text model made with Ligature, {source.training}, with a {source.head} head: image encoder "
        f"`{config.image.architecture}` at {config.image.image_size} px, text encoder of {config.text.layers} layers of width "
        f"{config.text.width}{', and ' + fusion if fusion else ''}. Images and texts are compared by the cosine of their features.",
        "load": form.load,
        "inputs": form.inputs,
        "facts": "\n".join(f"| {name} | {value} |" for name, value in facts(source, run).items()),
        "recipe": _recipe(source, run) or "# unknown: the checkpoint has no config.yaml",
        "scores": scores(source, run),
        "caveats": "\n".join(f"- {line}" for line in [*notes, *caveats(source)]),
    }
    write_text(folder / "README.md", Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values))


def run_of(source: Source) -> Path:
    """Return the run's folder; of a checkpoint that lies in no run, the checkpoint's own."""
    home = source.folder.resolve()
    return home.parent.parent if home.parent.name == "checkpoints" else home


def facts(source: Source, run: Path) -> dict[str, str]:
    """Return what is known of the training."""
    state = _read(source.folder / "state.json")
    stream = state.get("stream", {})
    environment = _read(run / "environment.json")
    versions = environment.get("versions", {})
    recipe = yaml.safe_load(_recipe(source, run)) or {}
    weights = {side: recipe.get("model", {}).get(side, {}).get("weights") for side in ("image", "text")}
    started = recipe.get("checkpoint") or ", ".join(
        f"{side}: {'random weights' if name == 'none' else name}" for side, name in weights.items() if name
    )
    return {
        "training": source.training,
        "training data": recipe.get("data", {}).get("train") or UNKNOWN,
        "fingerprint of the training data": stream.get("fingerprint", UNKNOWN),
        "samples seen": f"{stream['samples']:,} in {state['step']:,} steps" if stream else UNKNOWN,
        "started from": started or UNKNOWN,
        "checkpoint": source.hash,
        "code": f"commit {environment['commit']}, " + ", ".join(f"{name} {versions[name]}" for name in PACKAGES)
        if environment
        else UNKNOWN,
    }


def scores(source: Source, run: Path) -> str:
    """Return the tables of the score records of this checkpoint in the run's folder and the one above it."""
    records = []
    for path in sorted({*run.glob("*.json"), *run.parent.glob("*.json")}):
        try:
            record = read_record(path)
        except LigatureError:
            continue  # another JSON file
        if record["checkpoint"] == source.hash:
            records.append(record)
    return table(records) if records else "No score record of this checkpoint lies beside its run."


def caveats(source: Source) -> list[str]:
    """Return what a reader should know before relying on the model."""
    longest, size = source.tokenizer.caption_tokens, source.config.image.image_size
    lines = [
        f"Captions are cut to {longest} tokens, and images are read at {size} px.",
        "Scores hold for data like the named ones. Nobody has examined this model for bias or for use on people.",
        "The licence of the weights is the owner's to state; the training data and starting weights above may bind it.",
    ]
    if source.description.get("fusion_tuned") is False and source.has_matching:
        lines.insert(0, "Fine-tuning left the fusion encoder out, so matching no longer fits the encoders.")
    if not source.has_features:
        lines.insert(0, "Texts have no features of their own; the model only judges pairs.")
    return lines


def _recipe(source: Source, run: Path) -> str:
    for path in (source.folder / "config.yaml", run / "config.yaml"):
        if path.is_file():
            return yaml.safe_dump(
                _without_places(yaml.safe_load(path.read_text(encoding="utf-8"))), sort_keys=False
            ).strip()
    return ""


def _without_places(value: Any) -> Any:
    """Return the same recipe with absolute paths cut to their last name."""
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except LigatureError:
        return {}

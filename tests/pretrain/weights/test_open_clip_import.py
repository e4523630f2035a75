"""Models in open_clip's format become checkpoints of ours with open_clip's own features and logits, or are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_text_models import CAPTIONS, FAMILIES, POSITIONS, VOCABULARY, write_family, write_tokenizer

from launch.cli import main
from pretrain import load_model

open_clip = pytest.importorskip("open_clip")

VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": POSITIONS, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}


def timm(name: str, pool: str, projection: str | None) -> dict[str, Any]:
    return {"image_size": 160, "timm_model_name": name, "timm_pool": pool, "timm_proj": projection}


MODELS: dict[str, tuple[dict[str, Any], str]] = {  # model_cfg, and whose special tokens the tokenizer has
    "its own ViT": ({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}, "CLIP"),
    "its own ViT, quick_gelu": ({"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT}, "CLIP"),
    "its own ViT, other norms and widths": (
        {"embed_dim": 24, "custom_text": True, "vision_cfg": VIT | {"mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}, "text_cfg": TEXT | {"mlp_ratio": 3.0}},
        "CLIP",
    ),
    "timm ViT, its classifier projects": ({"embed_dim": 24, "vision_cfg": timm("test_vit", "token", None), "text_cfg": TEXT, "custom_text": True}, "CLIP"),
    "timm SigLIP": ({"embed_dim": 96, "init_logit_bias": -10, "custom_text": True, "vision_cfg": timm("test_vit3", "map", "none"), "text_cfg": SIGLIP_TEXT}, "SigLIP"),
    "timm SigLIP 2": ({"embed_dim": 96, "init_logit_bias": -10, "custom_text": True, "vision_cfg": timm("test_vit3", "map", "none"), "text_cfg": SIGLIP_TEXT | {"act_kwargs": {"approximate": "tanh"}}}, "SigLIP"),
    "timm ConvNeXt": ({"embed_dim": 24, "vision_cfg": timm("test_convnext", "", "linear"), "text_cfg": TEXT}, "CLIP"),
    "timm ResNet": ({"embed_dim": 24, "vision_cfg": timm("test_resnet", "avg", "linear"), "text_cfg": TEXT}, "CLIP"),
    "a RoBERTa of transformers": ({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": {"hf_model_name": "roberta", "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}}, "RoBERTa"),
    "an XLM-R of transformers, its class token": ({"embed_dim": 24, "vision_cfg": VIT, "text_cfg": {"hf_model_name": "xlm-roberta", "hf_proj_type": "linear", "hf_pooler_type": "cls_last_hidden_state_pooler"}}, "XLM-R"),
}  # fmt: skip


def write(name: str, folder: Path, binary: bool = False) -> torch.nn.Module:
    """Write a random model in open_clip's format, as its `save_for_hf` does, and return open_clip's own."""
    config, special = MODELS[name]
    config = json.loads(json.dumps(config))
    text = config["text_cfg"]
    if "hf_model_name" in text:
        text["hf_model_name"] = str(write_family(special, folder / "text"))
        text["hf_model_pretrained"] = False
    torch.manual_seed(2)
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    apart = config.get("custom_text") or "hf_model_name" in text
    model = (open_clip.CustomTextCLIP if apart else open_clip.CLIP)(**arguments).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim:
                tensor.add_(0.1 * torch.rand_like(tensor))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PIXELS}))
    if binary:
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
    write_tokenizer(FAMILIES[special], folder)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_and_logits_are_open_clips(name, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    theirs = write(name, folder, binary=name == "its own ViT")
    assert main(["import", "open_clip", str(folder), str(tmp_path / "ours"), "--caption-tokens", str(POSITIONS)]) == 0
    ours = load_model(tmp_path / "ours")
    side = MODELS[name][0]["vision_cfg"]["image_size"]
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(PIXELS[part])[:, None, None] * 255 for part in ("mean", "std"))
    # What open_clip's tokenizers do: pad to the context with 0, or with the padding token of the library's tokenizer.
    ids, mask = ours.tokenizer(CAPTIONS)
    words = ids.masked_fill(~mask, 0 if MODELS[name][1] == "CLIP" else ours.tokenizer.pad)
    words = torch.nn.functional.pad(
        words, (0, POSITIONS - ids.shape[1]), value=0 if MODELS[name][1] == "CLIP" else ours.tokenizer.pad
    )
    image = theirs.encode_image((images.float() - mean) / std, normalize=True)
    text = theirs.encode_text(words, normalize=True)
    torch.testing.assert_close(ours.encode_image(images), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_text(CAPTIONS), text, atol=1e-5, rtol=0)
    assert (text[0] - text[1]).abs().max() > 0.001
    logits = theirs.logit_scale.exp() * image @ text.T
    found = ours.encode_image(images) @ ours.encode_text(CAPTIONS).T / ours.network.temperature()
    torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-5)
    assert ours.transform.crop == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multimodal_cfg": {}}, "a CoCa"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 32}}, "CLIP's ResNet"),
        ({"vision_cfg": VIT | {"attentional_pool": True}}, "vision_cfg.attentional_pool True"),
        ({"vision_cfg": VIT | {"pool_type": "avg"}}, "vision_cfg.pool_type avg"),
        ({"vision_cfg": VIT | {"image_size": [32, 48]}}, r"images of \[32, 48\] px"),
        ({"vision_cfg": timm("test_vit", "abs_attn", "")}, "timm_pool abs_attn"),
        ({"vision_cfg": timm("test_vit", "avg", "mlp")}, "timm_proj mlp"),
        ({"text_cfg": TEXT | {"no_causal_mask": True}}, "no_causal_mask True and pool_type argmax"),
        ({"text_cfg": TEXT | {"embed_cls": True}}, "text_cfg.embed_cls True"),
        ({"text_cfg": {"hf_model_name": "nobody/nothing", "hf_pooler_type": "cls_pooler"}}, "hf_pooler_type cls_pooler"),
        ({"text_cfg": {"hf_model_name": "nobody/nothing"}}, "without network, give a folder"),
        ({"vision_cfg": VIT | {"layers": 3}}, r"the image tower lacks encoder.layers.2\S+"),
        ({"vision_cfg": VIT | {"layers": 1}}, r"the image tower has no place for encoder.layers.1\S+"),
        ({"embed_dim": 25}, r"image projection's weight is \(24, 32\), by its configuration it has \(25, 32\)"),
    ],
)  # fmt: skip
def test_what_has_no_place_here_is_refused_by_name(change, message, tmp_path, capsys):
    folder = tmp_path / "published"
    folder.mkdir()
    write("its own ViT", folder)
    file = folder / "open_clip_config.json"
    described = json.loads(file.read_text())
    described["model_cfg"] |= change
    file.write_text(json.dumps(described))
    refuse(capsys, folder, tmp_path / "ours", message)


def refuse(capsys, folder: Path, out: Path, message: str) -> None:
    capsys.readouterr()
    assert main(["import", "open_clip", str(folder), str(out)]) != 0
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and not out.exists()
    assert re.search(message, error), error


def test_folders_that_are_not_whole_are_refused(tmp_path, capsys):
    refuse(capsys, tmp_path, tmp_path / "ours", "holds no open_clip_config.json")
    write("its own ViT", tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    refuse(capsys, tmp_path, tmp_path / "ours", "holds no weights")
    (tmp_path / "open_clip_model.safetensors").write_text("text")
    refuse(capsys, tmp_path, tmp_path / "ours", "cannot be read")


def test_clips_own_tokenizer_gives_open_clips_tokens(tmp_path):
    """The published vocabulary of CLIP, which open_clip carries, as `transformers` saves it."""
    from data_tools.tokenizer import load_tokenizer

    simple = open_clip.tokenizer.SimpleTokenizer()
    merges = [" ".join(pair) for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    ends = {
        "<start_of_text>": "<|startoftext|>",
        "<end_of_text>": "<|endoftext|>",
    }  # open_clip's names, and the published ones
    vocabulary = {ends.get(token, token): number for token, number in simple.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    captions = ["A dog, running on the beach.", "two  People's hats (red) & 3 cats!", "Ein großes Haus", "x" * 300]
    ids, mask = load_tokenizer(tmp_path, 77)(captions)
    expected = simple(captions)
    for row, keep, other in zip(ids, mask, expected, strict=True):
        assert torch.equal(row[keep], other[: keep.sum()])

"""Importing ALBEF's checkpoints: other sizes, other resolutions, the files that are refused; and what comes out is a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig

from launch.cli import main
from pretrain import load_model
from pretrain.config import PretrainRecipe
from pretrain.model.image_encoder import interpolate_positions
from pretrain.task import PretrainTask
from pretrain.weights.albef import PUBLISHED, Heads, build_model, import_albef, read_albef
from pretrain.weights.load import find_checkpoint
from pretrain.weights.starting import load_starting_weights
from runtime.checkpoint import read_tensors
from runtime.errors import CheckpointError
from runtime.ranks import Ranks
from runtime.recipe import build_config

HEADS = Heads(image=1, text=2)
"""Those of `published`."""


def published(
    folder: Path, text: int = 128, vision: int = 64, layers=(3, 1), blocks: int = 2, words: int = 24, **more
) -> Path:
    """A checkpoint in ALBEF's layout with random weights, of sizes unlike the fixture's (heads of 64, 3 + 1 layers)."""
    generator = torch.Generator().manual_seed(0)

    def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight": torch.randn(out, into, generator=generator) * 0.05,
            f"{name}.bias": torch.randn(out, generator=generator) * 0.05,
        }

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.rand(width, generator=generator) + 0.5, f"{name}.bias": torch.zeros(width)}

    weights: dict[str, Tensor] = {}
    for suffix in ("", "_m"):
        image, bert = f"visual_encoder{suffix}", f"text_encoder{suffix}.bert"
        weights[f"{image}.cls_token"] = torch.randn(1, 1, vision, generator=generator)
        weights[f"{image}.pos_embed"] = torch.randn(1, 5, vision, generator=generator)
        weights[f"{image}.patch_embed.proj.weight"] = torch.randn(vision, 3, 16, 16, generator=generator) * 0.05
        weights[f"{image}.patch_embed.proj.bias"] = torch.zeros(vision)
        for block in range(blocks):
            home = f"{image}.blocks.{block}"
            weights |= norm(f"{home}.norm1", vision) | norm(f"{home}.norm2", vision)
            weights |= linear(f"{home}.attn.qkv", 3 * vision, vision) | linear(f"{home}.attn.proj", vision, vision)
            weights |= linear(f"{home}.mlp.fc1", 4 * vision, vision) | linear(f"{home}.mlp.fc2", vision, 4 * vision)
        weights |= norm(f"{image}.norm", vision)
        for name, rows in (("word", words), ("position", 40), ("token_type", 2)):
            weights[f"{bert}.embeddings.{name}_embeddings.weight"] = torch.randn(rows, text, generator=generator)
        weights |= norm(f"{bert}.embeddings.LayerNorm", text)
        weights[f"{bert}.embeddings.position_ids"] = torch.arange(40)[None]
        for number in range(sum(layers)):
            home = f"{bert}.encoder.layer.{number}"
            for attention, into in [("attention", text)] + [("crossattention", vision)] * (number >= layers[0]):
                weights |= linear(f"{home}.{attention}.self.query", text, text)
                weights |= linear(f"{home}.{attention}.self.key", text, into)
                weights |= linear(f"{home}.{attention}.self.value", text, into)
                weights |= linear(f"{home}.{attention}.output.dense", text, text)
                weights |= norm(f"{home}.{attention}.output.LayerNorm", text)
            weights |= linear(f"{home}.intermediate.dense", 3 * text, text)
            weights |= linear(f"{home}.output.dense", text, 3 * text) | norm(f"{home}.output.LayerNorm", text)
        head = f"text_encoder{suffix}.cls.predictions"
        weights |= linear(f"{head}.transform.dense", text, text) | norm(f"{head}.transform.LayerNorm", text)
        weights[f"{head}.bias"] = weights[f"{head}.decoder.bias"] = torch.zeros(words)
        weights[f"{head}.decoder.weight"] = weights[f"{bert}.embeddings.word_embeddings.weight"]
        weights |= linear(f"vision_proj{suffix}", 20, vision) | linear(f"text_proj{suffix}", 20, text)
    weights |= linear("itm_head", 2, text)
    weights["temp"] = torch.tensor(0.031)
    weights["image_queue"], weights["text_queue"] = (
        functional.normalize(torch.randn(20, 12, generator=generator), dim=0) for _ in range(2)
    )
    weights["queue_ptr"] = torch.tensor([6])
    folder.mkdir(exist_ok=True)
    torch.save({"model": weights | more, "epoch": 3}, folder / "ALBEF.pth")
    tiny.tokenizer().save(folder)
    return folder / "ALBEF.pth"


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("albef")
    import_albef(published(folder), folder / "out", str(folder), caption_tokens=tiny.CAPTION_WORDS, heads=HEADS)
    return folder / "out"


def test_the_sizes_are_read_from_the_tensors(imported):
    config = load_model(imported).network.config
    assert (config.image.image_size, config.image.width, config.image.depth, config.image.heads) == (32, 64, 2, 1)
    assert (config.text.width, config.text.layers, config.text.heads, config.text.feed_forward) == (128, 3, 2, 384)
    assert (config.fusion.layers, config.feature_dim, config.text.positions, config.codewords) == (1, 20, 40, 0)


def test_the_import_encodes_matches_and_holds_teacher_and_queue(imported):
    model = load_model(imported)
    torch.testing.assert_close(model.network.temperature(), torch.tensor([0.031]))
    images = tiny.batch(2)["images"][0]
    assert model.encode_image(images).norm(dim=-1).allclose(torch.ones(2))
    assert 0 < float(model.match(images, ["a red square", "two circle"])[0]) < 1
    queue, teacher = read_tensors(imported, "queue"), read_tensors(imported, "teacher")
    assert queue["image"].shape == (12, 20) and queue["counters"].tolist() == [6, 12]
    recipe = build_config(PretrainRecipe, {"model": vars(model.network.config) | {"image": vars(model.network.config.image), "text": vars(model.network.config.text), "fusion": vars(model.network.config.fusion)}, "teacher": {"queue": 12}, "objectives": {"codebook": {"weight": 0.0}}, "training": {"precision": "fp32"}})  # fmt: skip
    task = PretrainTask(recipe, model.network, model.tokenizer, Ranks(), torch.device("cpu"))
    task.teacher.load(teacher)
    task.queue.load_state_dict(queue)
    (inputs,), _ = task.prepare(tiny.batch(4), 1.0, 4)
    assert len(inputs.keys.image_ids) == 16


def test_pretraining_continues_from_the_import(imported, drawn, tmp_path):
    """At rate 0 and momentum 1 what a step saves is what the run began from; the codebook alone is new."""
    sizes = [
        f"--model.{key}={value}"
        for key, value in {
            "image.architecture": "vit_base_patch16_224", "image.image_size": 32, "image.patch": 16, "image.width": 64,
            "image.depth": 2, "image.heads": 1, "text.width": 128, "text.layers": 3, "text.heads": 2,
            "text.feed_forward": 384, "text.positions": 40, "fusion.layers": 1, "feature_dim": 20, "codewords": 8,
        }.items()
    ]  # fmt: skip
    asked = ["--data.train", str(drawn / "train"), "--data.caption_tokens", "20", "--data.workers", "0"]
    asked += ["--training.global_batch", "8", "--training.steps", "1", "--training.precision", "fp32"]
    asked += [
        "--training.device",
        "cpu",
        "--optimizer.lr",
        "0",
        "--optimizer.min_lr",
        "0",
        "--teacher.ema_momentum",
        "1",
    ]
    start = ["--checkpoint", str(imported), "--runs", str(tmp_path), "--name", "further"]
    assert main(["pretrain", *start, *sizes, *asked]) == 0
    for name in ("model", "teacher"):
        theirs, ours = read_tensors(imported, name), read_tensors(find_checkpoint(tmp_path / "further"), name)
        assert ours.keys() - theirs.keys() == ({"codebook"} if name == "model" else set())
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_joined_matrices_are_albefs_side_by_side(tmp_path):
    path = published(tmp_path)
    theirs, ours = torch.load(path, weights_only=True)["model"], read_albef(path, heads=HEADS)
    layer = "text_encoder.bert.encoder.layer.3.crossattention.self"
    joined = torch.cat([theirs[f"{layer}.{name}.weight"] for name in ("key", "value")])
    assert torch.equal(ours.student["fusion_encoder.layers.0.cross_attention.key_value.weight"], joined)
    joined = torch.cat(
        [
            theirs[f"text_encoder_m.bert.encoder.layer.1.attention.self.{name}.bias"]
            for name in ("query", "key", "value")
        ]
    )
    assert torch.equal(ours.teacher["text_encoder.layers.1.self_attention.query_key_value.bias"], joined)
    assert ours.unused == []


def test_position_embeddings_are_interpolated_to_another_resolution(tmp_path):
    path = published(tmp_path)
    import_albef(path, tmp_path / "out", str(tmp_path), image_size=64, caption_tokens=10, heads=HEADS)
    found = load_file(tmp_path / "out" / "model.safetensors")["image_encoder.vit.pos_embed"]
    theirs = torch.load(path, weights_only=True)["model"]["visual_encoder.pos_embed"]
    grid = functional.interpolate(theirs[:, 1:].view(1, 2, 2, -1).permute(0, 3, 1, 2), 4, mode="bicubic")
    assert torch.equal(found[:, :1], theirs[:, :1]) and found.shape == (1, 17, 64)
    torch.testing.assert_close(found[0, 1:], grid[0].flatten(1).T)
    assert torch.equal(interpolate_positions(theirs, 2), theirs)
    assert load_model(tmp_path / "out").encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 20)
    for size in (50, 0, -64):
        with pytest.raises(CheckpointError, match="no multiple of the patch"):
            import_albef(path, tmp_path / "other", str(tmp_path), image_size=size, caption_tokens=10, heads=HEADS)


def test_import_loading_and_starting_interpolate_positions_alike(imported, tmp_path):
    """At import, where a model is loaded at another size, and where a run begins from a file of the image encoder's weights."""
    path = published(tmp_path)
    import_albef(path, tmp_path / "out", str(tmp_path), image_size=64, caption_tokens=10, heads=HEADS)
    name = "image_encoder.vit.pos_embed"
    wanted = load_file(tmp_path / "out" / "model.safetensors")[name]
    loaded = load_model(imported, image_size=64).network
    torch.testing.assert_close(loaded.image_encoder.vit.pos_embed.data, wanted)
    vit = {key.removeprefix("visual_encoder."): weight for key, weight in torch.load(path, weights_only=True)["model"].items() if key.startswith("visual_encoder.")}  # fmt: skip
    torch.save(vit, tmp_path / "vit.pth")
    sizes = {"image_size": 64, "patch": 16, "width": 64, "depth": 2, "heads": 1, "weights": str(tmp_path / "vit.pth")}
    model = tiny.model(tiny.recipe(model__image={"architecture": "vit_tiny_patch16_224", **sizes}))
    load_starting_weights(model)
    torch.testing.assert_close(model.image_encoder.vit.pos_embed.data, wanted)


@pytest.mark.parametrize(
    ("asked", "configured", "told"),
    [
        ((4, 8), None, "image 4 (--image-heads), text 8 (--text-heads)"),
        ((4, None), 8, "image 4 (--image-heads), text 8 (config_bert.json)"),
        ((4, 8), 8, "image 4 (--image-heads), text 8 (--text-heads)"),
    ],
)
def test_heads_are_those_stated_and_the_report_says_by_whom(tmp_path, asked, configured, told):
    path = published(tmp_path)
    if configured:
        (tmp_path / "config_bert.json").write_text(json.dumps({"num_attention_heads": configured, "hidden_size": 128}))
    report = import_albef(path, tmp_path / "out", str(tmp_path), caption_tokens=10, heads=Heads(*asked))
    assert report[-1].endswith(f"heads: {told}")
    config = load_model(tmp_path / "out").network.config
    assert (config.image.heads, config.text.heads) == (4, 8)


@pytest.mark.parametrize(
    ("options", "bert", "said"),
    [
        ("", {}, "image encoder has, and 2 layers of width 64 are no published size; give --image-heads N"),
        ("--image-heads 1", {}, "text encoder has, and 4 layers of width 128 are .*; give --text-heads N or --bert-config FILE"),
        ("--image-heads 1", {"hidden_size": 128}, "give --text-heads N"),
        ("--text-heads 2", {"num_attention_heads": 2}, "give --image-heads N"),
        ("--image-heads 1 --text-heads 4", {"num_attention_heads": 2}, "--text-heads is 4, but config_bert.json says 2"),
        ("--image-heads 5 --text-heads 2", {}, "--image-heads: 5 heads do not divide the image encoder's width of 64"),
        ("--image-heads 1 --text-heads 0", {}, "--text-heads: 0 heads do not divide"),
        ("--image-heads 1", {"num_attention_heads": 3}, "config_bert.json: 3 heads do not divide the text encoder's width"),
        ("--image-heads 1", {"num_attention_heads": 12, "hidden_size": 768}, "hidden_size is 768 in config_bert.json, but 128"),
        ("--image-heads 1 --text-heads 2", {"hidden_act": "relu"}, "hidden_act is relu in config_bert.json, but gelu"),
    ],
)  # fmt: skip
def test_heads_are_never_guessed(tmp_path, capsys, options, bert, said):
    path = published(tmp_path)
    if bert:
        (tmp_path / "config_bert.json").write_text(json.dumps(bert))
    arguments = [str(path), str(tmp_path / "out"), "--tokenizer", str(tmp_path), "--caption-tokens", "10"]
    assert main(["import", "albef", *arguments, *options.split()]) == 1
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_published_sizes_are_those_of_timm_and_bert():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    bert = BertConfig()  # its defaults are bert-base-uncased
    assert {
        ("image", vit.embed_dim, len(vit.blocks)): (vit.blocks[0].attn.num_heads, "ViT-B's"),
        ("text", bert.hidden_size, bert.num_hidden_layers): (bert.num_attention_heads, "BERT-base's"),
    } == PUBLISHED


def test_heads_of_a_published_size_are_known_and_the_report_names_it(tmp_path, monkeypatch):
    path = published(tmp_path)
    monkeypatch.setitem(PUBLISHED, ("image", 64, 2), (4, "ViT-X's"))
    monkeypatch.setitem(PUBLISHED, ("text", 128, 4), (8, "BERT-X's"))
    read = read_albef(path)
    assert read.heads == "image 4 (ViT-X's), text 8 (BERT-X's)"
    assert (read.config.image.heads, read.config.text.heads) == (4, 8)


@pytest.mark.parametrize(
    "name", ["visual_encoder.blocks.1.attn.proj.bias", "itm_head.weight", "text_encoder.bert.embeddings.LayerNorm.bias"]
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path, name):
    path = published(tmp_path)
    weights = torch.load(path, weights_only=True)["model"]
    del weights[name]
    torch.save({"model": weights}, path)
    with pytest.raises(CheckpointError, match="lacks the tensors of .*, which would be random"):
        build_model(read_albef(path, heads=HEADS))


@pytest.mark.parametrize("family", ["meter", "blip"])
def test_fusion_models_of_other_families_are_refused_by_name(family, capsys):
    assert main(["import", family, "a", "b"]) == 2
    error = capsys.readouterr().err
    assert f"{family}: its" in error and "import an ALBEF" in error and error.count("\n") == 1


@pytest.mark.parametrize(("stored", "read"), [(0.0005, 0.001), (0.001, 0.001), (0.5, 0.5), (0.7, 0.5), (0.07, 0.07)])
def test_a_temperature_at_a_bound_or_beyond_is_brought_within(tmp_path, stored, read):
    path = published(tmp_path, temp=torch.tensor(stored))
    import_albef(path, tmp_path / "out", str(tmp_path), caption_tokens=10, heads=HEADS)
    assert float(load_model(tmp_path / "out").network.temperature()) == pytest.approx(read, rel=2e-3)


def test_captions_are_read_without_punctuation_and_fit_the_positions(imported, tmp_path):
    model = load_model(imported)
    assert model.tokenizer.encode(["a red, (square)!"]) == model.tokenizer.encode(["a red square"])
    with pytest.raises(CheckpointError, match="--caption-tokens 41 is more than the 40 positions"):
        import_albef(published(tmp_path), tmp_path / "out", str(tmp_path), caption_tokens=41, heads=HEADS)


def test_a_retrieval_checkpoint_without_mlm_head_and_teacher_is_read(tmp_path):
    path = published(tmp_path)
    weights = torch.load(path, weights_only=True)["model"]
    kept = {
        name.replace("text_encoder.bert.", "text_encoder."): tensor
        for name, tensor in weights.items()
        if "_m." not in name and ".cls." not in name and "queue" not in name
    }
    torch.save(kept, path)
    with pytest.raises(
        CheckpointError, match="has no head for masked words.*say on which dataset with --fine-tuned-on"
    ):
        import_albef(path, tmp_path / "out", str(tmp_path), caption_tokens=10, heads=HEADS)
    report = import_albef(
        path, tmp_path / "out", str(tmp_path), caption_tokens=10, training="fine-tuned-on coco", heads=HEADS
    )
    assert "no teacher, no queue" in report[0] and "masked_language_head.dense.weight" in report[1]
    assert load_model(tmp_path / "out").training == "fine-tuned-on coco"
    assert not (tmp_path / "out" / "teacher.safetensors").exists()


def test_stray_tensors_are_reported_and_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    path = published(tmp_path, stray=torch.zeros(1))
    assert read_albef(path, heads=HEADS).unused == ["stray"]
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one"]))
    with pytest.raises(CheckpointError, match="has 24 words and the tokenizer .* has 6"):
        import_albef(path, tmp_path / "out", str(tmp_path / "vocab"), heads=HEADS)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_albefs_are_refused_in_one_line(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    for name in ("evil.pth", "text.pth", "other.pth", "missing.pth"):
        assert main(["import", "albef", str(tmp_path / name), str(tmp_path / "out")]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("ligature: ") and said.err.count("\n") == 1 and "executed" not in said.out
    assert main(["import", "lxmert", "a", "b"]) == 2


def test_export_holds_the_model_alone_and_loads_back(imported, tmp_path, capsys):
    assert main(["export", str(imported), str(tmp_path / "plain")]) == 0
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "README.md",
        "manifest.json",
        "model.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    images = tiny.batch(3)["images"][0]
    assert torch.equal(load_model(tmp_path / "plain").encode_image(images), load_model(imported).encode_image(images))
    assert main(["export", str(imported), str(tmp_path / "plain")]) == 1 and "exists" in capsys.readouterr().err


def test_the_imported_folder_evaluates_and_fine_tunes(imported, drawn, tmp_path, capsys):
    small = [
        "--training.global_batch",
        "8",
        "--training.steps",
        "1",
        "--training.precision",
        "fp32",
        "--training.device",
        "cpu",
    ]
    places = [
        "--checkpoint",
        str(imported),
        "--dataset",
        "shapes",
        "--data.train",
        str(drawn / "train"),
        "--data.workers",
        "0",
    ]
    assert main(["finetune", "--runs", str(tmp_path), "--name", "tuned", *places, *small]) == 0
    record = [
        "--data",
        str(drawn / "test"),
        "--dataset",
        "shapes",
        "--split",
        "test",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    for source in (imported, tmp_path / "tuned"):
        out = tmp_path / f"{source.name}.json"
        assert (
            main(["evaluate", "--checkpoint", str(source), "--out", str(out), "--heads", "[dual, fusion]", *record])
            == 0
        )
        assert 0 <= json.loads(out.read_text())["rsum"] <= 600
    assert json.loads(out.read_text())["training"] == "fine-tuned-on shapes"

"""Fine-tuning changes resolution, trains only its own parts, and resumes."""

import os
import subprocess
import sys

import dual_jobs
import pytest
import small
import torch
from adamw import Formula
from killing import die_at_call
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from finetune.config import EvaluateRecipe, FinetuneRecipe
from finetune.heads.dual import DualTask
from launch.cli import main
from launch.start.local import free_port
from pretrain.config import MatchingConfig
from pretrain.model.alignment_model import TextBatch
from pretrain.objectives.state import MicroBatch
from pretrain.weights.load import find_checkpoint, load_model
from runtime.checkpoint import read_tensors
from runtime.errors import RecipeError
from runtime.files import read_json
from runtime.metrics import read_metrics


def tune(pretrained, drawn, runs, *more):
    return main(small.finetune(pretrained, drawn, runs, *more))


def tune_in_two(pretrained, drawn, runs, *more):
    """The first attempt dies at the fourth step, after the checkpoint of the second; another resumes."""
    import finetune.train as stage

    die_at_call(stage, "retrieval_batch", 4, lambda: tune(pretrained, drawn, runs, *more))
    assert tune(pretrained, drawn, runs, *more) == 0


def weights(folder):
    return dict(load_model(folder).network.named_parameters())


@pytest.mark.parametrize("more", [[], ["--training.micro_batch", "3"]], ids=["whole", "micro-batches"])
def test_stopped_and_resumed_fine_tuning_equals_an_uninterrupted_run(more, pretrained, drawn, tmp_path):
    assert tune(pretrained, drawn, tmp_path / "whole", *more) == 0
    tune_in_two(pretrained, drawn, tmp_path / "broken", *more)
    losses = [
        [line["train/loss"] for line in read_metrics(tmp_path / name / "finetune") if "train/loss" in line]
        for name in ("whole", "broken")
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    one, other = weights(tmp_path / "whole" / "finetune"), weights(tmp_path / "broken" / "finetune")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_model(tmp_path / "whole" / "finetune").training == "fine-tuned-on shapes"


def test_scoring_by_an_untuned_fusion_head_prints_a_note(pretrained, drawn, tmp_path, capsys):
    for name, weight in (("tuned", "1"), ("untuned", "0")):
        command = small.finetune(pretrained, drawn, tmp_path, "--name", name, "--matching_weight", weight, steps=1)
        assert main(command) == 0
        assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}-plain")]) == 0
        capsys.readouterr()
        scores = tmp_path / f"{name}.json"
        assert main(small.evaluate(tmp_path / f"{name}-plain", drawn, scores, "--heads", "[fusion]")) == 0
        noted = "was fine-tuned with matching_weight 0" in capsys.readouterr().err
        assert noted == (name == "untuned") == ("fusion_tuned" in read_json(scores))


def test_without_matching_the_fusion_head_does_not_change(pretrained, drawn, tmp_path):
    assert tune(pretrained, drawn, tmp_path, "--matching_weight", "0") == 0
    before, after = weights(pretrained), weights(tmp_path / "finetune")
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert "fusion_encoder" not in moved and "matching_head" not in moved and "masked_language_head" not in moved
    assert {"image_encoder", "text_encoder", "image_projection", "text_projection", "temperature"} <= moved


@pytest.mark.parametrize("head", ["dual", "hat", "vldeformer"])
def test_activation_checkpointing_trains_the_same_model(head, pretrained, drawn, tmp_path, monkeypatch):
    """With dropout, which must draw the same again."""
    from pretrain.model import activations

    again = []

    def counted(layer, *inputs, **options):
        again.append(layer)
        return checkpoint(layer, *inputs, **options)

    monkeypatch.setattr(activations, "checkpoint", counted)
    more = {"dual": [], "hat": [*small.HAT, "--hat.frozen_epochs", "0"], "vldeformer": ["--head", "vldeformer"]}[head]
    actual = []
    for kept in ("false", "true"):
        command = small.finetune(pretrained, drawn, tmp_path / kept, *more, steps=2)
        assert main([*command, "--training.checkpoint_activations", kept]) == 0
        actual.append(read_tensors(find_checkpoint(tmp_path / kept / "finetune"), "model"))
        assert bool(again) == (kept == "true")
    for name, one in actual[0].items():
        torch.testing.assert_close(one, actual[1][name], atol=1e-6, rtol=1e-5)


def test_another_resolution_keeps_all_weights_but_the_positions(pretrained):
    before = dict(load_model(pretrained).network.named_parameters())
    larger = load_model(pretrained, image_size=64)
    assert larger.transform.image_size == 64
    assert larger.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 16)
    after = dict(larger.network.named_parameters())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["image_encoder.vit.pos_embed"]


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (FinetuneRecipe, {"dataset": "x"}, "checkpoint"),
        (FinetuneRecipe, {"checkpoint": "x"}, "dataset"),
        (FinetuneRecipe, {"checkpoint": "x", "dataset": "x", "contrastive_weight": 0.0}, "contrastive_weight"),
        (
            FinetuneRecipe,
            {"checkpoint": "x", "dataset": "x", "matching": MatchingConfig(weight=0.0)},
            "matching_weight",
        ),
        (
            FinetuneRecipe,
            {"checkpoint": "x", "dataset": "x", "matching": MatchingConfig(same_codeword=True)},
            "codebook",
        ),
        (
            FinetuneRecipe,
            {"checkpoint": "x", "dataset": "x", "matching": MatchingConfig(negatives="all_ranks")},
            "nearby",
        ),
        (EvaluateRecipe, {"scores": "x", "dataset": "x", "split": "x", "captions_per_image": 5}, "give --data"),
        (EvaluateRecipe, {"scores": "x", "dataset": "x", "split": "x", "ensemble": "y"}, "a checkpoint's"),
        (EvaluateRecipe, {"scores": "x", "data": "x", "dataset": "x", "split": "x", "precision": "tf32"}, "precision"),
        (EvaluateRecipe, {"checkpoint": "x", "data": "x", "dataset": "x"}, "split"),
        (EvaluateRecipe, {"checkpoint": "x", "data": "x", "dataset": "x", "split": "x", "shortlist": 0}, "shortlist"),
        (EvaluateRecipe, {"checkpoint": "x", "data": "x", "dataset": "x", "split": "x", "heads": []}, "heads"),
    ],
)
def test_a_recipe_that_cannot_be_run_names_its_key(kind, values, named):
    with pytest.raises(RecipeError, match=named):
        kind(**values)


def test_ranks_started_by_srun_train_one_model(pretrained, drawn, tmp_path):
    """As under `srun ligature finetune`, without torchrun's variables, which are the only ones accelerate knows."""
    command = [sys.executable, "-m", "launch.cli", *small.finetune(pretrained, drawn, tmp_path / "srun", steps=2)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_NTASKS": "2", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | place
    ranks = [subprocess.Popen(command, env=environment | {"SLURM_PROCID": str(rank)}) for rank in range(2)]
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    arguments = small.finetune(pretrained, drawn, tmp_path / "local", steps=2)
    assert main(["launch", "local", "--nproc", "2", *arguments]) == 0
    one, other = weights(tmp_path / "srun" / "finetune"), weights(tmp_path / "local" / "finetune")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_parts_the_dual_head_cannot_train_are_left_out_or_refused(drawn, tmp_path, capsys):
    levels = ["--model.levels", "[[1,1]]", "--objectives.levels.weight", "0.5", "--name", "levels"]
    small.pretrain(tmp_path, drawn, *levels)
    task = DualTask(FinetuneRecipe(checkpoint=str(tmp_path / "levels"), dataset="shapes"))
    assert task.model.level_projections and not any(
        one.requires_grad for one in task.model.level_projections.parameters()
    )
    without = [
        "--model.fusion.layers",
        "0",
        "--objectives.matching.weight",
        "0",
        "--objectives.masked_language.weight",
        "0",
    ]
    small.pretrain(tmp_path, drawn, *without, "--name", "without")
    capsys.readouterr()
    assert tune(tmp_path / "without", drawn, tmp_path / "runs") == 1
    assert "no fusion layers to match by; set --matching_weight 0" in capsys.readouterr().err
    assert tune(tmp_path / "without", drawn, tmp_path / "runs", "--matching_weight", "0") == 0


def test_the_dual_heads_logits_are_float32_under_bf16(pretrained, monkeypatch):
    from finetune.heads import dual

    ordinary, dtypes = dual.dual_loss, []

    def recorded_loss(image, text, ids, temperature):
        dtypes.append({image.dtype, text.dtype, (image @ text.T).dtype})
        return ordinary(image, text, ids, temperature)

    monkeypatch.setattr(dual, "dual_loss", recorded_loss)
    task = DualTask(FinetuneRecipe(checkpoint=str(pretrained), dataset="shapes", matching_weight=0.0))
    text = TextBatch(*task.tokenizer(["a star", "two red circles", "a blue square"]))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    batch = MicroBatch(images, text, torch.arange(3), torch.arange(3), torch.zeros(3, 2), None, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            task.model.image_encoder(images).dtype == torch.bfloat16
            or task.model.image_projection(task.model.image_encoder(images)[:, 0]).dtype == torch.bfloat16
        ), "autocast is on"
        loss, _ = task(batch)
    assert dtypes == [{torch.float32}] and loss.dtype == torch.float32


PARTS = ["--optimizer.rates.text", "0.1", "--optimizer.rates.new", "2", "--optimizer.layer_decay", "0.5"]
PARTS += ["--optimizer.freeze_until.text", "0.15", "--optimizer.weight_decay", "0.1", "--optimizer.lr", "1e-3"]


def test_parts_learn_at_their_rates_from_their_epoch_on_and_resume_to_the_bit(pretrained, drawn, tmp_path):
    """Every weight against AdamW's formula, on the gradients that the optimizer got."""
    followed, start = {}, weights(pretrained)

    def follow(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                formula = followed.setdefault(
                    id(parameter), (parameter, group["lr_share"], Formula(parameter, group["weight_decay"]))
                )[2]
                if parameter.grad is not None:
                    formula.step(parameter.grad, group["lr"])

    hook = register_optimizer_step_pre_hook(follow)
    try:
        assert tune(pretrained, drawn, tmp_path / "whole", *PARTS) == 0
    finally:
        hook.remove()
    for parameter, _, formula in followed.values():
        assert (parameter.double() - formula.weight).abs().max() < 1e-6
    assert {round(share, 6) for _, share, _ in followed.values()} == {1.0, 0.5, 0.25, 0.1, 0.05, 0.025, 2.0}
    steps = {share: formula.steps for _, share, formula in followed.values()}
    assert steps[0.1] < steps[0.5] == 6, "the text encoder took fewer steps"

    import finetune.train as stage

    die_at_call(stage, "retrieval_batch", 4, lambda: tune(pretrained, drawn, tmp_path / "broken", *PARTS))
    early = weights(tmp_path / "broken" / "finetune")
    frozen = [torch.equal(early[name], start[name]) for name in early if name.startswith("text_encoder.")]
    assert all(frozen) and len(frozen) > 20, "the checkpoint of the second step is from before the thaw"
    assert tune(pretrained, drawn, tmp_path / "broken", *PARTS) == 0
    one, other = weights(tmp_path / "whole" / "finetune"), weights(tmp_path / "broken" / "finetune")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["text_encoder.words.weight"], start["text_encoder.words.weight"])


@pytest.mark.parametrize("head", ["dual", "hat", "vldeformer"])
def test_an_encoder_is_kept_or_freed_whatever_pretraining_did(head, pretrained, drawn, tmp_path):
    more = {"dual": [], "hat": [*small.HAT, "--hat.frozen_epochs", "0"], "vldeformer": ["--head", "vldeformer"]}[head]
    command = small.finetune(pretrained, drawn, tmp_path, *more, "--frozen.text", "true", steps=2)
    assert main(command) == 0
    start, after = weights(pretrained), read_tensors(find_checkpoint(tmp_path / "finetune"), "model")
    prefix = "encoders." if head == "hat" else ""
    kept = {
        side: all(
            torch.equal(after[prefix + name], start[name]) for name in start if name.startswith(f"{side}_encoder")
        )
        for side in ("image", "text")
    }
    assert kept == {"image": False, "text": True}
    if head == "dual":
        assert load_model(tmp_path / "finetune").network.config.text.frozen
        again = ["--name", "freed", "--frozen.text", "false"]
        assert tune(tmp_path / "finetune", drawn, tmp_path, *again) == 0
        freed = load_model(tmp_path / "freed").network
        assert not freed.config.text.frozen
        assert not torch.equal(freed.text_encoder.words.weight, start["text_encoder.words.weight"])


def test_ranks_share_the_gradients_of_a_part_that_thaws(gloo_pool, lone_process):
    """DDP was made while the part could learn, and takes it back when it does."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(6, 8, generator=generator), torch.randn(6, 2, generator=generator)
    (expected,) = lone_process.run(dual_jobs.gradients_while_a_part_thaws, *batch)
    for rank in gloo_pool.run(dual_jobs.gradients_while_a_part_thaws, *batch):
        for mine, alone in zip(rank, expected, strict=True):
            assert [one is None for one in mine] == [one is None for one in alone]
            torch.testing.assert_close([one for one in mine if one is not None], [o for o in alone if o is not None])
    assert [one is None for one in expected[0]] == [True, True, False, False]
    assert not any(one is None for one in expected[1])


def test_an_average_of_the_weights_is_what_is_validated_saved_and_loaded(pretrained, drawn, tmp_path):
    """Also where the run dies and resumes; the weights that train are those of a run without an average."""
    every = ["--training.checkpoint_every", "1", "--training.keep_last", "9", "--optimizer.lr", "1e-3"]
    averaged = [*every, "--training.ema_momentum", "0.5"]
    assert tune(pretrained, drawn, tmp_path / "plain", *every) == 0
    assert tune(pretrained, drawn, tmp_path / "whole", *averaged) == 0
    folders = sorted((tmp_path / "whole" / "finetune" / "checkpoints").glob("step-*"))
    expected = {name: weight.double() for name, weight in read_tensors(find_checkpoint(pretrained), "model").items()}
    for folder in folders:
        model, average = read_tensors(folder, "model"), read_tensors(folder, "ema")
        assert len(average) > 60 and "masked_language_head.bias" not in average
        for name in average:
            expected[name] = 0.5 * expected[name] + 0.5 * model[name].double()
            assert (average[name].double() - expected[name]).abs().max() < 1e-6, name
        loaded = load_model(folder).network.state_dict()
        assert all(torch.equal(loaded[name], average.get(name, model[name])) for name in loaded)
    plain = read_tensors(tmp_path / "plain" / "finetune" / "checkpoints" / folders[-1].name, "model")
    assert len(folders) == 6 and all(torch.equal(model[name], plain[name]) for name in plain)

    tune_in_two(pretrained, drawn, tmp_path / "broken", *averaged)
    resumed = read_tensors(tmp_path / "broken" / "finetune" / "checkpoints" / folders[-1].name, "ema")
    assert all(torch.equal(resumed[name], average[name]) for name in average)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pretraining_keeps_an_average_too(precision, drawn, tmp_path):
    """Of the student, by the formula at each step, and to the bit where the run dies and resumes."""
    from pretrain.task import PretrainTask

    more = ["--training.steps", "4", "--training.ema_momentum", "0.5", "--training.precision", precision]
    more += ["--training.checkpoint_every", "1", "--training.keep_last", "9"]
    more += ["--data.validation", str(drawn / "validation"), "--training.validate_every", "2"]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    folders = sorted((small.pretrain(tmp_path / "whole", drawn, *more) / "checkpoints").glob("step-*"))
    expected = None
    for folder in folders:
        model, average = read_tensors(folder, "model"), read_tensors(folder, "ema")
        assert average.keys() == model.keys()
        for name in average if expected else ():
            formula = 0.5 * expected[name].double() + 0.5 * model[name].double()
            assert (average[name].double() - formula).abs().max() < 1e-6, name
        expected = average
        loaded = load_model(folder).network.state_dict()
        assert all(torch.equal(loaded[name], average[name]) for name in average)
        assert not torch.equal(loaded["codebook"], model["codebook"])
    assert len(folders) == 4

    die_at_call(PretrainTask, "prepare", 3, lambda: small.pretrain(tmp_path / "broken", drawn, *more))
    resumed = small.pretrain(tmp_path / "broken", drawn, *more) / "checkpoints" / folders[-1].name
    for part in ("model", "ema"):
        ours, theirs = read_tensors(resumed, part), read_tensors(folders[-1], part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

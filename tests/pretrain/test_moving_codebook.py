"""Codewords that follow their features' average, and centred features: by hand, on two ranks, and to the bit through a resume."""

from __future__ import annotations

import pytest
import tiny
import torch
from killing import die_at_call
from safetensors.torch import load_file
from torch.nn.functional import normalize

from launch.cli import main
from pretrain.config import TransportConfig
from pretrain.objectives.codebook import solve_plans
from pretrain.task import PretrainTask
from pretrain.weights.load import load_model
from runtime.checkpoint import read_tensors

AVERAGE = {"model__codebook_update": "average", "model__codebook_centered": True}


def finish(task: PretrainTask) -> None:
    task.finish((name, parameter.data) for name, parameter in task.student.model.named_parameters())


def test_averages_are_the_means_of_what_the_plan_gives_to_each_codeword():
    image, text, codewords = tiny.unit(9, 6, seed=1), tiny.unit(9, 6, seed=2), tiny.unit(4, 6, seed=3)
    solved = solve_plans(image, text, codewords, 9, TransportConfig(), averages=True)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for plan, features in ((solved.plans.image, image), (solved.plans.text, text)):
        for row, feature in zip(plan.double(), features.double(), strict=True):
            expected += row[:, None] * feature
    torch.testing.assert_close(solved.averages.double(), normalize(expected, dim=-1), atol=1e-5, rtol=0)


def test_codewords_move_by_their_momentum_and_only_when_a_step_is_finished():
    task = tiny.task(tiny.recipe(**AVERAGE, objectives__codebook__average_momentum=0.8))
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    model, started = task.student.model, task.codebook.codewords.clone()
    torch.testing.assert_close(started.norm(dim=-1), torch.ones(16))
    assert "codebook" not in dict(model.named_parameters())
    loss, _ = task.student(inputs)
    loss.backward()
    averages = task._averages
    assert torch.equal(task.codebook.codewords, started)
    finish(task)
    torch.testing.assert_close(task.codebook.codewords, normalize(0.8 * started + 0.2 * averages, dim=-1))
    task.prepare(tiny.batch(8, step=1), 1.0, 8)
    assert torch.equal(model.codewords(), normalize(task.codebook.codewords, dim=-1))


def test_features_meet_codewords_without_their_modalitys_mean():
    task = tiny.task(tiny.recipe(**AVERAGE, objectives__codebook__center_momentum=0.9))
    task.prepare(tiny.batch(8), 1.0, 8)
    image = task._gathered_batch[0]
    torch.testing.assert_close(task.codebook.centres[0], image.mean(0))
    centred = task.student.model.codebook_features(image, 0)
    torch.testing.assert_close(centred, normalize(image - image.mean(0), dim=-1))
    before = task.codebook.centres.clone()
    finish(task)
    task.prepare(tiny.batch(8, step=1), 1.0, 8)
    second = task._gathered_batch[0]
    torch.testing.assert_close(task.codebook.centres, before)
    finish(task)
    torch.testing.assert_close(task.codebook.centres[0], 0.9 * before[0] + 0.1 * second.mean(0))


@pytest.mark.parametrize("update", ["gradient", "average"])
def test_before_its_epoch_the_codebook_has_no_loss_and_no_plan(update):
    task = tiny.task(tiny.recipe(model__codebook_update=update, objectives__codebook__from_epoch=1.0))
    (inputs,), _ = task.prepare(tiny.batch(8), 0.5, 8)
    loss, figures = task.student(inputs)
    loss.backward()
    assert inputs.plans is None and figures["codebook"] == 0
    assert task.codebook.starts == (update == "average")
    finish(task)
    (inputs,), _ = task.prepare(tiny.batch(8, step=1), 1.0, 8)
    assert inputs.plans is not None and float(task.student(inputs)[1]["codebook"]) > 0
    assert not task.codebook.starts


def test_frozen_codewords_start_from_features_and_stay():
    task = tiny.task(tiny.recipe(**AVERAGE, objectives__codebook__frozen=True))
    for step in range(2):
        task.prepare(tiny.batch(8, step), 1.0, 8)
        codewords = task.codebook.codewords.clone()
        finish(task)
        assert torch.equal(task.codebook.codewords, codewords) and codewords.any()


def test_a_plan_takes_the_newest_of_the_queue_from_its_own_epoch_on():
    settings = {"transport__samples": "batch+queue", "transport__queue_samples": 8, "teacher__queue_from_epoch": 5.0}
    waits = tiny.task(tiny.recipe(**settings, transport__queue_from_epoch=1.0))
    alone = tiny.task(tiny.recipe())
    for step, epoch in enumerate([0.0, 0.5, 1.0]):
        plans = []
        for task in (waits, alone):
            (inputs,), _ = task.prepare(tiny.batch(8, step), epoch, 8)
            plans.append(inputs.plans.image)
            finish(task)
        assert torch.allclose(*plans) == (epoch < 1), "the queue joins the plan before it joins the keys"
    newest, _ = waits.queue.newest(8)
    assert torch.equal(newest, waits.queue.keys()[0][16:24]), "three batches of eight: the last fills the last slots"
    assert len(waits.queue.newest(99)[0]) == 24


def test_a_shared_temperature_is_the_contrastive_one_and_learns_from_the_codebook():
    task = tiny.task(tiny.recipe(objectives__codebook__temperature=None, objectives__contrastive__weight=0.0))
    (inputs,), _ = task.prepare(tiny.batch(8), 1.0, 8)
    task.student(inputs)[0].backward()
    assert all(parameter.grad is not None for parameter in task.student.model.temperature.parameters())


RECIPE = """
name: moving
data: {vocabulary: 60, caption_tokens: 16, workers: 0, augment: {crop_scale: [1.0, 1.0], flip: false, operations: 0}}
model:
  image: {architecture: vit_tiny_patch16_224, image_size: 32, patch: 16, width: 16, depth: 1, heads: 2}
  text: {width: 16, layers: 1, heads: 2, feed_forward: 32, positions: 16}
  fusion: {layers: 1}
  feature_dim: 8
  codewords: 4
  codebook_update: average
  codebook_centered: true
objectives: {codebook: {from_epoch: 0.02, average_momentum: 0.5}}
transport: {samples: batch+queue}
teacher: {queue: 16}
training: {global_batch: 8, micro_batch: 8, steps: 4, device: cpu, checkpoint_every: 1, keep_last: 9, validate_every: 2}
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_ends_with_the_same_codewords_and_loads(precision, drawn, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    data = ["--data.train", str(drawn / "train"), "--data.validation", str(drawn / "validation")]
    data += ["--training.precision", precision]

    def command(runs: str) -> list[str]:
        return ["pretrain", "--config", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / runs), *data]

    assert main(command("whole")) == 0
    die_at_call(PretrainTask, "prepare", 3, lambda: main(command("broken")))
    assert main(command("broken")) == 0
    folders = [tmp_path / runs / "moving" for runs in ("whole", "broken")]
    tensors = [read_tensors(sorted((folder / "checkpoints").glob("step-*"))[-1], "model") for folder in folders]
    for name in tensors[0]:
        assert torch.equal(tensors[0][name], tensors[1][name]), name
    assert tensors[0]["codebook"].dtype == torch.float32 and tensors[0]["feature_centres"].any()
    model = load_model(folders[0]).network
    torch.testing.assert_close(model.codewords().norm(dim=-1), torch.ones(4))
    assert "validation/codebook_nearest" in (folders[0] / "metrics.jsonl").read_text()


def test_a_centred_codebook_stays_behind_where_retrieval_goes_on(drawn, tmp_path):
    """Fine-tuning, scoring and export take such a run, and a run without centres begins from it."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    shared = ["--runs", str(tmp_path), "--data.train", str(drawn / "train"), "--training.device", "cpu"]
    shared += ["--training.precision", "fp32", "--training.global_batch", "8"]
    plain = ["--model.codebook_update", "gradient", "--model.codebook_centered", "false"]
    assert main(["pretrain", "--config", str(tmp_path / "recipe.yaml"), *shared]) == 0
    source = str(tmp_path / "moving")
    begun = ["--name", "begun", "--checkpoint", source, "--training.steps", "1", *plain]
    assert main(["pretrain", "--config", str(tmp_path / "recipe.yaml"), *shared, *begun]) == 0
    about = ["--data", str(drawn / "test"), "--dataset", "shapes", "--split", "test", "--device", "cpu"]
    for head in ("dual", "hat", "vldeformer"):
        tune = ["--head", head, "--name", head, "--checkpoint", source, "--dataset", "shapes", "--data.workers", "0"]
        tune += ["--training.steps", "1"] + (["--hat.levels", "[[1,1]]"] if head == "hat" else [])
        assert main(["finetune", *tune, *shared]) == 0
        scored = ["--checkpoint", str(tmp_path / head), "--out", str(tmp_path / f"{head}.json"), "--workers", "0"]
        assert main(["evaluate", *scored, *about]) == 0
    assert main(["export", source, str(tmp_path / "exported"), "--format", "hf"]) == 0
    names = load_file(tmp_path / "exported" / "model.safetensors")
    assert "feature_centres" not in names and "codebook" not in names and "image_projection.weight" in names

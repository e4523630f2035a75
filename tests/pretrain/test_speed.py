"""A training step never waits for the device, and layers compile whole."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model.activations import checkpoint_activations

ASKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2", "item"}
"""Operations whose result, or whose result's shape, the host must wait for."""


class NoQuestions(TorchDispatchMode):
    """Refuses operations that would make the host wait for the device. (On a GPU: torch.cuda.set_sync_debug_mode.)"""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        if name in ASKS:
            raise AssertionError(f"aten::{name} asks the device")
        if name.startswith(("index", "_index_put")) and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in arguments[1] or ()
        ):
            raise AssertionError(f"aten::{name} by a mask asks the device how many there are")
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objectives__matching__negatives": "all_ranks", "objectives__codebook__pairing": "self"},
        {"objectives__matching__same_codeword": True, "model__text__dropout": 0.1},
        {"teacher__keys": "local", "training__checkpoint_activations": True},
        {"model__levels": [[1, 1]], "objectives__levels__weight": 1.0},
        {"model__fusion__kind": "single_stream"},
    ],
)
def test_forward_and_backward_never_wait_for_the_device(changes):
    task = tiny.task(tiny.recipe(**changes))
    task.queue.enqueue(tiny.unit(8, 16), tiny.unit(8, 16, seed=1), torch.arange(8))
    micro_batches, _ = task.prepare(tiny.batch(16), 2.0, 8)
    with NoQuestions():
        for inputs in micro_batches:
            loss, _ = task.student(inputs)
            loss.backward()


def test_which_operations_count_as_waiting_for_the_device():
    values, mask = torch.arange(4.0, requires_grad=True), torch.tensor([True, False, True, False])
    for question in (lambda: values.sum().item(), lambda: values[mask], lambda: bool(values.sum() > 0), mask.nonzero):
        with pytest.raises(AssertionError, match="asks the device"), NoQuestions():
            question()
    with NoQuestions():
        values[torch.tensor([0, 2])].sum().backward()


def test_the_teacher_takes_no_gradient_and_the_word_head_sees_masked_words_alone():
    task = tiny.task(tiny.recipe())
    heads, kept = [], []
    for model in (task.student.model, task.teacher.model):
        model.masked_language_head.register_forward_hook(lambda module, inputs, output: heads.append(len(output)))
    task.teacher.model.image_encoder.register_forward_hook(lambda m, i, output: kept.append(output.requires_grad))
    (inputs,), _ = task.prepare(tiny.batch(8), 2.0, 8)
    task.student(inputs)
    masked = len(inputs.masked.word_indices)
    assert heads == [masked, masked] and 0 < masked < inputs.text.mask.sum()
    assert kept == [False]


def test_keys_and_values_of_an_image_are_computed_once_and_pairs_share_a_batch():
    task = tiny.task(tiny.recipe())
    model, made, fused = task.student.model, [], []
    (inputs,), _ = task.prepare(tiny.batch(8), 2.0, 8)
    (layer,) = model.fusion_encoder.layers
    layer.cross_attention.key_value.register_forward_hook(lambda m, i, output: made.append(len(output)))
    model.fusion_encoder.register_forward_hook(lambda m, i, output: fused.append(len(output)))
    task.student(inputs)
    assert made == [8], "one image's keys and values serve its right caption, a wrong one, and the masked one"
    assert fused == [24, 8], "three pairs an image in one batch, then the masked captions"


def test_layers_compile_without_a_graph_break():
    model = tiny.model()
    tokens, states, mask = torch.randn(2, 5, 32), torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    image = model.fusion_encoder.prepare_images(tokens)[0]
    for layer, inputs in (
        (model.image_encoder.vit.blocks[0], (tokens,)),
        (model.text_encoder.layers[0], (states, mask)),
        (model.fusion_encoder.layers[0], (states, mask, image)),
    ):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), layer(*inputs))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_compiled_layers_are_compiled_once_for_each_call_signature(monkeypatch, again):
    """With dropout and captions of several lengths; activations computed again run what was compiled, and the same gradients."""
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend=counted))
    torch._dynamo.reset()
    sizes = tiny.recipe(
        model__text={"layers": 3, "dropout": 0.1, "width": 32, "heads": 2, "feed_forward": 64}, model__fusion__layers=2
    )
    plain, compiled = tiny.model(sizes).train(), tiny.model(sizes).train()
    compiled.compile_layers()
    if again:
        checkpoint_activations(compiled.layers())
    batch, after = tiny.batch(4), []
    for words in (10, 9, 8, 7):
        ids, mask = batch["ids"][:, :words], batch["mask"][:, :words]
        found = []
        for model in (plain, compiled):
            torch.manual_seed(0)
            states, read = (
                model.text_encoder(ids, mask),
                model.fusion_encoder.prepare_images(model.image_encoder(batch["images"][0])),
            )
            loss = model.match(states, mask, read).sum() + model.fusion_encoder(states, mask, read).sum()
            used = [*model.fusion_encoder.parameters(), *model.text_encoder.layers.parameters()]
            found.append(torch.autograd.grad(loss, used))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
        after.append(len(graphs))
    assert after[0] > 0 and after[1] == after[3] <= 16, after

"""Jobs that each rank of test_dual.py runs."""

import torch

from finetune.heads.dual import dual_loss


def loss_and_gradients(image, text, ids, temperature, rank=0, world=1):
    """The loss and gradients of this rank's share of a batch."""
    from torch.nn.functional import normalize

    share = slice(rank * len(ids) // world, (rank + 1) * len(ids) // world)
    image, text = image[share].clone().requires_grad_(), text[share].clone().requires_grad_()
    loss = dual_loss(normalize(image, dim=-1), normalize(text, dim=-1), ids[share], torch.tensor([temperature]))
    loss.backward()
    return loss.detach(), image.grad, text.grad


def on_this_rank(*batch):
    from torch import distributed

    return loss_and_gradients(*batch, rank=distributed.get_rank(), world=distributed.get_world_size())


def exchanged_on_this_rank(folder, captions, images, pairs):
    """The loss by exchanged words, and a gradient of it, of this rank's share of a batch."""
    from torch import distributed

    from finetune.hard_negatives.exchanged_words import ExchangedWords
    from pretrain.model.alignment_model import TextBatch
    from pretrain.objectives.state import MicroBatch, StudentState
    from pretrain.weights.load import load_model

    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    share = slice(rank * len(captions) // world, (rank + 1) * len(captions) // world)
    model = load_model(folder)
    network, (ids, mask) = model.network.eval(), model.tokenizer(captions)
    head = network.matching_head.requires_grad_(True)
    images, ids, mask = images[share], ids[share], mask[share]
    numbers = torch.arange(len(ids))
    batch = MicroBatch(images, TextBatch(ids, mask), numbers, numbers, torch.zeros(len(ids), 2), None, 0.0)
    state = StudentState(network, batch, network.image_encoder(images), network.text_encoder(ids, mask))
    figures = ExchangedWords(pairs, model.tokenizer)(state)
    figures["exchanged"].backward()
    return figures["exchanged"].detach(), figures["exchanged_right"].detach(), next(head.parameters()).grad


def fusion_on_this_rank(model, encodings, lists):
    """Matching logits of the lists' pairs, four pairs at a time."""
    from torch import distributed

    from finetune.heads import fusion
    from runtime.ranks import Ranks

    fusion.PAIRS = 4
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    return fusion.fusion_scores(model, encodings, lists, ranks, torch.device("cpu"))


def gradients_while_a_part_thaws(images, targets):
    """The gradients under DDP of three steps on this rank's share; the tower thaws before the second one."""
    from torch import distributed, nn

    from pretrain.model.parts import Freezing, Part

    world, rank = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
    torch.manual_seed(0)
    tower, head = nn.Linear(8, 4), nn.Linear(4, 2)
    model = nn.Sequential(tower, nn.Tanh(), head)
    freezing = Freezing(model, {"image": Part(tower, [])}, {"image": 1.0})
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    share, gradients = slice(rank * len(images) // world, (rank + 1) * len(images) // world), []
    for epoch in (0.0, 1.0, 1.5):
        freezing.apply(epoch)
        model.zero_grad()
        nn.functional.mse_loss(wrapped(images[share]), targets[share]).backward()
        gradients.append([None if weight.grad is None else weight.grad.clone() for weight in model.parameters()])
    return gradients

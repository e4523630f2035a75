"""The queue is a ring: any length, any batch size, the newest entries win."""

from __future__ import annotations

import pytest
import torch

from pretrain.feature_queue import FeatureQueue


def entries(start: int, count: int):
    """Entries whose features and ids tell which they are."""
    numbers = torch.arange(start, start + count)
    return numbers[:, None] + torch.tensor([0.0, 0.25, 0.5]), -numbers[:, None] - torch.ones(3), numbers


def kept(queue: FeatureQueue):
    return FeatureQueue.keys(queue)


def numbers_in(queue: FeatureQueue) -> list[int]:
    image, text, ids = kept(queue)
    assert torch.equal(image[:, 0].long(), ids) and torch.equal(-text[:, 0].long() - 1, ids), "the three stay together"
    return ids.tolist()


@pytest.mark.parametrize("length", [1, 5, 7, 24])
@pytest.mark.parametrize("sizes", [[3] * 20, [1, 2, 5, 4], [7, 7, 7], [30, 1, 50, 2], [5], [24, 24], [1]])
def test_the_queue_holds_the_newest_entries_for_any_batch_sizes(length, sizes):
    queue, arrived = FeatureQueue(length, 3), 0
    for size in sizes:
        queue.enqueue(*entries(arrived, size))
        arrived += size
        assert sorted(numbers_in(queue)) == list(range(max(0, arrived - length), arrived))
        assert queue.filled == min(length, arrived)


def test_the_queue_wraps_around_and_overwrites_the_oldest():
    queue = FeatureQueue(5, 3)
    queue.enqueue(*entries(0, 4))
    queue.enqueue(*entries(4, 3))
    assert numbers_in(queue) == [5, 6, 2, 3, 4] and queue.pointer == 2


def test_a_new_queue_offers_only_added_entries():
    queue = FeatureQueue(8, 3)
    assert [len(part) for part in kept(queue)] == [0, 0, 0]
    queue.enqueue(*entries(0, 3))
    assert numbers_in(queue) == [0, 1, 2]


def test_a_queue_of_length_0_stays_empty():
    queue = FeatureQueue(0, 3)
    queue.enqueue(*entries(0, 4))
    assert [part.shape for part in kept(queue)] == [(0, 3), (0, 3), (0,)]
    again = FeatureQueue(0, 3)
    again.load_state_dict(queue.state_dict())
    assert again.filled == 0


@pytest.mark.parametrize("before", [0, 3, 5, 8])
def test_a_queue_restored_from_its_state_continues_alike(before):
    queue = FeatureQueue(5, 3)
    if before:
        queue.enqueue(*entries(0, before))
    state = {name: tensor.clone() for name, tensor in queue.state_dict().items()}
    copy = FeatureQueue(5, 3)
    copy.enqueue(*entries(90, 2))
    copy.load_state_dict(state)
    for ring in (queue, copy):
        ring.enqueue(*entries(20, 2))
    assert numbers_in(copy) == numbers_in(queue)
    assert (copy.pointer, copy.filled) == (queue.pointer, queue.filled)


def test_lower_precision_features_are_kept_in_float32():
    queue = FeatureQueue(4, 3)
    image, text, ids = entries(0, 2)
    queue.enqueue(image.bfloat16(), text.bfloat16(), ids.int())
    assert [part.dtype for part in kept(queue)] == [torch.float32, torch.float32, torch.int64]

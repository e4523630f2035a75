"""What the objectives read: the student's encodings of a micro-batch, and what the teacher says about it.

Tested in tests/pretrain/test_task.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.model.bert_layers import PreparedImages


@dataclass
class MaskedText:
    """Captions with words to predict."""

    text: TextBatch
    """The altered captions (batch, words)."""
    word_indices: Tensor
    """(masked words,) int64: indices of the words to predict, in the micro-batch's words laid end to end. Indices instead of a
    mask: their number is known from the shape, without waiting for the device."""
    labels: Tensor
    """(masked words,) int64: the true ids of those words, in the same order."""
    normaliser: Tensor | float
    """Masked words of the global batch, divided by the number of micro-batches in it (ranks x accumulation steps). The mean over
    micro-batches of `sum / normaliser` is then the global sum over the global count."""
    teacher_logits: Tensor | None = None
    """(masked words, vocabulary): the teacher's prediction from the same altered captions and its own view of the image."""


@dataclass
class Keys:
    """Teacher features to compare with: those of the global batch in global sample order, then the queue's filled slots."""

    image: Tensor
    """(keys, feature_dim)"""
    text: Tensor
    """(keys, feature_dim)"""
    image_ids: Tensor
    """(keys,) int64. Keys with the same image id are positives of each other, never negatives."""


@dataclass
class GlobalInputs:
    """Inputs of the global batch, in global sample order. Negatives are drawn among them and encoded by the student."""

    images: Tensor
    """(samples, 3, size, size) uint8: the student's view."""
    text: TextBatch


@dataclass
class Plans:
    """Transport plans of this micro-batch's samples; rows sum to 1."""

    image: Tensor
    """(batch, codewords)"""
    text: Tensor
    """(batch, codewords)"""


@dataclass
class MicroBatch:
    """Everything that one forward of the student needs, on the device."""

    images: Tensor
    """(batch, 3, size, size) uint8: the student's view. Cached features are float: (batch, tokens, width) or (batch, pooled width)."""
    text: TextBatch
    image_ids: Tensor
    """(batch,) int64"""
    rows: Tensor
    """(batch,) int64: the row of each sample's own features among the keys."""
    draws: Tensor
    """(batch, 2) uniform numbers in [0, 1), a function of the sample: for the negative image, for the negative text."""
    keys: Keys
    distill_weight: float
    """Share of the teacher's soft targets in this step."""
    masked: MaskedText | None = None
    """None where masked language modelling is off."""
    plans: Plans | None = None
    """None where the codebook objective is off."""
    level_keys: list[Keys] = field(default_factory=list)
    """The teacher's features of the global batch at each level."""
    global_inputs: GlobalInputs | None = None
    """None unless negatives for matching come from all ranks."""
    positions: Tensor | None = None
    """(batch,) int64, on the CPU: each sample's position in the endless order. Heads draw random numbers of their own from it."""

    def part(self, rows: slice) -> MicroBatch:
        """Return these rows of a batch of fine-tuning, which has no targets of a teacher. The keys stay those of the whole."""
        return replace(
            self,
            images=self.images[rows],
            text=TextBatch(self.text.ids[rows], self.text.mask[rows]),
            image_ids=self.image_ids[rows],
            rows=self.rows[rows],
            draws=self.draws[rows],
            positions=None if self.positions is None else self.positions[rows],
        )


@dataclass
class StudentState:
    """The student's encodings of a micro-batch: computed once, read by every objective."""

    model: AlignmentModel
    batch: MicroBatch
    image_tokens: Tensor
    """(batch, 1 + patches, image width)"""
    text_states: Tensor
    """(batch, words, text width)"""
    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Unit-norm image and text features (batch, feature_dim) of each level."""

    def part(self, rows: slice) -> StudentState:
        """Return these rows, without their levels, under the same graph; see `MicroBatch.part`."""
        return StudentState(self.model, self.batch.part(rows), self.image_tokens[rows], self.text_states[rows])

    @cached_property
    def image(self) -> Tensor:
        """Unit-norm image features (batch, feature_dim)."""
        return self.model.image_features(self.image_tokens)

    @cached_property
    def text(self) -> Tensor:
        """Unit-norm text features (batch, feature_dim)."""
        return self.model.text_features(self.text_states, self.batch.text.mask)

    @cached_property
    def prepared_images(self) -> PreparedImages:
        """The images as the fusion encoder reads them, shared by matched pairs, negatives and masked captions."""
        return self.model.fusion_encoder.prepare_images(self.image_tokens)

"""What the objectives read: the student's state for a micro-batch, and what the teacher says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """(masked words,) int64: where the words to predict are, in rows of words laid end to end. Places and no mask: how many
    there are is the shape, and no device need be asked."""
    labels: Tensor
    """(masked words,) their true ids, in row order."""
    normaliser: Tensor | float
    """MaskedText words of the global batch divided by the number of micro-batches in it (ranks x accumulation steps): the mean
    over micro-batches of `sum / normaliser` is the sum over the global batch divided by its count of masked words."""
    teacher_logits: Tensor | None = None
    """(masked words, vocabulary), the teacher's prediction from the same altered captions and its own view of the image."""


@dataclass
class Keys:
    """Teacher features to compare with: the global batch in global sample order, then the queue's filled slots."""

    image: Tensor
    """(keys, feature_dim)"""
    text: Tensor
    """(keys, feature_dim)"""
    image_ids: Tensor
    """(keys,)"""


@dataclass
class GlobalInputs:
    """Inputs of the global batch, in global sample order: negatives are chosen among them, and encoded again."""

    images: Tensor
    """(samples, 3, size, size) uint8, the student's view"""
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
    """Inputs of the student for one forward, with the teacher's word on them. Everything on the device."""

    images: Tensor
    """(batch, 3, size, size) uint8, the student's view."""
    text: TextBatch
    image_ids: Tensor
    """(batch,)"""
    rows: Tensor
    """(batch,) each sample's place among the keys."""
    draws: Tensor
    """(batch, 2) uniform numbers that belong to the samples: for the negative image, for the negative text."""
    keys: Keys
    distill_weight: float
    masked: MaskedText | None = None
    plans: Plans | None = None
    level_keys: list[Keys] = field(default_factory=list)
    """The teacher's features of the global batch at each level."""
    global_inputs: GlobalInputs | None = None
    """Where negatives come from all ranks."""
    positions: Tensor | None = None
    """(batch,) the samples' places in the endless order, on the CPU, for heads that draw more numbers of their own."""


@dataclass
class StudentState:
    """What the student's encoders made of a micro-batch; computed once, read by every objective."""

    model: AlignmentModel
    batch: MicroBatch
    image_tokens: Tensor
    """(batch, 1 + patches, image width)"""
    text_states: Tensor
    """(batch, words, text width)"""
    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Unit-norm image and text features (batch, feature_dim) of each level."""

    @cached_property
    def image(self) -> Tensor:
        """Unit-norm features (batch, feature_dim)."""
        return self.model.image_features(self.image_tokens)

    @cached_property
    def text(self) -> Tensor:
        """Unit-norm features (batch, feature_dim)."""
        return self.model.text_features(self.text_states)

    @cached_property
    def prepared_images(self) -> PreparedImages:
        """What the fusion encoder reads of the images: made once for matched pairs, negatives and masked captions."""
        return self.model.fusion_encoder.prepare_images(self.image_tokens)

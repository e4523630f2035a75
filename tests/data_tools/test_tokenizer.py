"""Captions become the same ids wherever a tokenizer is loaded."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_tools.tokenizer import (
    ABSENT,
    SPECIAL,
    CaptionTokenizer,
    SpecialTokens,
    load_tokenizer,
    pad_tokens,
    train_tokenizer,
)
from runtime.errors import CheckpointError, DataError

CAPTIONS = ["A red circle left of a blue square.", "two green stars above a café", "a dog's bowl"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocabulary=200, caption_tokens=12)


def test_special_tokens_come_first_as_in_bert(tokenizer):
    assert [tokenizer.pipeline.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert (tokenizer.pad, tokenizer.unknown, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 1, 2, 3, 4)


def test_a_caption_begins_with_cls_and_ends_with_sep(tokenizer):
    (ids,) = tokenizer.encode(["a red circle"])
    assert ids[0] == tokenizer.cls and ids[-1] == tokenizer.sep and len(ids) == 5


def test_known_words_are_read_back(tokenizer):
    assert tokenizer.decode(tokenizer.encode(["Two GREEN stars"])[0]) == "two green stars"


def test_case_and_accents_make_no_difference(tokenizer):
    assert tokenizer.encode(["A Café"]) == tokenizer.encode(["a cafe"])


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("a dog, a 'red' (small) dog!", "a dog a red small dog"),
        ("black-and-white: dog/ball", "black and white  dog ball"),
        ("<person>'s dog; #1 ~ *?.", "persons dog 1"),
        ("A <PERSON> and a Dög", "a person and a dog"),
        ("a dog", "a dog"),
    ],
)
def test_without_punctuation_it_reads_what_albef_leaves_of_a_caption(tmp_path, caption, left):
    def trained() -> CaptionTokenizer:
        return train_tokenizer([caption, left, "a , dog"], 200, 40)

    without = trained().drop_punctuation()
    assert without.encode([caption]) == trained().encode([left])
    assert without.drop_punctuation().encode([caption]) == trained().encode([left])
    without.save(tmp_path)
    assert load_tokenizer(tmp_path, 40).encode([caption]) == trained().encode([left])


def test_a_vocabulary_is_learned_without_punctuation():
    captions = ["a dog's ball, a-b", "A dog's ball, a-b"]
    learned = train_tokenizer(captions, 200, 40, punctuation=False)
    assert "dogs" in learned.pipeline.get_vocab() and not {",", "'", "-"} & learned.pipeline.get_vocab().keys()
    assert learned.decode(learned.encode(["A dog's ball"])[0]) == "a dogs ball"


def test_unknown_letters_are_unknown_and_nothing_fails(tokenizer):
    (ids,) = tokenizer.encode(["犬"])
    assert ids == [tokenizer.cls, tokenizer.unknown, tokenizer.sep]


def test_an_empty_caption_is_cls_and_sep(tokenizer):
    assert tokenizer.encode([""]) == [[tokenizer.cls, tokenizer.sep]]


@pytest.mark.parametrize("length", [3, 5, 12])
def test_long_captions_are_cut_and_keep_their_end_token(tokenizer, tmp_path, length):
    tokenizer.save(tmp_path)
    cut = load_tokenizer(tmp_path, length)
    (ids,) = cut.encode([" ".join(CAPTIONS)])
    assert len(ids) == length and ids[0] == cut.cls and ids[-1] == cut.sep


def test_training_is_repeatable():
    """The library alone numbers ##a, ##b … differently each time, and breaks ties by that."""
    made = {train_tokenizer(CAPTIONS, vocabulary=60, caption_tokens=12).pipeline.to_str() for _ in range(4)}
    assert len(made) == 1


def test_training_does_not_depend_on_the_order_of_captions():
    made = {train_tokenizer(order, 60, 12).pipeline.to_str() for order in (CAPTIONS, CAPTIONS[::-1], iter(CAPTIONS))}
    assert len(made) == 1


def test_the_vocabulary_keeps_to_its_size():
    assert train_tokenizer(CAPTIONS, vocabulary=60, caption_tokens=12).vocabulary == 60


def test_only_the_five_special_tokens_are_special(tokenizer):
    assert set(tokenizer.pipeline.get_added_tokens_decoder()) == {0, 1, 2, 3, 4}


def test_of_very_many_letters_the_frequent_ones_are_kept(monkeypatch):
    monkeypatch.setattr("data_tools.tokenizer.ALPHABET", 3)
    made = train_tokenizer(["aaaa bbb cc d"] * 2, vocabulary=50, caption_tokens=12)
    assert made.encode(["a b c d"])[0][1:-1].count(made.unknown) == 1


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path, 12)
    assert loaded.encode(CAPTIONS) == tokenizer.encode(CAPTIONS)
    assert loaded.vocabulary == tokenizer.vocabulary


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert [theirs(caption)["input_ids"] for caption in CAPTIONS] == tokenizer.encode(CAPTIONS)


def test_a_berts_folder_with_vocab_txt_is_read(tokenizer, tmp_path):
    words = sorted(tokenizer.pipeline.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")
    loaded = load_tokenizer(tmp_path, 12)
    assert loaded.encode(CAPTIONS) == tokenizer.encode(CAPTIONS)


def test_batches_are_padded_to_the_longest(tokenizer):
    ids, mask = tokenizer(["a red circle", "a", "a red circle left of a blue square"])
    assert ids.shape == mask.shape == (3, 10) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [5, 3, 10]
    assert (ids[~mask] == 0).all() and (ids[mask] != 0).all()


def test_padding_counts_tokens_not_zeros():
    ids, mask = pad_tokens([[2, 0, 3], [2]])
    assert ids.tolist() == [[2, 0, 3], [2, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_a_tokenizer_is_refused_by_the_special_tokens_it_lacks():
    with pytest.raises(DataError, match=r"lacks \[PAD\] \[CLS\] \[SEP\] \[MASK\]"):
        CaptionTokenizer(Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]")), 12)


def test_a_tokenizer_that_pads_with_another_id_is_refused():
    vocabulary = {token: number for number, token in enumerate(["a", *SPECIAL])}
    with pytest.raises(DataError, match=r"\[PAD\] is 1; it must be 0"):
        CaptionTokenizer(Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]")), 12).require_bert()


def test_another_models_tokenizer_is_saved_with_its_special_tokens_and_length(tmp_path):
    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", "a", "dog"])}
    pipeline = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = SpecialTokens(pad="</s>", unknown="<unk>", cls=None, sep="</s>", mask=None)
    CaptionTokenizer(pipeline, 6, special, length=6).save(tmp_path)
    loaded = load_tokenizer(tmp_path, 6)
    assert (loaded.pad, loaded.unknown, loaded.cls, loaded.sep, loaded.mask) == (1, 0, ABSENT, 1, ABSENT)
    ids, mask = loaded(["a dog", "dog"])
    assert ids.shape == (2, 6) and mask.sum(1).tolist() == [3, 2] and ids[0].tolist() == [2, 3, 1, 0, 0, 0]
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs("a dog")["input_ids"] == [2, 3, 1] and theirs.pad_token_id == 1 and theirs.mask_token is None
    with pytest.raises(DataError, match=r"lacks \[PAD\] \[UNK\] \[CLS\] \[SEP\] \[MASK\]; use a BERT"):
        loaded.require_bert()


def one_line(source) -> str:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(source, 12)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_is_named_at_once(tmp_path, monkeypatch):
    """Asked for a path, the hub would be tried for most of a minute."""
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda name, **_: pytest.fail(f"asked the hub for {name}")
    )
    assert str(tmp_path / "none") in one_line(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "no tokenizer folder runs/demo" in one_line("runs/demo")


def test_a_folder_without_a_tokenizer_says_what_it_should_hold(tmp_path):
    assert "neither tokenizer.json nor vocab.txt" in one_line(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "cut')
    assert str(tmp_path / "tokenizer.json") in one_line(tmp_path)


def test_a_name_missing_from_the_hub_gives_a_one_line_error(monkeypatch):
    def offline(name, **_):
        raise OSError("We couldn't connect to the hub\nto load this file")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    assert "no tokenizer `bert-of-nobody`" in one_line("bert-of-nobody")

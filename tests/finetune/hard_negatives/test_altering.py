"""Hard negatives: lexicons are read, inflections are kept, and captions and images are altered or counted as unaltered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_wordnet
import torch

from data_tools.in_order.collection import open_collection
from data_tools.tokenizer import CaptionTokenizer, train_tokenizer
from finetune.hard_negatives.altering import AlteredCaptions, choose_patches, exchange_patches
from finetune.hard_negatives.lexicon import BuiltInLexicon, Entry
from finetune.hard_negatives.wordnet import WORDNET_FOLDERS, WordNet, find_line, open_lexicon
from finetune.heads.config import HardNegativesConfig
from runtime.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory) -> WordNet:
    return WordNet(tiny_wordnet.write(tmp_path_factory.mktemp("dict")))


READINGS = [
    ("dog", Entry("noun", "dog")),
    ("dogs", Entry("noun", "dog")),
    ("men", Entry("noun", "man")),
    ("boxes", Entry("noun", "box")),
    ("hands", Entry("noun", "hand")),
    ("sitting", Entry("verb", "sit", "stand")),
    ("stands", Entry("verb", "stand", "sit")),
    ("riding", Entry("verb", "ride", "walk")),
    ("small", Entry("adjective", "small", "large")),
    ("little", Entry("adjective", "little", "big")),
    ("bigger", Entry("adjective", "big", "little")),
    ("left", Entry("adjective", "left", "right")),
    ("green", Entry("adjective", "green", None)),
    ("up", Entry("adverb", "up", "down")),
    ("in", None),
    ("zzz", None),
    ("2", None),
]


@pytest.mark.parametrize(("word", "entry"), READINGS, ids=[word for word, _ in READINGS])
def test_words_are_looked_up_in_wordnets_files(wordnet, word, entry):
    assert wordnet.look_up(word) == entry


@pytest.mark.skipif(
    not any((Path(place) / "index.noun").is_file() for place in WORDNET_FOLDERS), reason="no wordnet-base here"
)
def test_the_real_wordnet_gives_the_same_entries():
    real = open_lexicon("auto")
    for word, entry in READINGS:
        assert real.look_up(word) == entry, word
    assert real.look_up("tables") == Entry("noun", "table") and real.look_up("young").antonym == "old"


def test_every_line_of_a_sorted_file_is_found_and_no_other():
    lines = ["  1 licence", *sorted(f"{word} x" for word in ("a", "ab", "a-b", "b", "ba", "zz"))]
    for text in ("\n".join(lines) + "\n", "\n".join(lines)):
        for line in lines[1:]:
            assert find_line(text.encode(), line.split()[0].encode()) == line.encode()
        assert all(find_line(text.encode(), word) is None for word in (b"0", b"aa", b"abc", b"z", b"zzz"))


def test_without_counts_the_number_of_senses_decides(tmp_path):
    assert WordNet(tiny_wordnet.write(tmp_path, counts=False)).look_up("dogs") == Entry("noun", "dog")


def test_a_folder_that_is_no_wordnet_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="wordnet-base") as error:
        open_lexicon(str(tmp_path))
    assert "\n" not in str(error.value)


INFLECTED = [
    ("dogs", "noun", "dog", "box", "boxes"),
    ("dogs", "noun", "dog", "man", "men"),
    ("dogs", "noun", "dog", "fire hydrant", "fire hydrants"),
    ("dog", "noun", "dog", "berry", "berry"),
    ("dogs", "noun", "dog", "berry", "berries"),
    ("walking", "verb", "walk", "ride", "riding"),
    ("walking", "verb", "walk", "run", "running"),
    ("standing", "verb", "stand", "sit", "sitting"),
    ("walks", "verb", "walk", "push", "pushes"),
    ("walked", "verb", "walk", "close", "closed"),
    ("stood", "verb", "stand", "sit", "sat"),
    ("holding", "verb", "hold", "let go of", "letting go of"),
    ("larger", "adjective", "large", "small", "smaller"),
    ("smallest", "adjective", "small", "big", "biggest"),
    ("happier", "adjective", "happy", "dirty", "dirtier"),
    ("opening", "verb", "open", "enter", "entering"),
    ("carries", "verb", "carry", "drop", "drops"),
    ("drying", "verb", "dry", "carry", "carrying"),
]


@pytest.mark.parametrize(("word", "kind", "base", "instead", "expected"), INFLECTED)
def test_a_replacement_takes_the_words_inflection(wordnet, word, kind, base, instead, expected):
    assert wordnet.inflect(instead, word, Entry(kind, base)) == expected


def test_the_built_in_lexicon_knows_the_words_of_captions():
    known = BuiltInLexicon()
    assert known.look_up("women") == Entry("noun", "woman") and known.look_up("circles") == Entry("noun", "circle")
    assert known.look_up("larger") == Entry("adjective", "large", "small")
    assert known.look_up("sits") == Entry("verb", "sit", "stand")
    assert known.look_up("below") == Entry("adverb", "below", "above")
    assert known.look_up("the") is None and known.look_up("quark") is None
    for (kind, word), other in known.antonyms.items():
        assert (kind, other) in known.antonyms and word != other


CAPTIONS = [
    "a large dog stands left of two small men",
    "a man sits up on an orange box",
    "the dogs",
    "in the of",
    "boxes riding",
]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    words = ["circle circles star stars apple apples right down stand sit standing walking big ripe"] * 3
    return train_tokenizer(CAPTIONS * 3 + words, 300, 14)


def altered(tokenizer, lexicon, draws, picks, caption, **settings):
    maker = AlteredCaptions(HardNegativesConfig(objects=["circle", "star", "apple"], **settings), lexicon, tokenizer)
    numbers = np.empty(maker.numbers_per_caption)
    numbers[::2], numbers[1::2] = draws, picks
    ids, mask = tokenizer([caption])
    new, new_mask, changed = maker(ids, mask, numbers[None])
    return tokenizer.decode(new[0][new_mask[0]]), bool(changed[0])


@pytest.mark.parametrize(
    ("caption", "draws", "picks", "expected"),
    [
        (CAPTIONS[0], 0.0, 0.0, "a small circle sits right of two large circles"),
        (CAPTIONS[0], 0.0, 0.4, "a small star sits right of two large stars"),
        (CAPTIONS[1], 0.0, 0.99, "an apple stands down on an orange apple"),
        (CAPTIONS[2], 0.0, 0.0, "the circles"),
        (CAPTIONS[4], 0.0, 0.0, "circles walking"),
        (CAPTIONS[4], 0.9, 0.0, "circles riding"),
    ],
    ids=["nouns and antonyms", "another pick", "articles agree", "plural", "verbs keep -ing", "at least one word"],
)
def test_a_caption_is_altered_word_by_word(wordnet, tokenizer, caption, draws, picks, expected):
    assert altered(tokenizer, wordnet, draws, picks, caption) == (expected, True)


def test_a_caption_without_replaceable_words_is_unchanged_and_counted(wordnet, tokenizer):
    assert altered(tokenizer, wordnet, 0.0, 0.0, CAPTIONS[3]) == (CAPTIONS[3], False)
    assert altered(tokenizer, wordnet, 0.0, 0.0, "an apple", text_ratio=1.0) == ("an apple", False), (
        "not in this WordNet"
    )


def test_about_half_of_the_words_change_and_equal_draws_change_the_same_words(tokenizer, wordnet):
    maker = AlteredCaptions(HardNegativesConfig(objects=["circle", "star"]), wordnet, tokenizer)
    ids, mask = tokenizer([CAPTIONS[0]] * 400)
    numbers = np.random.default_rng(0).random((400, maker.numbers_per_caption))
    new, _, changed = maker(ids, mask, numbers)
    assert changed.all() and torch.equal(new, maker(ids, mask, numbers)[0])
    share = [(len(set(tokenizer.decode(row).split()) - set(CAPTIONS[0].split()))) for row in new]
    words = [word for word in maker.words(ids[0].tolist()) if word.exchangeable]
    assert len(words) == 6
    kept = sum(tokenizer.decode(row).split()[1] == "large" for row in new) / 400
    assert 0.42 < kept < 0.58 and max(share) > 2


def test_a_word_of_several_pieces_is_one_word_and_long_captions_end_in_sep(wordnet, tokenizer):
    short = CaptionTokenizer(tokenizer.pipeline, 14)
    ids = short.encode(["riding dogs"])[0]
    maker = AlteredCaptions(HardNegativesConfig(objects=["stars"]), wordnet, short)
    words = maker.words(ids)
    assert [word.text for word in words] == ["riding", "dogs"] and words[-1].stop == len(ids) - 1
    long = short.encode(["the dogs " * 20])[0]
    assert len(long) == 14
    result = maker.alter(long, np.zeros(maker.numbers_per_caption))
    assert len(result) == 14 and result[-1] == short.sep
    nouns = maker.nouns(*short([CAPTIONS[1], CAPTIONS[3]]))
    assert short.decode(short([CAPTIONS[1]])[0][0][nouns[0]]) == "man box", "orange is no noun of this WordNet"
    assert torch.equal(nouns[1], short([CAPTIONS[1], CAPTIONS[3]])[1][1]), "no nouns: every token"


def test_attended_patches_are_chosen_first_and_then_a_share_of_the_rest():
    attention = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.0, 0.0, 0.0, 0.0]]).expand(3, 8)
    draws = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    chosen = choose_patches(attention, draws, 0.25, 0.5)
    assert chosen[:, [1, 3]].all() and chosen.sum(1).tolist() == [5, 5, 5], "2 of 8, and 3 of the other 6"
    assert not torch.equal(chosen[0], chosen[1])
    assert choose_patches(None, draws, 0.25, 0.5).sum(1).tolist() == [4, 4, 4]
    assert choose_patches(attention, draws, 0.25, 0.0).sum().item() == 6
    assert choose_patches(attention, draws, 1.0, 1.0).all()


def test_patches_come_from_the_same_position_in_another_image():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(torch.uint8)
    chosen = torch.tensor([[[True, False], [False, False]], [[False, False], [False, True]]])
    result = exchange_patches(images, chosen, torch.tensor([1, 0]))
    assert torch.equal(result[0, :, :2, :2], images[1, :, :2, :2]) and torch.equal(
        result[1, :, 2:, 2:], images[0, :, 2:, 2:]
    )
    assert torch.equal(result[0, :, 2:], images[0, :, 2:]) and torch.equal(result[1, :, :2], images[1, :, :2])


@pytest.mark.parametrize(
    ("settings", "says"), [({"text_ratio": 1.5}, "text_ratio is 1.5"), ({"attended": 0, "rest": 0}, "both 0")]
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(RecipeError, match=says):
        HardNegativesConfig(**settings)


def test_nearly_every_caption_of_flickr8k_can_be_altered_by_the_built_in_lexicon(shared_data):
    captions = (shared_data / "data" / "flickr8k" / "Flickr8k.token.txt").read_text().splitlines()[:3000]
    texts = [line.split("\t")[1].lower() for line in captions]
    known = BuiltInLexicon()
    able = sum(
        any((e := known.look_up(word)) and (e.kind == "noun" or e.antonym) for word in text.split()) for text in texts
    )
    assert able / len(texts) > 0.95


def test_every_caption_of_drawn_scenes_can_be_altered(drawn):
    collection = open_collection(drawn / "train", None)
    known = BuiltInLexicon()
    assert all(any(known.look_up(word) for word in caption.lower().split()) for caption in collection.captions[:100])

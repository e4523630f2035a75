"""Captions state facts that are true, and `fits` counts them exactly."""

import re

from data_tools.shapes.scenes import COLOURS, SHAPES, Group, Scene, scenes, split_of
from data_tools.shapes.sentences import Caption, captions, describe, fits, relation_pairs

RED_CIRCLES = Group("red", "circle", 2, "large", "plain")
BLUE_SQUARE = Group("blue", "square", 1, "small", "striped")
SCENE = Scene("white", RED_CIRCLES, "left", BLUE_SQUARE)

# The grammar's words once more, the other way round and written by hand: a caption is read back without its own tables.
READ = {
    "count": {"a": 1, "an": 1, "one": 1, "a single": 1, "two": 2, "a pair of": 2, "three": 3, "a trio of": 3},
    "size": {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"},
    "texture": {"plain": "plain", "solid": "plain", "striped": "striped", "stripy": "striped", "dotted": "dotted",
                "spotted": "dotted", " with stripes": "striped", " with dots": "dotted"},
    "colour": {"violet": "purple", "turquoise": "cyan"} | {colour: colour for colour in COLOURS},
    "shape": {"disc": "circle", "plus sign": "cross", "hoop": "ring"} | {shape: shape for shape in SHAPES},
}  # fmt: skip
NOUN_PHRASE = re.compile(
    r"\b(?P<count>a single|a pair of|a trio of|an|a|one|two|three) (?:(?P<size>small|little|tiny|large|big) )?"
    r"(?:(?P<texture>plain|solid|striped|stripy|dotted|spotted) )?"
    rf"(?:(?P<colour>{'|'.join(READ['colour'])}) )?(?P<shape>{'|'.join(READ['shape'])})(?:es|s)?\b"
    r"(?P<tail> with (?:stripes|dots))?"
)
RELATION = {"left of": "left", "right of": "right", "above": "top", "over": "top", "higher than": "top",
            "below": "bottom", "under": "bottom", "beneath": "bottom", "lower than": "bottom"}  # fmt: skip
PLACE = {"on the left": "left", "on the right": "right", "at the top": "top", "at the bottom": "bottom"}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def read(text: str) -> tuple[list[dict], str | None]:
    """The groups and the background that a caption's words tell of."""
    text = re.sub(r"^a picture of |^there (is|are) ", "", text)
    background = re.search(r" (?:on|on a|against a) (white|grey|black)(?: background)?$", text)
    text = text[: background.start()] if background else text
    facts_read = []
    for match in NOUN_PHRASE.finditer(text):
        words = match.groupdict()
        words["texture"] = words["texture"] or words.pop("tail")
        facts_read.append({name: READ[name][words[name]] for name in READ if words.get(name)})
    rest = NOUN_PHRASE.sub("", text)
    place = None
    if beside := re.search(r", with  (?:on (?:its|their) (left|right)|(above|below) (?:it|them))", rest):
        facts_read.reverse()
        place = beside[1] or {"above": "top", "below": "bottom"}[beside[2]]
    elif places := re.findall("|".join(PLACE), re.sub(r"on the (left|right) of", r"\1 of", rest)):
        place = PLACE[places[0]]
        assert len(places) == len(facts_read) and (len(facts_read) == 1 or PLACE[places[1]] == OPPOSITE[place])
    elif relation := re.search("|".join(RELATION), rest):
        place = RELATION[relation[0]]
    if place:
        facts_read = [
            facts | {"place": where} for facts, where in zip(facts_read, (place, OPPOSITE[place]), strict=False)
        ]
    return facts_read, background[1] if background else None


def test_captions_state_their_facts_and_the_facts_are_true():
    for scene in scenes("train", 400, 1) + scenes("test", 400, 1):
        for caption in describe(scene, seed=5):
            assert caption.text == caption.text.lower()
            facts_read, background = read(caption.text)
            assert (facts_read, background) == (list(caption.groups), caption.background), caption.text
            assert fits(caption, scene)


def test_captions_are_varied_and_a_stated_share_leaves_something_out():
    assert captions(SCENE, 7) == captions(SCENE, 7) != captions(SCENE, 8)
    assert captions(SCENE, 7, 9)[:5] == captions(SCENE, 7)
    drawn = scenes("train", 1000)
    assert sum(len(set(captions(scene))) < 5 for scene in drawn) < 40
    two_groups = [(scene, caption) for scene in drawn if scene.second for caption in describe(scene)]
    complete = sum(
        len(caption.groups) == 2
        and all({"colour", "size", "place"} <= stated.keys() for stated in caption.groups)
        and sum("texture" in stated for stated in caption.groups)
        >= sum(group.texture != "plain" for group in scene.groups)
        for scene, caption in two_groups
    )
    assert 0.75 < complete / len(two_groups) < 0.85


def test_fits_is_exact():
    left_circles = {"shape": "circle", "colour": "red", "place": "left"}
    assert fits(Caption("", (left_circles,)), SCENE)
    assert fits(Caption("", ({"shape": "square"}, left_circles), "white"), SCENE)
    assert not fits(Caption("", ({"shape": "square"}, left_circles), "black"), SCENE)
    assert not fits(Caption("", (left_circles,)), SCENE.swapped())
    assert not fits(Caption("", ({"shape": "circle"}, {"shape": "circle"})), SCENE)
    assert not fits(Caption("", ({"shape": "circle", "count": 1},)), SCENE)
    assert not fits(Caption("", ({"shape": "circle"}, {"shape": "square"})), Scene("white", RED_CIRCLES, "top"))


def test_relation_pairs_differ_only_in_the_relation():
    pairs = relation_pairs(200, seed=2)
    assert len(pairs) == 200 and pairs == relation_pairs(200, seed=2)
    for (scene, caption), (other, answer) in pairs:
        assert split_of(scene) == split_of(other) == "test"
        assert other == scene.swapped() != scene
        assert (other.groups, other.background) == (scene.groups, scene.background)
        assert sorted(caption.text.split()) == sorted(answer.text.split())
        assert fits(caption, scene) and fits(answer, other)
        assert not fits(caption, other) and not fits(answer, scene)
        assert (read(caption.text)[0], read(answer.text)[0]) == (list(caption.groups), list(answer.groups))

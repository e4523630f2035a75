"""Lexicons: what kind of word a caption's word is, its base form, its antonym, and the replacement in the same inflection.

`BuiltInLexicon` holds a few hundred words of captions. `finetune/hard_negatives/wordnet.py` reads WordNet, which is complete.

Tested in tests/finetune/hard_negatives/test_altering.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["noun", "verb", "adjective", "adverb"]

COCO_OBJECTS = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase,
frisbee, ski, snowboard, ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
dining table, toilet, television, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush"""
"""COCO's 80 classes, in the words that captions use."""

CLOSED = frozenset(
    """a an the this that these those some any no each every all both few many several another other such same own
    i me my you your he him his she her hers it its we us our they them their one ones who whom whose which what there here
    and or but nor so yet if as than then because while when where how why not s t
    of in on at by for to from with without into onto over under near off out along across through around about against among
    between behind beside besides beneath during after before since until toward towards upon via per like
    is are am was were be been being do does did doing done has have had having can could will would shall should may might must
    get gets getting got let very just too also even only more most much""".split()  # noqa: SIM905 (a hundred quoted words read worse)
)
"""Words that are never exchanged. WordNet has other readings of many: `in` as an inch, `on` as the opposite of off."""


@dataclass(frozen=True)
class Entry:
    """What a lexicon knows of a word, in the form that a caption has it."""

    kind: Kind
    base: str
    """The uninflected form."""
    antonym: str | None = None
    """The base form's antonym."""


class Lexicon:
    """A source of words and antonyms; a subclass implements `look_up`."""

    name: str
    """Its name and origin, for the first line of a run."""

    def look_up(self, word: str) -> Entry | None:
        """Return the most common reading of a lower-case word; None for an unknown word or one that is never exchanged."""
        raise NotImplementedError

    def irregular(self, base: str, kind: Kind) -> list[str]:
        """Return the irregular inflections of a base form."""
        return IRREGULAR.get(base, []) if kind == "noun" else []

    def inflect(self, replacement: str, word: str, entry: Entry) -> str:
        """Inflect a replacement in the same form as the word that it replaces.

        In a replacement of several words, a verb inflects the first one, any other kind the last one.

        Args:
            replacement: a base form, of one word or several.
            word: the word it replaces, inflected.
            entry: what the lexicon knows of `word`.
        """
        if word == entry.base:
            return replacement
        words = replacement.split()
        index = 0 if entry.kind == "verb" else -1
        words[index] = self._inflect(words[index], word, entry.kind)
        return " ".join(words)

    def _inflect(self, base: str, word: str, kind: Kind) -> str:
        irregular = self.irregular(base, kind)
        if kind == "noun":
            return irregular[0] if irregular else add_s(base)
        if kind == "verb":
            if word.endswith("ing"):
                return next((form for form in irregular if form.endswith("ing")), "") or stem(base, "ing") + "ing"
            if word.endswith("s"):
                return add_s(base)
            past = [form for form in irregular if not form.endswith(("ing", "s"))]
            past.sort(key=lambda form: form.endswith("n"))  # participles last
            return past[0] if past else stem(base, "ed") + "ed"
        if kind == "adjective" and word.endswith(("er", "est")):
            ending = "est" if word.endswith("est") else "er"
            return next((form for form in irregular if form.endswith(ending)), "") or stem(base, ending) + ending
        return base


VOWELS = "aeiou"
IRREGULAR = {
    "man": ["men"], "woman": ["women"], "child": ["children"], "person": ["people"], "foot": ["feet"], "mouse": ["mice"],
    "sheep": ["sheep"], "scissors": ["scissors"], "knife": ["knives"], "leaf": ["leaves"], "broccoli": ["broccoli"],
}  # fmt: skip


def add_s(base: str) -> str:
    """Return the regular plural of a noun, which is also the third person of a verb: dogs, boxes, berries."""
    if base.endswith("y") and base[-2:-1] not in VOWELS:
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("s", "x", "z", "ch", "sh")) else "s")


def stem(base: str, ending: str) -> str:
    """Return the stem that a regular ending follows: rid(ing), runn(ing), happi(er)."""
    if base.endswith("e") and not (ending == "ing" and base.endswith(("ee", "ye", "oe"))):
        return base[:-1]
    if base.endswith("y") and base[-2:-1] not in VOWELS and ending != "ing":
        return base[:-1] + "i"
    short = len(base) > 2 and base[-1] not in "aeiouwxy" and base[-2] in VOWELS and base[-3] not in VOWELS
    return base + base[-1] if short and sum(letter in VOWELS for letter in base) == 1 else base


def base_forms(word: str, kind: Kind) -> list[str]:
    """Return the base forms that a regularly inflected word may have.

    The rules are WordNet's own (its `morphy`); forms without a doubled consonant are added.
    """
    forms = [word[: -len(old)] + new for old, new in ENDINGS[kind] if word.endswith(old) and len(word) > len(old) + 1]
    return forms + [form[:-1] for form in forms if len(form) > 3 and form[-1] == form[-2] and form[-1] not in "aeiouls"]


ENDINGS: dict[Kind, list[tuple[str, str]]] = {
    "noun": [("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")],
    "verb": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ied", "y"), ("ing", "e"), ("ing", "")],
    "adjective": [("er", ""), ("est", ""), ("er", "e"), ("est", "e"), ("ier", "y"), ("iest", "y")],
    "adverb": [],
}  # fmt: skip


class BuiltInLexicon(Lexicon):
    """The words of `NOUNS`, `OPPOSITES` and `COCO_OBJECTS`, for machines without WordNet."""

    name = "the built-in lexicon"

    def __init__(self) -> None:
        self.nouns = {*NOUNS.split(), *(name.strip() for name in COCO_OBJECTS.split(","))}
        self.antonyms: dict[tuple[Kind, str], str] = {}
        for kind, text in OPPOSITES.items():
            for pair in text.split(","):
                first, second = pair.split()
                self.antonyms.setdefault((kind, first), second)
                self.antonyms.setdefault((kind, second), first)
        self.irregular_nouns = {form: base for base, forms in IRREGULAR.items() for form in forms}

    def look_up(self, word: str) -> Entry | None:
        """Look a word up among the opposites first, then among the nouns."""
        if word in CLOSED:
            return None
        for kind in OPPOSITES:
            for base in (word, *base_forms(word, kind)):
                if antonym := self.antonyms.get((kind, base)):
                    return Entry(kind, base, antonym)
        bases = (self.irregular_nouns.get(word, word), *base_forms(word, "noun"))
        return next((Entry("noun", base) for base in bases if base in self.nouns), None)


NOUNS = """man woman boy girl child baby kid lady guy player rider worker crowd group people family couple friend hand head face hair
arm leg foot eye shirt hat coat jacket dress helmet shoe pants shorts jeans glove uniform sunglasses puppy kitten duck goat monkey
street road sidewalk building house home room kitchen bathroom table desk window door wall floor roof fence bridge tower store market
park field beach ocean sea lake river water wave pool snow sand grass mountain hill rock tree forest flower leaf bush sky cloud sun
ground dirt path trail city town yard garden stage court track ramp rope net bag box basket plate dish food fruit vegetable salad
meat bread cheese egg candle camera phone computer screen picture photo sign light lamp mirror flag toy bike motorbike van taxi plane
jet ship canoe raft swing slide ladder stick bat racket football baseball soccer basketball guitar drum microphone paper cart wagon
circle square triangle star diamond cross heart ring hexagon shape"""
OPPOSITES: dict[Kind, str] = {
    "adjective": """small large, big little, tall short, long short, young old, new old, black white, dark light, dark bright,
        hot cold, warm cool, wet dry, clean dirty, full empty, open closed, high low, happy sad, fat thin, thick thin, wide narrow,
        fast slow, left right, upper lower, top bottom, front back, hard soft, rough smooth, sharp blunt, male female, busy quiet,
        crowded deserted, indoor outdoor, heavy light, deep shallow, good bad, near far, first last, modern ancient, bare covered,
        asleep awake, inside outside, vertical horizontal, tiny huge, shallow deep, straight curly, loud quiet, public private""",
    "verb": """sit stand, open close, push pull, rise fall, laugh cry, smile frown, throw catch, lead follow, enter leave,
        start stop, buy sell, give take, walk run, float sink, climb descend, lift lower, win lose, wake sleep, come go,
        arrive depart, dress undress, load unload, fill empty, show hide, drop raise""",
    "adverb": """up down, above below, inside outside, indoors outdoors, together apart, slowly quickly, happily sadly,
        upstairs downstairs, forward backward, quietly loudly, high low, away back, far near, uphill downhill, upward downward""",
}  # fmt: skip

"""A WordNet of a dozen words, written in its own format (man 5 wndb)."""

from __future__ import annotations

from pathlib import Path

# part of speech -> synsets: words, and antonyms as (own word number, synset, its word number), all from 1.
SYNSETS = {
    "noun": [
        (["dog"], []), (["man"], []), (["circle"], []), (["box"], []), (["left"], []), (["large"], []), (["stand"], []),
        (["ride"], []), (["hands"], []), (["hand"], []),
    ],
    "verb": [
        (["sit"], [(1, 2, 1)]), (["stand", "stand_up"], [(1, 1, 1)]), (["ride"], [(1, 4, 1)]), (["walk"], [(1, 3, 1)]),
        (["leave"], [(1, 6, 1)]), (["arrive"], [(1, 5, 1)]), (["hold"], [(1, 8, 1)]), (["let_go_of"], [(1, 7, 1)]),
        (["man"], []), (["hand"], []),
    ],
    "adj": [
        (["little", "small"], [(1, 2, 1), (2, 2, 2)]), (["big", "large"], [(1, 1, 1), (2, 1, 2)]), (["left"], [(1, 4, 1)]),
        (["right"], [(1, 3, 1)]), (["green"], []), (["green"], []), (["green"], [(1, 8, 1)]), (["ripe"], [(1, 7, 1)]),
    ],
    "adv": [(["up"], [(1, 2, 1)]), (["down"], [(1, 1, 1)])],
}  # fmt: skip
COUNTS = {
    "dog%1": 42, "man%1": 900, "man%2": 2, "circle%1": 9, "box%1": 8, "left%1": 3, "large%1": 1, "stand%1": 2, "ride%1": 2,
    "hands%1": 4, "hand%1": 90, "sit%2": 50, "stand%2": 150, "ride%2": 30, "walk%2": 60, "leave%2": 100, "hold%2": 70, "hand%2": 9,
    "large%3": 80, "small%3": 70, "little%3": 75, "big%3": 60, "left%3": 20, "green%3": 9, "up%4": 30, "down%4": 30,
}  # fmt: skip
EXCEPTIONS = {
    "noun": "men man\n",
    "verb": "left leave\nsat sit\nsitting sit\nstood stand\nheld hold\n",
    "adj": "bigger big\nbiggest big\n",
    "adv": "",
}
LICENCE = "".join(f"  {line} This is where Princeton's licence stands, two spaces first.  \n" for line in range(1, 30))


def write(folder: Path, counts: bool = True) -> Path:
    """-> the folder."""
    for pos, synsets in SYNSETS.items():
        letter = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}[pos]

        def lines(offsets: list[int], synsets=synsets, letter=letter) -> list[str]:
            result = []
            for number, (words, antonyms) in enumerate(synsets):
                named = " ".join(f"{word} 0" for word in words)
                pointers = "".join(f" ! {offsets[to - 1]:08d} {letter} {a:02x}{b:02x}" for a, to, b in antonyms)
                frames = " 01 + 02 00" if letter == "v" else ""
                head = (
                    f"{offsets[number]:08d} 00 {letter} {len(words):02x} {named} {len(antonyms):03d}{pointers}{frames}"
                )
                result.append(f"{head} | a gloss\n")
            return result

        offsets = [0] * len(synsets)  # eight digits each, so that lengths do not depend on them
        place = len(LICENCE)
        for number, line in enumerate(lines(offsets)):
            offsets[number] = place
            place += len(line)
        (folder / f"data.{pos}").write_text(LICENCE + "".join(lines(offsets)))
        entries: dict[str, list[int]] = {}
        for (words, _), offset in zip(synsets, offsets, strict=True):
            for word in words:
                entries.setdefault(word, []).append(offset)
        index = []
        for word, places in sorted(entries.items()):
            joined = " ".join(f"{place:08d}" for place in places)
            index.append(f"{word} {letter} {len(places)} 1 ! {len(places)} 1 {joined}  \n")
        (folder / f"index.{pos}").write_text(LICENCE + "".join(index))
        (folder / f"{pos}.exc").write_text(EXCEPTIONS[pos])
    if counts:
        (folder / "cntlist.rev").write_text("".join(f"{key}:00:00:: 1 {n}\n" for key, n in COUNTS.items()))
    return folder

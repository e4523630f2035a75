"""WordNet's own files (Miller 1995; `man 5 wndb`), from any `dict` folder: Debian's wordnet-base, Princeton's archive, nltk's.

`nltk` itself needs a file `lexnames` that Debian leaves out. This module reads index.*, data.* and *.exc, and cntlist.rev if
there is one.

Tested in tests/finetune/hard_negatives/test_altering.py.
"""

from __future__ import annotations

import mmap
from functools import cache
from pathlib import Path

from finetune.hard_negatives.lexicon import CLOSED, BuiltInLexicon, Entry, Kind, Lexicon, base_forms
from runtime.errors import DataError

KINDS: dict[Kind, str] = {"noun": "noun", "verb": "verb", "adjective": "adj", "adverb": "adv"}
"""Our name of a part of speech, and the ending of WordNet's files."""
OF_NUMBER: dict[str, Kind] = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}
"""The digit in a sense key; 5 is a satellite adjective, one that is like another."""
USUAL: dict[str, Kind] = {"left": "adjective", "right": "adjective", "building": "noun", "pants": "noun"}
"""The reading in captions of words that WordNet's texts use otherwise (to leave, a right, to build)."""
SENSES = 2
"""Number of a word's most frequent senses that are searched for an antonym. Rarer ones mislead: `ripe` is the opposite of the
third sense of `green`."""
WORDNET_FOLDERS = ("/usr/share/wordnet", "/usr/share/wordnet/dict", "/usr/local/WordNet-3.0/dict")
"""Folders that the lexicon `auto` looks for, in this order."""


class WordNet(Lexicon):
    """The lexicon in a `dict` folder. Raises DataError where files are missing."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = f"WordNet in {self.folder}"
        self.index, self.data = {}, {}
        self.exceptions: dict[Kind, dict[str, str]] = {}
        self.forms: dict[Kind, dict[str, list[str]]] = {}
        try:
            for kind, ending in KINDS.items():
                self.index[kind] = _mapped(self.folder / f"index.{ending}")
                self.data[kind] = _mapped(self.folder / f"data.{ending}")
                lines = (self.folder / f"{ending}.exc").read_text(encoding="ascii").splitlines()
                pairs = [line.split()[:2] for line in lines if len(line.split()) > 1]
                self.exceptions[kind] = {form: base for form, base in pairs}
                forms = self.forms[kind] = {}
                for form, base in pairs:
                    forms.setdefault(base, []).append(form)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.folder} is not a WordNet `dict` folder ({error}); install one (Debian: wordnet-base), or use the `built-in` lexicon"
            ) from error
        self.counts = self._read_counts()
        self.look_up = cache(self.look_up)  # type: ignore[method-assign]

    def look_up(self, word: str) -> Entry | None:
        """Return the reading that WordNet's texts use most, except for the words in `USUAL`."""
        if word in CLOSED or not word.isalpha() or not word.isascii():
            return None
        readings: list[tuple[int, int, int, Kind, str]] = []
        for rank, kind in enumerate(KINDS):
            bases = [word, self.exceptions[kind].get(word, ""), *base_forms(word, kind)]
            for position, base in enumerate(dict.fromkeys(filter(None, bases))):
                if self._senses(base, kind):
                    readings.append((self._count(base, kind), -rank, -position, kind, base))
        if not readings:
            return None
        *_, kind, base = next((reading for reading in readings if reading[3] == USUAL.get(word)), max(readings))
        return Entry(kind, base, None if kind == "noun" else self.antonym(base, kind))

    def irregular(self, base: str, kind: Kind) -> list[str]:
        """Return our own irregular inflections, then WordNet's."""
        # WordNet lists forms that people seldom write (brethren beside brothers), so ours come first.
        return super().irregular(base, kind) + self.forms[kind].get(base, [])

    def antonym(self, base: str, kind: Kind) -> str | None:
        """Return the antonym of the most frequent sense that has one.

        Antonyms belong to words, not to senses: `large` is the antonym of `small` but not of `little`.
        """
        for offset in self._senses(base, kind)[:SENSES]:
            words, pointers = self._synset(kind, offset)
            for symbol, target, part, numbers in pointers:
                source = int(numbers[:2], 16)
                if symbol == "!" and part in "nvars" and words[source - 1] == base:
                    others, _ = self._synset(kind, target)
                    return others[int(numbers[2:], 16) - 1].replace("_", " ")
        return None

    def _senses(self, base: str, kind: Kind) -> list[int]:
        """Return the offsets of a word's synsets, most frequent first; none for an unknown word."""
        line = find_line(self.index[kind], base.replace(" ", "_").encode())
        if line is None:
            return []
        parts = line.decode("ascii").split()
        count, pointers = int(parts[2]), int(parts[3])
        return [int(offset) for offset in parts[6 + pointers : 6 + pointers + count]]

    def _synset(self, kind: Kind, offset: int) -> tuple[list[str], list[tuple[str, int, str, str]]]:
        """Return a synset's words, and its pointers: symbol, offset, part of speech, numbers of the words at both ends."""
        data = self.data[kind]
        head = data[offset : data.find(b"|", offset)].decode("ascii").split()
        count = int(head[3], 16)
        words = [head[4 + 2 * number].split("(")[0].lower() for number in range(count)]
        rest = head[4 + 2 * count :]
        pointers = [rest[1 + 4 * number : 5 + 4 * number] for number in range(int(rest[0]))]
        return words, [(symbol, int(target), part, numbers) for symbol, target, part, numbers in pointers]

    def _count(self, base: str, kind: Kind) -> int:
        """Return how often WordNet's texts use a word as this kind; without counts, how many of its senses they use."""
        if self.counts:
            return self.counts.get((base, kind), 0)
        line = find_line(self.index[kind], base.encode())
        assert line is not None
        parts = line.split()
        return int(parts[5 + int(parts[3])])

    def _read_counts(self) -> dict[tuple[str, Kind], int]:
        counts: dict[tuple[str, Kind], int] = {}
        path = self.folder / "cntlist.rev"
        for line in path.read_text(encoding="ascii").splitlines() if path.is_file() else ():
            key, _, count = line.split()
            lemma, _, rest = key.partition("%")
            name = (lemma, OF_NUMBER[rest[0]])
            counts[name] = counts.get(name, 0) + int(count)
        return counts


def find_line(text: mmap.mmap | bytes, key: bytes) -> bytes | None:
    """Return the line of a sorted file that begins with the word `key`, by binary search without reading the whole file."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        start, end = text.rfind(b"\n", 0, middle) + 1, text.find(b"\n", middle)
        line = text[start : end if end >= 0 else len(text)]
        word = line.partition(b" ")[0]
        if word == key:
            return line
        low, high = (start + len(line) + 1, high) if word < key else (low, start)
    return None


def open_lexicon(source: str) -> Lexicon:
    """Open a lexicon.

    Args:
        source: `built-in`, a WordNet folder, or `auto`: WordNet where Debian installs it, else the built-in lexicon.
    """
    if source == "auto":
        source = next((folder for folder in WORDNET_FOLDERS if (Path(folder) / "index.noun").is_file()), "built-in")
    return BuiltInLexicon() if source == "built-in" else WordNet(source)


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

"""Porter's stemmer with the commonest irregular English forms: "bought" meets "buying".

Source: M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980; steps 1a to 5b.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

_FORMS = """\
be was were been am is are being|go went gone goes|buy bought|get got gotten|take took taken
make made|see saw seen|come came|give gave given|find found|tell told|feel felt
think thought|leave left|keep kept|begin began begun|write wrote written|read|run ran
bring brought|hold held|meet met|lose lost|win won|teach taught|catch caught|sell sold
send sent|spend spent|build built|grow grew grown|know knew known|speak spoke spoken
drive drove driven|ride rode ridden|fly flew flown|draw drew drawn|sing sang sung
swim swam swum|eat ate eaten|drink drank drunk|choose chose chosen|wear wore worn
break broke broken|fall fell fallen|sleep slept|hear heard|pay paid|say said|sit sat
stand stood|understand understood|become became|throw threw thrown|fight fought
hide hid hidden|forget forgot forgotten|rise rose risen|wake woke woken|steal stole stolen
lead led|light lit|shoot shot|show shown|shake shook shaken|stick stuck|strike struck
seek sought|bear bore born|bite bit bitten|blow blew blown|deal dealt|dig dug|feed fed
lie lay lain|lend lent|mean meant|ring rang rung|sink sank sunk|slide slid|sweep swept
swing swung|tear tore torn|weave wove woven|wind wound|child children|man men|woman women
person people|foot feet|tooth teeth|mouse mice|life lives|wife wives|knife knives
leaf leaves|good better best|bad worse worst|mom mum mother|dad father
picture pic pics photo photos photograph pictures""".replace("\n", "|")
_BASE = {form: line.split()[0] for line in _FORMS.split("|") for form in line.split()}

_Endings: TypeAlias = Mapping[str, Sequence[tuple[str, str]]]


def _by_last_letter(endings: dict[str, str]) -> _Endings:
    """Last letter -> (ending, what replaces it), longest first: most words try none or few."""
    out: dict[str, list[tuple[str, str]]] = {}
    for ending in sorted(endings, key=len, reverse=True):
        out.setdefault(ending[-1], []).append((ending, endings[ending]))
    return out


_STEP2 = _by_last_letter({
    "ational": "ate", "ization": "ize", "iveness": "ive", "fulness": "ful", "ousness": "ous",
    "tional": "tion", "biliti": "ble", "entli": "ent", "ousli": "ous", "ation": "ate",
    "alism": "al", "aliti": "al", "iviti": "ive", "enci": "ence", "anci": "ance", "izer": "ize",
    "abli": "able", "alli": "al", "ator": "ate", "eli": "e",
})  # fmt: skip
_STEP3 = _by_last_letter({
    "icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ness": "", "ful": "",
})  # fmt: skip
_STEP4 = _by_last_letter(dict.fromkeys(
    "ement ance ence able ible ment ant ent ion ism ate iti ous ive ize al er ic ou".split(), ""
))  # fmt: skip
_VOWELS_THEN_CONSONANTS = re.compile(r"v+c+")
_SHAPES = str.maketrans({chr(i): "v" if chr(i) in "aeiou" else "c" for i in range(128)})


def _shape(word: str) -> str:
    """The word as a string of c (consonant) and v (vowel); y is a vowel after a consonant."""
    if "y" not in word:
        return word.translate(_SHAPES)
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if vowel else "c"
    return shape


def _measure(stem: str) -> int:
    return len(_VOWELS_THEN_CONSONANTS.findall(_shape(stem)))


def _short(stem: str) -> bool:
    """Ends consonant-vowel-consonant, the last not w, x or y: "hop" but not "show"."""
    return _shape(stem).endswith("cvc") and stem[-1] not in "wxy"


def _swap(word: str, endings: _Endings, least: int) -> str:
    """Replace the longest matching ending if the stem before it has at least this measure."""
    for ending, other in endings.get(word[-1:], ()):
        if word.endswith(ending):
            stem = word[: -len(ending)]
            if _measure(stem) < least or (ending == "ion" and stem[-1:] not in ("s", "t")):
                return word
            return stem + other
    return word


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    if not word.endswith(("ed", "ing")):
        return word
    stem = word[:-2] if word.endswith("d") else word[:-3]
    if "v" not in _shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if len(stem) > 1 and stem[-1] == stem[-2] and _shape(stem)[-1] == "c" and stem[-1] not in "lsz":
        return stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _short(stem) else stem


def _tidy(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        if _measure(stem) > 1 or (_measure(stem) == 1 and not _short(stem)):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The stem of a lower-case word; numbers and words of other scripts stay as they are."""
    word = _BASE.get(word, word)
    if len(word) <= 2 or not (word.isascii() and word.isalpha()):
        return word
    word = _past(_plural(word))
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _swap(_swap(word, _STEP2, 1), _STEP3, 1)
    return _tidy(_swap(word, _STEP4, 2))

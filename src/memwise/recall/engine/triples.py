"""Triples from plain declarative sentences, and the triple pattern that a simple question asks for.

"Paris is the capital of France", "The capital of France is Paris", "France has Paris as its
capital" and "Paris serves as France's capital" all give (France, capital, Paris): a noun relation
belongs to the thing after "of". Verbs keep their direction; passives are turned round
("X was written by Y" gives (Y, write, X)).
"""

from __future__ import annotations

import re

from memwise.recall.engine.lexicon import AUXILIARIES, PREPOSITIONS, VERBS, relation_key, verb

Triple = tuple[str, str, str]
Pattern = tuple[str | None, str | None, str | None]

_LONGEST = 400  # characters; longer sentences are prose, not statements
_OPENING = re.compile(
    r"(?:(?:as of|since|in|by|until) \d{4}|since independence|\w+ly(?=,)|on the map|on paper|in fact|of course|today|now|currently|in fact|note that|remember that"
    r"|(?:it is|it's) (?:well )?known that|(?:we|you|they|people|everybody|everyone) (?:all )?(?:knows?|says?) that|as (?:is well known|we know|you know)|did you know that"
    r"|the fact is that|according to [\w ]{1,40}),? ",
    re.IGNORECASE,
)
_LINK = re.compile(
    r" (?:(is|are|was|were|(?:can|may|could) be|became|becomes|has become"
    r"|remains|ha(?:s|ve) (?:long |always )?been|will be"
    r"|(?:serves?|served|acts?|functions?|is known|is regarded|is designated|has served) as)"
    r"|(has had|have had|has|have|had)|(uses?|used))(?: (?:now|currently|also|still|officially|today))? "
)
_DATE_TAIL = re.compile(
    r",? (?:since|as of|until|in|from) \d{4}$|,? (?:today|now|currently|at present)$"
)
_ARTICLE = re.compile(r"(?:the|an?|its|their|his|her) ", re.IGNORECASE)
_NAMED = re.compile(
    r"(?:called|named|known as|the (?:city|town) of|the (?:number|code|city|town|name)) "
)
_ASIDE = re.compile(r", (?:as|which|so|of course)\b[^,]{0,40}(?:,(?= )|$)")
_HEDGE = re.compile(
    r" (?:always|now|nowadays|presently|mostly|mainly|generally|usually|commonly|still|long)(?= )"
)
_MADE_ITS = re.compile(
    r"(?P<s>[A-Z][^,]{0,60}?) (?:has |have |was |were )?(?:[a-z]+ed|made|chose|chosen|took|taken|given|gave"
    r"|kept|keeps|takes) (?P<o>.{1,60}?) (?:as )?(?:its|their|his|her) (?P<r>[a-z][\w -]{0,40})$"
)
_NAME_OF = re.compile(
    r"the name of (?=the )|^the (?:country|nation|state) of (?=[A-Z])", re.IGNORECASE
)
_HAS_ITS = re.compile(r"(?:its|their) (?P<r>[\w -]{1,40}?) in (?P<o>[A-Z].{0,60})$")
_HAS_THE = re.compile(r"the (?P<r>[a-z][a-z -]{1,40}?) (?P<o>[A-Z\d+].{0,60})$")
_AS_ITS = re.compile(r" (?:as|for) (?:its|their|his|her|the|an?) ")
_IN_PLACE = re.compile(
    r"(?:(?:located|situated|found|lying|set|based|a part|part) (?:in|on|of|within|inside)"
    r"|in|on|within|inside) (?:the (?:heart|middle|centre|center|north|south|east|west) of )?"
    r"(?:the continent of )?"
)
_KIND_IN_PLACE = re.compile(
    r"(?:an? |the )?(?P<kind>[\w -]{1,40}?) (?:(?:located|situated|lying|found) )?in "
    r"(?P<place>.{1,80})$"
)
_PLAIN_BE = ("is", "are", "was", "were", "has been", "have been")
_PEOPLE_SPEAK = re.compile(
    r"(?:(?:most |the )?(?:people|inhabitants|citizens|residents) (?:in|of|from) "
    r"(?P<a>.{1,60}?) speak"
    r"|in (?P<b>.{1,60}?),? (?:most )?(?:people|they|everyone|inhabitants|citizens) (?:mostly "
    r"|mainly )?speak"
    r"s?) (?P<c>.{1,60})$",
    re.IGNORECASE,
)
_PAY_IN = re.compile(
    r"(?:(?:people|you|they|everyone|customers) pay(?:s)? (?:with|in) (?P<c>.{1,60}?) in "
    r"(?P<a>.{1,60})"
    r"|(?:in (?P<b>.{1,60}?),? (?:people|you|they|one|everyone)|people in (?P<e>.{1,60}?)) pays? "
    r"(?:with|in) (?P<d>.{1,60}))$",
    re.IGNORECASE,
)
_USED_IN = re.compile(
    r"(?:the )?(?P<r>[\w -]{1,40}?) (?:(?:used|spoken|in use) (?:in|by)|for|in) (?P<s>.{1,60}?) "
    r"(?:is|are) (?:called )?(?P<o>.{1,60})$",
    re.IGNORECASE,
)
_USED_AS = re.compile(
    r"(?P<o>.{1,60}?) (?:is|are) (?:used|known|recogni[sz]ed|regarded|accepted) (?:as (?:the )?"
    r"(?P<r>[\w -]{1,40}?) (?:of|in) (?P<s>.{1,60})|in (?P<s2>.{1,60}?) as (?:the |its )?(?P<r2>.{1,40}))$",
    re.IGNORECASE,
)
_TENDER_IN = re.compile(
    r"(?P<o>.{1,60}?) (?:is|are) (?:the |an? )?(?:official )?(?P<r>legal tender|money|currency) in "
    r"(?P<s>.{1,60})$",
    re.IGNORECASE,
)
_PART_OF = re.compile(
    r"(?P<s>.{1,60}?) (?:forms|makes up|is|was|has been) (?:an? )?part of (?P<o>.{1,60})$",
    re.IGNORECASE,
)
_FOUND_IN = re.compile(
    r"(?:you (?:can|will|may)|one (?:can|may)) (?:find|visit|see) (?P<s>.{1,60}?) in (?P<o>.{1,60})$",
    re.IGNORECASE,
)
_LANGUAGE = re.compile(r"((?:[A-Z][\w'-]* ?){1,3}) language$")
_PEOPLE_OF = re.compile(
    r"^(?:people|inhabitants|citizens|residents) (?:of|in) (?=[A-Z])", re.IGNORECASE
)
_OF_KIND = re.compile(
    r"(?:the )?(?:city|town|country|nation|island|kingdom|republic|state) of (?=[A-Z])",
    re.IGNORECASE,
)
_WHICH_X_USES = re.compile(
    r"(?:the )?(?P<r>[\w -]{1,40}?) (?:(?:which|that) (?P<s>[A-Z][^,]{0,50}?) (?:uses?|has|have|speaks?)"
    r"|(?:(?:which|that) )?(?:people|they|you|everyone) (?:speaks?|uses?|pays? with|pays? in) in "
    r"(?P<s2>[A-Z][^,]{0,50}?)) (?:is|are) (?P<o>.{1,60})$"
)
_IN_X_IS = re.compile(
    r"in (?P<s>.{1,60}?), (?P<o>(?!the |its ).{1,60}?) (?:is|are|remains) the (?P<r>[\w -]{1,40})$",
    re.IGNORECASE,
)
_IN_X = re.compile(r"in (.{1,60}?),? (?=the |its |people )", re.IGNORECASE)
_STATEMENTS = (
    (_WHICH_X_USES, ""), (_IN_X_IS, ""), (_USED_IN, ""), (_USED_AS, ""), (_TENDER_IN, ""),
    (_MADE_ITS, ""), (_FOUND_IN, "located in"), (_PART_OF, "located in"),
)  # fmt: skip
_PASSIVE_INVERSES = {"spoken in": "language", "used in": "currency"}
_NO_SUBJECT = frozenset(
    "it this that these those there he she they we you i what who which here everyone someone "
    "everything nothing one".split()
)


def triples(sentence: str) -> list[Triple]:
    """Return the (subject, relation, object) triples of one declarative sentence.

    Args:
        sentence: one sentence, with or without its full stop.

    Returns:
        Triples with relations in normal form (`relation_key`); empty if the sentence has no
        such form, is a question, or has more than 400 characters.
    """
    text = " ".join(sentence.replace("’", "'").split()).rstrip(".! ")
    if not text or len(text) > _LONGEST or text.endswith("?"):
        return []
    opening = _OPENING.match(text)
    if opening is not None:
        text = text[opening.end() :]
    text = _DATE_TAIL.sub("", text)
    if text.startswith("The ") and not text.startswith("The Hague"):
        text = "t" + text[1:]
    text = _HEDGE.sub("", _ASIDE.sub("", _NAME_OF.sub("", text)))
    special = _special(text)
    if special is not None:
        return _clean([special])
    place = _IN_X.match(text)
    if place is not None:
        inner = _LINK.search(text, place.end())
        if inner is not None:
            noun = _bare(text[place.end() : inner.start()])
            return _clean([(place[1], relation_key(noun), _value(text[inner.end() :]))])
    link = _LINK.search(text)
    if link is None:
        return _clean(_by_verb(text))
    left, right = text[: link.start()], text[link.end() :]
    if link[1]:
        return _clean(_copular(left, right, link[1]))
    return _clean(_having(left, right, "use" if link[3] else "have"))


def _clean(found: list[Triple]) -> list[Triple]:
    out = []
    for s, r, o in found:
        triple = (_trim(s), r, _trim(o))
        if all(triple) and not {triple[0].lower(), triple[2].lower()} & _NO_SUBJECT:
            out.append(triple)
    return out


def _trim(term: str) -> str:
    term = term.strip(" ,;:'\"")
    term = term.removeprefix("the ") or term
    language = _LANGUAGE.match(term)
    return language[1] if language is not None else _PEOPLE_OF.sub("", term)


def _bare(noun: str) -> str:
    return _ARTICLE.sub("", noun.strip(), count=1) if _ARTICLE.match(noun.strip()) else noun.strip()


def _value(right: str) -> str:
    named = _NAMED.match(right)
    return right[named.end() :] if named is not None else right


def _special(text: str) -> Triple | None:
    spoken = _PEOPLE_SPEAK.match(text)
    if spoken is not None:
        return spoken["a"] or spoken["b"], "language", spoken["c"]
    for form, relation in _STATEMENTS:
        match = form.match(text)
        if match is not None:
            part = match.groupdict()
            relation = relation or relation_key(part["r"] or part["r2"])
            return part["s"] or part["s2"], relation, _bare(_value(part["o"]))
    paid = _PAY_IN.match(text)
    if paid is not None:
        return paid["a"] or paid["b"] or paid["e"], "currency", paid["c"] or paid["d"]
    return None


def _noun_of(phrase: str) -> tuple[str, str] | None:
    """Split "the capital of France" or "France's capital" into (relation noun, owner)."""
    phrase = phrase.strip()
    noun, sep, owner = phrase.partition(" of ")
    if sep and "'s " not in noun:
        if noun.lower().endswith(" number") or noun.lower() in (
            "seat",
            "the seat",
            "unit",
            "the unit",
            "the city",
            "city",
        ):
            more, sep, owner2 = owner.partition(" of ")
            if sep:
                noun, owner = f"{noun} of {more}", owner2
        return _bare(noun), owner
    for mark in ("'s ", "s' "):
        owner, sep, noun = phrase.partition(mark)
        if sep and noun:
            return noun, owner + mark[0].strip("'")
    return None


def _copular(left: str, right: str, link: str) -> list[Triple]:
    if link.endswith(("known as", "regarded as")) and _noun_of(right) is None:
        return [(left, "is a", _bare(right))]
    left = _OF_KIND.sub("", left) if _noun_of(right) is not None else left
    owned = _noun_of(left)
    if owned is not None and (owned[0][:1].islower() or left.startswith("the ")):
        return [(owned[1], relation_key(owned[0]), _value(right))]
    passive = _passive(left, right)
    if passive is not None:
        return [passive]
    inside = _IN_PLACE.match(right)
    if inside is not None and (link in _PLAIN_BE or link.endswith(" be")):
        return [(left, "located in", right[inside.end() :])]
    kind = _KIND_IN_PLACE.match(right)
    if kind is not None and right.lower().startswith(("a ", "an ")):
        return [(left, "located in", kind["place"]), (left, "is a", kind["kind"])]
    owned = _noun_of(right)
    if owned is not None and not right.lower().startswith(("a part of", "part of")):
        return [(owned[1], relation_key(owned[0]), left)]
    if right[:1].isdigit() and right.endswith(("years old", "year old")):
        return [(left, "age", right.split(" ", 1)[0])]
    return [(left, "is a" if _ARTICLE.match(right) else "is", _bare(right))]


def _passive(left: str, right: str) -> Triple | None:
    words = right.split(" ")
    if len(words) > 1 and words[0].endswith("ly"):
        words = words[1:]
    k = next((i for i, w in enumerate(words[:5]) if w.lower() in VERBS), None)
    if k is None or (
        k > 0 and words[0].lower() not in ("widely", "mostly", "mainly", "also", "first")
    ):
        return None
    lemma, form = VERBS[words[k].lower()]
    if form not in ("past", "participle") or k + 1 >= len(words):
        return None
    rest = " ".join(words[k + 2 :])
    link = words[k + 1].lower()
    phrase = f"{words[k].lower()} {link}"
    if phrase in _PASSIVE_INVERSES:
        return rest, _PASSIVE_INVERSES[phrase], left
    if link == "by":
        return rest, relation_key(lemma), left
    if link in PREPOSITIONS and words[k].lower() not in (
        "located",
        "situated",
        "found",
        "based",
        "set",
    ):
        return left, relation_key(f"was {words[k].lower()} {link}"), rest
    return None


def _having(left: str, right: str, lemma: str) -> list[Triple]:
    as_its = _AS_ITS.search(right)
    if as_its is not None:
        return [(left, relation_key(right[as_its.end() :]), right[: as_its.start()])]
    if lemma == "have":
        noun, sep, value = right.partition(" of ")
        if (
            sep
            and _ARTICLE.match(noun)
            and (value[:1].isdigit() or value.startswith(("about", "around", "over")))
        ):
            return [(left, relation_key(_bare(noun)), value)]
        named = _HAS_ITS.match(right) or _HAS_THE.match(right)
        if named is not None:
            return [(left, relation_key(named["r"]), named["o"])]
    words = right.split(" ")
    if words[0].lower() in VERBS and VERBS[words[0].lower()][1] == "participle":
        return _by_verb(f"{left} {right}")
    return [(left, lemma, right)]


def _by_verb(text: str) -> list[Triple]:
    words = text.split(" ")
    for k in range(1, min(len(words), 9)):
        low = words[k].lower()
        known = VERBS.get(low)
        if known is None or known[0] == "be":
            continue
        if known[1] not in ("third", "past") and low not in ("speak", "use", "border"):
            continue
        left, rest = " ".join(words[:k]), words[k + 1 :]
        if not rest:
            return []
        relation = known[0]
        if rest[0].lower() in PREPOSITIONS and len(rest) > 1:
            relation, rest = f"{relation} {rest[0].lower()}", rest[1:]
        key = relation_key(relation)
        place = key == "located in" or not left[0].isupper()
        return [(left, key, " ".join(rest))] if left[0].isupper() or place else []
    return []


# ---- questions -----------------------------------------------------------------------------------

_POLITE = re.compile(
    r"(?:(?:please|so|and|ok|hey),? )*(?:(?:can|could|would) you (?:please )?(?:tell me|say"
    r"|remind me)"
    r"|do you (?:know|remember)|tell me|i wonder|remind me|i'd like to know)? ?,?",
    re.IGNORECASE,
)
_WH = r"(?:what|which|who)"
_BE = r"(?:is|are|was|were|'s)"
_FORMS: tuple[tuple[str, str], ...] = (
    # (name of the rule, form); N stands for a noun such as "country"
    ("o:r,s", 
        r"how (?:many|much) (?P<r>people|inhabitants) (?:live in|does|are there in|are in) "
        r"(?P<s>.{1,80}?)(?: have)?"),
    ("age", r"how old (?:is|was) (?P<s>.{1,80})"),
    ("size", r"how (?P<r>large|big|tall|high|heavy) (?:is|was) (?P<s>.{1,80})"),
    ("r,o", 
        rf"(?:of |for )?(?:what|which) [\w-]{{1,20}} {_BE} (?P<o>.{{1,80}}?) (?:the|an?) "
        rf"(?P<r>[\w -]{{1,40}}?)(?: of)?"),
    ("r,o", 
        r"(?:of |for )?(?:what|which) [\w-]{1,20} does (?P<o>.{1,80}?) (?:serve|act"
        r"|function) as (?:the|an?)? ?(?P<r>[\w -]{1,40}?)(?: of)?"),
    ("r,o", rf"(?:what|which) [\w-]{{1,20}}'s (?P<r>[\w -]{{1,40}}?) {_BE} (?P<o>.{{1,80}})"),
    ("r,o", rf"whose (?P<r>[\w -]{{1,40}}?) {_BE} (?P<o>.{{1,80}})"),
    ("r,o", 
        r"(?:what|which) [\w-]{1,20} (?:has|have|had|uses?|used) (?P<o>.{1,80}?) (?:as|for) "
        r"(?:its|their|the|an?) (?P<r>[\w -]{1,40})"),
    ("r,o", 
        r"(?P<o>.{1,80}?) (?:is|was|serves as) (?:the )?(?P<r>[\w -]{1,40}?) of (?:what|which)"
        r"(?: [\w-]{1,20})?"),
    ("r,o", r"(?P<o>.{1,80}?) (?:is|was|serves as) (?:what|which) [\w-]{1,20}'s "
        r"(?P<r>[\w -]{1,40})"),
    ("speak,o", 
        r"(?:where|in (?:what|which) [\w-]{1,20}) (?:is|do (?:people|they) speak) "
        r"(?P<o>[\w -]{1,40}?)(?: spoken)?"),
    ("s,r", 
        rf"{_WH}(?: [\w-]{{1,20}})? (?:{_BE}|serves as|acts as|functions as) "
        rf"(?:the )?(?:name of )?(?:the )?(?P<r>[\w -]{{1,40}}?) of (?P<s>.{{1,80}})"),
    ("s,r", rf"{_WH}(?: [\w-]{{1,20}})? {_BE} (?P<s>.{{1,80}}?)(?:'s|(?<=s)') "
        r"(?P<r>[\w -]{1,40})"),
    ("s,r", rf"{_WH} {_BE} (?P<s>.{{1,80}}?) (?P<r>called|named)"),
    ("s,r", 
        r"(?:what|which) (?:is|was) used as (?:the )?(?P<r>[\w -]{1,40}?) (?:in|of) "
        r"(?P<s>.{1,80})"),
    ("s,r", 
        r"what does (?P<s>.{1,80}?) (?:have|use) (?:as|for) (?:its|their|the|an?) "
        r"(?P<r>[\w -]{1,40})"),
    ("s,lang", 
        r"(?:what|which) languages? (?:is|are|do (?:people|they)) (?:spoken|speak) in "
        r"(?P<s>.{1,80})"),
    ("s,r", 
        r"(?:what|which) (?P<r>[\w -]{1,40}?) (?:does|do|did) (?P<s>.{1,80}?) (?:have|use"
        r"|speak)"),
    ("s,r", r"(?:what|which) (?P<r>[\w -]{1,40}?) (?:is|are) (?:used|spoken) in (?P<s>.{1,80})"),
    ("s,place", 
        r"(?:in |on )?(?:what|which) (?:country|city|continent|region|state|town|place) (?:is"
        r"|was|does) (?P<s>.{1,80}?)(?: (?:located|situated|lie|found))?(?: in| on)?"),
)  # fmt: skip
_QUESTIONS = tuple((name, re.compile(form, re.IGNORECASE)) for name, form in _FORMS)
_INDIRECT = re.compile(
    r"^(?:(?:what|who|which) (?P<x>.{1,120}) (?:is|are|was)|(?:name|give|state) "
    r"(?P<y>the .{1,120}))$",
    re.IGNORECASE,
)
_WHERE = re.compile(
    r"(?:where|when) (?P<aux>is|was|are|were|does|did|do|has|have) (?P<rest>.{1,120})",
    re.IGNORECASE,
)
_WHO = re.compile(r"(?P<wh>who|what|which [\w-]{1,20}) (?P<rest>.{1,160})", re.IGNORECASE)
_WHAT_DOES = re.compile(
    r"(?:what|who|whom|which [\w-]{1,20}) (?:does|did|do|has|have|is|was|will) (?P<rest>.{1,120})",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"(?:does|did|do|is|was|has|will) (?P<rest>.{1,160})", re.IGNORECASE)
_SIZES = {"large": "area", "big": "area", "tall": "height", "high": "height", "heavy": "weight"}


def question(text: str) -> Pattern:
    """Return the triple pattern of a simple question, None where the answer stands.

    "What is the capital of France?" gives ("France", "capital", None), "Which country has Paris
    as its capital?" gives (None, "capital", "Paris"), "Where does Ana live?" gives
    ("Ana", "live in", None). A question of no known form gives (None, None, None).
    """
    asked = " ".join(text.replace("’", "'").split()).rstrip("?.! ")
    if not asked or len(asked) > _LONGEST:
        return None, None, None
    polite = _POLITE.match(asked)
    if polite is not None:
        asked = asked[polite.end() :].strip()
    indirect = _INDIRECT.match(asked)
    if indirect is not None and not asked.lower().startswith(("what is ", "who is ", "which is ")):
        asked = "what is " + (indirect["x"] or indirect["y"])
    for name, form in _QUESTIONS:
        match = form.fullmatch(asked)
        if match is not None:
            found = _asked(name, match)
            if found is not None:
                return found
    return _verbal(asked)


def _asked(name: str, match: re.Match[str]) -> Pattern | None:
    part = match.groupdict()
    if name == "age":
        return _trim(part["s"]), "age", None
    if name == "size":
        return _trim(part["s"]), _SIZES[part["r"].lower()], None
    if name == "o:r,s":
        return _trim(part["s"]), "population", None
    if name == "s,lang":
        return _trim(part["s"]), "language", None
    if name == "s,place":
        return _trim(part["s"]), "located in", None
    if name == "speak,o":
        spoken = match.group().lower().endswith("spoken") or " speak " in match.group()
        return (None, "language", _trim(part["o"])) if spoken else None
    relation = relation_key(part["r"])
    if name == "r,o":
        return None, relation, _trim(part["o"])
    return _trim(part["s"]), relation, None


def _verbal(asked: str) -> Pattern:
    where = _WHERE.fullmatch(asked)
    if where is not None:
        return _where(where["aux"].lower(), where["rest"].split(" "), asked[:5].lower() == "where")
    does = _WHAT_DOES.fullmatch(asked)
    if does is not None:
        split = _subject_verb(does["rest"].split(" "))
        if split is not None:
            subject, relation, rest = split
            return subject, relation, rest or None
    who = _WHO.fullmatch(asked)
    if who is not None:
        return _who(who["rest"].split(" "))
    yes = _YES_NO.fullmatch(asked)
    split = _subject_verb(yes["rest"].split(" ")) if yes is not None else None
    return (split[0], split[1], split[2] or None) if split is not None else (None, None, None)


def _where(aux: str, words: list[str], place: bool) -> Pattern:
    split = _subject_verb(words)
    if split is None:
        if not place:
            return _trim(" ".join(words)), "date", None
        if words[-1].lower() in ("from", "located", "situated", "based") and len(words) > 1:
            relation = "from" if words[-1].lower() == "from" else "located in"
            return _trim(" ".join(words[:-1])), relation, None
        return _trim(" ".join(words)), "located in", None
    subject, relation, rest = split
    if not place:
        return subject, relation, rest or None
    passive = relation in ("bear", "locate", "situate", "find", "raise")
    if relation == "come from" or relation == "from" or rest == "from":
        return subject, "from", None
    if " " not in relation:
        link = {
            "go": "to",
            "move": "to",
            "travel": "to",
            "fly": "to",
            "relocate": "to",
            "work": "at",
        }
        phrase = f"{relation} {link.get(relation, 'in')}"
        relation = relation_key(
            f"be {phrase}" if passive and aux in ("is", "was", "were", "are") else phrase
        )
    return subject, relation, rest or None


def _subject_verb(words: list[str]) -> tuple[str, str, str] | None:
    """Split "Ana live in Lisbon" into subject, relation and rest."""
    for k in range(1, min(len(words), 8)):
        low = words[k].lower()
        if low in VERBS and low not in AUXILIARIES and not (words[k][0].isupper() and k < 2):
            relation, rest = VERBS[low][0], words[k + 1 :]
            if rest and rest[0].lower() in PREPOSITIONS:
                relation, rest = f"{relation} {rest[0].lower()}", rest[1:]
            return _trim(" ".join(words[:k])), relation_key(relation), _trim(" ".join(rest))
    return None


def _who(words: list[str]) -> Pattern:
    while (
        words and words[0].lower() in AUXILIARIES and len(words) > 1 and words[1].lower() in VERBS
    ):
        words = words[1:]
    if not words or words[0].lower() not in VERBS or len(words) < 2:
        return None, None, None
    low = words[0].lower()
    if low in ("is", "are", "was", "were"):
        owned = _noun_of(" ".join(words[1:]))
        if owned is not None:
            return _trim(owned[1]), relation_key(owned[0]), None
        return _trim(" ".join(words[1:])), "is a", None
    relation, rest = verb(low)[0], words[1:]
    if rest[0].lower() in PREPOSITIONS and len(rest) > 1:
        relation, rest = f"{relation} {rest[0].lower()}", rest[1:]
    return None, relation_key(relation), _trim(" ".join(rest))

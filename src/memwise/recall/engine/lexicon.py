"""The words that the rules know: verbs and their forms, function words, names of relations.

Everything here is a literal table or a pure function of one word or phrase. The tables are closed
classes (auxiliaries, prepositions, irregular verbs) and the commonest open ones; what is not listed
is treated by its shape.
"""

from __future__ import annotations

import re
from functools import lru_cache

# ---- verbs ---------------------------------------------------------------------------------------

# lemma: past [participle]; the lemma itself when nothing is given after the colon
_IRREGULAR = """
be:was been, bear:bore born, lie:lay lain, become:became become,
begin:began begun, bend:bent, bet:bet, bite:bit bitten,
blow:blew blown, break:broke broken, bring:brought, build:built, burn:burnt, buy:bought,
catch:caught, choose:chose chosen, come:came come, cost:cost, cut:cut, deal:dealt, dig:dug,
do:did done, draw:drew drawn, dream:dreamt, drink:drank drunk, drive:drove driven, eat:ate eaten,
fall:fell fallen, feed:fed, feel:felt, fight:fought, find:found, fly:flew flown,
forget:forgot forgotten, freeze:froze frozen, get:got gotten, give:gave given, go:went gone,
grow:grew grown, hang:hung, have:had, hear:heard, hide:hid hidden, hit:hit, hold:held, hurt:hurt,
keep:kept, know:knew known, lay:laid, lead:led, learn:learnt, leave:left, lend:lent, let:let,
light:lit, lose:lost, make:made, mean:meant, meet:met, pay:paid, put:put, quit:quit, read:read,
ride:rode ridden, ring:rang rung, rise:rose risen, run:ran run, say:said, see:saw seen, sell:sold,
send:sent, set:set, sew:sewed sewn, shake:shook shaken, shoot:shot, show:showed shown, shut:shut,
sing:sang sung, sink:sank sunk, sit:sat, sleep:slept, speak:spoke spoken, spend:spent, split:split,
spread:spread, stand:stood, steal:stole stolen, stick:stuck, strike:struck, swim:swam swum,
take:took taken, teach:taught, tear:tore torn, tell:told, think:thought, throw:threw thrown,
understand:understood, wake:woke woken, wear:wore worn, win:won, write:wrote written
"""
_REGULAR = """
accept achieve act adopt add admire adore advise afford agree aim allow announce answer apply
appreciate approach arrange arrive ask assemble attend avoid award back bake battle believe belong
bike blog bond book borrow border bowl brew broaden call camp cancel care carry carve celebrate
challenge change chat check cheer cherish chill clean climb close coach collaborate collect combine
compete complete compose conclude connect consider contact contain contribute cook cosplay cover
crash create cross cruise cycle damage dance date decide decorate define deliver design develop
diagnose die direct discover discuss dislike divorce donate download dress drop dye earn edit
educate embrace employ encourage end engage enjoy enroll enrol enter escape establish exercise
expand expect experience explain explore express face fail finish fish fix focus follow foster
found frame fulfill garden gather graduate guess guide handle happen harvest hate head heal help
hike hire hope host hug hunt imagine improve include influence injure inspire install instruct
intend interview introduce invent invest invite jog join juggle jump kayak kick knit land laugh
launch like link listen live locate look love manage marry master match matter mentor miss mix
motivate move name need nurture observe offer open operate order organise organize own pack paint
park participate pass paste perform phone photograph pick plan plant play practice practise prefer
prepare present pretend print process produce promise promote propose publish pull purchase push
raise reach realise realize receive recommend record recover refer reflect register rehearse relax
relocate remain remember remind remodel renovate rent repair replace represent rescue research
reside rest restore retire return review roast sail sample save schedule score scream search serve
settle share shift ship shop shower sign skate skateboard sketch ski smell smile smoke snap
snowboard solve sort sponsor start stay stop struggle study style submit succeed suffer
suggest support surf surprise surround switch take talk taste team text thank tour trade train
transfer transition travel treat trek try turn tutor twist type update upgrade upload use vacation
value view visit volunteer vote wait walk want wash watch welcome wish wonder work
worry worship wrap yell
"""


def _verb_forms() -> dict[str, tuple[str, str]]:
    forms: dict[str, tuple[str, str]] = {}
    for entry in _IRREGULAR.replace("\n", " ").split(","):
        base, _, rest = entry.strip().partition(":")
        past, *participle = rest.split()
        forms[past] = (base, "past")
        for word in participle:
            forms.setdefault(word, (base, "participle"))
        forms.setdefault(base, (base, "base"))
        forms[_ing(base)] = (base, "ing")
        forms[_third(base)] = (base, "third")
    for base in _REGULAR.split():
        if base in forms:
            continue
        forms[base] = (base, "base")
        forms[_past(base)] = (base, "past")
        forms[_ing(base)] = (base, "ing")
        forms[_third(base)] = (base, "third")
    forms |= {"were": ("be", "past"), "is": ("be", "third"), "are": ("be", "base")}
    forms |= {"am": ("be", "base"), "learned": ("learn", "past"), "dreamed": ("dream", "past")}
    forms |= {"has": ("have", "third"), "does": ("do", "third"), "burned": ("burn", "past")}
    return forms


_DOUBLING = frozenset(
    "begin bet chat cut dig drop get hit hug jog let plan put quit run set shop shut sit snap "
    "split stop swim transfer win wrap refer knit".split()
)


def _stem(base: str, ending: str) -> str:
    if base in _DOUBLING:
        return base + base[-1] + ending
    if base.endswith("e") and not base.endswith(("ee", "ye", "oe")) and base != "be":
        return base[:-1] + ending
    return base + ending


def _ing(base: str) -> str:
    return base[:-2] + "ying" if base in ("die", "lie", "tie") else _stem(base, "ing")


def _past(base: str) -> str:
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    return base + "d" if base.endswith(("ee", "ye")) else _stem(base, "ed")


def _third(base: str) -> str:
    if base == "have":
        return "has"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


VERBS = _verb_forms()


@lru_cache(maxsize=8192)
def verb(word: str) -> tuple[str, str]:
    """Return the lemma and the form (base, past, participle, ing, third) of a lower-case verb.

    A word that is not listed is judged by its ending; anything else is a base form.
    """
    known = VERBS.get(word)
    if known is not None:
        return known
    if word.endswith("ing") and len(word) > 5:
        return _unlisted(word[:-3]), "ing"
    if word.endswith("ied") and len(word) > 4:
        return word[:-3] + "y", "past"
    if word.endswith("ed") and len(word) > 4:
        return _unlisted(word[:-2]), "past"
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y", "third"
    if word.endswith(("shes", "ches", "xes", "zes", "sses", "oes")):
        return word[:-2], "third"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1], "third"
    return word, "base"


def _unlisted(stem: str) -> str:
    if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsfz":
        return stem[:-1]  # jogg -> jog
    if stem.endswith(
        (
            "at",
            "iz",
            "is",
            "iv",
            "uc",
            "ag",
            "ur",
            "eas",
            "ang",
            "rg",
            "nc",
            "v",
            "u",
            "rs",
            "as",
            "is",
            "os",
            "us",
            "ak",
            "ap",
            "ad",
            "id",
        )
    ):
        return stem + "e"  # creat -> create
    return stem


def third_person(word: str) -> str:
    """Return the third person singular of a base form ("live" -> "lives")."""
    return _third(word)


# ---- closed classes ------------------------------------------------------------------------------

PREPOSITIONS = frozenset(
    "about above across after against along among around as at before behind below beside between "
    "beyond by during for from in inside into near of off on onto out outside over past since "
    "through to toward towards under until up upon via with within without".split()
)
PARTICLES = frozenset("up out off down back away over together along".split())
DETERMINERS = frozenset(
    "a an the some any this that these those my your his her its our their another each "
    "every".split()
)
PRONOUNS = frozenset(
    "i me my mine myself we us our ours ourselves you your yours yourself he him his himself "
    "she her "
    "hers herself it its itself they them their theirs themselves this that these those who whom "
    "which what one someone somebody everyone everybody anyone nobody everything something "
    "anything "
    "nothing there here".split()
)
ADVERBS = frozenset(
    "actually already also always almost absolutely basically certainly clearly completely "
    "currently "
    "definitely especially even eventually ever finally first frequently fully generally honestly "
    "hopefully just kinda lately literally mainly maybe mostly naturally nearly normally now "
    "occasionally often once only originally personally perhaps possibly pretty previously "
    "primarily "
    "probably quickly quite rarely really recently regularly seriously simply slowly so "
    "sometimes soon "
    "sort still suddenly super then today too totally truly typically usually very well yet again "
    "both all 100% proudly happily luckily sadly thankfully deeply gladly fortunately "
    "unfortunately never ever newly last".split()
)
INTERJECTIONS = frozenset(
    "ah aw awesome absolutely congrats congratulations cool cheers definitely exactly glad "
    "great ha haha "
    "hah hello hey hi hmm hm lol nice no nah nope oh ok okay omg ooh ouch please right sure "
    "thank thanks "
    "totally ugh uh um well whoa woah woo wow yay yeah yep yes yup btw hooray good sorry "
    "welcome bye "
    "later anyway anyways fingers".split()
)
AUXILIARIES = frozenset(
    "am is are was were be been being have has had do does did will would can could shall "
    "should may "
    "might must".split()
)
CONJUNCTIONS = frozenset(
    "and but or so because although though while when whenever if unless since as until before "
    "after that than whether where which who whom whose why how plus yet nor".split()
)
STOPWORDS = (
    PREPOSITIONS | PARTICLES | DETERMINERS | PRONOUNS | ADVERBS | INTERJECTIONS | AUXILIARIES
    | CONJUNCTIONS | frozenset(
        "not no don't didn't doesn't isn't wasn't aren't can't couldn't won't wouldn't i'm "
        "i've i'd i'll "
        "you're you've you'll it's that's there's he's she's we're we've we'll they're they've "
        "what's "
        "let's got get go going gonna know think lot lots thing things way bit much many more "
        "most such "
        "own same other others else like want need make made take really feel felt see look time "
        "people day days come keep good let say said tell told us kind stuff yes ever around "
        "went going gone getting making "
        "yesterday tomorrow tonight week weeks month months year years morning evening "
        "night".split()
    )
)  # fmt: skip

# Verbs whose first-person clauses carry talk, not facts ("I think", "I hope you ...").
TALK = frozenset(
    "think guess mean hope wish agree appreciate bet see hear understand say tell thank suppose "
    "believe know imagine wonder remember forget promise swear admit doubt assume notice can let "
    "look sound seem ask expect recommend suggest please mention feel congratulate care wait "
    "happen "
    "cheer sure reckon figure gotta need".split()
)
# Adjectives that only tell a mood of the moment.
MOODS = frozenset(
    "glad happy sorry sure proud excited thankful grateful good great fine okay ok well sad tired "
    "curious curious amazed impressed psyched stoked pumped thrilled lucky here there ready able "
    "interested worried nervous happy honored honoured blessed touched inspired confident hopeful "
    "okay right done back down up all always so really afraid surprised jealous determined "
    "with on over in off gonna not".split()
)
KIN = frozenset(
    "daughter son husband wife mom mum mother dad father brother sister friend boss partner "
    "boyfriend "
    "girlfriend grandma grandpa grandmother grandfather aunt uncle cousin niece nephew dog cat "
    "puppy "
    "kitten colleague coworker neighbor neighbour roommate teacher coach mentor therapist "
    "doctor baby "
    "fiance fiancé fiancée kid kids children daughters sons parents friends family dogs cats "
    "brothers "
    "sisters pets pet team grandparents colleagues students cousins child girl boy turtles".split()
)

# ---- relations -----------------------------------------------------------------------------------

# (verb or phrase) -> relation; several surface phrases, one key
RELATION_SYNONYMS = {
    "reside in": "live in", "move to": "live in", "relocate to": "live in", "settle in": "live in",
    "settle down in": "live in", "live at": "live in",
    "work for": "work at", "employ by": "work at", "employ at": "work at", "work in": "work in",
    "work with": "work with", "enjoy": "like", "love": "like", "adore": "like",
    "be into": "like", "be fond of": "like", "be passionate about": "like", "be fan of": "like",
    "be big fan of": "like", "be huge fan of": "like",
    "hate": "dislike", "detest": "dislike", "can't stand": "dislike",
    "not like": "dislike", "not enjoy": "dislike", "not love": "dislike",
    "own": "have", "possess": "have", "have got": "have", "purchase": "buy", "go to": "visit",
    "travel to": "visit", "fly to": "visit", "be to": "visit", "marry": "married to",
    "be married to": "married to", "marry to": "married to", "be engaged to": "engaged to",
    "get married to": "married to", "wed": "married to", "be allergic to": "allergic to",
    "come from": "from", "be from": "from", "hail from": "from", "be bear in": "born in",
    "be born in": "born in", "bear in": "born in", "major in": "study", "learn": "learn",
    "diagnose with": "diagnosed with", "be diagnosed with": "diagnosed with", "begin": "start",
    "complete": "finish", "conclude": "finish", "be named": "name", "be called": "name",
    "name": "name", "call": "name", "adopt": "adopt", "lie in": "located in", "lie within": "located in", "sit within": "located in", "lie inside": "located in",
    "locate in": "located in", "be located in": "located in", "situate in": "located in",
    "find in": "located in", "be in": "located in", "belong to": "located in",
    "sit in": "located in",
    "locate on": "located in", "capital city": "capital", "seat of government": "capital",
    "administrative capital": "capital", "monetary unit": "currency", "legal tender": "currency",
    "unit of currency": "currency", "money": "currency", "tongue": "language",
    "lingua franca": "language", "inhabitants": "population", "number of inhabitants": "population",
    "number of people": "population", "surface area": "area", "land area": "area",
    "favorite": "favourite", "occupation": "job", "profession": "job", "hometown": "hometown",
    "spouse": "married to", "husband": "married to", "wife": "married to", "residence": "live in",
    "home": "live in", "home city": "live in", "city of residence": "live in",
    "employer": "work at",
    "workplace": "work at", "birthplace": "born in", "place of birth": "born in",
    "be founded by": "found", "speak": "speak", "border": "border", "border with": "border",
    "share border with": "border", "neighbour": "border", "neighbor": "border",
}  # fmt: skip
FUNCTIONAL = frozenset(
    "live in,work at,work as,age,name,married to,engaged to,born in,from,job,capital,currency,"
    "population,area,height,weight,birthday,hometown,relationship status,is called,located in,"
    "salary,phone number,email,address,nickname,dating,date,mayor,president,continent".split(",")
)
_MODIFIERS = frozenset(
    "official national main principal present current federal primary common only main actual own "
    "predominant local international proud well-known sole exact total latest".split()
)
_DROPPED = frozenset(
    "the a an its his her their my our your very really also now currently still of".split()
)
_WORD = re.compile(r"[\w'+-]+")


@lru_cache(maxsize=8192)
def relation_key(phrase: str) -> str:
    """Return the normal form of a relation phrase: lower case, lemmas, one word for synonyms.

    "moved to" and "lives in" give "live in", "official languages" gives "language". A phrase that
    is in no table keeps its lemmas, so unknown relations still meet themselves.
    """
    words = [w for w in _WORD.findall(phrase.lower()) if w not in _DROPPED or w == "of"]
    if words and words[0] in ("am", "is", "are", "was", "were", "been"):
        words[0] = "be"
    if " ".join(words) in RELATION_SYNONYMS:
        return RELATION_SYNONYMS[" ".join(words)]
    while len(words) > 1 and words[0] in _MODIFIERS:
        words = words[1:]
    while words and words[-1] == "of" and len(words) > 1:
        words = words[:-1]
    if not words:
        return ""
    if len(words) > 1 and words[0] in AUXILIARIES and words[0] not in ("have", "has", "had"):
        if words[1] in VERBS:
            return _synonym(" ".join([verb(words[1])[0], *words[2:]]), " ".join(["be", *words[1:]]))
        if words[1] in PREPOSITIONS or words[-1] in PREPOSITIONS:
            return _synonym(" ".join(["be", *words[1:]]))
        words = words[1:]  # "is the capital of"
    head = words[0]
    if head in VERBS or (len(words) > 1 and words[-1] in PREPOSITIONS):
        return _synonym(" ".join([verb(head)[0], *words[1:]]), " ".join(words))
    return _synonym(" ".join([*words[:-1], singular(words[-1])]), " ".join(words))


def _synonym(*phrases: str) -> str:
    for phrase in phrases:
        if phrase in RELATION_SYNONYMS:
            return RELATION_SYNONYMS[phrase]
    return phrases[0]


def singular(noun: str) -> str:
    """Return the singular of a regular noun ("cities" -> "city")."""
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if noun.endswith(("ches", "shes", "xes", "sses")):
        return noun[:-2]
    if noun.endswith("s") and not noun.endswith(("ss", "us", "is")) and len(noun) > 3:
        return noun[:-1]
    return noun


def is_functional(relation: str) -> bool:
    """Return whether a relation holds one value at a time ("live in", "favourite colour")."""
    return relation in FUNCTIONAL or relation.startswith("favourite ")


# ---- words that steer the parse of a clause -----------------------------------------------------

# token -> auxiliary that it carries ("" = none); the speaker's own clauses
SPEAKER = {
    "i": "", "we": "", "i'm": "am", "im": "am", "i've": "have", "ive": "have", "i'll": "will",
    "i'd": "'d", "we're": "are", "we've": "have", "we'll": "will", "we'd": "'d",
}  # fmt: skip
LISTENER = {"you": "", "you're": "are", "you've": "have"}
OTHERS = {
    "he": "", "she": "", "they": "", "he's": "'s", "she's": "'s", "they're": "are",
    "they've": "have", "he'll": "will", "she'll": "will",
}  # fmt: skip
NOMINATIVE = frozenset(
    [*SPEAKER, *LISTENER, *OTHERS, "it", "it's", "that's", "there's", "there", "this", "it'll",
     "that'll", "they'd", "you'll", "you'd", "he'd", "she'd", "let's", "what's", "its"]
)  # fmt: skip
NEGATED = {
    "don't": "do", "doesn't": "does", "didn't": "did", "haven't": "have", "hasn't": "has",
    "hadn't": "had", "isn't": "is", "aren't": "are", "wasn't": "was", "weren't": "were",
    "won't": "will", "wouldn't": "would", "can't": "can", "cannot": "can", "couldn't": "could",
    "shouldn't": "should", "dont": "do", "didnt": "did", "cant": "can", "ain't": "is",
}  # fmt: skip
SINGULAR = {
    "am": "is", "are": "is", "were": "was", "have": "has", "do": "does", "don't": "doesn't",
    "haven't": "hasn't", "aren't": "isn't", "weren't": "wasn't", "dont": "doesn't", "'d": "would",
}  # fmt: skip
SKIPPED_MODALS = frozenset("could should might may must shall".split())
CUTS = frozenset(
    "but so because although though while when whenever if unless cuz cos coz whereas which".split()
)
SOFT_CUTS = frozenset("and or that who then before after until where as since plus".split())
HEADS = frozenset([*SPEAKER, *LISTENER, *OTHERS, "my", "our", "someone"])
PAST_FORMS = frozenset(word for word, (_, form) in VERBS.items() if form == "past")
NO_TOPIC = (
    (STOPWORDS | NOMINATIVE) - set(OTHERS) - (PAST_FORMS - AUXILIARIES) - {"been", "someone", "had"}
)
OPENERS = CONJUNCTIONS | ADVERBS | INTERJECTIONS | frozenset(
    "think guess say know believe mean realize realized hope recently lately guys man dude btw "
    "also".split()
)  # fmt: skip
INTENT = frozenset("want plan hope intend decide aim wish prepare hop".split())
ENDING = frozenset("stop quit finish cease".split())
PHASE = frozenset("start begin continue keep".split())
LONE = frozenset("retire graduate divorce relocate move resign".split())
COUNT_WORDS = {
    word: n for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split())
} | {"a": 1, "an": 1, "couple": 2, "few": 3}  # fmt: skip
DURATION_UNITS = {"day": 1, "week": 7, "month": 30, "year": 365}
QUIT_OBJECTS = frozenset("job position".split())
STATES = frozenset(
    "have like dislike live work know study speak allergic own belong play teach".split()
)

COPULA_RELATIONS = frozenset("like,from,allergic to,married to,engaged to,located in".split(","))
OPINION = frozenset("think guess mean bet suppose imagine hope wish believe".split())
BE = frozenset("am is are was were be been 's".split())
ALWAYS_FINITE = frozenset("lives works likes loves has had moved went is".split())
NOT_VERBS = (
    frozenset("'s a an the of and or but too as in on at if my your , . not".split()) | PREPOSITIONS
)
KEEPS_DATE = frozenset("since until till by before after from to of around between than".split())
PADDING = frozenset(
    "actually really just basically literally honestly definitely totally absolutely very so super "
    "pretty quite kinda simply truly certainly obviously well too both all".split()
)
TRAILING = frozenset(
    "and or but so that who which with to the a an as of then also at by for about '".split()
)
HYPOTHETICAL = frozenset("if what how than whether unless which who whom whose where".split())
LINKING = frozenset("then also finally even just recently already".split())
EMPTY = frozenset("it that this them 's one something lot lots bit".split())
PERSON_WORDS = {
    "my": "their", "our": "their", "us": "them", "ours": "theirs", "myself": "themself",
    "ourselves": "themselves", "i": "they", "we": "they", "i'm": "they are", "i've": "they have",
    "we're": "they are", "we've": "they have",
}  # fmt: skip
SKILLS = frozenset("play speak cook drive ride swim".split())
DURATION_WORDS = {u + s: d for u, d in DURATION_UNITS.items() for s in ("", "s")}

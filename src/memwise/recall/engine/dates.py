"""Time as integer microseconds (UTC), and the dates that people write in chats.

An `Instant` is an `int`: microseconds since 1970-01-01T00:00:00Z. Integers are exact, sort, and
survive a database; naive input is taken as UTC. `dates()` finds absolute and relative expressions
in English text and resolves them against an anchor to half-open intervals.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from memwise.errors import InvalidKnob

Instant = int

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

_EPOCH = datetime(1970, 1, 1)
_EPOCH_ORDINAL = _EPOCH.toordinal()
_FIRST = (date.min.toordinal() - _EPOCH_ORDINAL) * DAY
_LAST = (date.max.toordinal() + 1 - _EPOCH_ORDINAL) * DAY  # exclusive

_ACCEPTED = (
    "use ISO 8601 ('2026-05-02T10:30:00+02:00'), a date or datetime, epoch seconds, "
    "or a chat date ('1:56 pm on 8 May, 2023')"
)
_MONTHS = {
    name: number
    for number, names in enumerate(
        (
            ("january", "jan"),
            ("february", "feb"),
            ("march", "mar"),
            ("april", "apr"),
            ("may",),
            ("june", "jun"),
            ("july", "jul"),
            ("august", "aug"),
            ("september", "sep", "sept"),
            ("october", "oct"),
            ("november", "nov"),
            ("december", "dec"),
        ),
        start=1,
    )
    for name in names
}
_MONTH_WORD = r"(?P<month>[A-Za-z]{3,9})\.?"
_DAY_NUMBER = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_CLOCK = r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d)(?::(?P<second>\d\d))?)?\s?(?P<half>[ap]\.?m\.?)?"
_DATE_FORMS = (
    rf"{_DAY_NUMBER}(?: of)? {_MONTH_WORD},? (?P<year>\d{{4}})",
    rf"{_MONTH_WORD} {_DAY_NUMBER},? (?P<year>\d{{4}})",
    r"(?P<year>\d{4})[/.-](?P<month>\d{1,2})[/.-](?P<day>\d{1,2})(?: ?\([A-Za-z]{3,9}\))?",
)
_CHAT_DATES = tuple(
    re.compile(form, re.IGNORECASE)
    for date_form in _DATE_FORMS
    for form in (
        rf"(?:[A-Za-z]{{3,9}},? )?{date_form}(?:(?:,| at|, at)? {_CLOCK})?",
        rf"{_CLOCK}(?: on|,)? (?:[A-Za-z]{{3,9}},? )?{date_form}",
    )
)


def instant(at: str | int | float | datetime | date) -> Instant:
    """Return the instant of a time in any accepted form.

    Args:
        at: ISO 8601 text, a chat date ("8 May 2023", "2023/04/10 (Mon) 23:07"), a datetime or
            date (naive = UTC), or seconds since the epoch.

    Returns:
        Microseconds since the epoch, UTC; exact for text, datetimes and integers.

    Raises:
        InvalidKnob: if it is none of these, or outside the years 1 to 9999.
    """
    if isinstance(at, str):
        return _from_text(at)
    if isinstance(at, datetime):
        return _from_datetime(at)
    if isinstance(at, date):
        return (at.toordinal() - _EPOCH_ORDINAL) * DAY
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise InvalidKnob(f"at={at!r} ({type(at).__name__}) is not a time; {_ACCEPTED}")
    if isinstance(at, float) and not math.isfinite(at):
        raise InvalidKnob(f"at={at!r} is not a finite number of seconds; {_ACCEPTED}")
    t = at * SECOND if isinstance(at, int) else round(at * SECOND)
    return _within_years(t, at)


def iso(t: Instant) -> str:
    """Return an instant as ISO 8601 in UTC ("2026-05-02T00:00:00Z"), microseconds if nonzero.

    Raises:
        InvalidKnob: if the instant lies outside the years 1 to 9999.
    """
    _within_years(t, t)
    return (_EPOCH + timedelta(microseconds=t)).isoformat() + "Z"


def _within_years(t: int, given: object) -> int:
    if not _FIRST <= t < _LAST:
        shown = (
            repr(given) if not isinstance(given, int) or abs(given) < 10**30 else "a huge number"
        )
        raise InvalidKnob(
            f"at={shown} lies outside the years 1 to 9999; epoch times are in seconds "
            "(divide milliseconds by 1,000)"
        )
    return t


def _from_datetime(at: datetime) -> int:
    offset = at.utcoffset()
    since = at.replace(tzinfo=None) - _EPOCH
    if offset is not None:
        since -= offset
    return _within_years((since.days * 86_400 + since.seconds) * SECOND + since.microseconds, at)


def _from_text(text: str) -> int:
    try:
        return _from_datetime(datetime.fromisoformat(text))
    except ValueError:
        pass  # not ISO: chats write dates in other ways
    short = " ".join(text[:80].split())
    if len(text) <= 80:
        for form in _CHAT_DATES:
            match = form.fullmatch(short)
            if match is not None:
                t = _from_match(match)
                if t is not None:
                    return t
    raise InvalidKnob(f"at={short!r} is not a time that can be read; {_ACCEPTED}")


def _from_match(match: re.Match[str]) -> int | None:
    """Return the instant of a chat date, or None if its numbers name no time."""
    part = match.groupdict()
    month = _MONTHS.get(part["month"].lower()) if part["month"].isalpha() else int(part["month"])
    hour = int(part["hour"] or 0)
    if part["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if part["half"][0] in "pP" else 0)
    elif part["hour"] and not part["minute"]:
        return None  # a bare number beside a date is no clock time
    if month is None:
        return None
    clock = (hour, int(part["minute"] or 0), int(part["second"] or 0))
    try:
        return _from_datetime(datetime(int(part["year"]), month, int(part["day"]), *clock))
    except ValueError:
        return None


# ---- expressions in text -------------------------------------------------------------------------
#
# One pass of `_EXPRESSION` over the lower-cased text finds candidates; the name of the alternative
# that matched picks the rule that resolves it. Every repetition is bounded, so time is linear.


@dataclass(frozen=True, slots=True)
class DateSpan:
    """A date expression and the interval it names.

    Attributes:
        start: first instant.
        end: first instant after it (half-open).
        text: the matched characters.
        begin: index of the first matched character.
        stop: index after the last matched character.
    """

    start: int
    end: int
    text: str
    begin: int
    stop: int


_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_COUNTS = {
    word: n
    for n, words in enumerate(
        ("", "a an one", "two couple", "three few several", "four", "five", "six", "seven", "eight",
         "nine", "ten", "eleven", "twelve")
    )
    for word in words.split()
}  # fmt: skip
_SEASONS = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}  # first month, northern
_PARTS = {"morning": (6, 12), "afternoon": (12, 18), "evening": (18, 24), "night": (18, 24)}
_HOLIDAYS = {
    "christmas eve": (12, 24),
    "christmas": (12, 25),
    "new year's eve": (12, 31),
    "new year's": (1, 1),
    "new years": (1, 1),
    "halloween": (10, 31),
    "valentine's": (2, 14),
    "independence day": (7, 4),
}

_MONTH = (
    r"(?:january|february|march|april|may|june|july|august|september|october|november|december"
    r"|(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b\.?)"
)
_WEEKDAY = r"(?:mon|tues|wednes|thurs|fri|satur|sun)day"
_SHORT_DAY = r"(?:mon|tues?|wed|thu(?:rs?)?|fri|sat|sun)"
_PART = r"(?:morning|afternoon|evening|night)"
_SEASON = r"(?:spring|summer|autumn|fall|winter)"
_UNIT = r"(?:minute|hour|day|night|week|weekend|fortnight|month|year|yr|decade)"
_COUNT = (
    r"(?:\d{1,3}|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:a )?couple(?: of)?|(?:a )?few|several)"
)
_YEAR = r"(?:1[5-9]|20)\d\d"
_WHICH = r"(?:this past|this coming|last|past|previous|this|next|coming|upcoming)"
_RULES = (
    ("iso", 
        r"\d{4}-\d{2}-\d{2}(?:[t ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:z"
        r"|[+-]\d\d:?\d\d)?)?(?!\w)"),
    ("slash", r"(?:\d{4}/\d{1,2}/\d{1,2}|\d{1,2}/\d{1,2}/\d{4})(?![\w/])"),
    ("day_month", rf"(?:the )?\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}(?:,? {_YEAR})?(?!\w)"),
    ("month_day", 
        rf"{_MONTH} (?:the )?\d{{1,2}}(?:st|nd|rd|th)?(?![\d:]|(?:\.\d)| ?[ap]m)"
        rf"(?:,? {_YEAR})?(?!\w)"),
    ("month_year", rf"{_MONTH}(?: of)?,? {_YEAR}(?!\w)"),
    ("season_year", rf"{_SEASON}(?: of)? {_YEAR}(?!\w)"),
    ("day_word", 
        rf"(?:the )?(?:day (?:before yesterday|after tomorrow)|yesterday|today|tomorrow)"
        rf"(?: {_PART})?\b(?!'s (?:world|society|age))"),
    ("part", rf"(?:tonight|(?:this|last|tomorrow) {_PART})\b"),
    ("ago", rf"(?:{_COUNT}(?:(?: or |-| to ){_COUNT})?|an?) {_UNIT}s? (?:ago|back)\b"),
    (
        "rolling",
        rf"(?:last|past|next|coming|previous) {_COUNT} {_UNIT}s?\b|(?<=the )past {_UNIT}\b",
    ),
    ("hence", 
        rf"in (?:about |around |just )?(?:{_COUNT}|an?) {_UNIT}s?(?: time|' time)?\b|"
        rf"(?:{_COUNT}|an?) {_UNIT}s? from (?:now|today)\b"),
    ("edge", r"(?:beginning|start|middle|end) of (?:the|this|last|next) (?:week|month|year)\b"),
    ("which", 
        rf"{_WHICH} (?:week(?:end)?|month|year|decade|{_WEEKDAY}(?: {_PART})?|{_SHORT_DAY}\b"
        rf"|{_SEASON}|{_MONTH})\b"),
    ("weekend", r"(?:over|on|at|during) the weekend\b"),
    ("other_day", r"the other (?:day|night|week)\b"),
    ("weekday", rf"{_WEEKDAY}(?: {_PART})?\b|(?<=on ){_SHORT_DAY}\b"),
    ("holiday", 
        r"(?:last |this |next )?(?:christmas(?: eve| day)?|new year'?s(?: eve| day)?|halloween"
        r"|thanksgiving|valentine'?s(?: day)?|independence day)\b(?!')(?: (?:1[5-9]|20)\d\d\b)?"),
    ("season", 
        rf"(?:(?<=the ){_SEASON}\b|(?<=in ){_SEASON}\b|(?<=during ){_SEASON}\b)(?! "
        rf"(?:colou?rs?|leaves|foliage|semester|break|of\b))"),
    ("month", rf"{_MONTH}(?!\w)"),
    ("day_of_month", r"the \d{1,2}(?:st|nd|rd|th)\b(?! [a-z])"),
    ("decade", r"(?:early |late |mid-)?(?:the )?(?:(?:18|19|20)\d0s|'?[2-9]0s)\b"),
    ("year", 
        rf"{_YEAR}\b(?![-/:.]?\d|%| ?(?:people|dollars|words|steps|miles|calories|points|pieces"
        rf"|km))"),
    ("clock", 
        r"\d{1,2}(?::\d\d)? ?[ap](?:m\b|\.m\.)|(?<=at )\d{1,2}:\d\d\b|(?<=at )(?:noon"
        r"|midnight)\b"),
)  # fmt: skip
_OPENS = (  # how the first word of an expression begins: spares most words the alternatives below
    r"[0-9']|a(?:n? |pr|t |u[gt])|beg|c(?:om|ou|hr)|d(?:ay|ec|ur)|e(?:igh|nd|le|ar)"
    r"|f(?:eb|all|ri|our|iv|ew)|hall|in[ d]|j(?:an|u[nl])|la(?:st|te)|m(?:a[ry]|on|id)"
    r"|n(?:ext|ov|ew|oon|ine)|o(?:ct|ne|n |ver)|p(?:ast|rev)|s(?:ep|pr|um|at|un|ix|ev|ta)"
    r"|t(?:h|o[mnd]|ue|w[eo]|en)|upc|val|w(?:in|ed)|yes"
)
_EXPRESSION = re.compile(
    rf"(?<![\w$€£.,/])(?={_OPENS})(?:"
    + "|".join(f"(?P<{name}>{form})" for name, form in _RULES)
    + ")"
)
_STEMS = (
    "day", "week", "month", "year", "tomorrow", "night", "morning", "afternoon", "evening", "hour",
    "minute", "decade", "summer", "winter", "spring", "autumn", "fall ", "christmas", "halloween",
    "thanksg", "valentine", "noon", " jan", "febr", " feb ", "march", "april", " apr ", " may",
    "june", "july", "august", " aug ", "sept", "octob", " oct ", "novem", " nov ", "decem", " dec ",
)  # fmt: skip
_DIGIT = re.compile("[0-9]")
_FUTURE = re.compile(
    r"\b(?:will|won't|going to|gonna|plan|plans|planning|hope|hoping|want|upcoming|scheduled|soon"
    r"|can't wait|looking forward|excited for|getting ready|tomorrow|due|let's|next)\b|'ll\b"
)
_PAST = re.compile(
    r"\b(?:was|were|went|had|did|got|came|took|been|made|saw|met|won|lost|gave|last|since|ago"
    r"|bought|began|left|\w{2,12}ed)\b"
)
_BEFORE_MONTH = re.compile(
    r"\b(?:in|since|until|till|by|during|from|before|after|through|to|of|for|early|late|mid|around"
    r"|and|between|end|back in)[ -]$"
)
_BEFORE_YEAR = re.compile(
    r"\b(?:in|since|until|till|by|during|from|before|after|through|to|of|and|between|around|early"
    r"|late|mid|than|for|year|or)[ -](?:the year )?$|[(–-]$"
)
_BEFORE_DAY = re.compile(r"\b(?:on|until|till|by|since|from|before|after|to|of|for) $")
_OFFSET = re.compile(
    rf"(?:the )?(?:\b({_COUNT}|an?) )?\b({_UNIT}|{_WEEKDAY})s? (before|after|prior to|of) "
    rf"(?:the )?$"
)
_QUALIFIER = re.compile(
    r"(?:the )?(early|late|mid|beginning of|start of|middle of|end of)(?: in)?[ -](?:the )?$"
)
_JOIN = re.compile(r" ?(?:to|and|until|till|through|-|–) ?(?:the )?")
_OPENS_RANGE = re.compile(r"\b(?:from|between) (?:the )?$")
_HAS_YEAR = re.compile(r"\d{4}")
_STOPS = ".!?\n;"

Span = tuple[int, int]  # (start, end), instants


def dates(text: str, anchor: int) -> list[DateSpan]:
    """Return the date expressions of a text, resolved against an anchor.

    Weeks run from Monday to Sunday, so "last week" is the calendar week before the anchor's, and
    "last Friday" the latest Friday before the anchor's day. A day or month without a year takes
    its direction from the words of its sentence (past, future), else the nearest one. In
    7/4/2023 the month comes first unless that is impossible. Seasons are northern.

    Args:
        text: English text of any length.
        anchor: the instant at which it was said.

    Returns:
        Spans in the order of the text, not overlapping.
    """
    low = text.lower()
    if not _may_hold_date(low):
        return []
    if len(low) != len(text):  # a few letters grow when lowered, which would shift the indices
        low = text.translate(_ASCII_LOWER)
    found: list[DateSpan] = []
    for match in _EXPRESSION.finditer(low):
        scene = _Scene(low, match.start(), match.end(), anchor)
        try:
            span = _RESOLVE[match.lastgroup or ""](match.group(), scene)
            if span is None:
                continue
            begin, span = _qualified(span, scene)
        except (ValueError, OverflowError):  # 31 February, year 0
            continue
        if _FIRST <= span[0] < span[1] <= _LAST:
            found.append(DateSpan(*span, text[begin : match.end()], begin, match.end()))
    return _joined(found, text, low) if len(found) > 1 else found


def _may_hold_date(low: str) -> bool:
    for stem in _STEMS:  # substring tests cost a tenth of one search for all of them
        if stem in low:
            return True
    return _DIGIT.search(low) is not None


def spoken(start: int, end: int, anchor: int | None = None) -> str:
    """Return an interval in words with a preposition: "on 7 May 2023", "in July 2023".

    Args:
        start: first instant.
        end: first instant after it.
        anchor: when it was said; with it, the week and weekend just passed are written as
            "in the week before 9 June 2023".
    """
    first, after = divmod(start, DAY)[0], -(-end // DAY)
    day = _day_words(first)
    if after - first <= 1:
        return (
            f"on {day}"
            if start % DAY == 0 or end - start > 12 * HOUR
            else _with_part(start, end, day)
        )
    year, month, number = _civil(first)
    if (start, end) == _year(year):
        return f"in {year}"
    if (start, end) == _month(year, month):
        return f"in {_MONTH_NAMES[month - 1]} {year}"
    said = None if anchor is None else anchor // DAY
    if after - first == 7 and _weekday(first) == 0:
        if said is not None and after == said - _weekday(said):
            return f"in the week before {_day_words(said)}"
        return f"in the week of {day}"
    if after - first == 2 and _weekday(first) == 5:
        if said is not None and 0 <= said - after < 7:
            return f"on the weekend before {_day_words(said)}"
        return f"on the weekend of {day}"
    for name, opening in _SEASONS.items():
        if number == 1 and month == opening and (start, end) == _season(name, year):
            return f"in the {name} of {year}"
    if number == 1 and month == 1 and (start, end) == (_year(year)[0], _year(year + 9)[1]):
        return f"in the {year}s"
    return f"between {day} and {_day_words(after - 1)}"


_MONTH_NAMES = [
    name.capitalize() for name in _MONTHS if len(name) > 4 or name in ("may", "june", "july")
]
_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def _with_part(start: int, end: int, day: str) -> str:
    hour, minute = start % DAY // HOUR, start % HOUR // MINUTE
    if end - start == HOUR and minute == 0:
        return f"at {hour % 12 or 12} {'pm' if hour >= 12 else 'am'} on {day}"
    if end - start > HOUR and minute == 0:
        return f"on {day}"  # a morning, an afternoon
    return f"at {hour:02d}:{minute:02d} on {day}"


# ---- calendar arithmetic on day numbers (0 = 1970-01-01) -----------------------------------------


def _civil(day: int) -> tuple[int, int, int]:
    d = date.fromordinal(day + _EPOCH_ORDINAL)
    return d.year, d.month, d.day


def _number(year: int, month: int, day: int) -> int:
    return date(year, month, day).toordinal() - _EPOCH_ORDINAL


def _weekday(day: int) -> int:
    return (day + 3) % 7  # 1970-01-01 was a Thursday; Monday = 0


def _day_words(day: int) -> str:
    year, month, number = _civil(day)
    return f"{number} {_MONTH_NAMES[month - 1]} {year}"


def _days(first: int, n: int = 1) -> Span:
    return first * DAY, (first + n) * DAY


def _week(day: int, shift: int = 0) -> Span:
    return _days(day - _weekday(day) + 7 * shift, 7)


def _month(year: int, month: int, n: int = 1) -> Span:
    """Return `n` months from a month, which may lie outside 1..12."""
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    last = month + n - 1
    return (
        _number(year, month, 1) * DAY,
        _number(year + last // 12, last % 12 + 1, 1) * DAY,
    )


def _year(year: int, n: int = 1) -> Span:
    return _number(year, 1, 1) * DAY, _number(year + n, 1, 1) * DAY


def _season(name: str, year: int) -> Span:
    return _month(year, _SEASONS[name], 3)


def _weekend(day: int, shift: int = 0) -> Span:
    """Return the weekend of the day's week, `shift` weeks on."""
    return _days(day - _weekday(day) + 5 + 7 * shift, 2)


def _unit(name: str, day: int, shift: int, n: int = 1) -> Span:
    """Return `n` calendar units, the first one `shift` units from the one that holds the day."""
    year, month, _ = _civil(day)
    if name in ("day", "night"):
        return _days(day + shift, n)
    if name == "week":
        return _days(day - _weekday(day) + 7 * shift, 7 * n)
    if name == "fortnight":
        return _days(day - _weekday(day) + 14 * shift, 14 * n)
    if name == "weekend":
        return _weekend(day, shift)
    if name == "month":
        return _month(year, month + shift, n)
    if name == "decade":
        return _year(year + 10 * shift, 10 * n)
    return _year(year + shift, n)


# ---- resolving -----------------------------------------------------------------------------------


class _Scene:
    """Where an expression stands: the text, its character range, and the anchor's day."""

    __slots__ = ("anchor", "begin", "day", "low", "stop")

    def __init__(self, low: str, begin: int, stop: int, anchor: int) -> None:
        self.low, self.begin, self.stop, self.anchor = low, begin, stop, anchor
        self.day = anchor // DAY

    def before(self, n: int = 40) -> str:
        return self.low[max(0, self.begin - n) : self.begin]

    def direction(self) -> int:
        """Return -1 if the sentence tells of the past, 1 of the future, 0 if it is silent."""
        before = self.before(80)
        cut = max(before.rfind(stop) for stop in _STOPS)
        after = self.low[self.stop : self.stop + 60]
        ends = [i for i in map(after.find, _STOPS) if i >= 0]
        sentence = before[cut + 1 :] + after[: min(ends, default=60)]
        if _FUTURE.search(sentence) is not None:
            return 1
        return -1 if _PAST.search(sentence) is not None else 0


def _count(words: str) -> int:
    last = words.removesuffix(" of").split(" ")[-1]
    return int(last) if last.isdigit() else _COUNTS[last]


def _is_loose(words: str) -> bool:
    return "few" in words or "several" in words


def _part_of(day: int, part: str) -> Span:
    first, last = _PARTS[part]
    return day * DAY + first * HOUR, day * DAY + last * HOUR


def _iso(words: str, scene: _Scene) -> Span:
    t = instant(words.upper())
    if len(words) == 10:
        return _days(t // DAY)
    return t, t + (MINUTE if words.count(":") == 1 else SECOND)


def _slash(words: str, scene: _Scene) -> Span:
    a, b, c = map(int, words.split("/"))
    if a > 31:
        return _days(_number(a, b, c))
    month, day = (b, a) if a > 12 else (a, b)
    return _days(_number(c, month, day))


def _day_and_month(words: str, scene: _Scene) -> Span:
    numbers = [int(n) for n in re.findall(r"\d+", words)]
    name = next(w for w in re.findall(r"[a-z]+", words) if w in _MONTHS)
    month, day = _MONTHS[name], numbers[0]
    if len(numbers) == 2:
        return _days(_number(numbers[1], month, day))
    return _days(_nearest_day(scene, month, day))


def _nearest_day(scene: _Scene, month: int, day: int) -> int:
    year = _civil(scene.day)[0]
    choices = [_number(y, month, day) for y in (year - 1, year, year + 1)]
    return _choose(choices, scene.day, scene.direction())


def _choose(choices: list[int], day: int, direction: int) -> int:
    """Pick the nearest choice in a direction, or the nearest at all."""
    fits = [c for c in choices if direction * (c - day) >= 0]
    return min(fits or choices, key=lambda c: (abs(c - day), c))


def _month_and_year(words: str, scene: _Scene) -> Span:
    name, year = re.split(r"[ .,]+", words)[0], int(words[-4:])
    return _month(year, _MONTHS[name])


def _season_and_year(words: str, scene: _Scene) -> Span:
    return _season(words.split(" ")[0], int(words[-4:]))


def _day_word(words: str, scene: _Scene) -> Span:
    shift = {"yesterday": -1, "today": 0, "tomorrow": 1}
    parts = words.split(" ")
    word = next(w for w in parts if w in shift)
    day = scene.day + shift[word] * (2 if "day" in parts[:2] else 1)
    return _part_of(day, parts[-1]) if parts[-1] in _PARTS else _days(day)


def _part(words: str, scene: _Scene) -> Span:
    if words == "tonight":
        return _part_of(scene.day, "night")
    which, part = words.split(" ")
    return _part_of(scene.day + {"this": 0, "last": -1, "tomorrow": 1}[which], part)


def _ago(words: str, scene: _Scene) -> Span:
    pieces = re.split(r" or |-| to ", words.rsplit(" ", 1)[0])
    amount, unit = pieces[-1].rsplit(" ", 1)
    unit = unit.removesuffix("s")
    far = _count(amount)
    near = _count(pieces[0]) if len(pieces) > 1 else far
    if unit in ("minute", "hour"):
        size = MINUTE if unit == "minute" else HOUR
        return scene.anchor - far * size, scene.anchor - (near - 1) * size
    if _is_loose(amount):
        near, far = 2, 4 if "few" in amount else 6
    return _unit(unit, scene.day, -far)[0], _unit(unit, scene.day, -near)[1]


def _rolling(words: str, scene: _Scene) -> Span:
    parts = words.split(" ")
    unit = parts[-1].removesuffix("s")
    n = _count(" ".join(parts[1:-1])) if len(parts) > 2 else 1
    sign = 1 if parts[0] in ("next", "coming") else -1
    other = _shifted(unit, scene.anchor, sign * n)
    return (other, scene.anchor) if sign < 0 else (scene.anchor, other)


def _shifted(unit: str, t: int, n: int) -> int:
    """Return an instant `n` units away, at the start of its day (or exactly, below a day)."""
    if unit in ("minute", "hour"):
        return t + n * (MINUTE if unit == "minute" else HOUR)
    year, month, number = _civil(t // DAY)
    if unit in ("month", "year", "yr", "decade"):
        months = n * {"month": 1, "decade": 120}.get(unit, 12)
        start, end = _month(year, month + months)
        return min(start + (number - 1) * DAY, end - DAY)
    return (t // DAY + n * {"week": 7, "weekend": 7, "fortnight": 14}.get(unit, 1)) * DAY


def _hence(words: str, scene: _Scene) -> Span | None:
    match = re.search(rf"({_COUNT}|an?) ({_UNIT})", words)
    if match is None or (words.startswith("in ") and scene.direction() < 0):
        return None  # "I learnt it in two weeks" is a duration
    n, unit = _count(match[1]), match[2]
    if unit in ("minute", "hour"):
        t = _shifted(unit, scene.anchor, n)
        return t, t + MINUTE
    if _is_loose(match[1]):
        return _unit(unit, scene.day, 2)[0], _unit(unit, scene.day, 4)[1]
    return _unit(unit, scene.day, n)


def _edge(words: str, scene: _Scene) -> Span:
    parts = words.split(" ")
    whole = _unit(parts[-1], scene.day, {"last": -1, "next": 1}.get(parts[2], 0))
    return _third(whole, parts[0])


def _third(whole: Span, which: str) -> Span:
    """Return the early, middle or late part of a month, year or season; day-aligned."""
    year = _civil(whole[0] // DAY)[0]
    if whole == _year(year):
        return _month(
            year,
            1 if which.startswith(("early", "b", "s")) else 5 if which.startswith("mid") else 9,
            4,
        )
    first, after = whole[0] // DAY, whole[1] // DAY
    size = (after - first) // 3
    if which.startswith(("early", "beginning", "start")):
        return _days(first, size)
    if which.startswith("mid"):
        return first * DAY + size * DAY, (after - size) * DAY
    return (after - size) * DAY, after * DAY


def _which(words: str, scene: _Scene) -> Span:
    which, _, rest = words.rpartition(" ")
    part = None
    if rest in _PARTS:
        part, (which, _, rest) = rest, which.rpartition(" ")
    shift = -1 if which.split(" ")[-1] in ("last", "past", "previous") else 1
    now = which == "this"
    day = scene.day
    if rest in ("week", "month", "year", "decade"):
        return _unit(rest, day, 0 if now else shift)
    if rest == "weekend":
        return _which_weekend(day, now, shift, scene)
    if rest in _SEASONS or rest.rstrip(".") in _MONTHS:
        return _which_months(rest.rstrip("."), day, now, shift, scene)
    found = _which_weekday(rest, day, which, scene)
    return _part_of(found, part) if part else _days(found)


def _which_weekend(day: int, now: bool, shift: int, scene: _Scene) -> Span:
    if shift < 0:
        return _weekend(day, -1)
    if now and _weekday(day) < 5 and scene.direction() < 0:
        return _weekend(day, -1)
    return _weekend(day, 0 if now else 1)


def _which_months(name: str, day: int, now: bool, shift: int, scene: _Scene) -> Span:
    year, month, _ = _civil(day)
    spans = [_season(name, y) if name in _SEASONS else _month(y, _MONTHS[name]) for y in
             (year - 1, year, year + 1)]  # fmt: skip
    t = day * DAY
    if now:
        around = [s for s in spans if s[0] <= t < s[1]]
        return around[0] if around else spans[1]
    if shift < 0:
        return max(s for s in spans if s[1] <= t) if spans[0][1] <= t else _month(year - 2, month)
    return min(s for s in spans if s[0] > t)


def _which_weekday(name: str, day: int, which: str, scene: _Scene) -> int:
    target = next(i for i, full in enumerate(_WEEKDAYS) if full.startswith(name[:3]))
    back = (_weekday(day) - target) % 7 or 7
    if which == "this" and scene.direction() >= 0:
        return day + (target - _weekday(day)) % 7
    if which == "next":
        return day - _weekday(day) + 7 + target
    if which in ("this coming", "coming", "upcoming"):
        return day + 7 - back if back < 7 else day + 7
    return day - back


def _the_weekend(words: str, scene: _Scene) -> Span:
    if _weekday(scene.day) >= 5:
        return _weekend(scene.day)
    return _weekend(scene.day, 0 if scene.direction() > 0 else -1)


def _other_day(words: str, scene: _Scene) -> Span:
    return _days(scene.day - 7, 7)


def _a_weekday(words: str, scene: _Scene) -> Span:
    name, _, part = words.partition(" ")
    which = "this" if scene.direction() > 0 else "last"
    target = next(i for i, full in enumerate(_WEEKDAYS) if full.startswith(name[:3]))
    if target == _weekday(scene.day) and scene.direction() == 0:
        day = scene.day
    else:
        day = _which_weekday(name, scene.day, which, scene)
    return _part_of(day, part) if part else _days(day)


def _holiday(words: str, scene: _Scene) -> Span:
    which, year = words.split(" ")[0], int(words[-4:]) if words[-1].isdigit() else None
    this_year = _civil(scene.day)[0]
    choices = [_holiday_in(words, y) for y in range(this_year - 2, this_year + 2)]
    if year is not None:
        return _days(_holiday_in(words, year))
    if which == "last":
        return _days(max(d for d in choices if d < scene.day))
    if which == "next":
        return _days(min(d for d in choices if d > scene.day))
    return _days(_choose(choices, scene.day, scene.direction()))


def _holiday_in(words: str, year: int) -> int:
    if "thanksgiving" in words:  # the fourth Thursday of November
        first = _number(year, 11, 1)
        return first + (3 - _weekday(first)) % 7 + 21
    words = words.replace("valentines", "valentine's").replace("new years", "new year's")
    month, day = next(date for name, date in _HOLIDAYS.items() if name in words)
    return _number(year, month, day)


def _bare_season(words: str, scene: _Scene) -> Span:
    year = _civil(scene.day)[0]
    spans = {_season(words, y)[0] // DAY: _season(words, y) for y in (year - 1, year, year + 1)}
    return spans[_choose(list(spans), scene.day, scene.direction())]


def _bare_month(words: str, scene: _Scene) -> Span | None:
    if _BEFORE_MONTH.search(scene.before(12)) is None:
        return None
    year, month, _ = _civil(scene.day)
    wanted = _MONTHS[words.rstrip(".")]
    if wanted == month:
        return _month(year, month)
    firsts = [_number(y, wanted, 1) for y in (year - 1, year, year + 1)]
    first = _choose(firsts, scene.day, scene.direction())
    return _month(*_civil(first)[:2])


def _day_of_month(words: str, scene: _Scene) -> Span | None:
    if _BEFORE_DAY.search(scene.before(12)) is None:
        return None
    number = int(re.findall(r"\d+", words)[0])
    choices = []
    for shift in (-1, 0, 1):
        first, after = _unit("month", scene.day, shift)
        if (after - first) // DAY >= number >= 1:
            choices.append(first // DAY + number - 1)
    return _days(_choose(choices, scene.day, scene.direction())) if choices else None


def _decade(words: str, scene: _Scene) -> Span:
    number = int(re.findall(r"\d+", words)[0])
    year = number if number > 99 else 1900 + number
    whole = _year(year, 10)
    return _third(whole, words) if words.startswith(("early", "late", "mid")) else whole


def _bare_year(words: str, scene: _Scene) -> Span | None:
    return _year(int(words)) if _BEFORE_YEAR.search(scene.before(24)) else None


def _clock(words: str, scene: _Scene) -> Span:
    """Return a clock time of the anchor's day; `_joined` moves it to a date beside it."""
    start = scene.day * DAY
    if words in ("noon", "midnight"):
        return start + (12 * HOUR if words == "noon" else 0), start + (
            13 if words == "noon" else 1
        ) * HOUR
    numbers = [int(n) for n in re.findall(r"\d+", words)]
    hour = numbers[0]
    if words[-1] in "m.":
        if not 1 <= hour <= 12:
            raise ValueError(words)
        hour = hour % 12 + (12 if "p" in words else 0)
    minute = numbers[1] if len(numbers) > 1 else 0
    if hour > 23 or minute > 59:
        raise ValueError(words)
    start += hour * HOUR + minute * MINUTE
    return start, start + (MINUTE if len(numbers) > 1 else HOUR)


_RESOLVE: dict[str, Callable[[str, _Scene], Span | None]] = {
    "iso": _iso,
    "slash": _slash,
    "day_month": _day_and_month,
    "month_day": _day_and_month,
    "month_year": _month_and_year,
    "season_year": _season_and_year,
    "day_word": _day_word,
    "part": _part,
    "ago": _ago,
    "rolling": _rolling,
    "hence": _hence,
    "edge": _edge,
    "which": _which,
    "weekend": _the_weekend,
    "other_day": _other_day,
    "weekday": _a_weekday,
    "holiday": _holiday,
    "season": _bare_season,
    "month": _bare_month,
    "day_of_month": _day_of_month,
    "decade": _decade,
    "year": _bare_year,
    "clock": _clock,
}


def _qualified(span: Span, scene: _Scene) -> tuple[int, Span]:
    """Apply the words before a date ("the weekend before", "early"); return their begin."""
    before = scene.before()
    if not before.endswith((" ", "-")):
        return scene.begin, span
    match = _OFFSET.search(before)
    if match is not None:
        moved = _offset(match, span)
        if moved is not None:
            return scene.begin - len(before) + match.start(), moved
    match = _QUALIFIER.search(before)
    if match is not None and span[1] - span[0] > 20 * DAY:
        return scene.begin - len(before) + match.start(), _third(span, match[1])
    return scene.begin, span


def _offset(match: re.Match[str], span: Span) -> Span | None:
    amount, unit, side = match.groups()
    n = _count(amount) if amount else 1
    first, after = span[0] // DAY, -(-span[1] // DAY)
    if unit in _WEEKDAYS:
        target = _WEEKDAYS.index(unit)
        if side == "of":
            return None
        if side == "after":
            return _days(after + (target - _weekday(after)) % 7 + 7 * (n - 1))
        return _days(first - 1 - (_weekday(first - 1) - target) % 7 - 7 * (n - 1))
    if unit in ("minute", "hour"):
        return None
    if side == "of":
        return _unit(unit, first, 0) if unit in ("week", "weekend") and not amount else None
    if unit == "weekend":
        if side == "after":
            return _days(after + (5 - _weekday(after)) % 7 + 7 * (n - 1), 2)
        return _days(first - 2 - (_weekday(first - 2) - 5) % 7 - 7 * (n - 1), 2)
    return _unit(unit, first, -n) if side != "after" else _unit(unit, after - 1, n)


def _joined(found: list[DateSpan], text: str, low: str) -> list[DateSpan]:
    """Merge a clock time with the date beside it, and the two ends of a range."""
    out: list[DateSpan] = []
    for span in found:
        if out:
            last = out[-1]
            if span.begin < last.stop:
                out[-1] = span  # "Friday" gives way to "the Friday before 15 July"
                continue
            merged = _merged(last, span, low)
            if merged is not None:
                stop = span.stop
                out[-1] = DateSpan(*merged, text[last.begin : stop], last.begin, stop)
                continue
        out.append(span)
    return out


def _first_end(a: DateSpan, b: DateSpan) -> int:
    """Return where a range starts; in "3 June to 5 June 2020" it takes the year of its end."""
    if _HAS_YEAR.search(a.text) is None and _HAS_YEAR.search(b.text) is not None:
        again = dates(f"from {a.text}", b.start)
        if again and again[0].start <= b.start:
            return again[0].start
    return a.start


def _merged(a: DateSpan, b: DateSpan, low: str) -> Span | None:
    gap = low[a.stop : b.begin]
    if len(gap) > 9:
        return None
    a_clock, b_clock = a.end - a.start <= HOUR, b.end - b.start <= HOUR
    if a_clock != b_clock and gap.strip(" ,") in ("", "on", "at"):
        clock, day = (a, b) if a_clock else (b, a)
        if day.end - day.start <= DAY:
            start = day.start // DAY * DAY + clock.start % DAY
            return start, start + clock.end - clock.start
        return None
    if a_clock and b_clock and _JOIN.fullmatch(gap) and a.start < b.start:
        return a.start, b.start
    if _JOIN.fullmatch(gap) and (a.start < b.end or _HAS_YEAR.search(a.text) is None):
        opens = _OPENS_RANGE.search(low[max(0, a.begin - 14) : a.begin])
        if opens is not None or gap.strip() not in ("and", "to"):
            return _first_end(a, b), b.end
    return None

"""Instants in and out, and date expressions against answers worked out by hand."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwise.errors import InvalidKnob
from memwise.recall.engine.dates import DAY, HOUR, dates, instant, iso, spoken

ANCHOR = instant("2023-05-08T13:56:00Z")  # a Monday


def day(text: str) -> int:
    return instant(text)


# ---- instants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        "2023-05-08T13:56:00Z",
        "2023-05-08 13:56",
        "2023-05-08T15:56:00+02:00",
        "1:56 pm on 8 May, 2023",
        "1:56 PM on May 8, 2023",
        "8 May 2023 13:56",
        "8th of May 2023, 1:56 pm",
        "2023/05/08 (Mon) 13:56",
        "Monday, May 8, 2023 at 1:56 p.m.",
        1_683_554_160,
        1_683_554_160.0,
        datetime(2023, 5, 8, 13, 56),
        datetime(2023, 5, 8, 13, 56, tzinfo=UTC),
        datetime(2023, 5, 8, 8, 56, tzinfo=timezone(timedelta(hours=-5))),
    ],
)
def test_all_accepted_forms_name_the_same_instant(at):
    assert instant(at) == ANCHOR


@pytest.mark.parametrize(
    "at", ["8 May 2023", "May 8, 2023", "2023-05-08", "2023/5/8", "20230508", date(2023, 5, 8)]
)
def test_a_date_is_its_first_instant(at):
    assert iso(instant(at)) == "2023-05-08T00:00:00Z"


@pytest.mark.parametrize(
    "at",
    [
        "",
        "soon",
        "8 Mai 2023",
        "31 February 2023",
        "13:61 pm on 8 May 2023",
        "May 2023",
        "\x00",
        "25 pm on 8 May 2023",
        "2023-13-01",
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        None,
        [],
        b"2023",
        10**18,
        -(10**18),
        10**5000,
        1e300,
        "9" * 100_000,
    ],
    ids=lambda at: f"{type(at).__name__}{str(at)[:9] if not isinstance(at, int) else ''}",
)
def test_what_is_no_time_is_refused_and_says_what_is_accepted(at):
    with pytest.raises(InvalidKnob) as caught:
        instant(at)
    assert "at=" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_times_outside_the_years_1_to_9999_are_refused():
    with pytest.raises(InvalidKnob):
        instant(datetime.min.replace(tzinfo=timezone(timedelta(hours=1))))
    with pytest.raises(InvalidKnob):
        iso(instant("9999-12-31") + DAY)


@given(st.integers(instant("0001-01-01"), instant("9999-12-31") + DAY - 1))
@settings(derandomize=True, deadline=None)
def test_writing_and_reading_an_instant_gives_it_back(t):
    assert instant(iso(t)) == t


@given(st.datetimes(timezones=st.timezones() | st.none()).filter(lambda d: 2 < d.year < 9998))
@settings(derandomize=True, deadline=None)
def test_a_datetime_keeps_its_microseconds_and_its_zone(moment):
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    expected = (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert instant(moment) == expected


def test_microseconds_show_only_if_there_are_any():
    assert iso(0) == "1970-01-01T00:00:00Z"
    assert iso(-1) == "1969-12-31T23:59:59.999999Z"


# ---- expressions ---------------------------------------------------------------------------------

DAYS = [  # text, first day, last day (both included)
    ("I left yesterday.", "2023-05-07", "2023-05-07"),
    ("today was fine", "2023-05-08", "2023-05-08"),
    ("see you tomorrow", "2023-05-09", "2023-05-09"),
    ("the day before yesterday", "2023-05-06", "2023-05-06"),
    ("the day after tomorrow", "2023-05-10", "2023-05-10"),
    ("three days ago", "2023-05-05", "2023-05-05"),
    ("a few days ago", "2023-05-04", "2023-05-06"),
    ("2-3 weeks ago", "2023-04-17", "2023-04-30"),
    ("a week ago", "2023-05-01", "2023-05-07"),
    ("two weeks ago", "2023-04-24", "2023-04-30"),
    ("a couple of weeks ago", "2023-04-24", "2023-04-30"),
    ("two weekends ago", "2023-04-29", "2023-04-30"),
    ("two months ago", "2023-03-01", "2023-03-31"),
    ("5 months back", "2022-12-01", "2022-12-31"),
    ("a year ago", "2022-01-01", "2022-12-31"),
    ("10 years ago", "2013-01-01", "2013-12-31"),
    ("last week", "2023-05-01", "2023-05-07"),
    ("this week", "2023-05-08", "2023-05-14"),
    ("next week", "2023-05-15", "2023-05-21"),
    ("last month", "2023-04-01", "2023-04-30"),
    ("this month", "2023-05-01", "2023-05-31"),
    ("next month", "2023-06-01", "2023-06-30"),
    ("last year", "2022-01-01", "2022-12-31"),
    ("next year", "2024-01-01", "2024-12-31"),
    ("last Friday", "2023-05-05", "2023-05-05"),
    ("last Monday", "2023-05-01", "2023-05-01"),
    ("next Friday", "2023-05-19", "2023-05-19"),
    ("this Friday", "2023-05-12", "2023-05-12"),
    ("this past Saturday", "2023-05-06", "2023-05-06"),
    ("We met on Friday.", "2023-05-05", "2023-05-05"),
    ("We will meet on Friday.", "2023-05-12", "2023-05-12"),
    ("last weekend", "2023-05-06", "2023-05-07"),
    ("this weekend", "2023-05-13", "2023-05-14"),
    ("I slept over the weekend", "2023-05-06", "2023-05-07"),
    ("next weekend", "2023-05-20", "2023-05-21"),
    ("the other day", "2023-05-01", "2023-05-07"),
    ("8 May 2021", "2021-05-08", "2021-05-08"),
    ("on the 4th of July, 2021", "2021-07-04", "2021-07-04"),
    ("July 4, 2021", "2021-07-04", "2021-07-04"),
    ("Feb 29, 2024", "2024-02-29", "2024-02-29"),
    ("2021-07-04", "2021-07-04", "2021-07-04"),
    ("2021/7/4", "2021-07-04", "2021-07-04"),
    ("7/4/2021", "2021-07-04", "2021-07-04"),
    ("14/7/2021", "2021-07-14", "2021-07-14"),
    ("I went there on 4 July.", "2022-07-04", "2022-07-04"),
    ("I will go there on 4 July.", "2023-07-04", "2023-07-04"),
    ("on 2 May", "2023-05-02", "2023-05-02"),
    ("it was in October", "2022-10-01", "2022-10-31"),
    ("it will be in October", "2023-10-01", "2023-10-31"),
    ("in July 2020", "2020-07-01", "2020-07-31"),
    ("last July", "2022-07-01", "2022-07-31"),
    ("next March", "2024-03-01", "2024-03-31"),
    ("early June 2022", "2022-06-01", "2022-06-10"),
    ("in late 2021", "2021-09-01", "2021-12-31"),
    ("at the end of last month", "2023-04-21", "2023-04-30"),
    ("in 2022", "2022-01-01", "2022-12-31"),
    ("since 2016", "2016-01-01", "2016-12-31"),
    ("in the 1990s", "1990-01-01", "1999-12-31"),
    ("back in the 80s", "1980-01-01", "1989-12-31"),
    ("last summer", "2022-06-01", "2022-08-31"),
    ("next winter", "2023-12-01", "2024-02-29"),
    ("in the spring of 2021", "2021-03-01", "2021-05-31"),
    ("last Christmas", "2022-12-25", "2022-12-25"),
    ("Halloween 2021", "2021-10-31", "2021-10-31"),
    ("last Thanksgiving", "2022-11-24", "2022-11-24"),
    ("New Year's Eve 2021", "2021-12-31", "2021-12-31"),
    ("the weekend before 8 May 2023", "2023-05-06", "2023-05-07"),
    ("two weekends before 17 July 2023", "2023-07-08", "2023-07-09"),
    ("the week before 9 June 2023", "2023-05-29", "2023-06-04"),
    ("the week of 23 August 2023", "2023-08-21", "2023-08-27"),
    ("the Friday before 15 July 2023", "2023-07-14", "2023-07-14"),
    ("the Sunday after 3 May 2023", "2023-05-07", "2023-05-07"),
    ("the day after 28 February 2024", "2024-02-29", "2024-02-29"),
    ("a month before 3 March 2024", "2024-02-01", "2024-02-29"),
    ("between 2019 and 2021", "2019-01-01", "2021-12-31"),
    ("from 3 June to 5 June 2020", "2020-06-03", "2020-06-05"),
    ("We will start in three days.", "2023-05-11", "2023-05-11"),
    ("two weeks from now", "2023-05-22", "2023-05-28"),
    ("on the 2nd", "2023-05-02", "2023-05-02"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "first", "last"), DAYS)
def test_an_expression_resolves_to_the_days_counted_by_hand(text, first, last):
    (span,) = dates(text, ANCHOR)
    assert (iso(span.start), iso(span.end)) == (iso(day(first)), iso(day(last) + DAY))
    assert text[span.begin : span.stop] == span.text


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("this morning", "2023-05-08T06:00", "2023-05-08T12:00"),
        ("last night", "2023-05-07T18:00", "2023-05-08T00:00"),
        ("tonight", "2023-05-08T18:00", "2023-05-09T00:00"),
        ("yesterday afternoon", "2023-05-07T12:00", "2023-05-07T18:00"),
        ("at 5 pm yesterday", "2023-05-07T17:00", "2023-05-07T18:00"),
        ("1:56 pm on 8 May, 2020", "2020-05-08T13:56", "2020-05-08T13:57"),
        ("2020-05-08T13:56:07Z", "2020-05-08T13:56:07", "2020-05-08T13:56:08"),
        ("from 9 am to 5 pm", "2023-05-08T09:00", "2023-05-08T17:00"),
        ("two hours ago", "2023-05-08T11:56", "2023-05-08T12:56"),
        ("over the last three years", "2020-05-08", "2023-05-08T13:56"),
        ("in the past month", "2023-04-08", "2023-05-08T13:56"),
    ],
)
def test_times_of_day_and_rolling_windows_resolve_to_the_minute(text, start, end):
    (span,) = dates(text, ANCHOR)
    assert (span.start, span.end) == (instant(start), instant(end))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I may go",
        "march on!",
        "2022 people came",
        "it cost $2022",
        "on Mondays",
        "99 problems",
        "31 February 2023",
        "a nice daydream",
        "section 3.5.2",
        "he sat",
        "call 555-2020-11",
    ],
)
def test_words_that_only_look_like_dates_are_left_alone(text):
    assert dates(text, ANCHOR) == []


def test_several_dates_stand_in_order_and_do_not_overlap():
    spans = dates("I was in Rome last week, in Paris in 2019 and I fly on 3 June 2023.", ANCHOR)
    assert [s.text for s in spans] == ["last week", "2019", "3 June 2023"]
    assert all(a.stop <= b.begin for a, b in pairwise(spans))


def test_indices_hold_where_lower_case_is_longer_than_upper_case():
    text = "İİİ came YESTERDAY"
    (span,) = dates(text, ANCHOR)
    assert text[span.begin : span.stop] == "YESTERDAY"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("yesterday", "on 7 May 2023"),
        ("last week", "in the week before 8 May 2023"),
        ("last weekend", "on the weekend before 8 May 2023"),
        ("next month", "in June 2023"),
        ("last year", "in 2022"),
        ("last summer", "in the summer of 2022"),
        ("in the 90s", "in the 1990s"),
        ("at 5 pm yesterday", "at 5 pm on 7 May 2023"),
        ("a few weeks ago", "between 10 April 2023 and 30 April 2023"),
    ],
)
def test_an_interval_is_spoken_with_absolute_dates_that_read_back_the_same(text, words):
    (span,) = dates(text, ANCHOR)
    assert spoken(span.start, span.end, ANCHOR) == words
    (again,) = dates(words, 0)
    assert again.start == span.start
    assert again.end == span.end


@given(st.text(max_size=200), st.integers(instant("0001-01-01"), instant("9999-12-31")))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_any_text_at_any_time_gives_proper_intervals(text, anchor):
    for span in dates(text + " last week, 2 months ago, on 3 May, next Friday", anchor):
        assert span.start < span.end
        assert 0 <= span.begin < span.stop


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1 ",
        "the ",
        "last ",
        "a week before ",
        "may ",
        "2020-",
        "1/",
        "two or ",
        "\x00",
        "in the ",
    ],
)
def test_long_hostile_text_is_read_in_linear_time(piece):
    text = piece * (200_000 // len(piece))
    assert all(s.end - s.start >= HOUR or s.end > s.start for s in dates(text, ANCHOR))

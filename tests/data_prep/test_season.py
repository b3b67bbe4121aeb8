from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from biomass_jax.errors import PrepError
from data_prep.season import Season, resolve_season, season_of_year

SUMMER = Season(date(2020, 6, 1), date(2020, 9, 16))


def test_text_and_back():
    assert SUMMER.text == "2020-06-01/2020-09-16"
    assert Season.parse("2020-06-01/2020-09-16") == SUMMER


def test_the_first_moment_is_inside_and_the_last_is_not():
    assert SUMMER.contains(datetime(2020, 6, 1, tzinfo=UTC))
    assert not SUMMER.contains(datetime(2020, 5, 31, 23, 59, 59, 999999, tzinfo=UTC))
    assert SUMMER.contains(datetime(2020, 9, 15, 23, 59, 59, 999999, tzinfo=UTC))
    assert not SUMMER.contains(datetime(2020, 9, 16, tzinfo=UTC))
    assert SUMMER.bounds == (datetime(2020, 6, 1, tzinfo=UTC), datetime(2020, 9, 16, tzinfo=UTC))


def test_moments_are_compared_in_utc():
    east = timezone(timedelta(hours=5))
    assert not SUMMER.contains(datetime(2020, 6, 1, 4, 59, tzinfo=east))
    assert SUMMER.contains(datetime(2020, 6, 1, 5, 0, tzinfo=east))
    assert SUMMER.contains(datetime(2020, 6, 1, 0, 0))  # without a zone: UTC


@pytest.mark.parametrize(
    ("latitude", "expected"),
    [
        (64.4, "2020-06-01/2020-09-16"),
        (50.0, "2020-06-01/2020-09-16"),
        (49.999, "2020-05-01/2020-10-01"),
        (23.5, "2020-05-01/2020-10-01"),
        # dry in the tropics, while the rain belt is beyond the equator
        (23.499, "2019-12-01/2020-04-01"),
        (12.0, "2019-12-01/2020-04-01"),
        (5.0, "2019-12-01/2020-04-01"),
        (4.999, "2020-01-01/2021-01-01"),
        (0.0, "2020-01-01/2021-01-01"),
        (-5.0, "2020-01-01/2021-01-01"),
        (-5.001, "2020-06-01/2020-10-01"),
        (-17.0, "2020-06-01/2020-10-01"),
        (-23.5, "2020-06-01/2020-10-01"),
        (-23.501, "2019-11-01/2020-04-01"),
        (-80.0, "2019-11-01/2020-04-01"),
    ],
)
def test_season_of_a_year_by_latitude(latitude, expected):
    assert season_of_year(2020, latitude).text == expected
    assert resolve_season("2020", latitude).text == expected


def test_the_whole_year_in_the_tropics_is_a_table_away():
    table = [(50, "06-01", "09-16"), (23.5, "05-01", "10-01"), (-23.5, "01-01", "01-01", 0, 1)]
    table += [(-90, "11-01", "04-01", -1, 0)]
    for latitude in (-23.5, -10.0, 10.0, 23.499):
        assert season_of_year(2020, latitude, table).text == "2020-01-01/2021-01-01"
    for latitude in (-60.0, -23.501, 23.5, 49.0, 50.0):
        assert season_of_year(2020, latitude, table) == season_of_year(2020, latitude)


def test_a_table_of_ones_own_in_any_order():
    table = [[-90, "03-01", "03-02"], [10.5, "12-01", "02-01", -1, 0]]
    assert season_of_year(2021, 10.5, table).text == "2020-12-01/2021-02-01"
    assert season_of_year(2021, 10.4, table).text == "2021-03-01/2021-03-02"


def test_dates_need_no_latitude_and_a_year_does():
    assert resolve_season(" 2020-06-01/2020-09-16 ") == SUMMER
    with pytest.raises(PrepError, match="needs a latitude"):
        resolve_season("2020")


@pytest.mark.parametrize(
    "text", ["", "summer", "2020-06-01", "2020-06-01/2020-09", "2020-06-01/2020-09-31", "2020-06-01/2020-09-16/2021"]
)
def test_texts_that_are_no_season(text):
    with pytest.raises(PrepError, match="expected START/STOP"):
        Season.parse(text)


@pytest.mark.parametrize(
    "given",
    [
        "20200601/20200916",
        "2020.06.01/2020.09.16",
        "2020/06/01/2020/09/16",
        "2020-6-1 / 2020-9-16",
        "2020-06-01 to 2020-09-16",
        "2020-06-01..2020-09-16",
        "2020-06-01T00:00:00Z/2020-09-16T00:00:00.000Z",
        ("2020-06-01", "2020-09-16"),
        [date(2020, 6, 1), datetime(2020, 9, 16)],
    ],
)
def test_dates_in_other_formats_with_the_year_first(given):
    assert Season.parse(given) == resolve_season(given) == SUMMER


@pytest.mark.parametrize(
    "given",
    [
        "06/01/2020/09/16/2020",  # months or days first: nobody knows
        "01.06.2020/16.09.2020",
        "2020-06-01T12:00:00Z/2020-09-16T00:00:00Z",
        "2020-06-01/2020-09-15T23:59:59Z",
        "2020061/2020260",
        2020.5,
        None,
        ("2020-06-01",),
    ],
)
def test_dates_that_may_mean_two_things_are_refused(given):
    with pytest.raises(PrepError, match="expected START/STOP"):
        Season.parse(given)


def test_a_year_may_be_a_number():
    assert resolve_season(2020, 64.4) == SUMMER


@pytest.mark.parametrize("text", ["2020-06-01/2020-06-01", "2020-06-02/2020-06-01"])
def test_empty_intervals(text):
    with pytest.raises(PrepError, match="empty"):
        Season.parse(text)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([[0, "01-01"]], "can't read the line"),
        ([["north", "01-01", "02-01"]], "can't read the line"),
        ([[0, "1-1", "02-01"]], "start '1-1' of the line at latitude 0"),
        ([[0, "01-01", "02-30"]], "stop '02-30' of the line at latitude 0"),
        ([[0, "01-01", "02-01"], [0, "03-01", "04-01"]], "two lines"),
        ([[30, "01-01", "02-01"]], "no line holds at latitude 10"),
    ],
)
def test_tables_that_cannot_be_used(table, says):
    with pytest.raises(PrepError, match=says):
        season_of_year(2020, 10.0, table)


def test_label_years_add_the_same_days_of_years_either_side():
    assert SUMMER.widened() == [SUMMER]
    assert [season.text for season in SUMMER.widened(1)] == [
        "2019-06-01/2019-09-16",
        "2020-06-01/2020-09-16",
        "2021-06-01/2021-09-16",
    ]
    southern = Season.parse("2019-11-01/2020-04-01").widened(1)
    assert [season.text for season in southern] == [
        "2018-11-01/2019-04-01",
        "2019-11-01/2020-04-01",
        "2020-11-01/2021-04-01",
    ]
    leap = Season.parse("2020-02-29/2020-03-05").widened(1)
    assert [season.text for season in leap] == [
        "2019-03-01/2019-03-05",
        "2020-02-29/2020-03-05",
        "2021-03-01/2021-03-05",
    ]
    with pytest.raises(PrepError, match="label_years is -1"):
        SUMMER.widened(-1)

"""Seasons: half-open intervals of UTC dates, one for the scenes of a composite and the shots of its labels alike."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import NamedTuple

from biomass_jax.errors import PrepError

_MONTH_DAY = re.compile(r"(\d{2})-(\d{2})")
_DATE = re.compile(
    r"(\d{4})(?:([-./])(\d{1,2})\2(\d{1,2})|(\d{2})(\d{2}))(?:[T ]00:00(?::00(?:\.0+)?)?(?:Z|\+00:00)?)?"
)


class SeasonRow(NamedTuple):
    """One line of a table of seasons: what holds from a latitude on northwards, up to the next line's."""

    south: float  # the southernmost latitude in degrees, itself included
    start: str  # first day, `MM-DD`
    stop: str  # the day after the last, `MM-DD`
    start_year: int = 0  # added to the season's year for `start`; -1 where the season begins in the year before
    stop_year: int = 0  # the same for `stop`; 1 where it ends in the year after


# Leaf-on by latitude, in the tropics the dry months. The reference says no months: boreal May is snow and leaf-out, and
# the southern summer spans two years. The tropics have no leaf-on months; the rain belt lies in the southern ones from
# about November to March, in the northern ones from May to September (Nicholson 2018, BAMS 99, 337), and clouds with
# it. It crosses the equator twice, so there the year stays whole. A line's latitude belongs to it.
DEFAULT_TABLE: tuple[SeasonRow, ...] = (
    SeasonRow(50.0, "06-01", "09-16"),
    SeasonRow(23.5, "05-01", "10-01"),
    SeasonRow(5.0, "12-01", "04-01", -1, 0),
    SeasonRow(-5.0, "01-01", "01-01", 0, 1),
    SeasonRow(-23.5, "06-01", "10-01"),
    SeasonRow(-90.0, "11-01", "04-01", -1, 0),
)


@dataclass(frozen=True, order=True)
class Season:
    """UTC dates from `start` to the day before `stop`.

    Raises:
        PrepError: `stop` is not after `start`.
    """

    start: date
    stop: date

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise PrepError(f"season {self.text} is empty: its end (not included) has to be after its start")

    @classmethod
    def parse(cls, text: object) -> "Season":
        """The season written as `2020-06-01/2020-09-16`, or as a list of two dates.

        Years come first; points, slashes or nothing may stand between the parts of a date, and midnight (UTC) behind.

        Raises:
            PrepError: anything else, or an empty interval.
        """
        parts = [str(part) for part in text] if isinstance(text, list | tuple) else _parts(str(text).strip())
        days = [_date(part.strip()) for part in parts]
        if len(days) != 2 or days[0] is None or days[1] is None:
            raise PrepError(
                f"season {text!r} is not two dates; expected START/STOP as in 2020-06-01/2020-09-16 (STOP not included)"
            )
        return cls(days[0], days[1])

    @property
    def text(self) -> str:
        """`2020-06-01/2020-09-16`; the second date is the first that no longer belongs to it."""
        return f"{self.start:%Y-%m-%d}/{self.stop:%Y-%m-%d}"

    @property
    def bounds(self) -> tuple[datetime, datetime]:
        """First moment, and the first that no longer belongs to it, in UTC."""
        return datetime.combine(self.start, time(), UTC), datetime.combine(self.stop, time(), UTC)

    def contains(self, moment: datetime) -> bool:
        """Whether a moment lies inside; one without a time zone is taken as UTC."""
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        start, stop = self.bounds
        return start <= moment < stop

    def widened(self, label_years: int = 0) -> list["Season"]:
        """This season and the same days of `label_years` years before and after it, in order of time.

        For shots alone: forests change less in a year than there are shots in one season. A 29 February becomes
        1 March in other years.

        Raises:
            PrepError: `label_years` is negative.
        """
        if label_years < 0:
            raise PrepError(f"label_years is {label_years}; expected 0 (this season alone) or more years either side")
        return [
            Season(_other_year(self.start, years), _other_year(self.stop, years))
            for years in range(-label_years, label_years + 1)
        ]


def _parts(text: str) -> list[str]:
    """The two dates of a season: at a slash, `to` or two points; of dates with slashes at the one in the middle."""
    fields = text.split("/")
    if len(fields) == 6:
        return ["/".join(fields[:3]), "/".join(fields[3:])]
    return fields if len(fields) > 1 else re.split(r"\s+to\s+|\.\.", text)


def _date(text: str) -> date | None:
    """A date, year first; None for anything else."""
    found = _DATE.fullmatch(text)
    try:
        return date(int(found[1]), int(found[3] or found[5]), int(found[4] or found[6])) if found else None
    except ValueError:
        return None


def _other_year(day: date, years: int) -> date:
    try:
        return day.replace(year=day.year + years)
    except ValueError:  # 29 February
        return date(day.year + years, 3, 1)


def season_of_year(year: int, latitude: float, table: Iterable[Sequence] = DEFAULT_TABLE) -> Season:
    """The season of a year at a latitude.

    Args:
        year: the season's year; one that spans two, as a southern summer, belongs to the year it ends in.
        latitude: of the tile's centre in degrees north.
        table: SeasonRows, or lists of their fields, in any order; the first at or south of the latitude holds.

    Raises:
        PrepError: a line that can't be read, two lines for one latitude, or a latitude that no line reaches.
    """
    rows = sorted((_row(line) for line in table), key=lambda row: row.south, reverse=True)
    souths = [row.south for row in rows]
    if len(set(souths)) != len(souths):
        raise PrepError(f"season table: two lines begin at one latitude: {souths}; expected one for each")
    for row in rows:
        if latitude >= row.south:
            return Season(_day(row, "start", year), _day(row, "stop", year))
    raise PrepError(f"season table: no line holds at latitude {latitude:.4f}; its lines begin at {souths}")


def resolve_season(text: object, latitude: float | None = None, table: Iterable[Sequence] = DEFAULT_TABLE) -> Season:
    """The season that a setting names: a year (by latitude and table) or `START/STOP`.

    Raises:
        PrepError: neither, or a year where no latitude is known.
    """
    year = str(text).strip()
    if not re.fullmatch(r"\d{4}", year):
        return Season.parse(text)
    if latitude is None:
        raise PrepError(f"season {year} is a year, which needs a latitude; give dates as in 2020-06-01/2020-09-16")
    return season_of_year(int(year), latitude, table)


def _row(line: Sequence) -> SeasonRow:
    try:
        row = SeasonRow(*line)
        return row._replace(south=float(row.south), start_year=int(row.start_year), stop_year=int(row.stop_year))
    except (TypeError, ValueError) as error:
        raise PrepError(
            f"season table: can't read the line {line!r}; expected (southernmost latitude, 'MM-DD', 'MM-DD', "
            "years added to the first = 0, to the second = 0)"
        ) from error


def _day(row: SeasonRow, field: str, year: int) -> date:
    text, year = getattr(row, field), year + getattr(row, f"{field}_year")
    match = _MONTH_DAY.fullmatch(str(text))
    try:
        if match is None:
            raise ValueError("not MM-DD")
        return date(year, int(match[1]), int(match[2]))
    except ValueError as error:
        raise PrepError(
            f"season table: {field} {text!r} of the line at latitude {row.south:g} is no day of {year}; expected MM-DD"
        ) from error

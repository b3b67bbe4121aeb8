"""What every step of a conversion raises, and how it lists names."""

from collections.abc import Iterable


class ConvertError(ValueError):
    """A checkpoint, a flag or a bundle that cannot be converted; the message is for the user."""


def name_list(names: Iterable[str], limit: int = 20) -> str:
    """Names in one line, the tail of a long list as a count."""
    names = list(names)
    if not names:
        return "none"
    more = f" ... and {len(names) - limit} more ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

"""The one error of data preparation that is shown to users as a line without a traceback."""


class PrepError(ValueError):
    """Input or settings that a step can't work with; the message names file, field, what was found and expected."""

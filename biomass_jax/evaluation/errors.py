"""The error of a run that can't be done as asked."""


class EvaluationError(ValueError):
    """A setting is wrong, the bundle doesn't fit the data, or the model gave no number where it is scored."""

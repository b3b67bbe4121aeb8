"""Errors of training whose message says all."""


class ConfigError(ValueError):
    """A config whose fields don't fit each other or the data; the message names the field."""


class TrainingError(ValueError):
    """A run that can't go on; the message says where it stands and what to do."""

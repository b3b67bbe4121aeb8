"""A config from its settings, which biomass_jax declares. Not a run of its own: take one of the other files here."""

from ml_collections import config_dict

from biomass_jax.runtime.settings import to_config


def config_of(kind: type, mode: str) -> config_dict.ConfigDict:
    """The defaults of a kind of run; unlocked, so that a config can set its own."""
    config = to_config(kind)
    config.mode = mode
    return config

"""Configs, one file a kind of run; a config of your own begins with `from biomass_jax.configs import predict`."""

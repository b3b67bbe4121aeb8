"""From HLS granules and GEDI orbits to training shards; never imports JAX."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path


class _OldSpellings:
    """`python -m data_prep.labels`, the old spelling of `python -m data_prep labels`, runs `__main__.py` as well."""

    @staticmethod
    def find_spec(name: str, *about: object) -> ModuleSpec | None:
        """Asked last: `data_prep.chips` is found before, `data_prep.chips.__main__` is not."""
        parent, _, step = name.removesuffix(".__main__").rpartition(".")
        if parent != "data_prep":
            return None
        from data_prep.__main__ import STEPS

        return spec_from_file_location(name, Path(__file__).with_name("__main__.py")) if step in STEPS else None


sys.meta_path.append(_OldSpellings)

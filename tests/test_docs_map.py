"""docs/map.md has one line a module, and its first part names files that are there."""

import re

from tests.docs_map import LIST, PAGE, expected, first_sentence
from tests.house import MODULES, ROOT


def test_the_list_is_that_of_the_modules():
    (found,) = LIST.findall(PAGE.read_text(encoding="utf-8"))
    assert found[1] == expected(), "run python -m tests.docs_map"


def test_every_module_says_what_it_is():
    assert [module for module in MODULES if not first_sentence(module)] == []


def test_paths_of_the_first_part_are_there():
    head = PAGE.read_text(encoding="utf-8").split("<!-- modules -->")[0]
    named = re.findall(r"`((?:biomass_jax|data_prep|configs|tests|docs|launch|benchmarks)/[\w./]*)`", head)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []

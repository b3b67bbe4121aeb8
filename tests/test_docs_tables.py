"""The docs' tables of settings are those of the declarations; examples name fields that are there."""

import importlib
import re

import pytest

from tests.docs_tables import DOCS, TABLES, expected, pattern


def flat(config, prefix=""):
    found = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return found


@pytest.mark.parametrize("key", TABLES, ids="-".join)
def test_the_table_is_that_of_the_declaration(key):
    (found,) = pattern(key[1]).findall((DOCS / key[0]).read_text(encoding="utf-8"))
    assert found[1] == expected(key), "run python -m tests.docs_tables"


@pytest.mark.parametrize("page", sorted({page for page, _ in TABLES}))
def test_every_field_that_a_page_uses_is_there(page):
    configs = [importlib.import_module(f"configs.{config}").get_config() for _, config, _ in TABLES.values()]
    fields = set().union(*map(flat, configs))
    used = set(re.findall(r"--config\.([\w.]+)=", (DOCS / page).read_text(encoding="utf-8")))
    assert used <= fields | {"field"}, used - fields

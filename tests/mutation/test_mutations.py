"""The faults of the mutation script still fit the sources; trying them is left to the script."""

import pytest

from tests.mutation.fault import Mutation
from tests.mutation.mutate import MUTATIONS, ROOT, apply

pytestmark = pytest.mark.slow  # another wording of a source breaks it: for `make test-slow`, not for every change


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_fault_can_be_put_in_and_its_test_is_there(mutation, tmp_path):
    paths = {path for path, _, _ in mutation.changes}
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    apply(mutation, tmp_path)
    for path in paths:
        changed = (tmp_path / path).read_text()
        assert changed != (ROOT / path).read_text()
        compile(changed, path, "exec")
    file, name = mutation.test.split("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text()


def test_faults_have_names_of_their_own():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_text_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("one\none\n")
    for old in ("two", "one"):
        with pytest.raises(ValueError, match="expected once"):
            apply(Mutation("some", "", (("a.py", old, "three"),)), tmp_path)

"""Faults of tables of work."""

from tests.mutation.fault import Mutation, in_file

TABLE = "launch/work_table.py"
WORK = "launch/work.py"
LOCK = "biomass_jax/runtime/lock.py"
TABLE_TESTS = "tests/launch/test_work_table.py"
WORK_TESTS = "tests/launch/test_work.py"

MUTATIONS = (
    Mutation(
        "what_the_dead_had_taken_is_lost",
        f"{TABLE_TESTS}::test_an_item_that_kills_its_workers_fails_and_stops_nothing",
        in_file(TABLE, ("            if held:\n", "            if held is not None:\n")),
    ),
    Mutation(
        "the_living_are_robbed",
        f"{TABLE_TESTS}::test_a_worker_of_another_machine_is_given_time",
        in_file(LOCK, ("now - found.changed_ns / 1e9 < STALE", "now - found.changed_ns / 1e9 < 0")),
    ),
    Mutation(
        "one_that_starts_is_cleared_away",
        f"{TABLE_TESTS}::test_a_worker_that_starts_is_left_alone",
        in_file(
            TABLE,
            (
                "            if held is False:\n                with suppress",
                "            if not held:\n                with suppress",
            ),
        ),
    ),
    Mutation(
        "what_is_given_back_counts_as_tried",
        f"{TABLE_TESTS}::test_what_is_held_is_given_back_untried",
        in_file(TABLE, ("Mark(one.number, one.tries - 1)", "Mark(one.number, one.tries)")),
    ),
    Mutation(
        "a_try_too_many",
        f"{TABLE_TESTS}::test_what_fails_is_tried_again_last_and_named_in_the_end",
        in_file(TABLE, ("mark.tries < self.tries", "mark.tries <= self.tries")),
    ),
    Mutation(
        "a_worker_leaves_while_others_may_lose_something",
        f"{TABLE_TESTS}::test_a_worker_waits_for_what_another_may_lose",
        in_file(TABLE, ("if any(map(listed, workers)):", "if not workers:")),
    ),
    Mutation(
        "two_have_what_a_dead_one_had",
        f"{TABLE_TESTS}::test_of_two_that_find_a_dead_worker_one_has_its_item",
        in_file(
            TABLE, ("if moved(folder / mark.file, self.folder / mark.file):", "if True or moved(folder, self.folder):")
        ),
    ),
    Mutation(
        "a_map_of_what_was_taken_away_is_kept",
        f"{WORK_TESTS}::test_a_map_of_an_item_that_was_taken_away_is_thrown_away",
        in_file(WORK, ("elif worker.holds(ready.claim):", "elif worker:")),
    ),
    Mutation(
        "drafts_of_the_living_are_cleared_away",
        f"{WORK_TESTS}::test_drafts_of_the_dead_are_cleared_away_and_no_others",
        in_file(WORK, ("if folder.name not in known:", "if folder.name or known:")),
    ),
    Mutation(
        "a_model_that_is_gone_fails_every_item",
        f"{WORK_TESTS}::test_a_model_that_is_gone_ends_the_worker_and_fails_no_item",
        in_file(
            "biomass_jax/prediction/maps.py",
            ("(begin(item))\n            except BundleError:", "(begin(item))\n            except ZeroDivisionError:"),
            ("append(result)\n        except BundleError:", "append(result)\n        except ZeroDivisionError:"),
        ),
    ),
)

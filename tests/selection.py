"""Which tests are slow, and which versions cannot run the Triton kernels in the interpreter."""

import os
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

SLOW = (
    "bench",
    "experts/test_growing_learner.py::test_beyond_the_budget_the_nearest_columns_are_merged",
    "experts/test_growing_learner.py::test_columns_are_saved_and_loaded_to_the_bit",
    "experts/test_growing_learner.py::test_scoring_and_routing_change_no_bit",
    "experts/test_growing_learner.py::test_routing_to_the_anchor_gives_its_scores",
    "experts/test_growing_learner.py::test_text_that_is_not_learnt_is_scored_by_the_mixture",
    "experts/test_growing_learner.py::test_what_comes_later_changes_no_score_and_a_switch_keeps_the_context",
    "experts/test_growing_learner.py::test_what_is_stored_is_the_column_before_the_first_sign_of_change",
    "learn/test_learner.py::test_compiled_adapted_model_equals_eager",
    "nn/test_linear.py::test_compiled_forward_equals_eager_and_does_not_recompile",
    "ops/test_append.py",
    "ops/test_low_rank_compress_triton.py",
    "ops/test_low_rank_triton.py",
    "ops/test_replay_rows.py::test_rows_that_the_memory_would_have_drawn_give_the_same_bits",
    "ops/test_triton.py",
    "ops/test_triton_aot.py",
    "store/test_store_crashes.py",
    "store/test_store_faults.py::test_writes_that_a_file_size_limit_stops_change_nothing",
    "store/test_store_forks.py::test_a_child_cannot_go_on_with_its_parents_transaction",
    "store/test_store_forks.py::test_a_child_cannot_write_under_its_parents_lease_nor_end_it[postgres]",
    "store/test_store_forks.py::test_a_child_forked_during_a_transaction_does_not_hang[folder]",
    "store/test_store_leases.py::test_two_processes_that_fight_for_a_lease_never_both_write",
    "store/test_store_sequences.py",
    "test_distribution.py",
    "test_examples.py::test_learn_from_text_learns_saves_and_loads",
    "test_examples.py::test_learn_from_text_takes_a_model_folder",
    "test_examples.py::test_many_users_learn_apart_from_each_other",
)
"""Slow folders, files, functions and cases: Triton's interpreter, compilers, many processes, benches."""

QUICK_CASES = 3
"""This many cases of a parametrised test are quick."""

ONE_QUICK_CASE = (
    "adapt/test_random_damage.py",
    "experts/test_growing_learner.py",
)
"""Files in which each test has one quick case, because a case takes long."""


def mark_slow(items):
    """Mark as slow what `make quick` leaves out: the tests of `SLOW`, and most cases of parametrised tests."""
    cases = defaultdict(list)
    for item in items:
        if slow_by_name(os.path.relpath(item.path, TESTS), item.name):
            item.add_marker(pytest.mark.slow)
        else:
            cases[item.path, item.parent.name, function_of(item)].append(item)
    for group in cases.values():
        one = os.path.relpath(group[0].path, TESTS) in ONE_QUICK_CASE
        quick = spread(len(group), 1 if one else QUICK_CASES)
        for index, item in enumerate(group):
            if index not in quick:
                item.add_marker(pytest.mark.slow)


def function_of(item):
    return item.name.partition("[")[0]


def slow_by_name(file, test):
    """Whether `SLOW` names ``test`` (its function, or a case of it) or the ``file`` or a folder that it is in."""
    names = {file, f"{file}::{test}", f"{file}::{test.partition('[')[0]}"}
    return any(name in names or file.startswith(f"{name}/") for name in SLOW)


def spread(count, chosen):
    """Indices of ``chosen`` of ``count`` cases: the first, the last, and the others evenly between them."""
    if count <= chosen:
        return set(range(count))
    return {round(k * (count - 1) / max(chosen - 1, 1)) for k in range(chosen)}


def refuse_broken_interpreter():
    """Raise `pytest.UsageError` if the tests are to run in Triton's interpreter and it fails with these versions."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        fault = interpreter_fault(metadata.version("triton"), metadata.version("numpy"))
    except metadata.PackageNotFoundError:
        return  # tests that import triton say so
    if fault:
        raise pytest.UsageError(fault)


def interpreter_fault(triton, numpy):
    """Why Triton's interpreter fails with these versions; empty if it does not.

    Up to Triton 3.6 it converts arrays of one element to Python scalars, which numpy refuses from 2.4 on.
    """
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return f"Triton's interpreter needs triton >= 3.7 or numpy < 2.4; found triton {triton} and numpy {numpy}"
    return ""


def _release(version):
    return tuple(int(part) for part in version.split(".")[:2])

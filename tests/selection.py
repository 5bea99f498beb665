"""Which tests are slow, and which versions cannot run the Triton kernels in the interpreter."""

import os
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

SLOW = (
    "adapt/test_data_parallel.py",
    "adapt/test_distributed_checkpoint.py",
    "adapt/test_fully_sharded.py",
    "adapt/test_fully_sharded_users.py",
    "adapt/test_one_fails.py",
    "adapt/test_random_damage.py::test_metadata",
    "adapt/test_random_damage.py::test_values_of_tensors",
    "adapt/test_whole_replicas.py",
    "adapt/test_sharded.py",
    "adapt/test_tensor_parallel.py",
    "bench",
    "chat/test_terminal_input.py::test_lines_can_be_edited_at_a_terminal",
    "demo/test_conversation.py::test_a_process_that_fails_is_shown",
    "demo/test_conversation.py::test_the_demo_asks_in_a_new_process_and_reports",
    "demo/test_demo.py::test_the_demo_writes_its_report",
    "experts/test_growing_learner.py::test_a_column_opened_by_mistake_stays_as_it_was",
    "experts/test_growing_learner.py::test_beyond_the_budget_the_nearest_columns_are_merged",
    "experts/test_growing_learner.py::test_columns_are_saved_and_loaded_to_the_bit",
    "experts/test_growing_learner.py::test_frozen_columns_and_the_anchor_stay_to_the_bit",
    "experts/test_growing_learner.py::test_long_text_is_scored_piece_by_piece_and_one_token_not_at_all",
    "experts/test_growing_learner.py::test_reset_forgets_everything",
    "experts/test_growing_learner.py::test_routing_to_the_anchor_gives_its_scores",
    "experts/test_growing_learner.py::test_scores_come_before_learning_and_before_routing",
    "experts/test_growing_learner.py::test_scoring_and_routing_change_no_bit",
    "experts/test_growing_learner.py::test_text_that_is_not_learnt_is_scored_by_the_mixture",
    "experts/test_growing_learner.py::test_what_comes_later_changes_no_score_and_a_switch_keeps_the_context",
    "experts/test_growing_learner.py::test_what_is_stored_is_the_column_before_the_first_sign_of_change",
    "families",
    "learn/test_learner.py::test_compiled_adapted_model_equals_eager",
    "learn/test_learner.py::test_consolidated_memory_holds_only_rows_that_passed_through_the_layer",
    "learn/test_learner.py::test_generate_uses_what_was_learnt",
    "learn/test_whole_steps.py::test_a_handler_that_raises_at_any_moment_leaves_the_layers_in_step",
    "nn/test_linear.py::test_compiled_forward_equals_eager_and_does_not_recompile",
    "ops/sequence/test_delta_rule_triton.py",
    "ops/sequence/test_long_streams.py",
    "ops/sequence/test_memory_triton.py",
    "ops/sequence/test_sequence_training.py::test_compiled_training_equals_eager",
    "ops/test_append.py",
    "ops/test_cpu.py::test_opcheck",
    "ops/test_experts_triton.py",
    "ops/test_launch_variants.py",
    "ops/test_low_rank_compress_triton.py",
    "ops/test_low_rank_triton.py",
    "ops/test_program_order.py",
    "ops/test_reference.py::test_a_sampled_trace_is_unbiased",
    "ops/test_replay_rows.py::test_given_rows",
    "ops/test_replay_rows.py::test_rows_that_the_memory_would_have_drawn_give_the_same_bits",
    "ops/test_triton.py",
    "ops/test_triton_aot.py",
    "ops/test_window_step.py",
    "per_user/test_slot_states.py::test_a_changed_state_is_refused_or_works",
    "rules/test_sequences.py::test_reservoir_of_sequences_is_uniform_over_base_and_stream",
    "rules/test_sequences.py::test_rules_compose_with_each_other_and_with_protection",
    "rules/test_sequences.py::test_the_pool_is_written_by_the_anchor_of_the_moment",
    "sequence_models/test_sequence_models.py::test_compiled_equals_eager",
    "serve/test_page.py",
    "serve/test_replicas.py",
    "serve/test_serve_command.py::test_a_request_that_is_under_way_is_finished_when_the_server_is_stopped",
    "serve/test_serve_command.py::test_a_server_with_guards_undoes_what_goes_too_far_and_one_without_goes_on",
    "serve/test_serve_command.py::test_a_span_of_every_request_is_sent_and_holds_nothing_that_was_said",
    "serve/test_serve_command.py::test_a_stream_that_outlasts_the_end_of_the_server_ends_with_an_error",
    "serve/test_serve_command.py::test_open_requests_use_up_their_own_time_and_not_that_of_the_store",
    "serve/test_serve_command.py::test_what_a_store_did_not_take_in_time_is_said",
    "serve/test_serve_command.py::test_what_was_learnt_is_there_after_a_restart",
    "serve/test_service.py::test_a_study_gives_way_to_a_request_and_is_done_later",
    "serve/test_service.py::test_learning_takes_its_share_of_the_time_while_others_are_answered",
    "serve/test_service.py::test_what_was_acknowledged_survives_a_kill",
    "serve/test_service.py::test_what_was_said_is_studied_when_nothing_else_is_to_be_done",
    "serve/test_state_users.py::test_what_was_acknowledged_survives_a_kill",
    "store/test_store_crashes.py",
    "store/test_store_faults.py::test_writes_that_a_file_size_limit_stops_change_nothing",
    "store/test_store_forget.py::test_no_byte_of_a_forgotten_user_remains",
    "store/test_store_forks.py::test_a_child_cannot_go_on_with_its_parents_transaction",
    "store/test_store_forks.py::test_a_child_cannot_write_under_its_parents_lease_nor_end_it[postgres]",
    "store/test_store_forks.py::test_a_child_forked_during_a_transaction_does_not_hang",
    "store/test_store_garbage.py::test_no_order_of_a_write_and_a_collection_loses_an_acknowledged_version",
    "store/test_store_leases.py::test_two_processes_that_fight_for_a_lease_never_both_write",
    "store/test_store_sequences.py",
    "test_distribution.py",
    "test_docs.py::test_code_blocks_of_a_page_run_in_order_and_print_what_it_says[docs/index.md]",
    "test_examples.py",
    "test_package.py::test_info_says_what_is_active",
    "test_package.py::test_instruction_set_can_be_forced",
)
"""Slow folders, files, functions and cases: Triton's interpreter, compilers, many processes, benches, long runs."""

QUICK_CASES = 2
"""This many cases of a parametrised test are quick."""

ONE_QUICK_CASE = (
    "adapt/test_forged_files.py",
    "adapt/test_random_damage.py",
    "experts/test_growing_learner.py",
    "learn/test_defaults.py",
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


def long_files_first(items):
    """Move the files of which `SLOW` names tests to the front, and of the others those with many tests.

    Processes that share the tests take one file after the other: the last should be short, so that all end together.
    """
    named = {name.partition("::")[0] for name in SLOW}
    count = Counter(item.path for item in items)

    def rank(item):
        file = Path(os.path.relpath(item.path, TESTS))
        slow = any(path.as_posix() in named for path in (file, *file.parents))
        return not slow, -count[item.path]

    items.sort(key=rank)


def left_out(path, config):
    """Whether `make quick` need not even import ``path``, a file or folder of which all tests are slow."""
    return config.option.markexpr == "not slow" and os.path.relpath(path, TESTS) in SLOW


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

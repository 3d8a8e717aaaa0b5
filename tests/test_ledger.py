"""The Ledger alone: every move of a task, what a loss, a retry and a late outcome cost, and random walks with an audit."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import task_master
from task_master import DONE, LEASED, NEW, READY, IllegalMove, Ledger, Task

LEGAL = {(NEW, READY), (READY, LEASED), (LEASED, READY), (LEASED, DONE), (READY, DONE)}
ANNA, BERT = "anna", "bert"  # two connections


def make_ledger(tasks: int = 0, **limits: Any) -> Ledger:
    ledger = Ledger(**limits)
    ledger.submit([(task_id, str(task_id)) for task_id in range(tasks)])
    return ledger


def lease_ids(ledger: Ledger, holder: object, limit: int = 1000) -> list[int]:
    lease = ledger.lease(holder, limit)
    assert lease is not None
    return [task.id for task in lease]


def report(ledger: Ledger, holder: object, *outcomes: tuple[int, bool]) -> tuple[list[int], list[int]]:
    """The ids that were settled, and those that are retried."""
    settled, retried = ledger.report(holder, [(task_id, ok, "what") for task_id, ok in outcomes])
    return [task.id for task in settled], [task.id for task in retried]


def drop(ledger: Ledger, holder: object) -> tuple[list[int], list[int]]:
    """The ids that are READY again, and those that were given up."""
    again, given_up = ledger.drop(holder)
    return [task.id for task in again], [task.id for task in given_up]


def check_counts(ledger: Ledger, ready: int, leased: int, done: int) -> None:
    ledger.audit()
    counts = ledger.counts()
    assert (counts[READY], counts[LEASED], counts[DONE]) == (ready, leased, done)
    assert ledger.submitted == ready + leased + done


# ---- the moves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), sorted(LEGAL))
def test_a_legal_move_changes_the_state_and_the_counts(old: str, new: str) -> None:
    ledger, task = Ledger(), Task(0, "1")
    task.state = old
    ledger._counts[old] = 1
    ledger._move([task], new)
    assert task.state == new
    assert (ledger._counts[old], ledger._counts[new]) == (0, 1)


@pytest.mark.parametrize(("old", "new"), sorted(set(itertools.product((NEW, READY, LEASED, DONE), repeat=2)) - LEGAL))
def test_an_illegal_move_is_refused_and_changes_nothing(old: str, new: str) -> None:
    ledger, task = Ledger(), Task(0, "1")
    task.state = old
    before = {**ledger._counts}
    with pytest.raises(IllegalMove, match=f"from {old} to {new}"):
        ledger._move([task], new)
    assert (task.state, ledger._counts) == (old, before)


def test_one_illegal_move_among_legal_ones_stops_them_all() -> None:
    ledger, good, bad = Ledger(), Task(0, "1"), Task(1, "1")
    good.state, bad.state = READY, DONE
    with pytest.raises(IllegalMove):
        ledger._move([good, bad], LEASED)
    assert (good.state, bad.state) == (READY, DONE)


def test_a_task_goes_from_ready_over_leased_to_done() -> None:
    ledger = make_ledger(1)
    check_counts(ledger, ready=1, leased=0, done=0)
    assert lease_ids(ledger, ANNA) == [0]
    check_counts(ledger, ready=0, leased=1, done=0)
    assert report(ledger, ANNA, (0, True)) == ([0], [])
    check_counts(ledger, ready=0, leased=0, done=1)


def test_a_leased_task_is_leased_to_nobody_else() -> None:
    ledger = make_ledger(1)
    assert lease_ids(ledger, ANNA) == [0]
    assert lease_ids(ledger, BERT) == []
    assert lease_ids(ledger, ANNA) == []


def test_the_audit_finds_a_task_that_went_missing() -> None:
    ledger = make_ledger(2)
    del ledger._tasks[0]
    with pytest.raises(AssertionError, match="ready tasks are not counted right"):
        ledger.audit()


def test_the_audit_finds_a_task_that_is_queued_twice() -> None:
    ledger = make_ledger(1)
    ledger._ready.append(ledger._tasks[0])
    with pytest.raises(AssertionError, match="queued twice"):
        ledger.audit()


def test_the_audit_finds_a_leased_task_without_a_holder() -> None:
    ledger = make_ledger(1)
    ledger.lease(ANNA, 1)
    del ledger._held[ANNA]
    with pytest.raises(AssertionError, match="no holder"):
        ledger.audit()


# ---- release -------------------------------------------------------------------------------------------------------


def test_a_release_is_free_of_charge() -> None:
    ledger = make_ledger(1, redeliveries=0)
    for _ in range(10):
        (task,) = ledger.lease(ANNA, 1) or []
        ledger.release(ANNA, [0])
        check_counts(ledger, ready=1, leased=0, done=0)
    assert (task.losses, task.failures, ledger.redelivered, ledger.retried) == (0, 0, 0, 0)


def test_released_tasks_go_to_the_back_of_the_queue() -> None:
    ledger = make_ledger(3, batch=1)
    assert lease_ids(ledger, ANNA) == [0]
    ledger.release(ANNA, [0])
    assert [lease_ids(ledger, ANNA)[0] for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("task_id", [0, 1, 2, 99], ids=["another's", "ready", "done", "unknown"])
def test_releasing_what_one_does_not_hold_does_nothing(task_id: int) -> None:
    ledger = make_ledger(3, batch=1)
    lease_ids(ledger, ANNA)
    assert lease_ids(ledger, BERT) == [1]
    ledger.release(BERT, [1])
    assert lease_ids(ledger, BERT) == [2]
    report(ledger, BERT, (2, True))
    ledger.release(BERT, [task_id])
    check_counts(ledger, ready=1, leased=1, done=1)
    assert report(ledger, ANNA, (0, True)) == ([0], [])


def test_a_release_that_names_a_task_twice_releases_it_once() -> None:
    ledger = make_ledger(2)
    assert lease_ids(ledger, ANNA) == [0, 1]
    ledger.release(ANNA, [1, 1])
    check_counts(ledger, ready=1, leased=1, done=0)
    assert lease_ids(ledger, BERT) == [1]


# ---- retries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_task_that_always_raises_runs_once_and_then_as_often_as_retries_say(retries: int) -> None:
    ledger = make_ledger(1, retries=retries)
    for _ in range(retries):
        assert lease_ids(ledger, ANNA) == [0]
        assert report(ledger, ANNA, (0, False)) == ([], [0])
        check_counts(ledger, ready=1, leased=0, done=0)
    assert lease_ids(ledger, ANNA) == [0]
    assert report(ledger, ANNA, (0, False)) == ([0], [])
    check_counts(ledger, ready=0, leased=0, done=1)
    assert (ledger.failed, ledger.retried) == (1, retries)


def test_a_retried_task_that_succeeds_is_not_a_failure() -> None:
    ledger = make_ledger(1, retries=1)
    lease_ids(ledger, ANNA)
    report(ledger, ANNA, (0, False))
    lease_ids(ledger, ANNA)
    assert report(ledger, ANNA, (0, True)) == ([0], [])
    assert (ledger.failed, ledger.retried) == (0, 1)


def test_a_retried_task_goes_to_the_back_of_the_queue() -> None:
    ledger = make_ledger(3, retries=1, batch=1)
    lease_ids(ledger, ANNA)
    report(ledger, ANNA, (0, False))
    assert [lease_ids(ledger, ANNA)[0] for _ in range(3)] == [1, 2, 0]


def test_losses_do_not_use_up_retries_nor_retries_redeliveries() -> None:
    ledger = make_ledger(1, retries=1, redeliveries=1)
    lease_ids(ledger, ANNA)
    assert drop(ledger, ANNA) == ([0], [])
    lease_ids(ledger, BERT)
    assert report(ledger, BERT, (0, False)) == ([], [0])
    lease_ids(ledger, BERT)
    assert report(ledger, BERT, (0, True)) == ([0], [])
    assert (ledger.failed, ledger.retried, ledger.redelivered) == (0, 1, 1)


# ---- redeliveries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redeliveries", [0, 2])
def test_a_task_whose_workers_are_always_lost_is_given_up_after_its_redeliveries(redeliveries: int) -> None:
    ledger = make_ledger(1, redeliveries=redeliveries)
    for _ in range(redeliveries):
        assert lease_ids(ledger, ANNA) == [0]
        assert drop(ledger, ANNA) == ([0], [])
        check_counts(ledger, ready=1, leased=0, done=0)
    assert lease_ids(ledger, ANNA) == [0]
    assert drop(ledger, ANNA) == ([], [0])
    check_counts(ledger, ready=0, leased=0, done=1)
    assert (ledger.failed, ledger.redelivered) == (1, redeliveries)


def test_the_tasks_of_a_lost_connection_go_to_the_back_of_the_queue() -> None:
    ledger = make_ledger(4, batch=2)
    assert lease_ids(ledger, ANNA) == [0, 1]
    assert drop(ledger, ANNA) == ([0, 1], [])
    assert lease_ids(ledger, BERT) == [2, 3]
    assert lease_ids(ledger, BERT) == [0]


def test_only_what_the_lost_connection_held_is_ready_again() -> None:
    ledger = make_ledger(4, batch=2)
    assert (lease_ids(ledger, ANNA), lease_ids(ledger, BERT)) == ([0, 1], [2, 3])
    report(ledger, ANNA, (0, True))
    assert drop(ledger, ANNA) == ([1], [])
    check_counts(ledger, ready=1, leased=2, done=1)


def test_dropping_twice_or_without_a_lease_does_nothing() -> None:
    ledger = make_ledger(1)
    assert drop(ledger, "nobody") == ([], [])
    lease_ids(ledger, ANNA)
    assert drop(ledger, ANNA) == ([0], [])
    assert drop(ledger, ANNA) == ([], [])
    check_counts(ledger, ready=1, leased=0, done=0)


def test_a_task_that_was_lost_before_is_leased_alone() -> None:
    ledger = make_ledger(4)
    ledger.enlist(ANNA)
    assert len(lease_ids(ledger, ANNA, 2)) == 2
    drop(ledger, ANNA)
    assert [lease_ids(ledger, BERT, 10) for _ in range(3)] == [[2, 3], [0], [1]]


def test_without_redeliveries_every_task_is_leased_alone() -> None:
    ledger = make_ledger(3, redeliveries=0)
    assert [lease_ids(ledger, ANNA, 10) for _ in range(3)] == [[0], [1], [2]]


# ---- late outcomes -------------------------------------------------------------------------------------------------


def test_a_late_success_settles_a_task_that_is_ready_again() -> None:
    ledger = make_ledger(2, batch=1)
    lease_ids(ledger, ANNA)
    drop(ledger, ANNA)
    assert report(ledger, ANNA, (0, True)) == ([0], [])
    check_counts(ledger, ready=1, leased=0, done=1)
    assert [lease_ids(ledger, BERT), lease_ids(ledger, BERT)] == [[1], []]


def test_a_late_success_settles_a_task_that_another_has_leased_and_the_others_outcome_is_dropped() -> None:
    ledger = make_ledger(1)
    lease_ids(ledger, ANNA)
    drop(ledger, ANNA)
    assert lease_ids(ledger, BERT) == [0]
    assert report(ledger, ANNA, (0, True)) == ([0], [])
    check_counts(ledger, ready=0, leased=0, done=1)
    assert report(ledger, BERT, (0, True)) == ([], [])
    assert ledger.dropped == 1
    assert drop(ledger, BERT) == ([], [])
    check_counts(ledger, ready=0, leased=0, done=1)


@pytest.mark.parametrize("second_is_ok", [True, False])
def test_the_second_outcome_of_a_task_is_counted_and_dropped(second_is_ok: bool) -> None:
    ledger = make_ledger(1, retries=5)
    lease_ids(ledger, ANNA)
    report(ledger, ANNA, (0, True))
    assert report(ledger, ANNA, (0, second_is_ok)) == ([], [])
    assert (ledger.dropped, ledger.failed) == (1, 0)
    check_counts(ledger, ready=0, leased=0, done=1)


def test_a_second_success_in_the_same_report_is_dropped() -> None:
    ledger = make_ledger(1)
    lease_ids(ledger, ANNA)
    assert report(ledger, ANNA, (0, True), (0, True)) == ([0], [])
    check_counts(ledger, ready=0, leased=0, done=1)


@pytest.mark.parametrize("second_is_ok", [True, False])
def test_a_report_that_names_a_failed_task_twice_keeps_the_books_right(second_is_ok: bool) -> None:
    ledger = make_ledger(1, retries=2)
    lease_ids(ledger, ANNA)
    settled, retried = report(ledger, ANNA, (0, False), (0, second_is_ok))
    assert (settled, retried) == ([0] if second_is_ok else [], [0])  # the second one counts as late
    check_counts(ledger, ready=1 - len(settled), leased=0, done=len(settled))


def test_an_outcome_for_an_unknown_task_is_dropped() -> None:
    ledger = make_ledger(1)
    assert report(ledger, ANNA, (7, True), (-1, False)) == ([], [])
    assert ledger.dropped == 2
    check_counts(ledger, ready=1, leased=0, done=0)


@pytest.mark.parametrize("leased_again", [False, True])
def test_a_late_error_is_dropped_while_there_are_retries_since_the_task_runs_again_anyway(leased_again: bool) -> None:
    ledger = make_ledger(1, retries=1)
    lease_ids(ledger, ANNA)
    drop(ledger, ANNA)
    if leased_again:
        assert lease_ids(ledger, BERT) == [0]
    assert report(ledger, ANNA, (0, False)) == ([], [])
    check_counts(ledger, ready=not leased_again, leased=leased_again, done=0)
    assert (ledger.dropped, ledger.failed) == (1, 0)


@pytest.mark.parametrize("leased_again", [False, True])
def test_a_late_error_settles_a_task_that_has_no_retries(leased_again: bool) -> None:
    ledger = make_ledger(1)
    lease_ids(ledger, ANNA)
    drop(ledger, ANNA)
    if leased_again:
        assert lease_ids(ledger, BERT) == [0]
    assert report(ledger, ANNA, (0, False)) == ([0], [])
    check_counts(ledger, ready=0, leased=0, done=1)
    assert report(ledger, BERT, (0, True)) == ([], [])
    assert ledger.failed == 1


# ---- how much is leased --------------------------------------------------------------------------------------------


def test_tasks_are_leased_in_the_order_in_which_they_came() -> None:
    ledger = make_ledger(5)
    assert lease_ids(ledger, ANNA) == [0, 1, 2, 3, 4]


def test_the_ready_tasks_are_divided_between_twice_as_many_leases_as_slots() -> None:
    ledger = make_ledger(100)
    for holder in (ANNA, BERT):
        ledger.enlist(holder)
    assert len(lease_ids(ledger, ANNA, 40)) == 100 // 4
    assert len(lease_ids(ledger, BERT, 40)) == 75 // 4
    ledger.drop(BERT)  # ANNA is alone again
    assert len(lease_ids(ledger, ANNA, 40)) == 75 // 2


def test_a_slot_that_asks_for_very_many_gets_more_than_its_share() -> None:
    ledger = make_ledger(100)
    for holder in (ANNA, BERT):
        ledger.enlist(holder)
    assert len(lease_ids(ledger, ANNA, 16 * 60)) == 60


def test_a_slot_may_ask_for_less_than_its_share() -> None:
    ledger = make_ledger(100)
    assert len(lease_ids(ledger, ANNA, 3)) == 3


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_below_one_leases_a_single_task(limit: int) -> None:
    assert lease_ids(make_ledger(10), ANNA, limit) == [0]


def test_a_batch_bounds_every_lease() -> None:
    ledger = make_ledger(100, batch=7)
    assert len(lease_ids(ledger, ANNA)) == 7
    assert len(lease_ids(ledger, ANNA, 3)) == 3


def test_the_text_in_a_lease_is_bounded_unless_a_single_task_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_master, "LEASE_BYTES", 100)
    ledger = Ledger()
    ledger.submit([(number, '"%s"' % ("x" * size)) for number, size in enumerate([48, 48, 48, 200, 1])])
    assert [lease_ids(ledger, ANNA) for _ in range(4)] == [[0, 1], [2], [3], [4]]


def test_tasks_from_the_horizon_on_wait_until_it_is_moved() -> None:
    ledger = make_ledger(4)
    ledger.set_horizon(2)
    assert lease_ids(ledger, ANNA) == [0, 1]
    assert lease_ids(ledger, ANNA) == []
    ledger.set_horizon(3)
    assert lease_ids(ledger, ANNA) == [2]


def test_with_a_horizon_the_lowest_id_comes_first() -> None:
    ledger = make_ledger(4, batch=1)
    ledger.set_horizon(4)
    assert lease_ids(ledger, ANNA) == [0]
    assert lease_ids(ledger, ANNA) == [1]
    ledger.release(ANNA, [1])
    ledger.drop(ANNA)
    assert [lease_ids(ledger, BERT)[0] for _ in range(4)] == [0, 1, 2, 3]


def test_a_horizon_set_late_does_not_hide_a_task_below_it_at_the_back_of_the_queue() -> None:
    ledger = make_ledger(3, batch=1)
    lease_ids(ledger, ANNA)
    ledger.drop(ANNA)  # the queue is 1, 2, 0
    ledger.set_horizon(1)
    assert lease_ids(ledger, BERT) == [0]


# ---- the end, and waiting ------------------------------------------------------------------------------------------


def test_the_job_is_over_when_no_task_will_come_and_all_are_done() -> None:
    ledger = make_ledger(1)
    assert not ledger.over()
    ledger.end()
    assert not ledger.over()
    lease_ids(ledger, ANNA)
    assert not ledger.over()
    report(ledger, ANNA, (0, True))
    assert ledger.over()
    ledger.begin()
    assert not ledger.over()


def test_an_ended_ledger_without_a_task_is_over() -> None:
    ledger = Ledger()
    ledger.end()
    assert ledger.over()


def test_a_closed_ledger_leases_nothing_and_is_over_when_nothing_is_leased() -> None:
    ledger = make_ledger(3, batch=1)
    lease_ids(ledger, ANNA)
    ledger.close()
    assert ledger.lease(BERT, 1) is None
    assert not ledger.over()
    report(ledger, ANNA, (0, True))
    assert ledger.over()
    check_counts(ledger, ready=2, leased=0, done=1)


def test_a_closed_ledger_takes_no_task() -> None:
    ledger = Ledger()
    ledger.close()
    ledger.submit([(0, "1")])
    check_counts(ledger, ready=0, leased=0, done=0)


def test_a_closed_ledger_takes_releases_outcomes_and_losses() -> None:
    ledger = make_ledger(3)
    assert lease_ids(ledger, ANNA) == [0, 1, 2]
    ledger.close()
    ledger.release(ANNA, [1])
    assert report(ledger, ANNA, (0, True)) == ([0], [])
    assert drop(ledger, ANNA) == ([2], [])
    check_counts(ledger, ready=2, leased=0, done=1)
    assert ledger.over()


def in_thread(target: Any, *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def check_ends(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def make_patient_ledger(tasks: int = 0, **limits: Any) -> Ledger:
    """One with so many slots that each may wait for a minute."""
    ledger = make_ledger(tasks, **limits)
    for slot in range(int(60 * task_master.IDLE_POLLS)):
        ledger.enlist(slot)
    return ledger


def start_waiting(ledger: Ledger, count: int) -> tuple[list[threading.Thread], list[bool]]:
    """Threads that wait for a task, and what they hear."""
    answers: list[bool] = []
    waiters = [in_thread(lambda: answers.append(ledger.wait_ready(60.0))) for _ in range(count)]
    waiters[0].join(0.05)
    assert all(waiter.is_alive() for waiter in waiters)
    return waiters, answers


def test_waiting_for_a_task_ends_when_one_is_submitted() -> None:
    ledger = make_patient_ledger()
    waiters, answers = start_waiting(ledger, 1)
    ledger.submit([(0, "1")])
    check_ends(waiters)
    assert answers == [True]


@pytest.mark.parametrize("move", ["release", "retry", "loss"])
def test_waiting_for_a_task_ends_when_one_is_ready_again(move: str) -> None:
    ledger = make_patient_ledger(1, retries=1)
    lease_ids(ledger, ANNA)
    waiters, answers = start_waiting(ledger, 1)
    if move == "release":
        ledger.release(ANNA, [0])
    elif move == "retry":
        report(ledger, ANNA, (0, False))
    else:
        ledger.drop(ANNA)
    check_ends(waiters)
    assert answers == [True]


def test_waiting_for_a_task_ends_for_everyone_when_the_ledger_is_closed() -> None:
    ledger = make_patient_ledger()
    waiters, answers = start_waiting(ledger, 3)
    ledger.close()
    check_ends(waiters)
    assert answers == [True] * 3


def test_waiting_for_a_task_ends_without_one_when_the_time_is_over() -> None:
    assert Ledger().wait_ready(0.01) is False


def test_submitting_blocks_while_too_many_tasks_are_ready_and_goes_on_when_some_are_leased(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task_master, "READY_LIMIT", 3)
    ledger = make_ledger(3, batch=1)
    reader = in_thread(ledger.submit, [(3, "3")])
    reader.join(0.05)
    assert reader.is_alive()
    lease_ids(ledger, ANNA)
    check_ends([reader])
    check_counts(ledger, ready=3, leased=1, done=0)


def test_submitting_blocks_while_the_ready_text_is_too_long_and_ends_when_the_ledger_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task_master, "READY_BYTES", 10)
    ledger = Ledger()
    ledger.submit([(0, '"a long task"')])
    reader = in_thread(ledger.submit, [(1, "1")])
    reader.join(0.05)
    assert reader.is_alive()
    ledger.close()
    check_ends([reader])
    check_counts(ledger, ready=1, leased=0, done=0)


def test_text_of_tasks_that_were_settled_late_makes_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_master, "READY_BYTES", 10)
    ledger = Ledger()
    ledger.submit([(0, '"a long task"')])
    lease_ids(ledger, ANNA)
    ledger.drop(ANNA)
    report(ledger, ANNA, (0, True))  # READY -> DONE
    assert lease_ids(ledger, ANNA) == []
    check_ends([in_thread(ledger.submit, [(1, "1")])])
    assert lease_ids(ledger, ANNA) == [1]


# ---- random walks --------------------------------------------------------------------------------------------------


class Walk(RuleBasedStateMachine):
    """Connections that lease, release, report (in time, late, twice) and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.retries, self.redeliveries = 1, 1
        self.ledger = Ledger(self.retries, self.redeliveries)
        self.submitted = 0
        self.holders: list[int] = []
        self.held: dict[int, set[int]] = {}  # what each live connection holds, as far as it knows
        self.settled: list[int] = []
        self.runs: dict[int, int] = {}  # times that a task was leased and not released

    def some(self, data: st.DataObject, ids: Iterable[int]) -> list[int]:
        candidates = sorted(ids)
        return data.draw(st.lists(st.sampled_from(candidates), max_size=4)) if candidates else []

    @rule(count=st.integers(1, 5))
    def submit(self, count: int) -> None:
        self.ledger.submit([(number, str(number)) for number in range(self.submitted, self.submitted + count)])
        self.submitted += count

    @rule(is_slot=st.booleans())
    def connect(self, is_slot: bool) -> None:
        holder = len(self.held)
        self.holders.append(holder)
        self.held[holder] = set()
        if is_slot:
            self.ledger.enlist(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), limit=st.integers(1, 4))
    def lease(self, data: st.DataObject, limit: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        tasks = self.ledger.lease(holder, limit)
        assert tasks is not None
        assert len(tasks) <= limit
        assert len(tasks) == 1 or not any(task.losses for task in tasks)
        for task in tasks:
            assert task.id not in self.settled
            assert not any(task.id in held for other, held in self.held.items() if other in self.holders and other != holder)
            self.runs[task.id] = self.runs.get(task.id, 0) + 1
        self.held[holder] |= {task.id for task in tasks}

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        task_ids = self.some(data, self.held[holder])
        self.ledger.release(holder, task_ids)
        self.held[holder] -= set(task_ids)
        for task_id in set(task_ids):
            self.runs[task_id] -= 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        """By a live connection or one that has ended, of what it held; some outcomes twice."""
        holder = data.draw(st.sampled_from(sorted(self.held)))
        outcomes = [(task_id, data.draw(st.booleans()), "what") for task_id in self.some(data, self.held[holder])]
        settled, retried = self.ledger.report(holder, outcomes)
        self._note([task.id for task in settled])
        over = {task.id for task in [*settled, *retried]}
        assert over <= {task_id for task_id, *_ in outcomes}
        for other in self.holders:  # a real one hears of it later; then it reports in vain
            self.held[other] -= over

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        again, given_up = self.ledger.drop(holder)
        assert {task.id for task in [*again, *given_up]} == self.held[holder]
        self._note([task.id for task in given_up])
        self.holders.remove(holder)

    @rule(ahead=st.integers(0, 10))
    def move_horizon(self, ahead: int) -> None:
        self.ledger.set_horizon(len(self.settled) + ahead)

    @invariant()
    def the_books_are_right(self) -> None:
        self.ledger.audit()
        counts = self.ledger.counts()
        assert counts[DONE] == len(self.settled)
        assert counts[LEASED] == sum(len(self.held[holder]) for holder in self.holders)
        assert counts[READY] == self.submitted - counts[DONE] - counts[LEASED]

    def teardown(self) -> None:
        """Whatever happened before, the connections end and one that works well finishes the job."""
        for holder in self.holders:
            self._note([task.id for task in self.ledger.drop(holder)[1]])
        self.ledger.end()
        self.ledger.set_horizon(self.submitted)
        while tasks := self.ledger.lease("last", 10):
            self._note([task.id for task in self.ledger.report("last", [(task.id, True, "what") for task in tasks])[0]])
        self.ledger.audit()
        assert self.ledger.over()
        assert sorted(self.settled) == list(range(self.submitted))
        assert all(runs <= 1 + self.retries + self.redeliveries for runs in self.runs.values())

    def _note(self, task_ids: list[int]) -> None:
        assert not set(task_ids) & set(self.settled), "settled twice"
        assert len(set(task_ids)) == len(task_ids), "settled twice at once"
        self.settled += task_ids


TestRandomWalksLoseNoTaskAndSettleNoneTwice = Walk.TestCase
TestRandomWalksLoseNoTaskAndSettleNoneTwice.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

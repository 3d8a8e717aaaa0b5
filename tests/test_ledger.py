"""The Ledger alone: each move of a task, the phases of a job, what a loss, a retry and a late outcome cost, and random walks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import task_master
from task_master import DONE, LEASED, MOVES, READY, Failure, Ledger, Outcomes, Phase

ANNA, BERT = "anna", "bert"  # two connections
OK, ERROR, LAST_ERROR = (True, False, "what"), (False, False, "what"), (False, True, "what")


def make_ledger(tasks: int = 0, *enlisted: object, **limits: Any) -> Ledger:
    ledger = Ledger(**limits)
    ledger.begin()
    assert ledger.submit([(task_id, str(task_id)) for task_id in range(tasks)])
    enlist(ledger, *enlisted)
    return ledger


def lease(ledger: Ledger, holder: object, limit: int = 1, now: float = 0.0) -> list[int]:
    """The ids of what is leased."""
    tasks = ledger.lease(holder, limit, now)
    assert tasks is not None
    return [task.id for task in tasks]


def make_outcomes(outcomes: dict[int, tuple[bool, bool, str]]) -> Outcomes:
    """What was reported of some tasks, by id."""
    oks, finals, texts = ([outcome[column] for outcome in outcomes.values()] for column in range(3))
    return Outcomes([*outcomes], oks, finals, texts)


def report(ledger: Ledger, holder: object, outcomes: dict[int, Any], now: float = 0.0) -> tuple[list[int], list[int]]:
    """Report, record and settle; the ids that have their last outcome, and those that are retried."""
    last, retried = ledger.report(holder, make_outcomes(outcomes), now)
    ledger.settle(last)
    return [task.id for task in last], [task.id for task in retried]


def drop(ledger: Ledger, holder: object) -> tuple[list[int], list[int]]:
    """End a connection, and settle what is given up; the ids that are READY again, and those that were given up."""
    again, given_up = ledger.drop(holder)
    ledger.settle(given_up)
    return [task.id for task in again], [task.id for task in given_up]


def enlist(ledger: Ledger, *holders: object) -> None:
    """Workers of one slot each, which have had a result."""
    for holder in holders:
        ledger.enlist(holder, holder, 0.0)
        report(ledger, holder, {-1: OK})


def in_thread(target: Any, *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def check_ends(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def check_blocked(thread: threading.Thread) -> None:
    thread.join(0.05)
    assert thread.is_alive()


def check_counts(ledger: Ledger, ready: int, leased: int, done: int) -> None:
    ledger.audit()
    assert ledger.counts() == {READY: ready, LEASED: leased, DONE: done}
    assert ledger.submitted == ready + leased + done


# ---- the moves -----------------------------------------------------------------------------------------------------


def move(ledger: Ledger, tasks: list[Any], state: str) -> None:
    """What would bring ANNA's tasks into this state."""
    ids = [task.id for task in tasks]
    if state == READY:
        ledger.release(ANNA, ids)
    elif state == LEASED:
        ledger.report(ANNA, make_outcomes(dict.fromkeys(ids, OK)), 0.0)
    else:
        ledger.settle(tasks)


LEGAL = {(READY, LEASED), (LEASED, READY), (LEASED, LEASED), (LEASED, DONE)}


@pytest.mark.parametrize(("old", "new"), sorted(itertools.product((READY, LEASED, DONE), repeat=2)))
def test_the_table_says_which_moves_are_legal_and_an_illegal_one_stops_those_beside_it(old: str, new: str) -> None:
    ledger = make_ledger(2)
    good, task = ledger.lease(ANNA, 2, 0.0) or []
    task.state = old
    assert ((old, new) in MOVES) is ((old, new) in LEGAL)
    if (old, new) in LEGAL:
        move(ledger, [good, task], new)
        assert (good.state, task.state) == (new, new)
    else:
        with pytest.raises(AssertionError, match=f"from {old} to {new}"):
            move(ledger, [good, task], new)
        assert (good.state, good.holder, task.state, task.holder) == (LEASED, ANNA, old, ANNA)


def test_a_task_that_cannot_be_leased_is_recorded_as_failed() -> None:
    ledger = make_ledger(1)
    task = ledger.submit_failed(1, '"nonsense"', "what")
    check_counts(ledger, ready=1, leased=1, done=0)
    assert (ledger.failed, ledger.first_held(), task.attempts) == (0, {}, 0)
    ledger.settle([task])
    check_counts(ledger, ready=1, leased=0, done=1)
    assert ledger.failed == 1  # not before it is recorded, so that `done` less `failed` are those that succeeded


@pytest.mark.parametrize(
    ("released", "member", "value", "problem"),
    [
        (False, "state", READY, "cannot be leased"),
        (False, "state", DONE, "submitted is not"),
        (False, "holder", BERT, "not leased to it"),
        (True, "state", LEASED, "no holder"),
    ],
)
def test_the_audit_finds_what_does_not_fit(released: bool, member: str, value: str, problem: str) -> None:
    ledger = make_ledger(2)
    (task,) = ledger.lease(ANNA, 1, 0.0) or []
    if released:
        ledger.release(ANNA, [0])
    setattr(task, member, value)
    with pytest.raises(AssertionError, match=problem):
        ledger.audit()


# ---- release -------------------------------------------------------------------------------------------------------


def test_what_is_released_or_retried_is_leased_before_all_others_and_what_was_lost_after_them() -> None:
    ledger = make_ledger(4, retries=1)
    assert [lease(ledger, holder) for holder in (ANNA, ANNA, BERT)] == [[0], [1], [2]]
    assert ledger.first_held() == {ANNA: 0, BERT: 2}
    drop(ledger, BERT)
    report(ledger, ANNA, {1: ERROR})
    ledger.release(ANNA, [0])
    assert [lease(ledger, ANNA)[0] for _ in range(4)] == [0, 1, 3, 2]


def test_tasks_are_leased_in_the_order_in_which_they_came_however_many_wait_behind_a_slow_consumer() -> None:
    ledger = make_ledger(49_000)
    assert lease(ledger, ANNA, 500) == [*range(500)]
    ledger.close_gate(True)
    ledger.release(ANNA, [*range(499, 99, -1)])
    assert lease(ledger, BERT, 500) == []
    ledger.close_gate(False)
    order: list[int] = []
    while ids := lease(ledger, len(order), 1000):
        order += ids
    assert order == [*range(499, 99, -1), *range(500, 49_000)]


# ---- retries and redeliveries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["retries", "redeliveries"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_task_that_always_raises_or_loses_its_worker_runs_once_more_than_the_limit_says(limit: str, count: int) -> None:
    ledger = make_ledger(1, **{limit: count})

    def end_badly() -> tuple[list[int], list[int]]:
        """The ids of what is READY again, and of what has its last outcome."""
        return report(ledger, ANNA, {0: ERROR})[::-1] if limit == "retries" else drop(ledger, ANNA)

    for _ in range(count):
        assert lease(ledger, ANNA) == [0]
        assert end_badly() == ([0], [])
        check_counts(ledger, ready=1, leased=0, done=0)
    (task,) = ledger.lease(ANNA, 1, 0.0) or []
    assert end_badly() == ([], [0])
    check_counts(ledger, ready=0, leased=0, done=1)
    assert (ledger.failed, ledger.retried + ledger.redelivered, task.attempts) == (1, count, 1 + count)


def test_losses_do_not_use_up_retries_nor_retries_redeliveries() -> None:
    ledger = make_ledger(1, retries=1, redeliveries=2)
    lease(ledger, ANNA)
    assert drop(ledger, ANNA) == ([0], [])
    lease(ledger, BERT)
    assert report(ledger, BERT, {0: ERROR}) == ([], [0])
    lease(ledger, BERT)
    assert drop(ledger, BERT) == ([0], [])
    (task,) = ledger.lease(ANNA, 1, 0.0) or []
    assert report(ledger, ANNA, {0: OK}) == ([0], [])
    assert (ledger.failed, ledger.retried, ledger.redelivered, task.attempts) == (0, 1, 2, 4)


def test_a_retry_waits_for_its_delay_which_doubles_each_time() -> None:
    ledger = make_ledger(1, retries=3, retry_delay=10.0)
    now = 100.0
    for delay in (10.0, 20.0, 40.0):
        assert lease(ledger, ANNA, now=now) == [0]
        assert report(ledger, ANNA, {0: ERROR}, now) == ([], [0])
        assert lease(ledger, ANNA, now=now + delay - 0.1) == []
        check_counts(ledger, ready=1, leased=0, done=0)
        now += delay
    assert lease(ledger, ANNA, now=now) == [0]


def test_a_delayed_retry_keeps_nobody_else_waiting_and_a_loss_and_a_release_know_no_delay() -> None:
    ledger = make_ledger(5, retries=1, retry_delay=10.0)
    assert lease(ledger, ANNA, 4) == [0, 1, 2, 3]
    report(ledger, ANNA, {0: ERROR}, now=5.0)
    report(ledger, ANNA, {1: ERROR}, now=0.0)
    ledger.release(ANNA, [2])
    drop(ledger, ANNA)
    assert [lease(ledger, ANNA, 2, now=9.9) for _ in range(2)] == [[2, 4], [3]]
    assert lease(ledger, ANNA, 9, now=15.0) == [1, 0]
    assert (ledger.retried, ledger.redelivered) == (2, 1)  # a release is free of charge


# ---- late outcomes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [OK, LAST_ERROR, ERROR], ids=["ok", "final", "error"])
@pytest.mark.parametrize("leased_again", [False, True])
def test_a_late_last_outcome_settles_a_task_and_the_outcome_of_another_is_dropped(outcome: Any, leased_again: bool) -> None:
    ledger = make_ledger(2)
    assert lease(ledger, ANNA) + lease(ledger, BERT) == [0, 1]
    drop(ledger, ANNA)
    if leased_again:
        assert lease(ledger, BERT) == [0]
    assert report(ledger, ANNA, {0: outcome}) == ([0], [])
    check_counts(ledger, ready=0, leased=1, done=1)
    assert report(ledger, BERT, {0: OK}) == ([], [])
    assert (lease(ledger, BERT), ledger.failed) == ([], outcome is not OK)
    assert drop(ledger, BERT) == ([1], [])


@pytest.mark.parametrize("leased_again", [False, True])
@pytest.mark.parametrize("reported", [False, True], ids=["late", "reported again"])
def test_a_late_error_is_dropped_while_there_are_retries_and_one_whose_acknowledgement_was_lost_counts_once(
    reported: bool, leased_again: bool
) -> None:
    ledger = make_ledger(1, retries=1)
    lease(ledger, ANNA)
    if reported:
        assert report(ledger, ANNA, {0: ERROR}) == ([], [0])
    drop(ledger, ANNA)
    if leased_again:
        assert lease(ledger, BERT) == [0]
    assert report(ledger, "anna again", {0: ERROR}) == ([], [])
    check_counts(ledger, ready=not leased_again, leased=leased_again, done=0)
    assert ledger.failed == 0
    lease(ledger, BERT)
    assert report(ledger, BERT, {0: ERROR}) == (([0], []) if reported else ([], [0]))  # another run, which ended in the same way


def test_a_late_outcome_settles_a_retry_that_waits_for_its_delay() -> None:
    ledger = make_ledger(1, retries=1, retry_delay=10.0)
    lease(ledger, ANNA)
    drop(ledger, ANNA)
    lease(ledger, BERT)
    report(ledger, BERT, {0: ERROR})
    assert report(ledger, ANNA, {0: OK}) == ([0], [])
    assert lease(ledger, BERT, now=10.0) == []
    check_counts(ledger, ready=0, leased=0, done=1)


@pytest.mark.parametrize("outcome", [OK, ERROR], ids=["ok", "error"])
@pytest.mark.parametrize("settled", [False, True])
def test_the_second_outcome_of_a_task_is_dropped_also_after_the_end(outcome: Any, settled: bool) -> None:
    ledger = make_ledger(1, retries=5)
    lease(ledger, ANNA)
    last, _ = ledger.report(ANNA, make_outcomes({0: OK}), 0.0)
    if settled:
        ledger.settle(last)
    assert report(ledger, ANNA, {0: outcome, 7: OK, -1: ERROR}) == ([], [])  # and those of unknown tasks
    assert ledger.failed == 0
    check_counts(ledger, ready=0, leased=not settled, done=settled)
    if settled:
        ledger.end(Phase.CLOSED)
        assert report(ledger, ANNA, {0: outcome}) == ([], [])


# ---- how much is leased --------------------------------------------------------------------------------------------


def test_a_slot_gets_its_share_of_the_ready_tasks() -> None:
    ledger = make_ledger(100, ANNA, "lost")
    ledger.drop("lost")
    assert len(lease(ledger, ANNA, 60)) == 60
    enlist(ledger, BERT)
    assert len(lease(ledger, BERT, 40)) == 40 // 2
    assert [len(lease(ledger, BERT, limit)) for limit in (3, 0, -5)] == [3, 1, 1]
    assert len(lease(ledger, BERT, 12 * task_master.LEASE_PART)) == 12  # more than its share


def test_a_worker_gets_tasks_singly_until_it_has_had_a_result() -> None:
    ledger = make_ledger(100)
    for holder in (ANNA, BERT):
        ledger.enlist(holder, "their worker", 0.0)
    assert [lease(ledger, holder, 10) for holder in (ANNA, BERT, ANNA)] == [[0], [1], [2]]
    report(ledger, BERT, {1: ERROR})
    assert len(lease(ledger, ANNA, 10)) == 1
    report(ledger, BERT, {0: OK})
    assert len(lease(ledger, ANNA, 10)) == 10


# ---- a worker that fails all its tasks -----------------------------------------------------------------------------


def fail(ledger: Ledger, holder: object, count: int, now: float = 0.0) -> None:
    for _ in range(count):
        (task_id,) = lease(ledger, holder, 1, now)
        report(ledger, holder, {task_id: ERROR}, now)


def test_a_worker_that_fails_ten_times_while_another_does_not_gets_single_tasks_with_pauses_that_double() -> None:
    ledger = make_ledger(100, ANNA, BERT)
    fail(ledger, ANNA, 10)
    assert ledger.is_in_doubt(ANNA, 0.0) and not ledger.is_in_doubt(BERT, 0.0)
    got_at, now = [], 0.0
    while now < 130.0:
        if ids := lease(ledger, ANNA, 10, now):
            got_at.append(now)
            assert len(ids) == 1
            report(ledger, ANNA, {ids[0]: ERROR}, now)
        now += 0.25
    assert got_at == [0.0, 0.25, 0.75, 1.75, 3.75, 7.75, 15.75, 31.75, 63.75, 123.75]  # the last pause is of a minute
    assert len(lease(ledger, BERT, 10, now)) == 10
    report(ledger, ANNA, {lease(ledger, ANNA, 1, 200.0)[0]: OK}, 200.0)  # with a result it is like any other
    assert not ledger.is_in_doubt(ANNA, 200.0)
    assert len(lease(ledger, ANNA, 10, 200.0)) == 10


def test_the_pause_of_a_worker_in_doubt_stays_when_others_come_and_go_and_ends_with_the_doubt() -> None:
    ledger = make_ledger(100, ANNA, BERT)
    fail(ledger, ANNA, 11)
    ledger.enlist("carla", "carla", 0.0)
    ledger.drop("carla")
    assert lease(ledger, ANNA) == []
    fail(ledger, BERT, 6)  # neither good any more, nor failing all
    assert len(lease(ledger, ANNA)) == 1


def test_a_worker_in_doubt_waits_for_its_pause_and_not_for_tasks() -> None:
    ledger = make_ledger(100, ANNA, BERT)
    fail(ledger, ANNA, 11)
    assert lease(ledger, ANNA) == []
    assert [ledger.wait_ready(holder, 0.01, 0.0) for holder in (ANNA, BERT)] == [False, True]
    waiter = in_thread(ledger.wait_ready, ANNA, 120.0, 0.0)
    check_ends([waiter])  # it can hear that the job drains
    assert ledger.wait_ready(ANNA, 0.01, 0.25) is True


@pytest.mark.parametrize("end", ["is over", "drains"])
def test_a_worker_in_doubt_does_not_ask_again_and_again_when_the_job_ends(end: str) -> None:
    ledger = make_ledger(12, ANNA, BERT)
    fail(ledger, ANNA, 11)
    if end == "is over":
        report(ledger, BERT, {lease(ledger, BERT)[0]: OK})
        ledger.end(Phase.ENDED)
        assert ledger.phase == Phase.OVER
    else:
        lease(ledger, BERT)
        ledger.end(Phase.DRAINING)
    assert ledger.wait_ready(ANNA, 0.01, 0.0) is (ledger.lease(ANNA, 1, 0.0) is None) is (end == "drains")


def test_a_worker_that_fails_before_others_can_have_come_is_in_doubt_for_a_while() -> None:
    ledger = make_ledger(100, others_time=2.0)
    ledger.enlist(ANNA, ANNA, 50.0)
    fail(ledger, ANNA, 10, now=50.0)
    assert [ledger.is_in_doubt(ANNA, now) for now in (51.9, 52.0)] == [True, False]


def test_a_retry_is_left_for_another_worker_if_there_is_one() -> None:
    ledger = make_ledger(3, ANNA, BERT, retries=2)
    fail(ledger, ANNA, 1)
    assert lease(ledger, ANNA, 5) + lease(ledger, ANNA, 5) == [1, 2]  # divided between the two
    assert lease(ledger, ANNA, 5) == []
    assert ledger.wait_ready(ANNA, 0.01, 0.0) is False  # it does not ask again and again
    assert ledger.wait_ready(ANNA, 0.01, task_master.AVOID_PAUSE) is True
    assert lease(ledger, BERT, 5) == [0]
    report(ledger, BERT, {0: ERROR})
    drop(ledger, ANNA)
    assert lease(ledger, BERT, 5) == [0]  # there is nobody else now
    ledger.audit()


def test_retries_that_are_left_for_others_do_not_hide_what_is_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_master, "AVOID_LIMIT", 3)
    ledger, times = make_ledger(11, ANNA, BERT, retries=1), range(9)
    for task_id in [lease(ledger, ANNA)[0] for _ in times]:
        report(ledger, ANNA, {task_id: ERROR})
    assert {task_id for now in times for task_id in lease(ledger, ANNA, 9, float(now))} == {9, 10}
    ledger.audit()
    assert {task_id for _ in times for task_id in lease(ledger, BERT, 9)} == {*range(9)}


def test_retries_that_nobody_else_takes_in_time_are_not_leased_one_by_one() -> None:
    ledger = make_ledger(100, ANNA, BERT, retries=1)
    for holder in (ANNA, BERT):
        report(ledger, holder, {lease(ledger, holder)[0]: OK})
    ids = lease(ledger, ANNA, 100)
    while lease(ledger, BERT, 100):  # it is busy with all others
        pass
    report(ledger, ANNA, {task_id: ERROR if task_id % 2 else OK for task_id in ids})
    assert lease(ledger, ANNA, 100) == []
    assert len(lease(ledger, ANNA, 100, now=task_master.AVOID_TIME)) > 5


@pytest.mark.parametrize(("failures", "leased"), [(1, [0, 1, 0]), (10, [0, 0, 1])], ids=["one failure", "fails all its tasks"])
def test_a_retry_is_not_left_for_long_for_a_worker_that_may_be_busy_for_hours(failures: int, leased: list[int]) -> None:
    ledger = make_ledger(1 + failures, ANNA, BERT, retries=5)
    assert lease(ledger, BERT) == [0]
    fail(ledger, ANNA, failures)
    assert [len(lease(ledger, ANNA, now=now)) for now in (0.0, task_master.AVOID_TIME, 2 * task_master.LAST_PAUSE)] == leased
    ledger.submit([(100, "100")])
    assert lease(ledger, ANNA, now=1e6) == [100]  # others first, however long it takes


def test_a_retry_is_not_left_for_a_worker_that_fails_all_its_tasks() -> None:
    ledger = make_ledger(11, ANNA, BERT, retries=2)
    fail(ledger, BERT, 10)
    fail(ledger, ANNA, 1)
    assert {*lease(ledger, ANNA, 100), *lease(ledger, ANNA, 100), *lease(ledger, ANNA, 100)} == {*range(11)}


def test_a_task_that_was_lost_before_or_may_not_be_lost_is_leased_alone() -> None:
    ledger = make_ledger(4)
    lease(ledger, ANNA, 2)
    drop(ledger, ANNA)
    assert [lease(ledger, BERT, 10) for _ in range(3)] == [[2, 3], [0], [1]]
    ledger = make_ledger(3, redeliveries=0)
    assert [lease(ledger, ANNA, 10) for _ in range(3)] == [[0], [1], [2]]


def test_what_one_lease_and_one_connection_hold_is_bounded_unless_a_task_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_master, "LEASE_LIMIT", 4)
    ledger = make_ledger(9)
    assert [lease(ledger, holder, 9) for holder in (ANNA, ANNA, ANNA, BERT)] == [[0, 1], [2, 3], [], [4, 5]]
    monkeypatch.setattr(task_master, "LEASE_BYTES", 100)
    ledger = make_ledger()
    ledger.submit([(number, '"%s"' % ("x" * size)) for number, size in enumerate([48, 48, 48, 200, 1])])
    assert [lease(ledger, holder, 9) for holder in range(4)] == [[0, 1], [2], [3], [4]]


# ---- the phases of a job -------------------------------------------------------------------------------------------


def test_a_job_is_over_when_no_task_will_come_and_all_are_done_and_another_may_begin() -> None:
    ledger = Ledger()
    assert (ledger.submit([(0, "0")]), ledger.lease(ANNA, 1, 0.0), ledger.is_over()) == (False, [], True)  # before the first
    ledger = make_ledger(1)
    assert not ledger.is_over()
    ledger.end(Phase.ENDED)
    waiter = in_thread(ledger.wait_over, None)
    lease(ledger, ANNA)
    last, _ = ledger.report(ANNA, make_outcomes({0: OK}), 0.0)
    check_blocked(waiter)
    assert not ledger.is_over() and not ledger.wait_over(0.0)
    ledger.settle(last)
    check_ends([waiter])
    assert ledger.is_over() and ledger.wait_over(None)
    ledger.begin()
    assert (ledger.phase, ledger.submit([(1, "1")]), lease(ledger, ANNA)) == (Phase.OPEN, True, [1])
    ledger = make_ledger()
    ledger.end(Phase.ENDED)
    assert ledger.phase == Phase.OVER  # without a task


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase != Phase.OVER])
def test_a_job_does_not_begin_while_another_runs_or_was_ended_early(phase: Phase) -> None:
    ledger = make_ledger(1)
    ledger.end(phase)
    with pytest.raises(Failure, match="closed"):
        ledger.begin()


def test_a_phase_only_goes_up_and_the_first_reason_counts() -> None:
    ledger = make_ledger(1)
    lease(ledger, ANNA)
    first, second = Failure("first"), Failure("second")
    ledger.end(Phase.DRAINING, first)
    ledger.end(Phase.ENDED, second)
    assert (ledger.phase, ledger.reason) == (Phase.DRAINING, first)
    ledger.end(Phase.FAILED)
    assert (ledger.phase, ledger.reason, ledger.is_over()) == (Phase.FAILED, first, True)


COMING_BACK = {
    "released": lambda ledger: ledger.release(ANNA, [0]),
    "retried": lambda ledger: ledger.report(ANNA, make_outcomes({0: ERROR}), 0.0),
    "lost": lambda ledger: ledger.drop(ANNA),
}
LAST_MOVES = {**COMING_BACK, "reported": lambda ledger: report(ledger, ANNA, {0: OK})}


@pytest.mark.parametrize("last", LAST_MOVES)
def test_a_draining_job_leases_and_takes_nothing_and_is_closed_when_nothing_is_leased(last: str) -> None:
    ledger = make_ledger(3, retries=1)
    lease(ledger, ANNA)
    ledger.end(Phase.DRAINING)
    assert ledger.lease(BERT, 1, 0.0) is None
    assert not ledger.submit([(3, "3")])
    assert not ledger.is_over()
    LAST_MOVES[last](ledger)
    assert (ledger.phase, ledger.wait_over(0.0)) == (Phase.CLOSED, True)
    check_counts(ledger, ready=2 + (last != "reported"), leased=0, done=last == "reported")


def test_a_signal_handler_may_end_the_job_in_the_middle_of_a_call() -> None:
    ledger = make_ledger(1)

    class Interrupted:
        def __hash__(self) -> int:
            ledger.end(Phase.CLOSED)
            return 0

    ledger.release(Interrupted(), [0])
    assert ledger.is_over()


@pytest.mark.parametrize("phase", [Phase.CLOSED, Phase.FAILED])
def test_an_outcome_is_not_acknowledged_when_it_cannot_be_recorded_any_more(phase: Phase) -> None:
    ledger = make_ledger(1)
    lease(ledger, ANNA)
    ledger.end(phase)
    with pytest.raises(EOFError):
        ledger.report(ANNA, make_outcomes({0: OK}), 0.0)
    check_counts(ledger, ready=0, leased=1, done=0)


# ---- waiting ------------------------------------------------------------------------------------------------------


WAKING = {
    **COMING_BACK,
    "submitted": lambda ledger: ledger.submit([(1, "1")]),
    "the gate opens": lambda ledger: ledger.close_gate(False),
    "the job drains": lambda ledger: ledger.end(Phase.DRAINING),
}


@pytest.mark.parametrize("move", WAKING)
def test_waiting_for_a_task_ends_when_one_can_be_leased_or_none_ever(move: str) -> None:
    ledger = make_ledger(1, retries=1)
    if move == "the gate opens":
        ledger.close_gate(True)
    else:
        lease(ledger, ANNA)
    enlist(ledger, *range(int(120 * task_master.IDLE_POLLS)))  # so many that each may wait for two minutes
    answers: list[bool] = []
    holders = range(3 if move == "the job drains" else 1)
    waiters = [in_thread(lambda holder=holder: answers.append(ledger.wait_ready(holder, 120.0, 0.0))) for holder in holders]
    check_blocked(waiters[0])
    WAKING[move](ledger)
    check_ends(waiters)
    assert answers == [True] * len(waiters)


def test_one_who_is_woken_for_what_its_worker_must_not_have_wakes_the_next() -> None:
    ledger = make_ledger(10)
    for holder in (ANNA, "her second slot", "her third slot"):
        ledger.enlist(holder, ANNA, 0.0)
    enlist(ledger, *range(int(120 * task_master.IDLE_POLLS)))
    fail(ledger, ANNA, 10)

    def wait(holder: object) -> None:
        assert ledger.wait_ready(holder, 120.0, 0.0)
        lease(ledger, holder)

    waiters = []
    for holder in ("her second slot", "her third slot", 0):
        waiters.append(in_thread(wait, holder))
        check_blocked(waiters[-1])
    ledger.submit([(10, "10"), (11, "11")])
    check_ends(waiters)
    check_counts(ledger, ready=0, leased=2, done=10)


def test_waiting_ends_without_a_task_when_the_time_is_over_though_the_gate_is_closed_or_a_retry_is_not_due() -> None:
    assert make_ledger().wait_ready(ANNA, 0.01, 0.0) is False
    ledger = make_ledger(1)
    ledger.close_gate(True)
    assert ledger.wait_ready(ANNA, 0.01, 0.0) is False
    ledger.close_gate(False)
    assert ledger.wait_ready(ANNA, 0.01, 0.0) is True
    ledger = make_ledger(1, retries=1, retry_delay=10.0)
    lease(ledger, ANNA)
    report(ledger, ANNA, {0: ERROR})
    assert [ledger.wait_ready(ANNA, 0.01, now) for now in (0.0, 10.0)] == [False, True]


@pytest.mark.parametrize("limit", ["READY_LIMIT", "READY_BYTES"])
@pytest.mark.parametrize("retried", [False, True], ids=["ready", "retries"])
@pytest.mark.parametrize("move", ["lease", "drain"])
def test_submitting_blocks_while_too_much_is_ready_or_waits_for_its_delay(
    monkeypatch: pytest.MonkeyPatch, limit: str, retried: bool, move: str
) -> None:
    monkeypatch.setattr(task_master, limit, 2)
    ledger, answers = make_ledger(2, retries=1, retry_delay=10.0), []
    for task_id in lease(ledger, ANNA, 2) if retried else ():
        report(ledger, ANNA, {task_id: ERROR})
    reader = in_thread(lambda: answers.append(ledger.submit([(2, "2")])))
    check_blocked(reader)
    if move == "lease":
        assert lease(ledger, ANNA, 1, 10.0) == [0]
    else:
        ledger.end(Phase.DRAINING)
    check_ends([reader])
    assert answers == [move == "lease"]
    ledger.audit()


@pytest.mark.parametrize("look", [Ledger.lease, Ledger.wait_ready])
def test_text_of_tasks_that_were_settled_late_makes_room_again(monkeypatch: pytest.MonkeyPatch, look: Any) -> None:
    monkeypatch.setattr(task_master, "READY_BYTES", 10)
    ledger = make_ledger()
    ledger.submit([(0, '"a long task"')])
    lease(ledger, ANNA)
    drop(ledger, ANNA)
    report(ledger, ANNA, {0: OK})  # it still stands among those to be leased
    assert not look(ledger, ANNA, 0, 0.0)
    check_ends([in_thread(ledger.submit, [(1, "1")])])
    assert lease(ledger, ANNA) == [1]


# ---- random walks --------------------------------------------------------------------------------------------------


class Walk(RuleBasedStateMachine):
    """Connections that lease, release, report (in time, late, twice) and end in any order, and a job that may drain."""

    retries, redeliveries, delay = 1, 1, 10.0

    def __init__(self) -> None:
        super().__init__()
        self.ledger = make_ledger(0, retries=self.retries, redeliveries=self.redeliveries, retry_delay=self.delay)
        self.now, self.submitted, self.gate_closed, self.draining = 0.0, 0, False, False
        self.live: set[int] = set()  # connections
        self.held: dict[int, set[int]] = {}  # by connection, live or not: what it has leased and neither released nor reported
        self.recorded: dict[int, Any] = {}  # tasks to be settled
        self.settled: set[int] = set()
        self.due: dict[int, float] = {}
        self.runs: dict[int, int] = {}  # times that a task was leased and not released
        for _ in range(3):
            self.connect()

    def connect(self) -> None:
        holder = len(self.held)
        self.live.add(holder)
        self.held[holder] = set()
        if holder % 3:
            self.ledger.enlist(holder, holder % 2, self.now)

    def draw_ids(self, data: st.DataObject, ids: Iterable[int]) -> list[int]:
        """All of them, or some that follow each other."""
        candidates = sorted(ids)
        first, last = (data.draw(st.integers(0, len(candidates))) for _ in range(2))
        return candidates[first:last] or candidates

    def record(self, tasks: list[Any]) -> None:
        for task in tasks:
            assert task.id not in self.recorded and task.id not in self.settled, "recorded twice"
            self.recorded[task.id] = task

    @rule(count=st.integers(1, 8))
    def submit(self, count: int) -> None:
        wanted = self.ledger.submit([(number, str(number)) for number in range(self.submitted, self.submitted + count)])
        assert wanted is not self.draining
        self.submitted += count * wanted

    @precondition(lambda self: not self.draining and self.submitted % 4 == 0)
    @rule()
    def submit_failed(self) -> None:
        self.record([self.ledger.submit_failed(self.submitted, "0", "what")])
        self.submitted += 1

    @rule(data=st.data(), limit=st.integers(1, 9))
    def lease(self, data: st.DataObject, limit: int) -> None:
        holder = data.draw(st.sampled_from(sorted(self.live)))
        tasks = self.ledger.lease(holder, limit, self.now)
        assert (tasks is None) is self.draining
        tasks = tasks or []
        assert len(tasks) <= (0 if self.gate_closed else limit)
        assert len(tasks) == 1 or not any(task.losses for task in tasks)
        ids = {task.id for task in tasks}
        assert not ids & {*self.settled, *self.recorded}.union(*[self.held[other] for other in self.live])
        assert all(self.due.get(task_id, 0.0) <= self.now for task_id in ids)
        self.held[holder] |= ids
        for task_id in ids:
            self.runs[task_id] = self.runs.get(task_id, 0) + 1

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """What the holder has leased, or whatever it likes; what it does not hold stays as it is."""
        holder = data.draw(st.sampled_from(sorted(self.live)))
        ids = self.draw_ids(data, self.held[holder] if data.draw(st.booleans()) else range(self.submitted + 1))
        self.ledger.release(holder, [*ids, *ids])
        for task_id in self.held[holder] & {*ids}:
            self.held[holder].remove(task_id)
            self.runs[task_id] -= 1

    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        """By a live connection or one that has ended, of what it held, or of what anybody held."""
        holder = data.draw(st.sampled_from(sorted(self.held)))
        ids = self.draw_ids(data, self.held[holder] if data.draw(st.booleans()) else range(self.submitted))
        outcomes = make_outcomes({task_id: data.draw(st.sampled_from([OK, ERROR, LAST_ERROR])) for task_id in ids})
        if self.ledger.is_over() and len(self.settled) < self.submitted:
            with pytest.raises(EOFError):
                self.ledger.report(holder, outcomes, self.now)
            return
        last, retried = self.ledger.report(holder, outcomes, self.now)
        self.record(last)
        moved = {task.id for task in [*last, *retried]}
        assert moved <= {*ids}
        assert not [task.id for task in retried if outcomes.finals[ids.index(task.id)]], "another run could not change it"
        for other in self.live:  # a real one hears of it later; then it reports in vain
            self.held[other] -= moved
        for task in retried:
            self.due[task.id] = self.now + self.delay

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        ids = self.draw_ids(data, self.recorded)
        self.ledger.settle([self.recorded.pop(task_id) for task_id in ids])
        self.settled |= {*ids}

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.live)))
        self.live.remove(holder)
        again, given_up = self.ledger.drop(holder)
        assert {task.id for task in [*again, *given_up]} == self.held[holder]
        assert self.ledger.drop(holder) == ([], [])
        self.record(given_up)
        self.connect()

    @rule(seconds=st.sampled_from([0.5, 5.0, 10.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule(closed=st.sampled_from([False, False, True]))
    def close_gate(self, closed: bool) -> None:
        self.ledger.close_gate(closed)
        self.gate_closed = closed

    @precondition(lambda self: self.submitted > 5 and not self.draining)
    @rule()
    def drain(self) -> None:
        self.ledger.end(Phase.DRAINING)
        self.draining = True

    @invariant()
    def the_books_are_right(self) -> None:
        self.ledger.audit()
        leased = sum(len(self.held[holder]) for holder in self.live) + len(self.recorded)
        done = len(self.settled)
        assert self.ledger.counts() == {READY: self.submitted - leased - done, LEASED: leased, DONE: done}
        assert self.ledger.is_over() is (self.draining and not leased)

    def teardown(self) -> None:
        """Whatever happened before, the connections end, and if the job does not drain, one that works well finishes it."""
        for holder in self.live:
            self.record(self.ledger.drop(holder)[1])
        self.ledger.settle([*self.recorded.values()])
        self.ledger.end(Phase.ENDED)
        self.ledger.close_gate(False)
        while tasks := self.ledger.lease("last", 10, self.now + 1000.0):
            self.ledger.settle(self.ledger.report("last", make_outcomes({task.id: OK for task in tasks}), self.now)[0])
        self.ledger.audit()
        assert self.ledger.is_over()
        assert self.draining or self.ledger.done == self.submitted
        assert all(runs <= 1 + self.retries + self.redeliveries for runs in self.runs.values())


TestRandomWalksLoseNoTaskAndRecordNoneTwice = Walk.TestCase
TestRandomWalksLoseNoTaskAndRecordNoneTwice.settings = settings(max_examples=100, derandomize=True, database=None)

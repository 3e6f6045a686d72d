import contextvars
import threading
import time

import pytest

from csi_driver.errors import NotFound, OperationPending, Unavailable
from csi_driver.volumes import jobs as jobs_module
from csi_driver.volumes.jobs import REPLY_MARGIN_SECONDS, JobCancelled, Jobs


def soon():
    return time.monotonic() + 30


def at_once():
    return time.monotonic()


@pytest.fixture
def jobs():
    made = Jobs()
    yield made
    made.stop(5)


class Work:
    """Work that goes on until it is released or told to stop, and counts how often it was begun."""

    def __init__(self, result="made", error=None):
        self.begun = 0
        self.release = threading.Event()
        self._result, self._error = result, error

    def __call__(self, job):
        self.begun += 1
        while not self.release.wait(0.005):
            if job.should_stop():
                raise JobCancelled("stopped")
        if self._error is not None:
            raise self._error
        return self._result


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_result_is_returned(jobs):
    assert jobs.run("k", lambda _job: 42, soon()) == 42
    assert jobs.running() == []


def test_work_that_outlasts_the_call_goes_on_and_the_retry_joins_it(jobs):
    work = Work()
    for _ in range(3):
        with pytest.raises(OperationPending, match="try again"):
            jobs.run("k", work, at_once())
    threading.Timer(0.05, work.release.set).start()
    assert jobs.run("k", work, soon()) == "made"
    assert work.begun == 1


def test_the_call_answers_before_its_deadline(jobs):
    started = time.monotonic()
    with pytest.raises(OperationPending):
        jobs.run("k", Work(), started + REPLY_MARGIN_SECONDS + 0.2)
    assert 0.15 < time.monotonic() - started < REPLY_MARGIN_SECONDS


def test_all_who_wait_get_the_one_result(jobs):
    work = Work()
    results = []
    waiters = [threading.Thread(target=lambda: results.append(jobs.run("k", work, soon()))) for _ in range(5)]
    for waiter in waiters:
        waiter.start()
    until(lambda: work.begun)
    work.release.set()
    for waiter in waiters:
        waiter.join()
    assert results == ["made"] * 5
    assert work.begun == 1


def test_a_failure_between_two_retries_is_told_to_the_next_once_and_then_forgotten(jobs):
    failing = Work(error=NotFound("the source went away"))
    with pytest.raises(OperationPending):
        jobs.run("k", failing, at_once())
    failing.release.set()
    until(lambda: not jobs.running())
    with pytest.raises(NotFound, match="went away"):
        jobs.run("k", lambda _job: "another try", soon())
    assert jobs.run("k", lambda _job: "another try", soon()) == "another try"


def test_a_failure_that_is_no_error_of_ours_reaches_the_caller_too(jobs):
    with pytest.raises(ZeroDivisionError):
        jobs.run("k", lambda _job: 1 // 0, soon())


def test_a_success_that_nobody_fetched_never_answers_for_a_later_namesake(jobs):
    work = Work(result="the first")
    with pytest.raises(OperationPending):
        jobs.run("k", work, at_once())
    work.release.set()
    until(lambda: not jobs.running())
    assert jobs.run("k", lambda _job: "the second", soon()) == "the second"


def test_an_old_failure_is_not_kept_for_ever(jobs, monkeypatch):
    failing = Work(error=NotFound("long ago"))
    with pytest.raises(OperationPending):
        jobs.run("k", failing, at_once())
    failing.release.set()
    until(lambda: not jobs.running())
    monkeypatch.setattr(jobs_module, "KEEP_FAILURE_SECONDS", 0.0)
    time.sleep(0.01)
    assert jobs.run("k", lambda _job: "new", soon()) == "new"


def test_a_cancelled_job_stops_and_says_so_to_whoever_waits(jobs):
    work = Work()
    with pytest.raises(OperationPending):
        jobs.run("k", work, at_once())
    jobs.cancel("k")
    with pytest.raises(JobCancelled):
        jobs.run("k", work, soon())
    assert jobs.find("k") is None


def test_cancelling_drops_a_failure_that_nobody_fetched(jobs):
    failing = Work(error=NotFound("of the one that is deleted"))
    with pytest.raises(OperationPending):
        jobs.run("k", failing, at_once())
    failing.release.set()
    until(lambda: not jobs.running())
    jobs.cancel("k")
    assert jobs.run("k", lambda _job: "the namesake", soon()) == "the namesake"
    jobs.cancel("never begun")


def test_jobs_of_other_keys_do_not_wait_for_each_other(jobs):
    slow = Work()
    with pytest.raises(OperationPending):
        jobs.run("slow", slow, at_once())
    assert jobs.run("quick", lambda _job: 1, soon()) == 1
    assert [job.key for job in jobs.running()] == ["slow"]
    assert jobs.find("slow") is not None


def test_stopping_ends_what_runs_and_lets_nothing_begin(jobs):
    work = Work()
    with pytest.raises(OperationPending):
        jobs.run("k", work, at_once())
    started = time.monotonic()
    jobs.stop(10)
    assert time.monotonic() - started < 5
    assert jobs.running() == []
    with pytest.raises(Unavailable, match="shutting down"):
        jobs.run("another", lambda _job: 1, soon())


def test_stopping_waits_no_longer_than_it_was_told(jobs):
    deaf = threading.Event()
    with pytest.raises(OperationPending):
        jobs.run("k", lambda _job: deaf.wait(20), at_once())
    started = time.monotonic()
    jobs.stop(0.1)
    assert time.monotonic() - started < 5
    deaf.set()


def test_progress_is_in_the_answer_that_says_to_come_back(jobs):
    def work(job):
        job.progress.add_bytes(12345)
        release.wait(10)

    release = threading.Event()
    with pytest.raises(OperationPending):
        jobs.run("k", work, at_once())
    until(lambda: jobs.find("k").progress.bytes)
    with pytest.raises(OperationPending, match=r"0 files, 12\.1 KiB"):
        jobs.run("k", work, at_once())
    release.set()


def test_the_request_id_of_the_call_is_seen_by_the_job(jobs):
    request_id = contextvars.ContextVar("request_id", default="none")
    request_id.set("r-1")
    assert jobs.run("k", lambda _job: request_id.get(), soon()) == "r-1"


def test_a_process_that_has_no_more_threads_says_so_and_the_next_try_begins_anew(jobs, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")  # as CPython says when clone(2) fails with EAGAIN

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(Unavailable, match="can't start new thread"):
            jobs.run("k", lambda _job: 1, soon())
    assert jobs.run("k", lambda _job: 2, soon()) == 2

import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest
from bench import make_bench

from csi_driver.errors import OperationPending
from csi_driver.volumes.locks import KeyedLocks


@pytest.fixture
def store(bench):
    return bench.pool()


def is_free(locks, store, key="k", *, shared=False):
    try:
        with locks.hold(store, key, shared=shared):
            return True
    except OperationPending:
        return False


class OtherProcess:
    """A second process that serves the same pool, and holds a key until it is told to let go, or killed."""

    def __init__(self, store, key, *, shared=False):
        ready, self._tell = os.pipe()
        self._let_go, let_go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(ready)
                os.close(let_go)
                with KeyedLocks().hold(store, key, shared=shared):
                    os.write(self._tell, b"h")
                    os.read(self._let_go, 1)
                code = 0
            finally:
                os._exit(code)
        os.close(self._tell)
        os.close(self._let_go)
        self._let_go = let_go
        assert os.read(ready, 1) == b"h"
        os.close(ready)

    def finish(self, signal=0):
        if signal:
            os.kill(self.pid, signal)
        os.close(self._let_go)
        os.waitpid(self.pid, 0)


def test_a_key_is_held_by_one_and_free_again_afterwards(store):
    locks = KeyedLocks()
    with locks.hold(store, "k"):
        with pytest.raises(OperationPending, match="k in pool default"):
            locks.hold(store, "k").__enter__()
        assert is_free(locks, store, "another key")
    assert is_free(locks, store)


def test_a_key_is_free_again_after_an_error_inside(store):
    locks = KeyedLocks()
    with pytest.raises(ZeroDivisionError), locks.hold(store, "k"):
        raise ZeroDivisionError
    assert is_free(locks, store)


def test_the_same_key_in_another_pool_is_another_lock(bench):
    locks = KeyedLocks()
    with locks.hold(bench.pool("default"), "k"):
        assert is_free(locks, bench.pool("other"))


def test_readers_share_and_keep_a_writer_out_until_the_last_has_gone(store):
    locks = KeyedLocks()
    with ExitStack() as first:
        first.enter_context(locks.hold(store, "k", shared=True))
        with locks.hold(store, "k", shared=True):
            assert not is_free(locks, store)
        assert not is_free(locks, store)
    with locks.hold(store, "k"):
        assert not is_free(locks, store, shared=True)


def test_of_many_threads_one_at_a_time_is_inside(store):
    locks = KeyedLocks()
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, entered
        for _ in range(50):
            try:
                with locks.hold(store, "k"):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                        entered += 1
                    time.sleep(0.0005)
                    with guard:
                        inside -= 1
            except OperationPending:
                time.sleep(0.0005)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered > 8


def test_two_instances_in_one_process_exclude_each_other_too(store):
    # Two lock tables know nothing of each other: here the lock file alone decides, as between two controllers.
    with KeyedLocks().hold(store, "k"):
        assert not is_free(KeyedLocks(), store)
    assert is_free(KeyedLocks(), store)


def test_another_process_that_holds_a_key_keeps_this_one_out(store):
    locks = KeyedLocks()
    other = OtherProcess(store, "k")
    assert not is_free(locks, store)
    assert not is_free(locks, store, shared=True)
    assert is_free(locks, store, "another key")
    other.finish()
    assert is_free(locks, store)


def test_readers_share_across_processes(store):
    locks = KeyedLocks()
    other = OtherProcess(store, "k", shared=True)
    assert is_free(locks, store, shared=True)
    assert not is_free(locks, store)
    other.finish()
    assert is_free(locks, store)


def test_a_key_is_free_as_soon_as_its_holder_was_killed(store):
    other = OtherProcess(store, "k")
    assert not is_free(KeyedLocks(), store)
    other.finish(signal=9)
    assert is_free(KeyedLocks(), store)


def test_a_refusal_by_another_process_leaves_nothing_held_here(store):
    locks = KeyedLocks()
    other = OtherProcess(store, "k")
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert not is_free(locks, store)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    other.finish()
    assert is_free(locks, store)


def test_the_lock_file_is_never_written(store):
    with KeyedLocks().hold(store, "k"), KeyedLocks().hold(store, "l", shared=True):
        assert (store.backend.root() / ".csi/lock").stat().st_size == 0


def test_a_second_controller_that_asks_for_the_same_volume_is_told_to_come_back(bench, tmp_path, pools):
    second = make_bench(tmp_path, pools)
    volume = bench.create("v")
    with bench.domain.services.volumes._locks.hold(bench.pool(), f"volume:{volume.record.id}"):
        with pytest.raises(OperationPending):
            second.volumes.delete(volume.record.handle)
        assert second.create("v") == volume  # to look takes no lock
    second.volumes.delete(volume.record.handle)


# --- queues -----------------------------------------------------------------------------------------------------------------------


def test_those_who_queue_come_one_after_another_and_all_of_them(store):
    locks, inside, most, done = KeyedLocks(), 0, 0, 0

    def work():
        nonlocal inside, most, done
        with locks.queue(store, "k", 30):
            inside += 1
            most = max(most, inside)
            time.sleep(0.001)
            inside -= 1
            done += 1

    threads = [threading.Thread(target=work) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 50)


def test_whoever_queues_waits_for_another_process_until_it_lets_go_or_dies(store):
    locks = KeyedLocks()
    for signal_number in (0, signal.SIGKILL):
        other = OtherProcess(store, "k")
        with pytest.raises(OperationPending, match="k in pool default"), locks.queue(store, "k", 0.2):
            pass
        timer = threading.Timer(0.3, other.finish, [signal_number])
        timer.start()
        began = time.monotonic()
        with locks.queue(store, "k", 20):
            assert time.monotonic() - began < 10
        timer.join()


def test_a_queue_is_free_again_after_an_error_inside(store):
    locks = KeyedLocks()
    with pytest.raises(ZeroDivisionError), locks.queue(store, "k", 1):
        raise ZeroDivisionError
    with locks.queue(store, "k", 1):
        assert not is_free(KeyedLocks(), store)
    assert is_free(locks, store)

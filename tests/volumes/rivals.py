"""Two controllers that both believe that a lock is theirs: the pool's server was away, and has given it to the second meanwhile."""

import threading


def lose_all_locks(bench):
    """Take away all locks of a pool: its lock file is another from now on, so that whoever comes asks for other locks."""
    (bench.pool().backend.root() / ".csi/lock").unlink()


class Slow:
    """A call that stands still before a step of its own domain (`when` says at which), and is let go on later."""

    def __init__(self, monkeypatch, place, step, call, when=lambda *_: True):
        self._here, self._go_on, self.outcome = threading.Event(), threading.Event(), None
        done = getattr(place, step)

        def wait(*arguments, **keywords):
            if when(*arguments):
                self._here.set()
                assert self._go_on.wait(30)
            return done(*arguments, **keywords)

        monkeypatch.setattr(place, step, wait)
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()
        assert self._here.wait(30)

    def _run(self, call):
        try:
            self.outcome = call()
        except Exception as error:
            self.outcome = error

    def go_on(self):
        self._go_on.set()
        self._thread.join(30)
        return self.outcome

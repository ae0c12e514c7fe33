"""Killable worker processes for `common.answers`: computer algebra on untrusted text, with limits of time and memory.

The workers are plain subprocesses that talk JSON lines over pipes. So there is no pickle, no re-import of the caller's
`__main__`, no signal in the calling process, and it makes no difference whether the caller is a thread, an asyncio
task, a forked child (which makes its own workers) or a daemonic process. A late worker is killed and replaced. It also
ends when its pipe closes or its parent is gone, and the kernel ends it at its own alarm, CPU or memory limit.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from common._compare import Outcome, Policy, compare

_MEMORY = 2 * 1024**3  # bytes of address space for one worker
_START_LIMIT = 120.0  # seconds for a worker to import sympy, on a machine under load
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from common._worker import main; main()"


class _Late(Exception):
    """No reply before the deadline."""


class _Gone(Exception):
    """The worker ended."""


class _Worker:
    """One process. `ready` is True once it has imported what it needs."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", _BOOT, str(Path(__file__).parents[1])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, bufsize=0, **pipes)
        self.ready = False
        self._buffer = b""

    def wait_ready(self, deadline: float) -> None:
        if not self.ready:
            hello = self._read(deadline)
            if "missing" in hello:
                raise ImportError(f"{hello['missing']}. Checking answers needs it: pip install latex2sympy2-extended")
            self.ready = True

    def ask(self, request: dict, deadline: float) -> Outcome | None:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise _Gone from error
        outcome = self._read(deadline)["outcome"]
        return outcome and Outcome(*outcome)

    def _read(self, deadline: float) -> dict:
        poller = select.poll()  # not select(): training processes have more than 1024 open files
        poller.register(self.process.stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._buffer:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Late
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                raise _Gone
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes the pipes and leaves the process alone: in a forked child it belongs to the parent."""
        self.process.returncode = self.process.returncode or 0
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


class _Pool:
    """The workers of this process, at most `limit`; each is started when needed and kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._changed = threading.Condition()

    def raise_limit(self, limit: int) -> None:
        with self._changed:
            self.limit = max(self.limit, limit)
            self._changed.notify_all()

    def take(self, deadline: float) -> _Worker:
        with self._changed:
            while True:
                if self._idle:
                    worker = self._idle.pop()
                    if worker.process.poll() is None:
                        return worker
                    worker.forget()  # it was killed while nobody asked it anything
                    self.workers.discard(worker)
                elif len(self.workers) < self.limit:
                    self._start()
                elif not self._changed.wait(deadline - time.monotonic()):
                    raise _Late

    def give_back(self, worker: _Worker) -> None:
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()

    def replace(self, worker: _Worker) -> None:
        """Kills a worker and starts the next at once, which imports while the caller goes on."""
        worker.kill()  # before the lock, for which others would wait beyond their deadlines
        with self._changed:
            self.workers.discard(worker)
            self._start()
            self._changed.notify()

    def drop(self, worker: _Worker) -> None:
        worker.kill()
        with self._changed:
            self.workers.discard(worker)
            self._changed.notify()

    def _start(self) -> None:
        worker = _Worker()
        self.workers.add(worker)
        self._idle.append(worker)


def _default_limit() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


_pool = _Pool(_default_limit())


def at_least(workers: int | None) -> int:
    """Allows that many workers (None: the default limit) and returns the number."""
    count = workers or _default_limit()
    _pool.raise_limit(count)
    return count


def ask(prediction: str, gold: str, policy: Policy, timeout: float, *, wait: bool) -> Outcome | None:
    """A worker's finding on a normalised pair; None if it is late or dies. `RuntimeError` if no worker starts.

    With `wait`, the clock starts when a ready worker takes the pair; without, the whole call keeps to `timeout`.
    """
    request = {"p": prediction, "g": gold, "policy": asdict(policy)}
    pool, deadline = _pool, time.monotonic() + timeout
    for last_try in (False, True):  # a worker may have died of something other than this pair
        try:
            worker = pool.take(time.monotonic() + threading.TIMEOUT_MAX / 2 if wait else deadline)
        except _Late:
            return None
        try:
            return _ask_worker(pool, worker, request, deadline, timeout if wait else None)
        except _Gone:
            pool.drop(worker)
            if last_try and not worker.ready:
                raise RuntimeError(f"no worker for checking answers starts: {worker.process.args}") from None
            if last_try:
                return None
        except BaseException:  # KeyboardInterrupt too: this worker's next reply would belong to this pair
            pool.drop(worker)
            raise
    return None


def _ask_worker(pool: _Pool, worker: _Worker, request: dict, deadline: float, allowed: float | None) -> Outcome | None:
    try:
        worker.wait_ready(deadline if allowed is None else time.monotonic() + _START_LIMIT)
    except _Late:
        pool.give_back(worker)  # still importing: the next call finds it ready
        return None
    deadline = deadline if allowed is None else time.monotonic() + allowed
    try:
        outcome = worker.ask(request | {"seconds": max(0.0, deadline - time.monotonic())}, deadline)
    except _Late:
        pool.replace(worker)
        return None
    pool.give_back(worker)
    return outcome


def _stop() -> None:
    for worker in list(_pool.workers):
        worker.kill()


def _after_fork() -> None:
    """Gives a forked child a pool of its own: it must share no pipe and no lock with its parent."""
    global _pool
    old, _pool = _pool, _Pool(_default_limit())
    for worker in old.workers:
        worker.forget()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------------------------------------------------------------
# In the worker process
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Serve requests from stdin until it closes or the parent is gone."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints must not mix with the replies
    _take_limits()
    try:
        from common._algebra import Algebra

        algebra = Algebra()
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}).encode() + b"\n")
        return
    replies.write(b"{}\n")
    for line in _requests():
        request = json.loads(line)
        with _limits(request["seconds"]):
            outcome = _decide(request, algebra)
        replies.write(json.dumps({"outcome": outcome}).encode() + b"\n")


def _decide(request: dict, algebra) -> Outcome | None:
    """The outcome of one request; None if it takes too long or too much memory."""
    deadline = time.monotonic() + request["seconds"]
    try:
        return compare(request["p"], request["g"], deadline, Policy(**request["policy"]), algebra.equal)
    except (TimeoutError, MemoryError):
        return None


def _requests():
    parent, buffer = os.getppid(), b""
    while True:
        if not select.select([0], [], [], 2.0)[0]:
            if os.getppid() != parent:  # a forked sibling may hold our pipe open
                return
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from lines


def _take_limits() -> None:
    import resource

    for number in (signal.SIGINT, signal.SIGHUP):  # the caller decides what Ctrl-C and a lost terminal mean
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with contextlib.suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def _limits(seconds: float):
    """The kernel ends this process a second or two after the limit, in wall or CPU time, or when the parent is gone.

    Only the kernel can, since code in C may not return to Python. The pipe sends a signal when its other end closes.
    """
    import fcntl
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + seconds) + 2, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    flags = fcntl.fcntl(0, fcntl.F_GETFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)  # SIGIO, whose default action is the end
    yield
    fcntl.fcntl(0, fcntl.F_SETFL, flags)
    signal.setitimer(signal.ITIMER_REAL, 0)

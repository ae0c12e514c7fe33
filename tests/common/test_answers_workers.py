"""The worker processes of `common.answers`: kills, order, speed, threads, forks, signals."""

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import _worker, answers
from common.answers import Policy, Verdict, grade_many, judge, same_answer

pytestmark = pytest.mark.usefixtures("ready_worker")
ROOT = Path(__file__).parents[2]


def needs_algebra(i):
    """(prediction, gold): equal, and decided in a worker process."""
    return rf"\frac{{x^2}}{{2}}+{i}", rf"\int_{{0}}^{{x}} t dt+{i}"


def has_no_end(i):
    """A text on which the computer algebra system works for minutes."""
    return rf"\sum_{{n=1}}^{{\infty}} \frac{{1}}{{n^{i}+\sin n}}"


def workers():
    return [worker.process.pid for worker in _worker._pool.workers]


def test_import_is_light():
    heavy = {"sympy", "math_verify", "torch", "latex2sympy2_extended"}
    code = f"import sys, common.answers; print({heavy!r} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


def test_workers_are_reused_and_replaced_after_a_kill():
    before = workers()
    assert same_answer(*needs_algebra(1))
    assert same_answer(*needs_algebra(2))
    assert workers() == before
    assert judge(rf"\boxed{{{has_no_end(4)}}}", "5", timeout=0.3) is Verdict.TIMEOUT
    assert len(workers()) == len(before)
    assert workers() != before
    assert grade_many(*zip(needs_algebra(3), strict=True), timeout=30) == [Verdict.NO_ANSWER]
    assert boxed_many(3) == [Verdict.CORRECT]


@pytest.mark.parametrize("ready", [False, True])
def test_a_worker_that_dies_before_it_reads_a_pair_costs_no_verdict(monkeypatch, ready):
    """While it starts, or just after."""
    killed, wait_ready = [], _worker._Worker.wait_ready

    def dies(worker, deadline):
        if ready:
            wait_ready(worker, deadline)
        if not killed:
            killed.append(worker)
            worker.process.kill()
            worker.process.wait()
        wait_ready(worker, deadline)

    monkeypatch.setattr(_worker, "_pool", pool := _worker._Pool(1))
    monkeypatch.setattr(_worker._Worker, "wait_ready", dies)
    assert boxed_many(20 + ready) == [Verdict.CORRECT]
    (left,) = pool.workers
    assert left not in killed
    pool.drop(left)


def test_a_late_pair_leaves_a_worker_that_starts_alone(monkeypatch):
    """Replaced each time, none would ever be ready on a machine under load."""
    monkeypatch.setattr(_worker, "_pool", pool := _worker._Pool(1))
    starting = pool.take(time.monotonic() + 60)
    pool.give_back(starting)
    assert not same_answer(*needs_algebra(23), timeout=0.2)
    assert pool.workers == {starting} and not starting.ready
    pool.drop(starting)


@pytest.mark.parametrize("waits", [False, True])
def test_the_clock_starts_with_the_call_or_with_a_ready_worker(waits):
    asked = []
    worker = SimpleNamespace(wait_ready=lambda deadline: None, ask=lambda *given: asked.append(given))
    call = time.monotonic() - 100  # with 60 seconds for the pair
    _worker._ask_worker(SimpleNamespace(give_back=lambda worker: None), worker, {}, call + 60, 60 if waits else None)
    ((request, deadline),) = asked
    assert (request["seconds"] > 0, deadline > call + 100) == (waits, waits)


def test_a_package_that_the_workers_lack_is_named(monkeypatch):
    monkeypatch.setattr(_worker, "_pool", pool := _worker._Pool(1))
    monkeypatch.setattr(_worker, "_BOOT", "import sys; sys.modules['sympy'] = None; " + _worker._BOOT)
    with pytest.raises(ImportError, match=r"sympy.* Checking answers needs it: pip install latex2sympy2-extended"):
        same_answer(*needs_algebra(22), timeout=60)
    assert not pool.workers


@pytest.mark.parametrize("event", ["raise_limit", "give_back", "replace", "drop"])
def test_who_waits_for_a_worker_has_the_next_at_once(monkeypatch, event):
    class Worker:
        process = SimpleNamespace(poll=lambda: None)

        def kill(self):
            pass

    monkeypatch.setattr(_worker, "_Worker", Worker)
    pool = _worker._Pool(1)
    first = pool.take(time.monotonic() + 20)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(pool.take, time.monotonic() + 20)
        time.sleep(0.1)
        getattr(pool, event)(2 if event == "raise_limit" else first)
        assert (waiting.result() is first) == (event == "give_back")


@pytest.mark.parametrize(("cores", "limit"), [(3, 3), (64, 8)])
def test_there_is_a_worker_for_each_core_up_to_eight(monkeypatch, cores, limit):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    assert _worker._default_limit() == limit


def boxed_many(i):
    prediction, gold = needs_algebra(i)
    return grade_many([rf"\boxed{{{prediction}}}"], [gold], timeout=30)


def test_a_worker_killed_from_outside_costs_no_verdict():
    for _ in range(2):  # the second is killed while it starts
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert boxed_many(4) == [Verdict.CORRECT]


def test_idle_workers_killed_from_outside_cost_no_verdict():
    _worker.at_least(3)
    idle = [_worker._pool.take(time.monotonic() + 60) for _ in range(3)]
    for worker in idle:
        worker.wait_ready(time.monotonic() + 60)
        _worker._pool.give_back(worker)
        os.kill(worker.process.pid, signal.SIGKILL)
    time.sleep(0.05)
    assert boxed_many(5) == [Verdict.CORRECT]
    assert not {worker.process.pid for worker in idle}.intersection(workers())


def test_a_pair_that_two_workers_die_of_is_late_and_costs_no_other():
    """As those that the kernel ends for want of memory."""
    killed, pool = set(), _worker._pool
    with ThreadPoolExecutor(1) as executor:
        asked = executor.submit(judge, rf"\boxed{{{has_no_end(13)}}}", "5", timeout=60)
        while not asked.done():
            busy = [worker for worker in list(pool.workers) if worker.ready and worker not in pool._idle]
            for pid in {worker.process.pid for worker in busy} - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.01)
    assert asked.result() is Verdict.TIMEOUT
    assert len(killed) == 2
    assert boxed_many(17) == [Verdict.CORRECT]


def test_want_of_memory_in_a_worker_is_no_verdict():
    class Hungry:
        def equal(self, p, g):
            raise MemoryError

    prediction, gold = needs_algebra(1)
    request = {"p": prediction, "g": gold, "policy": asdict(Policy()), "seconds": 5.0}
    assert _worker._decide(request, Hungry()) is None


@pytest.mark.skipif(sys.platform != "linux", reason="macOS refuses the limit")
def test_a_worker_has_a_limit_of_memory():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from common import _worker; "
    code += "_worker._take_limits(); bytearray(_worker._MEMORY)"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("MemoryError\n")


WORKER = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from common import _algebra, _worker
class Algebra:
    def equal(self, p, g):
        {work}
        return True
_algebra.Algebra = Algebra
{before}
_worker.main()
"""


@contextmanager
def worker(work, before=""):
    """A ready worker, started after `before`, whose algebra does `work` with a pair."""
    command = [sys.executable, "-P", "-c", WORKER.format(work=work, before=before), str(ROOT)]
    with subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"{}\n"
            yield process
        finally:
            process.kill()


def request_of(seconds):
    prediction, gold = needs_algebra(1)
    request = {"p": prediction, "g": gold, "policy": asdict(Policy()), "seconds": seconds}
    return json.dumps(request).encode() + b"\n"


@pytest.mark.parametrize(
    "before", ["signal(signal.SIGALRM, signal.SIG_IGN)", "pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])"]
)
def test_a_worker_ends_at_its_limit_whatever_signals_its_parent_ignores_or_blocks(before):
    with worker("time.sleep(60)", f"signal.{before}") as process:
        process.stdin.write(request_of(0.1))
        assert process.wait(30) == -signal.SIGALRM


def test_a_worker_heeds_no_ctrl_c_and_replies_with_nothing_else():
    """A terminal sends Ctrl-C to it too; libraries print; and a request may come in pieces."""
    signals = (signal.SIGINT, signal.SIGHUP)
    heeded = f"[signal.signal(n, signal.SIG_DFL) for n in {tuple(map(int, signals))}]"  # in scripts they may not be
    with worker("print('so said a library', flush=True)", heeded) as process:
        for number in signals:
            process.send_signal(number)
        request = request_of(60)
        for part in (request[:50], request[50:]):
            process.stdin.write(part)
            time.sleep(0.1)
        assert json.loads(process.stdout.readline())["outcome"][0] is True


def test_the_limits_of_a_pair_are_beyond_what_its_worker_has_used_and_end_with_it():
    code = f"""
import resource, sys, types
sys.path.insert(0, {str(ROOT)!r})
from common import _worker
from signal import ITIMER_REAL, getitimer
resource.getrusage = lambda whom: types.SimpleNamespace(ru_utime=100.0, ru_stime=20.0)
with _worker._limits(3.0):
    print(resource.getrlimit(resource.RLIMIT_CPU)[0], getitimer(ITIMER_REAL)[0] > 3)
print(getitimer(ITIMER_REAL)[0])
"""
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.PIPE, capture_output=True, text=True)
    assert done.stdout == "125 True\n0.0\n"


def test_ctrl_c_leaves_no_worker_with_a_reply_for_the_next_pair():
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            same_answer(has_no_end(14), "5", timeout=60)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert _worker._pool.workers == set(_worker._pool._idle)
    assert boxed_many(18) == [Verdict.CORRECT]


def test_code_in_c_is_ended_too():
    """An integer power runs in C for minutes and looks at no signal; the worker dies all the same."""
    worker = _worker._Worker()
    worker.wait_ready(time.monotonic() + 60)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from common import _worker; "
    code += "with_limits = _worker._limits(1.0); with_limits.__enter__(); len(str(7 ** (10**8)))"
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code, str(ROOT)], stdin=subprocess.PIPE, timeout=60).returncode
    worker.kill()
    assert ended in (-signal.SIGALRM, -signal.SIGXCPU)
    assert time.monotonic() - start < 10


def test_grade_many_keeps_order_among_hostile_rows():
    rows = [(rf"\boxed{{{i}+x}}", f"x+{i}") for i in range(20)]
    rows[3] = (rf"\boxed{{{needs_algebra(5)[0]}}}", needs_algebra(5)[1])
    rows[7] = (rf"\boxed{{{has_no_end(5)}}}", "5")
    rows[9] = ("no idea", "5")
    expected = [Verdict.CORRECT] * 20
    expected[7], expected[9] = Verdict.TIMEOUT, Verdict.NO_ANSWER
    assert grade_many(*zip(*rows, strict=True), workers=2, timeout=2.0) == expected
    with pytest.raises(ValueError, match="1 responses but 2"):
        grade_many(["5"], ["5", "6"])
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"workers={number} must be 1 or more: leave it out"):
            grade_many(["5"], ["5"], workers=number)


def test_grade_many_of_a_training_step_is_fast():
    """2,048 responses of usual kinds, none seen before."""
    kinds = [
        "{i}",
        r"\frac{{{i}}}{{7}}",
        "x^2+{i}x",
        "({i}, 2)",
        r"{i}\sqrt{{2}}",
        r"\$1,{i:03d}.50",
        "[0, {i})",
        "x={i}",
    ]
    answers = [kinds[i % 8].format(i=i % 1000) for i in range(2048)]
    responses = [
        f"Let me see. So $x = 3$ gives the result.\n\nThe answer is \\boxed{{{answer}}}." for answer in answers
    ]
    golds = [answer.replace("x^2+", "x*x + ").replace("2)", "2.0)") for answer in answers]
    start = time.process_time()
    assert set(grade_many(responses, golds)) == {Verdict.CORRECT}
    assert time.process_time() - start < 2  # half a second on a quiet machine


def test_threads():
    pairs = [needs_algebra(i % 10) for i in range(40)] + [(f"z+{i}", f"{i}+z") for i in range(960)]
    with ThreadPoolExecutor(1000) as executor:
        assert all(executor.map(lambda pair: same_answer(*pair, timeout=30), pairs))
        late = list(executor.map(lambda i: same_answer(has_no_end(6 + i % 2), "5", timeout=0.5), range(4)))
    assert late == [False] * 4


def test_a_memo_that_another_thread_empties_costs_no_verdict(monkeypatch):
    class Emptied(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    monkeypatch.setattr(answers, "_memo", Emptied())
    assert [boxed_many(19) for _ in range(2)] == [[Verdict.CORRECT]] * 2


def test_asyncio():
    async def both():
        direct = same_answer(*needs_algebra(11), timeout=30)
        start = time.monotonic()
        late = await asyncio.to_thread(same_answer, has_no_end(8), "5", timeout=0.5)
        return direct, late, time.monotonic() - start < 3

    assert asyncio.run(both()) == (True, False, True)


def test_alarm_of_the_caller_is_untouched():
    rang = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        handler = signal.getsignal(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert not same_answer(has_no_end(9), "5", timeout=0.5)
        assert rang == [True]
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process_makes_its_own_workers():
    held = threading.Thread(target=lambda: same_answer(has_no_end(10), "5", timeout=0.5))
    held.start()  # a thread is inside the pool while the process forks
    parents = set(workers())
    child = os.fork()
    if child == 0:
        right = same_answer(*needs_algebra(12), timeout=30) and not set(workers()) & parents
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.join()
    assert boxed_many(13) == [Verdict.CORRECT]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_started_processes(method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(same_answer, needs_algebra(14), {"timeout": 30})
        start = time.monotonic()
        assert not pool.apply(same_answer, (has_no_end(11), "5"), {"timeout": 0.5})
        assert time.monotonic() - start < 3


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["idle", "busy", "held by a sibling"])
def test_workers_end_with_the_process(kind):
    """Also where a process that was forked past Python holds their pipes open."""
    code = f"""
import ctypes, os, threading, time
from common import _worker, answers
assert answers.same_answer({needs_algebra(15)[0]!r}, {needs_algebra(15)[1]!r}, timeout=60)
sibling = 0
if {kind!r} == "busy":
    threading.Thread(target=answers.same_answer, args=({has_no_end(12)!r}, "5"), kwargs={{"timeout": 60}}).start()
    time.sleep(0.5)
if {kind!r} == "held by a sibling" and (sibling := ctypes.PyDLL(None).fork()) == 0:
    os.closerange(1, 3)
    time.sleep(60)
    os._exit(0)
print(sibling, *[worker.process.pid for worker in _worker._pool.workers], flush=True)
os.kill(os.getpid(), 9)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True).stdout
    sibling, *pids = map(int, out.split())
    try:
        deadline = time.monotonic() + 10
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert pids
        assert not any(map(is_running, pids))
        assert not sibling or is_running(sibling)
    finally:
        if sibling:
            with suppress(ProcessLookupError):
                os.kill(sibling, signal.SIGKILL)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a container without an init process does not reap

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
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

_MEMORY = 2 * 1024**3  # bytes of address space for one worker
_START_LIMIT = 120.0  # seconds for a worker to import sympy, on a machine under load
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from common._worker import main; main()"


class _Late(Exception):
    """No reply before the deadline."""


class _Gone(Exception):
    """The worker ended."""


class _Worker:
    """One process. `ready` turns true when it has imported what it needs."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", _BOOT, str(Path(__file__).parents[1])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, bufsize=0, **pipes)
        self.ready = False
        self._buffer = b""

    def wait_ready(self, deadline: float) -> None:
        if not self.ready:
            try:
                hello = self._read(deadline)
            except _Gone as error:
                raise RuntimeError(f"a worker for checking answers does not start: {self.process.args}") from error
            if "missing" in hello:
                raise ImportError(f"{hello['missing']}. Checking answers needs math-verify: pip install math-verify")
            self.ready = True

    def ask(self, request: dict, deadline: float) -> str:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise _Gone from error
        return self._read(deadline)["verdict"]

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
        """Close the pipes and leave the process alone: in a forked child it is somebody else's."""
        self.process.returncode = self.process.returncode or 0
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


class _Pool:
    """Workers of this process, at most `limit`, started when needed and kept."""

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
            while not self._idle:
                if len(self.workers) < self.limit:
                    self._start()
                elif not self._changed.wait(deadline - time.monotonic()):
                    raise _Late
            return self._idle.pop()

    def give_back(self, worker: _Worker) -> None:
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()

    def replace(self, worker: _Worker) -> None:
        """Kill, and start the next one at once: it imports while the caller goes on."""
        worker.kill()
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
    """Allow that many workers (None: the default limit) and return the number."""
    count = max(1, workers or _default_limit())
    _pool.raise_limit(count)
    return count


def ask(pair: tuple[str, str], timeout: float, *, wait: bool) -> str | None:
    """The verdict of a worker on (prediction, gold), or None when it is late or dies of the pair.

    With `wait`, the clock starts when a ready worker takes the pair; without, the whole call keeps to `timeout`.
    """
    pool, deadline = _pool, time.monotonic() + timeout
    for last_try in (False, True):  # a worker may have died of something else than this pair
        try:
            worker = pool.take(time.monotonic() + threading.TIMEOUT_MAX / 2 if wait else deadline)
        except _Late:
            return None
        try:
            return _ask_worker(pool, worker, pair, deadline, timeout if wait else None)
        except _Gone:
            pool.drop(worker)
            if last_try:
                return None
        except BaseException:  # KeyboardInterrupt too: this worker's next reply would belong to this pair
            pool.drop(worker)
            raise
    return None


def _ask_worker(
    pool: _Pool, worker: _Worker, pair: tuple[str, str], deadline: float, allowed: float | None
) -> str | None:
    try:
        worker.wait_ready(deadline if allowed is None else time.monotonic() + _START_LIMIT)
    except _Late:
        pool.give_back(worker)  # still importing: the next call finds it ready
        return None
    deadline = deadline if allowed is None else time.monotonic() + allowed
    try:
        request = {"p": pair[0], "g": pair[1], "seconds": max(0.0, deadline - time.monotonic())}
        verdict = worker.ask(request, deadline)
    except _Late:
        pool.replace(worker)
        return None
    pool.give_back(worker)
    return verdict


def _stop() -> None:
    for worker in list(_pool.workers):
        worker.kill()


def _after_fork() -> None:
    """A child shares no pipe and no lock with its parent."""
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
        algebra = _Algebra()
        from common.answers import decide
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}).encode() + b"\n")
        return
    replies.write(b"{}\n")
    for line in _requests():
        request = json.loads(line)
        with _alarm(request["seconds"]):
            verdict = _decide(decide, request, algebra)
        replies.write(json.dumps({"verdict": verdict}).encode() + b"\n")


def _decide(decide, request: dict, algebra: _Algebra) -> str:
    try:
        return decide(request["p"], request["g"], time.monotonic() + request["seconds"], algebra.equal).value
    except (TimeoutError, MemoryError):
        return "timeout"


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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what Ctrl-C means
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with contextlib.suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def _alarm(seconds: float):
    """The kernel ends this process a second after the limit, in time or CPU time, even if the parent is gone."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + seconds) + 2, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


class _Unreadable(Exception):
    """The text is no formula, or one too large to compute."""


class _Algebra:
    """Equality of two formulas with sympy, parsed by math-verify's LaTeX parser (latex2sympy2_extended).

    Two formulas in the same variables are equal when their values agree to 100 digits at points chosen in advance, of
    both signs; two equations or inequalities, when left minus right differ by a constant factor. No tolerance is meant
    by this: decimals are exact fractions, and unequal formulas of the size admitted do not agree so far everywhere.
    """

    _MAX_CHARS = 1000  # of one formula; the parser is slow
    _DIGITS = 120
    _MAX_LOG10 = 1e5  # of any power on the way

    def __init__(self) -> None:
        import sympy
        from latex2sympy2_extended import latex2sympy
        from latex2sympy2_extended.latex2sympy2 import ConversionConfig
        from sympy.parsing import sympy_parser

        sympy_parser.eval_expr = _digits_only  # sympy makes even a number from its text by running code: not here
        self.sympy = sympy
        config = ConversionConfig(lowercase_symbols=False)
        self._latex2sympy = lambda text: latex2sympy(text, normalization_config=None, conversion_config=config)
        self.parse = lru_cache(maxsize=256)(self._parse)
        self.parse("x^{2}+1")  # builds the parser's tables

    def equal(self, p: str, g: str) -> bool | str:
        """Whether two normalised answers are equal, or which side ("prediction", "gold") cannot be read."""
        sides = []
        for name, text in (("gold", g), ("prediction", p)):
            try:
                sides.append(self.parse(text))
            except MemoryError:
                raise
            except Exception:
                return name
        gold, prediction = sides
        try:
            return gold == prediction or self._same(prediction, gold)
        except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
            return False  # sympy's ways of saying that it has no answer

    def _parse(self, text: str):
        sympy = self.sympy
        if len(text) > self._MAX_CHARS:
            raise _Unreadable
        parsed = self._latex2sympy(_to_latex(text))
        if not isinstance(parsed, (sympy.Basic, sympy.MatrixBase)):
            raise _Unreadable
        self._size(parsed)
        parsed = parsed.replace(_is_odd_root, _real_root) if isinstance(parsed, sympy.Expr) else parsed
        known = {sympy.Symbol("i"): sympy.I, sympy.Symbol("e"): sympy.E}
        parsed = parsed.subs(known) if isinstance(parsed, sympy.MatrixBase) else parsed.xreplace(known)
        parsed = parsed if isinstance(parsed, sympy.core.relational.Relational) else parsed.doit()
        if parsed.has(sympy.nan, sympy.zoo):
            raise _Unreadable
        return parsed

    def _size(self, node) -> float:
        """log10 of the magnitude of a formula, roughly; raises where an exact power or factorial has no end."""
        sizes = [self._size(arg) for arg in node.args]
        if node.is_Rational:
            return math.log10(abs(node.p)) - math.log10(node.q) if node.p else -9.0
        if node.is_Mul:
            return sum(sizes)
        if node.is_Pow and len(sizes) == 2:
            size = (abs(sizes[0]) + 0.1) * 10 ** min(sizes[1], 9.0)
        elif isinstance(node, self.sympy.factorial):
            size = (abs(sizes[0]) + 0.1) * 10 ** min(sizes[0], 9.0)
        else:
            return max([0.5, *sizes])
        if size > self._MAX_LOG10:
            raise _Unreadable
        return size

    def _same(self, p, g) -> bool:
        sympy = self.sympy
        relation = sympy.core.relational.Relational
        if isinstance(p, relation) and isinstance(g, relation):
            return self._same_relation(p, g)
        if isinstance(p, sympy.Set) and isinstance(g, sympy.Set):
            return p == g or p.symmetric_difference(g).is_empty is True
        if isinstance(p, sympy.MatrixBase) and isinstance(g, sympy.MatrixBase):
            return p.shape == g.shape and all(self._same(*cells) for cells in zip(p.flat(), g.flat(), strict=True))
        if not isinstance(p, sympy.Expr) or not isinstance(g, sympy.Expr):
            return False
        pairs = self._values(p, g)
        return pairs is not None and all(self._close(*pair) for pair in pairs)

    def _same_relation(self, p, g) -> bool:
        flipped = p.reversed.rel_op == g.rel_op and p.rel_op != g.rel_op
        if p.rel_op != g.rel_op and not flipped:
            return False
        pairs = self._values(p.lhs - p.rhs, g.lhs - g.rhs)
        if pairs is None or any(right == 0 for _, right in pairs):
            return False
        ratios = [left / right for left, right in pairs]
        ordered = p.rel_op not in ("==", "!=")
        positive = all(self.sympy.re(ratio) > 0 for ratio in ratios)
        negative = all(self.sympy.re(ratio) < 0 for ratio in ratios)
        right_way = not ordered or (negative if flipped else positive)
        return right_way and all(self._close(ratio, ratios[0]) for ratio in ratios)

    def _values(self, p, g) -> list[tuple] | None:
        """Values of both at the same points; None when the variables differ or too few points are in both domains.

        A point where exactly one value is real tells of a branch (cube roots of negative numbers) and is left out.
        """
        if p.is_Rational and g.is_Rational:
            return [(p, g)]
        symbols = sorted(p.free_symbols | g.free_symbols, key=str)
        if p.free_symbols != g.free_symbols:
            return None
        pairs = []
        for point in _points(self.sympy, symbols):
            left, right = (expr.subs(point).evalf(self._DIGITS, maxn=1000) for expr in (p, g))
            numeric = left.is_number and right.is_number and left.is_finite and right.is_finite
            if numeric and self._is_real(left) == self._is_real(right):
                pairs.append((left, right))
        return pairs if len(pairs) >= (4 if symbols else 1) else None

    def _is_real(self, value) -> bool:
        real, imaginary = value.as_real_imag()
        return abs(imaginary) <= abs(real) * self.sympy.Float("1e-100")

    def _close(self, left, right) -> bool:
        if left.is_Rational and right.is_Rational:
            return left == right
        scale = 1 if left == 0 or right == 0 else abs(left) + abs(right)
        return bool(abs(left - right) <= scale * self.sympy.Float("1e-100"))


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def _points(sympy, symbols: list) -> list[dict]:
    """Values for the variables: four points with small positive ones, four with mixed signs."""
    if not symbols:
        return [{}]
    points = []
    for trial in range(8):
        point = {}
        for i, symbol in enumerate(symbols):
            top, bottom = _PRIMES[(i + trial) % 12] + 40 * (i // 12), _PRIMES[(2 * i + 3 * trial + 5) % 12] + 3
            negative = trial == 7 or (trial >= 4 and (i + trial) % 2 == 0)
            point[symbol] = sympy.Rational(-top if negative else top, bottom)
        points.append(point)
    return points


def _is_odd_root(node) -> bool:
    if not (node.is_Pow and node.base.is_Rational and node.exp.is_Rational):
        return False
    return node.base < 0 and node.exp.q > 1 and node.exp.q % 2 == 1


def _real_root(node):
    """The cube root of -8 is -2 here, as in school, not the principal complex root."""
    return (-1) ** node.exp.p * (-node.base) ** node.exp


def _digits_only(code, *_namespaces):
    """In the place of sympy's evaluation of generated code: reads `Integer (12 )`, refuses all else."""
    import sympy

    digits = re.fullmatch(r"\s*Integer\s*\(\s*(\d+)\s*\)\s*", code) if isinstance(code, str) else None
    if not digits:
        raise _Unreadable("text is never evaluated as code")
    return sympy.Integer(int(digits[1]))


_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|alpha|beta|theta)"
    r"(?![A-Za-z])"
)
_SHORT = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}


def _to_latex(text: str) -> str:
    """The LaTeX that the parser reads, out of a normalised answer: plain-text functions, exact decimals, braces."""
    text = re.sub(r"(?<![\\A-Za-z])a(?:sin|cos|tan)(?![A-Za-z])", lambda m: _SHORT[m[0]], text)
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = re.sub(r"\^ ?(-?\d+)", r"^{\1}", text)
    if not re.search(r"[\[({]", text):
        text = re.sub(r"\d{1,3}(?:,\d{3})+(?!\d)", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?<![\\A-Za-z])E(?![A-Za-z\d])", r"\\Upsilon ", text)  # the parser takes E for Euler's number
    text = re.sub(r"\\gamma(?![A-Za-z])", r"\\overline{gamma}", text)  # and this for the function or Euler's constant
    text = re.sub(r"(\d)\.(?!\d)", r"\1", text)
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}", text)
    text = re.sub(r"(\d+) ?\\text\{degrees\}", r"{\\frac{\1\\pi}{180}}", text)
    text = re.sub(r"\\text\{([A-Za-z])\}", r"\1", text)
    for head in ("\\sqrt", "^"):
        text = _brace_argument(text, head)
    return text


def _brace_argument(text: str, head: str) -> str:
    """`\\sqrt{2+x}` from `\\sqrt (2+x)`, at every place."""
    start = 0
    while (start := text.find(head, start)) >= 0:
        start += len(head)
        opening = start + len(text[start:]) - len(text[start:].lstrip())
        if text[opening : opening + 1] != "(":
            continue
        depth = 0
        for i in range(opening, len(text)):
            depth += (text[i] == "(") - (text[i] == ")")
            if depth == 0:
                text = text[:start] + "{" + text[opening + 1 : i] + "}" + text[i + 1 :]
                break
    return text

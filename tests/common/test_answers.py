"""`common.answers`: what counts as the answer, what counts as equal, and that no input hangs, raises or runs."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import _worker
from common.answers import Verdict, extract_answer, grade, grade_many, judge, same_answer

ROOT = Path(__file__).parents[2]
CASES = ROOT.parent / "shared" / "data" / "answers" / "cases.jsonl"
LIMIT = 1.0  # seconds allowed to one hostile check
SLACK = 1.0  # seconds of overhead on a loaded machine


@pytest.fixture(scope="module", autouse=True)
def ready_worker():
    """Start one worker before any test that measures time."""
    assert grade_many([r"\boxed{x+1}"], ["1+x"]) == [Verdict.CORRECT]


def workers():
    return [worker.process.pid for worker in _worker._pool.workers]


EXTRACTION = [
    # response, last, first
    (r"so \boxed{42}.", "42", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"first \boxed{1}, then \boxed{2}", "2", "1"),
    (r"\boxed{1} and \boxed{2}", "1, 2", "1, 2"),
    (r"$\boxed{(2, 2)}$, $\boxed{(6, 2)}$", "(2, 2), (6, 2)", "(2, 2), (6, 2)"),
    (r"\boxed{1}. Wait: the answer is 2.", "1", "1"),
    (r"The answer is 3. No: \boxed{4}", "4", "3"),
    ("The answer is 3. Wait, the answer is 4.", "4", "3"),
    (r"The answer is \boxed{7}.", "7", "7"),
    (r"\boxed 7 and more", "7", "7"),
    ("**Final Answer:** **73**", "73", "73"),
    ("Final Answer: The final answer is $5x$. I hope it is correct.", "$5x$", "$5x$"),
    ("Final Answer: The largest $n$ is 34.", "34", "34"),
    ("The answer is 3.14.", "3.14", "3.14"),
    ("Answer:\n\n\\[ 9 \\]\nDone", "\\[ 9 \\]", "\\[ 9 \\]"),
    ("<answer>Paris</answer>", "Paris", "Paris"),
    ("work\n#### 1,234", "1,234", "1,234"),
    ("最终答案是 42。", "42", "42"),
    ("答案：5", "5", "5"),
    ("The answer is D because A is too small", "D", "D"),
    (r"<think>\boxed{1}</think> so \boxed{2}", "2", "2"),
    (r"<think>\boxed{1} and on", None, None),
    (r"thinking \boxed{1}</think>", None, None),
    (r"\boxed{5}<|im_end|>\boxed{6}", "5", "5"),
    (r"\boxed{}", None, None),
    (r"\boxed{{{", None, None),
    (r"\boxed{1} then \boxed{2", "1", "1"),
    ("so it is 42", None, None),
    ("The answer is", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("response", "last", "first"), EXTRACTION)
def test_extraction(response, last, first):
    assert extract_answer(response) == last
    assert extract_answer(response, which="first") == first


def test_extraction_refuses_an_unknown_rule():
    with pytest.raises(ValueError, match="which"):
        extract_answer("5", which="best")


EQUAL = [  # gold, prediction
    ("1000", "1,000"), ("1000", r"1{,}000"), ("1000", "1 000"), ("0.5", ".50"), ("5", "5.0"), ("7", "007"),
    ("0", "-0"),
    ("1/2", "0.5"), ("1/2", r"\dfrac12"), ("1/2", r"\frac{3}{6}"), ("1/2", "½"), ("-1/2", r"\frac{1}{-2}"),
    ("3.5", r"3\frac{1}{2}"), ("5/4", "1 1/4"), ("0.0025", r"2.5 \times 10^{-3}"), ("1500", "1.5e3"), ("-5", "−5"),
    ("5", "５"), ("5", "٥"), ("5", "5\u200b"), ("5", r"5\,\text{cm}"), (r"5\text{ cm}", "5 centimeters"),
    ("90", r"90^\circ"),
    ("12", r"\$12.00"), ("50", r"50\%"), (r"28\%", "28 percent"), ("15 cm^2", r"15\text{ square cm}"), ("2", "2m"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("x^2", "x²"), ("x^{12}", "x^12"), ("2π", r"2\pi"), ("(x+1)^2", "x^2+2x+1"),
    ("5", "x=5"), ("x=5", "5"), ("11", "x = 5+6 = 11"), (r"\frac13", r"\frac13 \approx 0.333"),
    ("11", r"x \approx 11"),
    (r"\{1,2\}", r"\{2,1\}"), ("1,2,3", r"\{3,2,1\}"), ("2 or 3", r"x=2 \text{ or } x=3"), (r"\pm 3", "3, -3"),
    ("(1,2)", r"\left(1, 2\right)"), ("[1,2)", r"1 \le x < 2"), (r"(3,\infty)", "x > 3"), ("x > 3", "3 < x"),
    (r"(-\infty,-2]\cup[2,\infty)", r"x\leq -2 \text{ or } x\geq 2"), ("y=2x+3", "y-2x=3"), ("2x+3y=6", "4x+6y=12"),
    (r"\begin{pmatrix}1\\0.5\end{pmatrix}", r"\begin{bmatrix}1\\ 1/2\end{bmatrix}"), (r"\emptyset", r"\{\}"),
    ("C", "(C)"), ("C", "c"), ("C", r"\textbf{(C)}"), ("C", "C. x = 42"), ("(D) Alina", "D"),
    ("Paris", r"\text{paris}"),
    ("(1+i)^2", "2i"), (r"\sqrt[3]{-8}", "-2"), (r"\cos 60^\circ", "1/2"), ("1/sqrt(3)", r"\frac{\sqrt{3}}{3}"),
    ("nan", "nan"), ("None", "none"), (r"\boxed{24}", "24"), ("9^{9^{9^{9}}}", "9^{9^{9^9}}"),
]  # fmt: skip

UNEQUAL = [  # gold, prediction
    ("5", "5 or 7"), ("5", r"5 \text{ or } 7"), ("5", "5, 7"), ("5", r"\{5,7\}"), ("5", r"x=5 \text{ or } x=7"),
    ("5", r"5\text{ or maybe 7}"), ("5", r"5\text{ (or 7)}"), ("A", "A, possibly B"), ("7", "5=7"), ("5", "5=7"),
    ("7", "1=2=3=4=5=6=7"), ("3", r"\pm 3"), (r"\pm 3", "3"), ("C", "A or B or C"),
    ("C", "ABC"),
    ("C", "A, B, C"), ("C", "Carbon"), ("A", "A, but maybe B"), ("A square", "A"), ("0.5", r"50\%"), ("1/3", "0.333"),
    ("1/3", "0.3333333333333333"), (r"\pi", "3.14"), (r"\pi", r"\frac{22}{7}"), ("0.3", "0.30000000000000004"),
    ("0", "0.0000001"), ("1", r"1+10^{-35}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), (r"\sqrt{2}", "1.41421356237"),
    ("(1,2)", "[1,2]"), ("(1,2)", r"\{1,2\}"), ("(1,2)", "(2,1)"), ("[0,1]", "[0,1)"), ("5", "[5]"),
    ("[1,2]", "[2,1]"),
    ("x=5", "y=5"), ("x+1", "y+1"), (r"\frac{A}{B}", r"\frac{a}{b}"), ("f(x)=x+1", "g(x)=x+1"), ("2x+z=1", "1"),
    ("x > 3", "x < 3"), ("x > 3", r"x \geq 3"), ("y=2x+3", "y=2x+4"), ("|x|", "x"), (r"\sqrt{x^2}", "x"), ("2m", "2"),
    (r"5\text{ cm}", r"5\text{ m}"), (r"\$12", "12 cents"), ("2 hours", "2 minutes"), (r"1.5\text{ million}", "1.5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), ("101_2", "101"), ("12:00", "1:00"),
    ("yes", "no"), ("no", "on"), ("x", "X"), ("42", "\u202e24"), ("42", "4\x002"), ("5", "5😀"), ("10", "4 10/3"),
    ("5", ""), ("", ""), ("5", " "), ("5", "None"), ("5", "null"), ("5", "nan"), (r"\infty", "1/0"), ("zoo", "1/0"),
    (r"\infty", r"-\infty"), ("0", r"\emptyset"), ("1,2,2", "1,1,2"), ("7", r"7 \pmod{11}"), ("1/2", "1/2 x"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction"), EQUAL)
def test_same(gold, prediction):
    assert same_answer(prediction, gold)


@pytest.mark.parametrize(("gold", "prediction"), UNEQUAL)
def test_not_same(gold, prediction):
    assert not same_answer(prediction, gold)


@pytest.mark.parametrize(
    ("response", "gold", "verdict"),
    [
        (r"\boxed{5}", "5", Verdict.CORRECT),
        (r"\boxed{6}", "5", Verdict.WRONG),
        ("five, I think", "5", Verdict.NO_ANSWER),
        ("None", "None", Verdict.NO_ANSWER),
        (r"\boxed{\frac{1}{}+}", "5", Verdict.UNPARSEABLE),
        (r"\boxed{%s}" % ("9" * 5000), "5", Verdict.UNPARSEABLE),
        (r"\boxed{x+1}", "", Verdict.GOLD_UNPARSEABLE),
        (r"\boxed{x+1}", r"\frac{1}{}+", Verdict.GOLD_UNPARSEABLE),
        (r"\boxed{5}", None, Verdict.GOLD_UNPARSEABLE),
        (None, "5", Verdict.NO_ANSWER),
        (r"\boxed{27}", 27.0, Verdict.CORRECT),
    ],
)
def test_verdicts(response, gold, verdict):
    assert judge(response, gold) is verdict
    assert grade(response, gold) is (verdict is Verdict.CORRECT)
    assert grade_many([response], [gold]) == [verdict]
    assert str(verdict) == verdict.value


HOSTILE = [
    "9^{9^{9^{9}}}", "9**9**9", "2^{2^{2^{2^{2^2}}}}", "10^{10^{10}}", "x^{x^{x}}", "(9!)!!", "((10!)!)!",
    "1000000000!",
    "(12!)!", r"\binom{10^9}{5\cdot10^8}", "9" * 5000, "9" * 1_000_000, "1e999999999", "2^{99999}", "(x+y)^{3000}",
    r"\prod_{n=1}^{1000000} n", r"\sum_{n=1}^{\infty} \frac{1}{n^3+\sin n}", r"\int_0^{\infty} e^{-x^2}\sin(x^3) dx",
    r"\begin{pmatrix}" + r"\\".join("&".join(["x+1"] * 50) for _ in range(50)) + r"\end{pmatrix}",
    "(" * 3000 + ")" * 3000,
    "{" * 10_000 + "}" * 10_000, r"\boxed{{{", r"\frac{" * 500 + "1" + "}{2}" * 500, r"\sqrt{" * 30 + "2" + "}" * 30,
    "nan", "inf", r"-\infty", "zoo", "1/0", "", " ", "null", "N/A", "\ud800\udfff", "\x00", "\u202e5", "a" * 1_000_000,
    r"\boxed{" * 140_000, r"\boxed{" * 70_000 + "}" * 70_000, "<answer>" * 120_000, "answer is " * 100_000,
    "}" * 1_000_000,
    "(1," * 39 + "1" + ")" * 39, ", ".join(rf"\sqrt{{{i}}}" for i in range(60)), "-" * 3000 + "5", "a_" * 1500,
    "(a)" * 1300, "a'" * 1500, "a-'" * 1300, "1=" * 1500 + "1", "|" * 900, ":" * 3000, "\\" * 3999, ". " * 1999 + "x",
    "A or " * 500 + "B", r"\sin(10^{99999})", r"\exp(\exp(\exp(\exp(9))))", "\ufdfa" * 3999, "½" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:24]))
def test_hostile_input_returns_in_time_and_is_never_right(text):
    for check in (
        lambda: same_answer(text, r"\sqrt{2}+x", timeout=LIMIT),
        lambda: same_answer(r"\sqrt{2}+x", text, timeout=LIMIT),
        lambda: grade(text, "5", timeout=LIMIT),
        lambda: grade(rf"The answer is \boxed{{{text}}}", "5", which="first", timeout=LIMIT),
    ):
        start = time.monotonic()
        assert check() is False
        assert time.monotonic() - start < LIMIT + SLACK


def test_model_text_is_never_run(tmp_path):
    sentinel = tmp_path / "sentinel"
    touch = f"__import__('pathlib').Path({str(sentinel)!r}).touch()"
    for text in (touch, f"[{touch}]", f"[exec({touch!r})]", f"lambda: {touch}", f"f'{{{touch}}}'", f"({touch})+x"):
        for gold in ("5", r"\begin{pmatrix}1\\2\end{pmatrix}", "x+1"):
            assert not same_answer(text, gold, timeout=LIMIT)
            assert not same_answer(gold, text, timeout=LIMIT)
    assert not sentinel.exists()


def test_no_source_evaluates_text():
    banned = re.compile(
        r"(?<![\w.])(?:eval|exec)\(|\b(?:sympify|parse_expr)\(|\bpickle\.loads?\("
    )  # model.eval() is fine
    folders = [ROOT / name for name in ("common", "va_opd", "srpo", "r_diverse")]
    found = [path for folder in folders for path in folder.rglob("*.py") if banned.search(path.read_text("utf-8"))]
    assert found == []


def test_import_is_light():
    heavy = {"sympy", "math_verify", "torch", "latex2sympy2_extended"}
    code = f"import sys, common.answers; print({heavy!r} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


def test_workers_are_reused_and_replaced_after_a_kill():
    before = workers()
    assert same_answer("y+x+0", "x+y")
    assert same_answer("y+x+00", "x+y")
    assert workers() == before
    assert judge(r"\boxed{\sum_{n=1}^{\infty} \frac{1}{n^4+\sin n}}", "5", timeout=0.3) is Verdict.TIMEOUT
    assert len(workers()) == len(before)
    assert workers() != before
    assert grade_many([r"\boxed{y+x+1}"], ["x+y+1"]) == [Verdict.CORRECT]


def test_a_worker_killed_from_outside_costs_no_verdict():
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    assert grade_many([r"\boxed{y+x+2}"], ["x+y+2"]) == [Verdict.CORRECT]


def test_grade_many_keeps_order_among_hostile_rows():
    rows = [(rf"\boxed{{{i}+x}}", f"x+{i}") for i in range(20)]
    rows[7] = (r"\boxed{\sum_{n=1}^{\infty} \frac{1}{n^5+\sin n}}", "5")
    rows[9] = ("no idea", "5")
    expected = [Verdict.CORRECT] * 20
    expected[7], expected[9] = Verdict.TIMEOUT, Verdict.NO_ANSWER
    assert grade_many(*zip(*rows, strict=True), workers=2, timeout=2.0) == expected
    with pytest.raises(ValueError, match="1 responses but 2"):
        grade_many(["5"], ["5", "6"])


def test_threads():
    with ThreadPoolExecutor(50) as executor:
        assert all(executor.map(lambda i: same_answer(f"z+{i % 40}", f"{i % 40}+z", timeout=30), range(200)))


def test_asyncio():
    async def check():
        direct = same_answer("b+a+0", "a+b")
        return direct, await asyncio.to_thread(same_answer, "b+a+00", "a+b")

    assert asyncio.run(check()) == (True, True)


def test_alarm_of_the_caller_is_untouched():
    rang = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        handler = signal.getsignal(signal.SIGALRM)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert not same_answer(r"\sum_{n=1}^{\infty} \frac{1}{n^6+\sin n}", "5", timeout=0.5)
        assert rang == [True]
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process_makes_its_own_workers():
    held = threading.Thread(target=lambda: same_answer(r"\sum_{n=1}^{\infty} \frac{1}{n^7+\sin n}", "5", timeout=0.5))
    held.start()  # a thread is inside the pool while the process forks
    parents = set(workers())
    child = os.fork()
    if child == 0:
        right = same_answer("c+a+0", "a+c", timeout=20) and not set(workers()) & parents
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.join()
    assert grade_many([r"\boxed{c+a+1}"], ["a+c+1"]) == [Verdict.CORRECT]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_the_process():
    code = (
        "from common import _worker, answers; answers.grade_many([r'\\boxed{x+1}'], ['1+x']);"
        "print(*[worker.process.pid for worker in _worker._pool.workers], flush=True);"
        "import os; os.kill(os.getpid(), 9)"
    )
    pids = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True).stdout.split()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids
    assert not any(map(is_running, pids))


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a container without an init process does not reap


def scored_cases():
    rows = [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
    return [row for row in rows if row["form"] != "nomarker" and row["kind"] != "arguable"]


@pytest.mark.skipif(not CASES.exists(), reason="the shared answer pairs are not beside the repository")
def test_public_answer_pairs():
    false_positives, false_negatives, rows = [], [], scored_cases()
    for row in rows:
        check = same_answer if row["form"] == "answer" else grade
        right = check(row["prediction"], row["gold"], timeout=10)
        if right != row["expected"]:
            (false_positives if right else false_negatives).append(row["id"])
    assert false_positives == []
    assert 1 - len(false_negatives) / len(rows) >= 0.985, false_negatives

r"""Hostile answers: each gets a verdict in time, none runs, none is right, none leaves anything behind.

One test is one text. It stands as a bare answer, in a box, after a marker, in tags and as the gold answer. After it a
probe, a right and a wrong pair that nothing may have disturbed.
"""

import itertools
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import _worker
from common.answers import Verdict, extract_answer, grade_many, judge, same_answer
from common.verifiers import format_reward

pytestmark = pytest.mark.usefixtures("ready_worker")
ROOT = Path(__file__).parents[2]
LIMIT = 0.4  # seconds given to one check
SLACK = 3.0  # seconds of overhead on a loaded machine; the sum stays below the five that a check may take

CANARY = "canary_of_the_hostile_tests"
TOUCH = f"open('{CANARY}','w')"

TOWERS = [
    "9^{9^{9^{9}}}", "9**9**9", "9^9^9", "2^{2^{2^{2^{2^2}}}}", "10^{10^{10}}", "x^{x^{x}}", "(9^9)^(9^9)",
    "9^{9^{9}}x", "2^{99999999}", "2^{99999}", "0.5^{99999999}", "(-3)^{12345678}", r"\left(9^{9}\right)^{9^{9}}",
    "9^{(9^{(9^9)})}", r"e^{e^{e^{e^{e}}}}", r"\exp(\exp(\exp(\exp(9))))", r"10^{10^{100}}", r"\sqrt{9^{9^{9}}}",
    r"\frac{9^{9^9}}{9^{9^9}}+1", "2↑↑↑5", "9⁹⁹⁹⁹⁹⁹", r"1.1^{1.1^{1.1^{999999}}}", r"\pi^{\pi^{\pi^{\pi}}}",
    r"i^{i^{i^{99999999}}}", "3^{-9999999}", "((((9^9)^9)^9)^9)^9", "(1+1/1000000)^{1000000000}", r"\log(9^{9^{9^9}})",
    r"\sin(9^{9^{9^9}})", r"9^{9!!}", "2^{2^{2024}}", "2^{2024!}", "3^{3^{1000}}", "2024^{2023^{2022}}",
    "2^{10^{309}}", "n=2^{2^{1100}}", "(x+1)^{2^{2016}}", r"\frac{1}{2^{2^{2024}}}", "0.5^{2^{2024}}",
    r"\log(2^{2^{2024}})", "2^{-2^{2024}}", r"\sum_{k=1}^{2} a_{2^{20000}+k}", r"\sqrt[2^{2^{12}}]{2}",
]  # fmt: skip
FACTORIALS = [
    "(9!)!!", "((10!)!)!", "1000000000!", "(12!)!", "100000!", "99999!", "5!!!!", "(((3!)!)!)!", r"\Gamma(10^{10})",
    r"\binom{10^9}{5\cdot10^8}", r"\binom{1000000000}{500000000}", r"\binom{99999}{44444}", r"{10^9 \choose 5}",
    r"\frac{(10^9)!}{(10^9-1)!}", "(10^{10})!", "170!^{170!}", "x!!!", "(x!)^{(x!)}", r"\prod_{n=1}^{1000000} n",
    "2500!^{99}", "(0.5)!^{99999}", "(10**10)!", "9999999999999999999!",
]  # fmt: skip
LITERALS = [
    "9" * 999, "9" * 1000, "9" * 4400, "9" * 5000, "9" * 1_000_000, "0." + "3" * 5000, "1e999999999", "1e-999999999",
    "1E999999", r"1\times 10^{999999999}", r"1 \cdot 10^{-999999999}", "-" * 3000 + "5", "1" + ",000" * 1200,
    "1" + " 000" * 900, "0" * 3999 + "6", "6." + "0" * 3000 + "1", "1/" + "3" * 998, r"\frac{1}{" + "3" * 999 + "}",
    "0x" + "f" * 3000, "½" * 3000, "٣" * 3999, "９" * 5000, "0.\\overline{" + "1" * 900 + "}", "1_000_000_000",
    "1e5" * 900, "5e-5e-5",
]  # fmt: skip
SERIES = [
    r"\sum_{i=1}^{9999}\sum_{j=1}^{9999} ij", r"\sum_{k=1}^{9000} k^{k}", r"\prod_{k=1}^{9999} \frac{k+\pi}{k+e}",
    r"\sum_{k=-10^9}^{10^9} k", r"\sum" * 130, r"\sum_{k=1}^{9}" * 30 + "k", r"\sum_{n=1}^{n} n", r"\sum_{k=k}^{k} k",
    r"\sum_{k=1}^{9999} \sin(k)^{k}", r"\sum_{a=1}^{21}\sum_{b=1}^{21}\sum_{c=1}^{21} \sqrt{a+b+c}",
    r"\sum_{k=1}^{2} a_{k^9}", r"\prod_{k=1}^{9999} k!", r"\sum_{k=1}^{n} \prod_{j=1}^{k} \sum_{i=1}^{j} \pi^{i}",
    r"\sum_{=}^{=} =", r"\sum_{k=1}^{9}" + "k=" * 90, r"\sum_{k=1}^{1/3} k", r"\sum_{k=\pi}^{9} k",
    r"\sum_{k=1}^{9^{9^9}} k", r"\sum_{k=1}^{n} a_{k}" + "_{k}" * 90, r"\sum^2_{k=1}_{k=2} k",
]  # fmt: skip
EXPANSIONS = [
    "(x+y)^{3000}", "(x+y+z)^{999}", "((x+1)^{99})^{99}", "(a+b)(c+d)" * 90, "+".join(f"x_{i}" for i in range(500)),
    r"\sum_{n=1}^{\infty} \frac{1}{n^3+\sin n}", r"\sum_{n=1}^{10^{9}} n^{n}", r"\sum_{k=1}^{n} k^{k}",
    r"\prod_{k=1}^{100000} (x+k)", r"\int_0^{\infty} e^{-x^2}\sin(x^3) dx", r"\int \int \int \sin(\sin(x)) dx",
    r"\int x^{x} dx", r"\lim_{n\to\infty} n^{n^{n}}", r"\lim_{x\to 0} \sin(1/x)", r"\frac{d^{99}}{dx^{99}} \tan x",
    r"\begin{pmatrix}" + r"\\".join("&".join(["x+1"] * 50) for _ in range(50)) + r"\end{pmatrix}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{99999}",
    r"\det\begin{pmatrix}" + r"\\".join(["a&b&c&d"] * 4) + r"\end{pmatrix}",
    r"\begin{vmatrix}" + r"\\".join("&".join(["x"] * 12) for _ in range(12)) + r"\end{vmatrix}",
    ", ".join(rf"\sqrt{{{i}}}" for i in range(60)), "1,2," * 999 + "3", r"\{" + ",".join(map(str, range(900))) + r"\}",
    r"\{1,2\}\cup" * 300 + r"\{3\}", r"[0,1]\cup" * 200 + "[2,3]", r"\mathbb{R}\setminus" * 100 + r"\{1\}",
    "1=" * 1500 + "1", r"\sqrt{x+" * 30 + "1" + "}" * 30, r"\sin(" * 35 + "x" + ")" * 35, r"\gcd(10^{999},10^{998}+1)",
    r"\pm" * 40 + "1", ",".join([r"1\pm2"] * 60), "<".join("abcdefgh" * 60), "x" * 1500, "(a)" * 1300, r"\cos x" * 300,
    r"\sqrt[99999]{2}",
]  # fmt: skip
NESTING = [
    "(" * 3000 + ")" * 3000, "{" * 10_000 + "}" * 10_000, "[" * 2000 + "5" + "]" * 2000, r"\boxed{{{",
    r"\boxed{" * 140_000, r"\boxed{" * 70_000 + "6" + "}" * 70_000, r"\frac{" * 500 + "1" + "}{2}" * 500,
    r"\sqrt{" * 300 + "2" + "}" * 300, r"\text{" * 300 + "a" + "}" * 300, r"\left(" * 500 + r"\right)" * 500,
    "(1," * 39 + "1" + ")" * 39, "}" * 1_000_000, "|" * 900, "||||x||||" * 90, r"\frac{\frac{\frac{1}{",
    r"\begin{pmatrix}" * 100, r"\begin{array}{" * 90, "^" * 3000, "x^{" * 40 + "2" + "}" * 40,
    "a_{" * 40 + "1" + "}" * 40, r"\{" * 700 + r"\}" * 700, "((((5)))", "5)", "(5", r"\left(5", r"\frac{5}", r"\frac",
    r"\sqrt", r"\frac{}{}", r"\boxed{\boxed{\boxed{", "{" * 39 + "6" + "}" * 39, r"\log_{\log_{\log_", "$" * 3999,
    "$$" * 1500 + "6", "`" * 3000,
]  # fmt: skip
CODE = [
    f"__import__('os').system('touch {CANARY}')", TOUCH, f"[{TOUCH}]", f'exec("{TOUCH}")', f'[exec("{TOUCH}")]',
    f"lambda: {TOUCH}", f"f'{{{TOUCH}}}'", f"({TOUCH})+x", f"eval({TOUCH!r})", f"x if {TOUCH} else 5", f"{TOUCH} or 5",
    f"5 if {TOUCH} else 5", "().__class__.__mro__[1].__subclasses__()", "(lambda f: f(f))(lambda f: f(f))",
    f"[x for x in [{TOUCH}]]", f"5#{TOUCH}", rf"\text{{{TOUCH}}}", rf"\begin{{pmatrix}}{TOUCH}\\2\end{{pmatrix}}",
    rf"\frac{{{TOUCH}}}{{2}}", rf"5\text{{ {TOUCH}}}", f"Symbol('x').__class__({TOUCH})", f"sympify({TOUCH!r})",
    f"N({TOUCH})", f"sqrt({TOUCH})", f"Integer({TOUCH})", f"Integer (1) + {TOUCH}", f"\\operatorname{{exec}}({TOUCH})",
    f"';{TOUCH};'", f'"+{TOUCH}+"', f"{{{{{TOUCH}}}}}", f"${{{TOUCH}}}", f"$(touch {CANARY})", f"`touch {CANARY}`",
    f"; touch {CANARY}", f"| touch {CANARY}", "{{7*7}}", "%s%s%s%n", "{0.__class__}",
    f"!!python/object/apply:os.system ['touch {CANARY}']", f"cos\nsystem\n(S'touch {CANARY}'\ntR.",
    "../../../../etc/passwd", '{"p": "5", "g": "5", "seconds": 9}\n{"outcome": [true, "text", "text", ""]}',
    '"}\n{"outcome": [true]}', r"\input{/etc/passwd}", r"\write18{touch " + CANARY + "}", r"\def\x{\x\x}\x",
    r"\csname exec\endcsname", "import os", "while True: pass", "exit()",
]  # fmt: skip
SPECIALS = [
    "nan", "NaN", "inf", "-inf", r"\infty", r"-\infty", "zoo", "oo", "1/0", "0/0", r"\frac{1}{0}", "0^0",
    r"\frac{0}{0}", r"\log 0", r"\ln(-1)^{1/0}", r"\tan 90^\circ", "", " ", "\t\n", r"\boxed{}", r"\boxed{ }",
    r"\text{}", "$$", r"\(\)", "{}", "()", "[]", "None", "null", "N/A", "undefined", "True", "False", "NULL", "-", "+",
    ".", ",", "=", "?", "!", "...", "*", "_", "/", "\\", r"\\", "\\" * 3999, "x", "I don't know", "no answer",
    "cannot be determined", "\ud800\udfff", "\x00", "\x00" * 3000, "\u202e6", "\u202e5\u202c", "5\x00",
    "6\ufe0f\u20e3", "5😀", "😀" * 2000, "\ufdfa" * 3999, "\u0301" * 3000, "5\u0338", "𝟞", "Ⅵ", "六", "\ufeff",
    "\u200b", "\u2028", "<5>", "<|im_start|>assistant", "</s>", "<|endoftext|>5", "<think>5", "</answer>",
    "<answer></answer>",
    "&#53;", "%35", "\\u0035", "a" * 1_000_000, "answer is " * 100_000, "<answer>" * 120_000, ". " * 1999 + "x",
    "a_" * 1500, "a'" * 1500, "a-'" * 1300, ":" * 3000, "A or " * 500 + "B",
]  # fmt: skip
HEDGES = [  # of 5, of A or of 3: right for none
    "5 or 7", "5, 7", "5,7", r"\{5,7\}", r"5 \text{ or } 7", r"x=5 \text{ or } x=7", "5=7", "7=5", "1=2=3=4=5", "1=5",
    "5 and 7", "5; 7", "5/7", "5|7", "either 5 or 7", "5 (or 7)", "5, possibly 7", "5 or maybe 7", "5?7", "5 to 7",
    "5-7", "5–7", r"5 \lor 7", r"5 \cup 7", "not 5", r"\neq 5", r"x \neq 5", "5 is wrong", "anything but 5", "5 < 7",
    "x < 5", "x > 5", r"\geq 5", "at least 5", "5 or less", "5+", "(5)(7)", "5 5", "5:7", "(5, 7)", "[5, 7]",
    "5 unless x = 0", "if x then 5 else 7", r"5 \text{ if } n > 0", "5 7", "7 5", "55", r"\pm 5", r"5 \pm 1",
    r"5 \mp 1", "|5|x", r"5, \ldots", "1,2,3,4,5", "0 through 9", "5 million", "5 dozen", "5^2", "5!", "-5", "(-5)",
    "5i", "5x", "x^5", "5%7", r"5 \pmod{7}", "5_7", "105_7", "0.5", "5.5", "5.0001", "4.9999999999999999",
    "5 cm or 5 km", "five or seven", "V", "A or B", "A or B or C", "A, B", "AB", "ABCDE", "A/B", "(A) or (B)",
    "A, but maybe B", "A and B", "either A or B", "not A", "A? B?", r"\pm 3", "3 or -3", "3, -3", r"3 \text{ or } -3",
    "+-3", "3=-3", "-3=3", r"\{3,-3\}", "x=3, x=-3", "3 with multiplicity 2, or 4", r"\boxed{5} \boxed{7}",
    r"\boxed{5} or \boxed{7}", r"\boxed{5}, \boxed{7}", "<answer>5</answer><answer>7</answer>", "5</think>7",
]  # fmt: skip

CLASSES = {
    "towers": TOWERS, "factorials": FACTORIALS, "literals": LITERALS, "series": SERIES, "expansions": EXPANSIONS,
    "nesting": NESTING, "code": CODE, "specials": SPECIALS, "hedges": HEDGES,
}  # fmt: skip
CASES = [(name, text) for name, texts in CLASSES.items() for text in texts]
GOLDS = (
    "5",
    "A",
    "3",
    r"\sqrt{2}+x",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\{1,2\}\cup[3,4]",
    "yes",
    "5 cm",
    "2^{99}",
)


WRAPS = (r"So \boxed{%s}.", "The answer is %s", "<answer>%s</answer>")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Where a canary of this process would appear; for the workers see `test_no_canary_file`."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


_fresh = itertools.count(1)


def probe():
    """A right and a wrong pair in each layer; the numbers are new each time, so that no memo answers."""
    i = next(_fresh)
    assert same_answer(f"{i}.50", f"{2 * i + 1}/2")
    assert not same_answer(f"{i}.50", f"{2 * i}/2")
    assert same_answer(f"(x+{i})^2", f"x^2+{2 * i}x+{i * i}")
    assert not same_answer(f"(x+{i})^2", f"x^2+{2 * i}x+{i * i + 1}")
    assert judge(rf"\boxed{{{i}}}", str(i)) is Verdict.CORRECT
    assert judge(rf"\boxed{{{i}}}", str(i + 1)) is Verdict.WRONG


@pytest.mark.parametrize("filling", ["\n", "\n\n#", " ", "\n ", "answer\n", "answer is ", ", "])
def test_extraction_takes_time_in_proportion_to_the_text(filling):
    """It runs in the calling process, before any limit: with the square of this length it would take hours."""
    text = f"So the answer must be found.{filling * 100_000}done, as it is"
    assert judge(text, "5") is not Verdict.CORRECT
    assert format_reward([text])[0] in (0.0, 1.0)


def test_there_are_enough():
    assert len(CASES) == len({text for _, text in CASES})
    assert len(CASES) >= 300
    assert all(len(texts) >= 20 for texts in CLASSES.values())


@pytest.mark.parametrize(("name", "text"), CASES, ids=[f"{name}-{text[:20]!a}" for name, text in CASES])
def test_hostile(name, text):
    """Bare against each gold answer; in a box, after a marker and in tags against one each; as the gold answer."""
    golds = GOLDS[:3] if name == "hedges" else GOLDS
    pairs = [(same_answer, text, gold) for gold in golds]
    pairs += [(judge, wrap % text, gold) for wrap, gold in zip(WRAPS, golds, strict=False)]
    for verdict, answered, gold in pairs:
        start = time.monotonic()
        result = verdict(answered, gold, timeout=LIMIT)
        assert time.monotonic() - start < LIMIT + SLACK
        assert result is False or result in set(Verdict) - {Verdict.CORRECT}, (answered[:80], gold)
    for prediction in ("B", r"\sqrt{2}+x"):
        assert not same_answer(prediction, text, timeout=LIMIT)
    probe()


def test_an_answer_that_is_missing_equals_nothing():
    for nothing in ("", " ", None, r"\boxed{}", "no box", float("nan")):
        for gold in ("None", "", None, "nan", "no", "5", float("nan")):
            assert judge(nothing, gold) in (Verdict.NO_ANSWER, Verdict.GOLD_UNPARSEABLE)


def test_hostile_batch_keeps_order_and_time():
    texts = [text for _, text in CASES if len(text) < 5000]
    start = time.monotonic()
    verdicts = grade_many([rf"\boxed{{{text}}}" for text in texts], ["5 + x"] * len(texts), timeout=0.3, workers=2)
    assert len(verdicts) == len(texts)
    assert Verdict.CORRECT not in verdicts
    assert time.monotonic() - start < 0.3 * len(texts) + 30  # as if one worker took all; the rest is starts of workers


def test_linear_time_extraction():
    units = [
        r"\boxed{5", r"\boxed5 ", "answer: ", "#### \n", "<answer>x", "{", "}", "The answer is $", "**Answer** \n",
        "</think>", "#", "#### ", "answer", "答", "\n",
    ]  # fmt: skip
    size = 100_000  # of which the square takes a minute
    texts = [unit * (size // len(unit)) + "x<think>" for unit in units]
    for text in [*texts, " " * size + "<|im_start|>", "答" + " " * size]:
        for which in ("last", "first"):
            start = time.process_time()
            extract_answer(text, which=which)
            assert time.process_time() - start < 3


def test_no_canary_file(tmp_path):
    """The workers run where the process that starts them runs, so a fresh process looks at its own folder."""
    code = "import sys; sys.path[:0] = [sys.argv[1]]; from tests.common.test_answers_hostile import CODE, GOLDS\n"
    code += "from common.answers import same_answer, _ask, _Request, Policy\n"
    code += "for text in CODE:\n"
    code += "    for gold in GOLDS:\n"
    code += "        same_answer(text, gold); same_answer(gold, text)\n"
    code += "        assert _ask(_Request(text, gold, Policy()), 20, wait=True).verdict != 'correct', text"
    subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_worker_is_bounded():
    for worker in list(_worker._pool.workers):
        if sys.platform == "linux":
            assert resource.prlimit(worker.process.pid, resource.RLIMIT_AS)[0] <= 2 * 1024**3
            assert resource.prlimit(worker.process.pid, resource.RLIMIT_CORE)[0] == 0

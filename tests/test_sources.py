"""No source of the project runs text as code."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
EVALUATING = {"eval", "exec", "compile", "sympify", "S", "parse_expr", "__import__"}
# The last is a checker of answers that makes Python code of them
IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "numexpr", "mathruler"}
UNPICKLING = {"torch.load": "weights_only=True", "yaml.load": "Loader=yaml.SafeLoader"}  # without this argument
# Why a file may: it measures this peer beside ours, in a process of its own, and warns of data that is not trusted
ALLOWED = {"benchmarks/answers.py": ["from mathruler.grader import extract_boxed_content, grade_answer"]}


def evaluations(source):
    """Calls that run text as code or unpickle a file, and imports of what does; `model.eval()` takes no argument."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = node.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            of_module = isinstance(called, ast.Attribute) and ast.unparse(called.value) in ("re", "torch")
            found += (
                [ast.unparse(node)] if name in EVALUATING and (node.args or node.keywords) and not of_module else []
            )
            options, safe = [ast.unparse(keyword) for keyword in node.keywords], UNPICKLING.get(ast.unparse(called))
            found += [ast.unparse(node)] if (safe and safe not in options) or "allow_pickle=True" in options else []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [ast.unparse(node)] if IMPORTS & {name.split(".")[0] for name in names} else []
    return found


def test_no_source_evaluates_text():
    assert sorted(evaluations("eval('1'); sympy.sympify(text); import pickle; torch.compile(f)")) == [
        "eval('1')", "import pickle", "sympy.sympify(text)",
    ]  # fmt: skip
    loads = "torch.load(p); torch.load(p, weights_only=False); np.load(p, allow_pickle=True); yaml.load(t)"
    assert evaluations(loads) == loads.split("; ")
    assert evaluations("torch.load(p, weights_only=True); np.load(p); yaml.safe_load(t)") == []
    folders = [ROOT / name for name in ("common", "va_opd", "srpo", "r_diverse", "benchmarks", "scripts")]
    files = {path.relative_to(ROOT).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
    assert {folder.name for folder in folders} == {name.partition("/")[0] for name in files}
    assert {name: found for name, path in files.items() if (found := evaluations(path.read_text("utf-8")))} == ALLOWED

"""What the project declares about itself: packages, Makefile, environment, rules of dependence."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
METHODS = [name for name in ("va_opd", "srpo", "r_diverse") if (ROOT / name).is_dir()]
MAY_IMPORT_COMMON = {"data.py", "train.py", "loop.py", "evaluate.py"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = (ROOT / "requirements-cpu.lock").read_text()
PINS = dict(re.findall(r"^([a-z0-9._-]+)==([^ \n]+)", LOCK, re.M))


# --- pyproject.toml, the lock, environment.yml ---


def test_lock_holds_exact_pins_and_no_cuda():
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.]+( ; .+)?", line) for line in lines), lines
    assert len(PINS) == len(lines)
    unwanted = [name for name in PINS if re.match(r"(nvidia|cuda|triton|torchvision|torchaudio)", name)]
    assert not unwanted


def test_lock_satisfies_pyproject():
    for line in PROJECT["dependencies"] + EXTRAS["dev"]:
        requirement = Requirement(line)
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_python_versions_are_the_documented_ones():
    declared = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    first, last = (int(version.removeprefix("3.")) for version in (declared[0], declared[-1]))
    assert declared == [f"3.{minor}" for minor in range(first, last + 1)]
    assert PROJECT["requires-python"] == f">=3.{first}"
    assert f"Python 3.{first} to 3.{last}" in (ROOT / "README.md").read_text()
    assert f"Python 3.{first} to 3.{last}" in (ROOT / "scripts/setup.sh").read_text()


def test_extras_are_the_documented_ones():
    assert set(EXTRAS) == {"vllm", "deepspeed", "qlora", "eval", "skills", "bench", "dev"}
    for line in (line for extra in EXTRAS.values() for line in extra):
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= set(EXTRAS), line


def test_vllm_is_in_the_range_of_trl():
    pin = str(Requirement(EXTRAS["vllm"][0]).specifier).removeprefix("==")
    allowed = [
        Requirement(line) for line in metadata.requires("trl") if canonicalize_name(Requirement(line).name) == "vllm"
    ]
    assert allowed
    assert all(pin in requirement.specifier for requirement in allowed)


def test_environment_file():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["channels"] == ["conda-forge"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if not isinstance(entry, str)]
    assert "pip" in conda
    for line in pip:
        if line.startswith("-e "):
            assert set(re.fullmatch(r"-e \.\[([a-z,]+)\]", line).group(1).split(",")) == set(EXTRAS)
        else:
            check_pin_in_range(Requirement(line))
    makefile = (ROOT / "Makefile").read_text()
    assert f"($(CONDA_DEFAULT_ENV),{environment['name']})" in makefile


def check_pin_in_range(pin: Requirement) -> None:
    version = str(pin.specifier).removeprefix("==")
    for line in PROJECT["dependencies"]:
        requirement = Requirement(line)
        if requirement.name == pin.name:
            assert version in requirement.specifier, f"environment.yml has {pin}, pyproject.toml {line}"


def test_environment_file_has_conda_specs():
    rattler = pytest.importorskip("rattler")
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        if isinstance(entry, str):
            rattler.MatchSpec(entry, strict=False)


def test_pre_commit_uses_the_locked_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    used = {package for hook in hooks for package in hook["additional_dependencies"] if package.startswith("ruff")}
    assert used == {f"ruff=={PINS['ruff']}"}


def test_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    papers = [reference["journal"].rsplit(":", 1)[1] for reference in citation["references"]]
    assert papers == ["2605.21924", "2604.02288", "2602.13103"]


# --- Makefile ---


def make(*arguments: str) -> subprocess.CompletedProcess:
    """make without the variables of a make that runs these tests, or of a conda environment."""
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "CONDA_DEFAULT_ENV", "ARGS", "PY", "PYTHON"}
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@cache
def targets() -> list[str]:
    return re.findall(r"^  make ([\w-]+) ", make("help").stdout, re.M)


def test_help_is_first_and_lists_every_target():
    assert make().stdout == make("help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert sorted(targets()) == sorted(phony)


def test_every_target_prints_its_command():
    for target in targets():
        dry = make("-n", "-B", target)
        assert dry.returncode == 0, dry.stderr
        commands = [line for line in dry.stdout.splitlines() if target == "setup" or "scripts/setup.sh" not in line]
        assert commands, f"make -n {target} prints no command"
        for module in re.findall(r" -m ((?:common|benchmarks|va_opd|srpo|r_diverse)[\w.]*)", dry.stdout):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{target} calls {module}"


@pytest.mark.parametrize("preset", ["paper", "single-gpu", "tiny"])
def test_presets_name_files_that_exist(preset):
    experiments = [t for t in targets() if t.startswith(("va_opd-", "srpo-", "rdiverse-"))]
    assert len(experiments) == 7
    for target in experiments:
        output = make(
            "-n", target, f"PRESET={preset}", "PY=python", "SEED=3", "MODEL=some/model", "ARGS=--limit 5"
        ).stdout
        assert (ROOT / re.search(r"--config (\S+)", output).group(1)).is_file()
        assert "--model 'some/model' --seed 3 --limit 5" in output


def test_unknown_preset_is_one_clear_sentence():
    dry = make("-n", "va_opd-geo3k", "PRESET=huge")
    assert dry.returncode != 0
    assert "PRESET=huge is unknown; choose paper, single-gpu or tiny" in dry.stderr


DOCUMENTS = [ROOT / folder / "README.md" for folder in (".", "benchmarks", *METHODS)]
DOCUMENTS += [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def test_documented_targets_exist():
    for path in DOCUMENTS:
        named = re.findall(r"(?:^|`)make ([a-z][\w-]*)(?![\w<-])", path.read_text(), re.M)
        assert set(named) <= set(targets()), path


def test_links_between_documents_lead_somewhere():
    def anchors(path: Path) -> set[str]:
        headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
        return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}

    for path in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", path.read_text()):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), f"{path.relative_to(ROOT)}: {link}"
            assert not anchor or anchor in anchors(target), f"{path.relative_to(ROOT)}: {link}"


# --- Rules of dependence (CONTRIBUTING.md) ---


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """Top-level names of all absolute imports, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_common_imports_no_method():
    for path in sources("common"):
        assert not imports(path) & {*METHODS, "benchmarks", "tests"}, path


@pytest.mark.parametrize("method", METHODS)
def test_method_stands_alone(method):
    for path in sources(method):
        others = {*METHODS, "benchmarks", "tests"} - {method}
        assert not imports(path) & others, path
        if path.name not in MAY_IMPORT_COMMON:
            assert "common" not in imports(path), path
    if (objective := ROOT / method / "objective.py").exists():
        assert not imports(objective) & {"trl", "transformers", "accelerate"}


@pytest.mark.parametrize("method", METHODS)
def test_equations_are_imported_without_trl(method):
    """Also what the folder itself exports: it imports the trainer when that is asked for, not before."""
    script = f"""
import sys
for name in ("trl", "transformers", "accelerate", "datasets", "peft"):
    sys.modules[name] = None  # the import of it fails
import {method}
for name in {method}._MODULES["objective"]:
    getattr({method}, name)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_all_exported_names_exist(method):
    package = importlib.import_module(method)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        package.other  # noqa: B018


SAMPLING = {"temperature", "max_completion_length"}
SCHEDULE = {"lr_scheduler_type", "warmup_steps", "weight_decay"}
REDEFINED = {
    "va_opd.VAOPDConfig": SAMPLING | SCHEDULE | {"top_p", "num_train_epochs", "adam_beta2"},
    "srpo.SRPOConfig": SAMPLING | SCHEDULE | {"num_generations", "learning_rate", "epsilon", "epsilon_high", "delta"}
    | {"beta", "scale_rewards", "loss_type"} | {f"vllm_importance_sampling_{x}" for x in ("mode", "clip_max")},
}  # fmt: skip


@pytest.mark.parametrize("name", REDEFINED)
def test_a_field_of_trl_keeps_its_meaning(name):
    """A field named as one of TRL's has its meaning with the paper's default; another meaning needs another name."""
    package, _, attribute = name.partition(".")
    config = getattr(importlib.import_module(package), attribute)
    inherited = {field for base in config.__mro__[1:] for field in inspect.get_annotations(base)}
    assert set(inspect.get_annotations(config)) & inherited == REDEFINED[name]


def test_imports_are_declared():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    declared |= {canonicalize_name(Requirement(line).name) for extra in EXTRAS.values() for line in extra}
    distributions = {**metadata.packages_distributions(), "faiss": ["faiss-cpu"]}
    own = {"common", "benchmarks", *METHODS}
    for path in (path for folder in own for path in sources(folder)):
        for name in imports(path) - own - set(sys.stdlib_module_names):
            origins = {canonicalize_name(origin) for origin in distributions.get(name, [name])}
            assert origins & declared, f"{path.relative_to(ROOT)} imports {name}: declare it in pyproject.toml"


# --- Files ---


def test_no_registry_and_no_machine_path_in_any_file():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    git = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git repository")
    # In parts, so that this file does not match itself
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "pytorch" + ".org", "anaconda" + ".org", "npmjs" + ".org"]
    hosts = "|".join(re.escape(host) for host in hosts)
    forbidden = re.compile(rf"{hosts}|(?<![\w./~*])/({'|'.join(['work', 'farm', 'opt', 'root', 'home'])})/".encode())
    found = []
    for path in (ROOT / name for name in git.stdout.split("\0") if name):
        if path.is_file() and (match := forbidden.search(path.read_bytes())):
            found.append(f"{path.relative_to(ROOT)}: {match.group().decode()}")
    assert not found

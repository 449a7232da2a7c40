"""A command goes on whatever becomes of its terminal, of its encoding, and of a user without a name or a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

# Writes more than a pipe holds, and says at its end, in a file, that it came to it.
TALK = """
import sys
from pathlib import Path
from trainers import command

def main():
    with open({record!r}, "a") as record:
        for _ in range(4_000):
            print("π ± 0.01 │ ok", flush=True)
            print("warning: ä", file=sys.stderr)
        record.write("whole\\n")
        record.flush()
        import subprocess
        subprocess.run(["echo", "a child of the command"], check=True)
        from rich.console import Console
        Console().print("ü")
    return 3

sys.exit(command.run(main))
"""


def talk(tmp_path: Path, redirect: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs TALK in a shell, which gives its exit code as text."""
    script = tmp_path / "talk.py"
    script.write_text(TALK.format(record=str(tmp_path / "record")))
    line = f"({sys.executable} {script} {redirect}; echo code $? >&3) 3>{tmp_path / 'code'}"
    return subprocess.run(
        ["bash", "-c", line if "| " not in redirect else piped(script, redirect, tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        check=False,
    )


def piped(script: Path, redirect: str, tmp_path: Path) -> str:
    return f"({sys.executable} {script} 2>&1; echo code $? >{tmp_path / 'code'}) {redirect}"


@pytest.mark.parametrize(
    ("redirect", "environment"),
    [
        ("| head -1", {}),
        ("| head -1", {"PYTHONUNBUFFERED": "1"}),
        (">&-", {}),
        (">&- 2>&- <&-", {}),
        (">/dev/full 2>/dev/full", {}),
        ("", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
        ("", {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}),
        ("| head -1", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_nothing_ends_a_command_for_what_it_prints(redirect: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = talk(tmp_path, redirect, **environment)
    assert (tmp_path / "code").read_text() == "code 3\n", done.stderr[-500:]
    assert (tmp_path / "record").read_text() == "whole\n", "nothing else was written into it"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if not redirect:
        assert done.stdout.startswith((b"? ? 0.01 ? ok\n", "π ± 0.01 │ ok\n".encode()))


def test_a_user_without_a_name_or_a_home_has_both(tmp_path: Path) -> None:
    code = """
import getpass, os, stat, sys
from pathlib import Path
os.setresgid(54321, 54321, 54321); os.setresuid(54321, 54321, 54321)
from trainers.command import _name_user_and_home
_name_user_and_home()
print(getpass.getuser(), Path.home(), oct(stat.S_IMODE(Path.home().stat().st_mode)))
"""
    if os.getuid():
        pytest.skip("only root can become a user without a name")
    tmp_path.chmod(0o777)
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    bare = {key: value for key, value in os.environ.items() if key not in names} | {"TMPDIR": "/tmp"}
    preload = "import getpass, pwd, stat, tempfile, pathlib, trainers.command\n"  # its files may be root's alone
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", preload + code], cwd=ROOT, env=bare, capture_output=True, text=True, check=False
        )
        assert done.stdout == "user-54321 /tmp/home-54321 0o700\n", done.stderr
        assert done.stderr.count("\n") == 1
        assert "has no home folder" in done.stderr


def test_a_whole_study_ends_well_without_a_reader_in_ascii(tmp_path: Path) -> None:
    line = f"({sys.executable} -m search.run replay=tiny-moe trials=4 name=s storage={tmp_path}; echo $? >&2) | head -1"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "0\n"
    assert {"front.csv", "points.csv", "front.png", "report.html"} <= {file.name for file in (tmp_path / "s").iterdir()}


def test_every_command_is_run_so() -> None:
    folders = [ROOT / "search", ROOT / "trainers"]
    files = [file for one in folders for file in one.rglob("*.py") if '\nif __name__ == "__main__"' in file.read_text()]
    files.remove(ROOT / "trainers/embedded/domains.py")  # prints a few lines of text
    assert len(files) > 7
    assert [file.name for file in files if "command.run(" not in file.read_text()] == []


def test_an_interrupt_is_one_line() -> None:
    code = (
        "import sys\nfrom trainers import command\ndef main(): raise KeyboardInterrupt\nsys.exit(command.run(main))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "interrupted\n")


def test_a_warning_of_ours_is_one_line() -> None:
    code = (
        "import sys, warnings\n"
        "from allocators.core.errors import ToolkitWarning\n"
        "from trainers import command\n"
        "def main():\n"
        "    warnings.warn('a file is damaged', ToolkitWarning)\n"
        "    warnings.warn('of a library', UserWarning)\n"
        "    return 0\n"
        "sys.exit(command.run(main))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == ["warning: a file is damaged", "<string>:6: UserWarning: of a library"]

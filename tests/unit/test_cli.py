"""The command line: exit codes, a single error message, and output that cannot control a terminal."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from codeparrot_ds.cli import app
from codeparrot_ds.cli.output import parse_size, printable
from codeparrot_ds.errors import ConfigError

COMMAND = Path(sys.executable).with_name("codeparrot-ds")


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def test_help_lists_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    for verb in (
        *("corpus", "tokenizer", "shards", "launch", "status", "compare"),
        *("convert", "complete", "evaluate", "report"),
    ):
        assert verb in done.stdout


def test_usage_errors_exit_with_2() -> None:
    assert run("shards", "build").returncode == 2
    assert run("no-such-verb").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["corpus", "collect", "-o", "{tmp}/c", "{tmp}"], "no .py files found in {tmp}"),
        (["corpus", "collect", "-o", "{tmp}/c"], "add --installed-python"),
        (["corpus", "collect", "-o", "/proc/c", "--max-file-size", "90kB", "{stdlib}"], "/proc/c: cannot write here"),
        (["tokenizer", "train", "{tmp}", "-o", "{tmp}/t"], "contains no data files"),
        (["shards", "verify", "{tmp}"], "codeparrot-ds shards build"),
        (["launch", "{tmp}/r.yaml"], "no such recipe"),
        (["convert", "{tmp}/run", "{tmp}/hf"], "no such run or checkpoint"),
        (["complete", "{tmp}", "x"], "codeparrot-ds convert"),
        (["status", "{tmp}"], "no run status here"),
        (["compare", "{tmp}/run", "{tmp}"], "{tmp}/run: no such run"),
        (["compare", "{tmp}", "{tmp}", "--steps", "9"], "write them like 100:200"),
        (["status", "{stdlib}/__init__.py"], "this run status cannot be read (Not a directory)"),
        (["shards", "verify", "{stdlib}/__init__.py"], "no shards manifest here"),
        (["tokenizer", "train", "{data}/shards", "-o", "{tmp}/t"], "a manifest of 'shards'; expected 'corpus'"),
        (
            ["shards", "build", "{data}/tokenizer", "--tokenizer", "{data}/tokenizer", "-o", "{tmp}/s"],
            "expected 'corpus'",
        ),
        (["tokenizer", "train", "{data}/corpus", "--vocab-size", "300", "-o", "{stdlib}/__init__.py/t"], "__init__.py"),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_1(
    tmp_path: Path, data: Path, arguments: list[str], expected: str
) -> None:
    names = {"tmp": str(tmp_path), "data": str(data), "stdlib": str(Path(json.__file__).parent)}
    done = run(*(argument.format(**names) for argument in arguments))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert expected.format(**names) in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_disk_that_is_too_small_is_reported_before_writing(tmp_path: Path) -> None:
    """A real small file system."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        sources = Path(json.__file__).parent
        done = run("corpus", "collect", sources.parent / "email", "-o", disk / "corpus")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 1
    assert f"{disk / 'corpus'}: the corpus needs about" in done.stderr


def test_json_output_is_json(data: Path) -> None:
    done = run("shards", "verify", data / "shards", "--deep", "--json")
    assert json.loads(done.stdout)["vocab_size"] == 512


@pytest.mark.parametrize(("text", "size"), [("30MB", 30_000_000), ("5 gb", 5 * 10**9), ("32kB", 32_000), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "3 apples", "nan", "1e400GB"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 30MB"):
        parse_size(text)


def test_generated_text_cannot_control_the_terminal() -> None:
    assert printable("a\tb\nc é") == "a\tb\nc é"
    assert printable("\x1b[2J\x07\r\u202e") == "\\x1b[2J\\x07\\r\\u202e"


def options_of_all_commands() -> list[tuple[list[str], list[str]]]:
    """(words of the command, option with a value) of every option that takes one value."""
    found, groups = [], [([], typer.main.get_command(app))]
    while groups:
        words, command = groups.pop()
        groups += [([*words, name], each) for name, each in getattr(command, "commands", {}).items()]
        if not hasattr(command, "commands"):
            for param in command.params:
                if param.param_type_name == "option" and not param.multiple and param.name != "help":
                    given = [param.opts[0]] if param.is_flag else [param.opts[0], "1"]
                    found.append((words, given))
    return found


def test_an_option_given_twice_is_refused() -> None:
    """Of any command: click takes the last."""
    options = options_of_all_commands()
    assert {words[-1] for words, _ in options} >= {"collect", "clean", "build", "launch", "doctor", "status", "push"}
    for words, given in options:
        done = CliRunner().invoke(app, [*words, *given, *given], env={"COLUMNS": "200"})
        assert done.exit_code == 2, (words, given)
        assert "given twice. Give it once." in done.output, (words, given, done.output)
    contradiction = CliRunner().invoke(app, ["launch", "r.yaml", "--doctor", "--no-doctor"])
    assert "given twice" in contradiction.output


def test_lists_may_be_given_twice(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--hostfile", "h", str(tmp_path / "r"), "--set", "a=1", "--set", "b=2"])
    assert "no such recipe" in str(done.exception)


def test_a_home_directory_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the shell does not: in `--option=~/x`, in a scheduler's or a container's command."""
    monkeypatch.setenv("HOME", "/nonexistent/me")
    for arguments in (
        ["status", "~/run"],
        ["plan", "~/r.yaml"],
        ["doctor", "--hostfile=~/hosts"],
        ["shards", "verify", "~/shards"],
        ["shards", "build", "~/x", "--output=o", "--tokenizer=t"],
        ["corpus", "collect", "~/x", "--output=o"],
    ):
        assert "/nonexistent/me/" in str(CliRunner().invoke(app, arguments).exception), arguments


@pytest.mark.parametrize("importing", [True, False])
def test_ctrl_c_ends_the_command(importing: bool, tmp_path: Path) -> None:
    """Also during an import of a module that catches KeyboardInterrupt and goes on."""
    body = "import time\nprint('ready', flush=True)\ntry:\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    pass\n"
    (tmp_path / "stubborn.py").write_text(body, encoding="utf-8")
    work = "import stubborn" if importing else "import time; print('ready', flush=True); time.sleep(30)"
    program = (
        f"from codeparrot_ds import cli\n@cli.app.command('x')\ndef x():\n    {work}\n    print('went on')\n"
        "import sys; sys.argv = ['x', 'x']; cli.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (130, b""), errors
    assert b"Traceback" not in errors

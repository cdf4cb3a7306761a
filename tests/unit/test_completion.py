"""What the shell offers on TAB, in a real bash and by the functions that bash, zsh and fish call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.cli.completion import complete_recipe, complete_run, complete_setting, drop_keys
from tests.conftest import ROOT

# Completes the words given as bash does when TAB is pressed at the end of the last one.
SCRIPT = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_codeparrot_ds_completion codeparrot-ds
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def command(tmp_path: Path) -> dict[str, str]:
    """Environment with `codeparrot-ds` on PATH, in which torch and numpy cannot be imported."""
    blocked, program = tmp_path / "blocked", tmp_path / "bin" / "codeparrot-ds"
    blocked.mkdir()
    for name in ("torch", "deepspeed", "transformers", "numpy"):
        (blocked / f"{name}.py").write_text(f"raise SystemExit('completion imports {name}')", encoding="utf-8")
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom codeparrot_ds.cli import main\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{blocked}:{ROOT}",
    }


def test_bash_completes_verbs_options_recipes_and_settings(command: dict[str, str], tmp_path: Path) -> None:
    source = {**command, "_CODEPARROT_DS_COMPLETE": "source_bash"}
    script = tmp_path / "completion.sh"
    script.write_bytes(subprocess.check_output(["codeparrot-ds"], env=source))

    def completions(*words: str) -> list[str]:
        bash = ["bash", "-euc", SCRIPT, "bash", str(script), "codeparrot-ds", *words]
        done = subprocess.run(bash, env=command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert {"launch", "plan", "corpus"} <= set(completions(""))
    assert completions("launch", "codeparrot-") == ["codeparrot-small", "codeparrot-xl"]
    # An option given twice is an error, but not while the line is being written.
    twice = ["launch", "quickstart", "--ranks", "2", "--ranks", "2"]
    assert completions(*twice, "--set", "engine.prec") == [
        "engine.precision=", "engine.precision=bf16", "engine.precision=fp16", "engine.precision=fp32",
    ]  # fmt: skip
    assert completions("launch", "--set", "seed", "=", "1", "--set", "engine.precision", "=", "b") == ["bf16"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_in_their_own_format(command: dict[str, str], tmp_path: Path, shell: str) -> None:
    asked = {
        "_CODEPARROT_DS_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "codeparrot-ds launch codeparrot-small --set engine.precision=b",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    answer = subprocess.check_output(["codeparrot-ds"], env={**command, **asked}, cwd=tmp_path, text=True)
    offer = "engine.precision=bf16"
    assert answer.strip() == {"zsh": f"_arguments '*: :((\"{offer}\"))'", "fish": offer}[shell]


def test_bash_splits_a_setting_at_its_equals_sign() -> None:
    for words, kept, current in (
        ("x --set a = b", "x --set b", 2),
        ("x --set a =", "x --set ", 2),
        ("x --set a = b --set c = d --se", "x --set b --set d --se", 5),
        ("x --output = b", "x --output = b", 3),
    ):
        asked = {"COMP_WORDS": words.replace(" ", "\n"), "COMP_CWORD": str(words.count(" "))}
        environment = {"_CODEPARROT_DS_COMPLETE": "complete_bash", **asked}
        drop_keys(environment)
        assert (environment["COMP_WORDS"].split("\n"), int(environment["COMP_CWORD"])) == (kept.split(" "), current)
        assert environment.get("_CODEPARROT_DS_KEY") == ("a" if words.endswith(("a = b", "a =")) else None)


def test_settings_are_those_of_a_recipe() -> None:
    offered = complete_setting("")
    assert "model.n_layer=" in offered and "optimizer.learning_rate=" in offered
    assert complete_setting("model.n_") == ["model.n_layer=", "model.n_head=", "model.n_embd="]
    assert complete_setting("model.act")[1:] == [
        f"model.activation_checkpointing={x}" for x in ("none", "selective", "full")
    ]
    assert complete_setting("engine.compile=") == ["engine.compile=true", "engine.compile=false"]
    assert complete_setting("checkpoints.keep_last=") == ["checkpoints.keep_last=3"]
    assert {f"engine.deepspeed={path.stem}" for path in (ROOT / "ds_configs").iterdir()} == set(
        complete_setting("engine.deepspeed=")
    )
    assert complete_setting("no.such.key=") == complete_setting("no") == []


def test_runs_and_recipes_are_found_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs/a", "runs/b", "runs/.hidden", "runs/c d", "runs/\\$(touch x)", "runs/'", "other/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").touch()
    (tmp_path / "runs" / "data").mkdir()
    (tmp_path / "code.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert complete_run("") == complete_run("runs/") == ["runs/a", "runs/b"]
    assert complete_run("other/") == ["other/c"]
    assert complete_run("~/runs/b") == ["~/runs/b"]
    assert complete_run("nowhere/") == complete_run("~no-such-user/") == []
    assert complete_recipe("co") == ["codeparrot-small", "codeparrot-xl", "code.yaml"]
    assert complete_recipe("runs/a/") == ["runs/a/recipe.yaml"]

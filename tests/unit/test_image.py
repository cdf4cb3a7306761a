"""The files of other services: the image for GPU nodes and the GitHub workflow. Neither can be run here."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT
from tests.unit.test_bootstrap import bootstrap  # noqa: F401 (a fixture)

WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def test_the_image_is_pinned_and_its_user_is_not_root() -> None:
    stages = []
    for name, arguments in instructions():
        if name == "FROM":
            image, _, stage = arguments.partition(" AS ")
            assert image in stages or re.fullmatch(r"[a-z]+/[a-z]+:\d+\.\d+\.\d+-[a-z0-9.-]+", image), image
            stages.append(stage)
    names = [name for name, _ in instructions()]
    defaults = dict(arguments.split("=", 1) for name, arguments in instructions() if name == "ARG")
    assert [arguments for name, arguments in instructions() if name == "USER"] == ["$UID"]
    assert int(defaults["UID"]) > 0  # a number, because Kubernetes cannot tell whether a name is root
    assert "RUN" not in names[names.index("USER") :]


def test_its_packages_are_those_that_the_bootstrap_installs(bootstrap: Any) -> None:  # noqa: F811
    text = " ".join(arguments for name, arguments in instructions() if name == "RUN")
    words = shlex.split(text.partition("--no-install-recommends")[2].partition("&&")[0])
    at_run_time = {bootstrap.TEST_PACKAGES[name] for name in ("pdsh", "sshd", "ip", "header:libaio.h", "bwrap")}
    base = {re.sub(r"^python3\.\d+", "python3", package) for package in bootstrap.BASE_PACKAGES.values()}
    # Here, headers come with Python, and ssh with sshd.
    assert set(words) == at_run_time | base | {"python3-dev", "openssh-client"}
    assert "rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*" in text  # keys in an image are no secret


def test_what_it_copies_is_sent_to_the_builder_and_nothing_else_is() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules and all((ROOT / name).exists() for name in allowed)
    copied = [
        arguments.split()[0] for name, arguments in instructions() if name == "COPY" and "--from" not in arguments
    ]
    assert all(name == "." or name.partition("/")[0] in allowed for name in copied)
    links = [path for path in (ROOT / "codeparrot_ds").rglob("*") if path.is_symlink()]
    for path in links:  # recipes, DeepSpeed JSON and the hostfile, which are part of the package
        target = Path(os.path.normpath(path.parent / path.readlink())).relative_to(ROOT)
        assert any(target == Path(name) or Path(name) in target.parents for name in allowed), target
    assert links and {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} < set(allowed)


def test_the_entry_point_runs_the_command() -> None:
    assert ENTRYPOINT.stat().st_mode & 0o111
    done = subprocess.run([ENTRYPOINT, "echo", "a b"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a b\n", "")


def test_the_workflow_runs_commands_that_exist_with_pinned_actions() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["cancel-in-progress"]
    assert set(workflow["jobs"]) == {"lint", "fast", "full"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and "latest" not in job["runs-on"]
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", step["uses"])
                continue
            words = shlex.split(step["run"])
            for word in words:
                if "/" in word and not word.startswith((".venv/", "PATH=")):
                    assert (ROOT / word).is_file(), word
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert sum("./launch/test.sh" in command for command in commands) == 2
    linters = {command.partition(".venv/bin/")[2] for command in commands if ".venv/bin/" in command}
    assert linters == {"ruff check .", "ruff format --check .", "mypy"}


def test_the_workflow_tests_the_python_that_the_package_requires() -> None:
    steps = [
        step for job in yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]
    ]
    (version,) = {step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})}
    assert f'requires-python = ">={version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

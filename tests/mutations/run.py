"""Mutation tests: break the package in one place at a time, and run the tests that must fail.

Run as `python -m tests.mutations.run [NAME ...]`, by hand and before a release. Each mutation of mutations.yaml is
applied to a copy of the tree. It is caught if a test that it names fails there. It is missed if all of them pass, if a
named test does not exist, or if the text that it replaces does not occur exactly once. The exit code is 1 if any is
missed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

from tests.trees import copy_tree

PACKAGE = "codeparrot_ds"
MUTATIONS = Path(__file__).with_name("mutations.yaml")
PYTEST_TESTS_FAILED = 1  # pytest's exit code; other codes mean that it could not run them
OUTPUT_LINES = 15  # shown of a failed pytest run


@dataclass(frozen=True)
class Mutation:
    """A text replacement in the package, and the tests that must catch it.

    Attributes:
        name: unique name.
        find: text that occurs exactly once in the package.
        replace: replacement text.
        tests: pytest node ids, at least one of which must fail.
    """

    name: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def place(self, tree: Path) -> Path:
        """Find the module that contains the text. Raises LookupError unless the text occurs exactly once."""
        found = []
        for path in sorted((tree / PACKAGE).rglob("*")):
            if path.suffix in (".py", ".cpp"):
                found += [path] * path.read_text().count(self.find)
        if len(found) != 1:
            raise LookupError(f"its text is found {len(found)} times in {PACKAGE}/, not once")
        return found[0]


def load_mutations() -> list[Mutation]:
    """Read all mutations from mutations.yaml."""
    return [Mutation(**{**each, "tests": tuple(each["tests"])}) for each in yaml.safe_load(MUTATIONS.read_text())]


def run_tests(tree: Path, tests: tuple[str, ...], *options: str) -> tuple[int, str]:
    """Run tests in a copy of the tree; returns pytest's exit code and output."""
    # The package is installed from this tree; PYTHONPATH makes all test processes use the copy instead.
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *tests]
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def try_mutation(mutation: Mutation, tree: Path) -> str | None:
    """Apply a mutation to a copy of the tree, run its tests and undo it. Returns why it was missed, or None."""
    try:
        path = mutation.place(tree)
    except LookupError as error:
        return str(error)
    before = path.read_text()
    path.write_text(before.replace(mutation.find, mutation.replace))
    try:
        code, output = run_tests(tree, mutation.tests)
    finally:
        path.write_text(before)
    if code == PYTEST_TESTS_FAILED:
        return None
    if code == 0:
        return "its tests pass"
    return f"pytest could not run its tests (exit code {code})\n" + "\n".join(output.splitlines()[-OUTPUT_LINES:])


def main() -> None:
    """Check that the named tests pass on the unchanged tree, then try the mutations in parallel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; all of them by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutations tried in parallel (2)")
    parser.add_argument("--trust-tests", action="store_true", help="do not run the tests on the unchanged tree first")
    options = parser.parse_args()
    mutations = load_mutations()
    if unknown := set(options.names) - {each.name for each in mutations}:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    chosen = [each for each in mutations if not options.names or each.name in options.names]

    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        copies = [copy_tree(Path(directory) / str(number)) for number in range(options.jobs)]
        if not options.trust_tests:
            tests = tuple(sorted({test for each in chosen for test in each.tests}))
            code, output = run_tests(copies[0], tests, "-n", str(options.jobs), "--dist", "loadfile")
            if code != 0:
                sys.exit(f"{output}\nThe tests fail on the unchanged tree (exit code {code}): nothing was tried.")
        free: SimpleQueue[Path] = SimpleQueue()
        for copy in copies:
            free.put(copy)

        def attempt(mutation: Mutation) -> str | None:
            tree, begun = free.get(), time.monotonic()
            try:
                missed = try_mutation(mutation, tree)
            finally:
                free.put(tree)
            print(f"{time.monotonic() - begun:6.1f} s  {mutation.name}: {missed or 'caught'}", flush=True)
            return missed

        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(attempt, chosen))
    missed = [each.name for each, why in zip(chosen, results, strict=True) if why is not None]
    print(
        f"{len(chosen) - len(missed)} of {len(chosen)} mutations caught" + "".join(f"\n  missed: {n}" for n in missed)
    )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

"""README and docs: links lead somewhere, commands exist, and what the pages say of the code is so."""

import ast
import itertools
import re
from functools import cache
from pathlib import Path

import pytest

from codeparrot_ds.planning.machine import MachineSpec, find_machine
from codeparrot_ds.planning.plan import Choice, predict
from codeparrot_ds.run.recipe import load_recipe
from tests.conftest import ROOT
from tests.pages import PAGES, Link, anchors, blocks, code_spans, commands, links, sections, tables, usage_problem
from tests.unit.test_faults import functions
from tests.unit.test_recipe_rules import keys

DOCS = ROOT / "docs"
README = ROOT / "README.md"
OTHERS = "Messages of other programs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [link.target for link in links(page) if broken(link)] == []


def broken(link: Link) -> bool:
    """Whether a file or a heading that a link names does not exist. Other sites are not asked."""
    if re.match(r"https?://", link.target):
        return False
    path, _, anchor = link.target.partition("#")
    target = (link.page.parent / path).resolve() if path else link.page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c-d (e)\n\n```\n# no heading [x](y)\n```\n`[no](link)` [no\nlink](#a-b-c-d-e) [q](#z)\n## A\n## A\n"
    )
    assert anchors(page) == {"a-b-c-d-e", "a", "a-1"}
    assert [link.target for link in links(page)] == ["#a-b-c-d-e", "#z"]
    assert [broken(link) for link in links(page)] == [False, True]


def test_the_index_lists_every_page() -> None:
    listed = {(DOCS / link.target.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    assert sorted(page.name for page in DOCS.glob("*.md") if page.name != "README.md" and page not in listed) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page: Path) -> None:
    """Also those that no test can run here: on GPUs, several hosts, the Hub."""
    known = {key for key, *_ in keys()}
    for words, complete in commands(page):
        if words[0] == "codeparrot-ds":
            assert usage_problem(words, complete) is None, words
        for option, value in itertools.pairwise(words):
            if option == "--set" and "=" in value:
                assert value.partition("=")[0] in known, words


def test_wrong_commands_are_found() -> None:
    build = ["codeparrot-ds", "shards", "build", "x", "-o", "y"]
    assert usage_problem([*build, "--tokenizer", "z"]) is None
    assert usage_problem(build) == "missing tokenizer"
    assert usage_problem([*build, "--tokeniser", "z"]) == "No such option: --tokeniser"
    assert usage_problem(["codeparrot-ds", "shard", "build"]) == "no command shard"
    assert usage_problem(["codeparrot-ds", "convert", "a", "b", "c"]) == "unexpected c"
    assert usage_problem(["codeparrot-ds", "--install"]) == "no option --install"


def test_the_readme_is_short_and_shows_how_to_start() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200
    assert "./launch/quickstart.sh\n" in blocks(README, "bash")
    transcripts = blocks(README, "text")
    assert transcripts and all(len(block.splitlines()) <= 15 for block in transcripts)


def test_each_claim_about_this_package_has_its_test_or_benchmark() -> None:
    """In the table of features: the second column is ours."""
    (table,) = (table for table in tables(README) if table[0][1] == "codeparrot-ds")
    assert len(table) > 10
    for row in table[1:]:
        assert len(row) == len(table[0]), row
        if row[1] == "no":
            continue
        shown = [link for link in links(README) if f"[{link.text}]({link.target})" in row[1]]
        assert shown, row
        for link in shown:
            path, _, name = link.target.partition("#")
            assert not name or not path.startswith("tests/"), f"{link.target}: name the function in the text"
            if path.startswith("tests/"):
                assert link.text.startswith("test_") and link.text in functions(ROOT / path), row
            else:
                assert path.startswith(("docs/", "benchmarks/")), row


def own_messages() -> list[str]:
    """The messages of this package on the page: the code in the first column of each table."""
    found = []
    for heading, body in sections(DOCS / "troubleshooting.md"):
        if heading != OTHERS:
            found += [code for table in tables(body) for row in table[1:] for code in code_spans(row[0])]
    return found


@cache
def source_texts() -> str:
    """Every text in the source of this package and its installer, with … where a value is filled in, joined by NUL."""
    found = []
    for path in [*(ROOT / "codeparrot_ds").rglob("*.py"), ROOT / "launch" / "bootstrap.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\0".join(found)


def in_source(message: str) -> bool:
    """Whether some text of the source contains a message, in which … stands for anything."""
    pattern = "[^\0]*?".join(map(re.escape, message.strip("…").split("…")))
    return re.search(pattern, source_texts()) is not None


def test_each_message_on_the_page_is_one_of_this_package() -> None:
    messages = own_messages()
    assert len(messages) > 60
    assert [message for message in messages if not in_source(message)] == []
    assert [message for message in messages if len(message.replace("…", "").strip()) < 12] == []
    assert not in_source("no such … message is in the source")


def test_messages_of_other_programs_say_whose_they_are() -> None:
    ((_, body),) = (each for each in sections(DOCS / "troubleshooting.md") if each[0] == OTHERS)
    (table,) = tables(body)
    assert table[0] == ["message", "printed by", "cause", "mend"]
    assert len(table) > 20 and all(len(row) == 4 and all(row) for row in table)


def test_the_memory_of_each_stage_is_what_the_plan_says() -> None:
    (table,) = (table for table in tables(DOCS / "deepspeed.md") if table[0][0] == "recomputation")
    for recompute, gpus, *peaks in table[1:]:
        for stage, peak in zip(table[0][2:], peaks, strict=True):
            recipe = load_recipe(Path("codeparrot-xl"), [f"engine.deepspeed={stage}", "batch.micro_batch_size=8"])
            machine = find_machine(recipe, MachineSpec(int(gpus), gpu="H100", gpu_memory_bytes=80 * 10**9))
            found = predict(recipe, Choice(recipe.engine.deepspeed, recompute, 8), machine)
            assert f"{found.memory.peak_bytes / 1e9:.1f}" == peak, (recompute, gpus, stage)


def test_the_recipes_on_the_page_are_those_of_the_package() -> None:
    (table,) = (table for table in tables(DOCS / "training.md") if table[0][0] == "recipe")
    assert [row[0].strip("`") for row in table[1:]] == ["quickstart", "codeparrot-small", "codeparrot-xl"]
    for name, *facts in table[1:]:
        recipe = load_recipe(Path(name.strip("`")))
        assert facts == [
            f"{recipe.model.parameters / 1e6:,.1f} M",
            f"{recipe.batch.global_batch_size} x {recipe.model.seq_len:,} tokens",
            f"`{recipe.engine.deepspeed.stem}`",
        ]


def test_every_page_is_plain_markdown() -> None:
    """Fences are closed, and no line of a table is cut."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0, page
        for table in tables(page):
            assert len({len(row) for row in table}) == 1, (page, table[0])

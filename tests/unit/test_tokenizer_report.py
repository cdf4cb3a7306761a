"""`tokenizer report`: every figure equals a plain computation, and everything that is not measured is counted."""

import io
import json
import keyword
import tokenize
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from codeparrot_ds.cli import app
from codeparrot_ds.errors import DataError
from codeparrot_ds.tokenizer.directory import EOS_TOKEN
from codeparrot_ds.tokenizer.kinds import KINDS, kinds_of
from codeparrot_ds.tokenizer.report import report
from tests.tokenizer_kinds import KINDS as TOKENIZERS
from tests.tokenizer_kinds import save, sources

ANNOTATED = [  # text and the kind of each character: c code, # comment, s string, . indentation
    ("def f(a):  # one\n", "cccccccccccc#####c"[1:]),
    ("    return 'it' # x\n", "....cccccccssssc###c"),
    ('\tx = """a\n  b"""; y\n', ".cccc" + "s" * 11 + "cccc"),
    ("if a:\n    \n  # z\n  pass\n", "cccccc....c..###c..ccccc"),
    ("a = (1,\n     rb'2' f'{x!r:>{w}}{\"\"}')\n", "cccccccc.....sssssc" + "s" * 17 + "cc"),
    ("\ufeffa\r\n  'b'\r\n", "cccc" + "..sss" + "cc"),
    ("x = 1\r# c\ry\r", "cccccc###ccc"),
]


@pytest.mark.parametrize(("text", "expected"), ANNOTATED)
def test_the_kind_of_each_character(text: str, expected: str) -> None:
    assert "".join("c#s."[kind] for kind in kinds_of(text)) == expected


@pytest.mark.parametrize("text", ["print 'a\n", "x = '''\n", "if a:\n    b\n  c\n", "a = $b\n", "(\n"])
def test_what_python_cannot_tokenize_has_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=r"line [1-4]"):
        kinds_of(text)


def plain_kinds(text: str) -> list[str]:
    """The kinds of text, character by character."""
    kinds, fresh = [], True
    for character in text:
        fresh = character == "\n" or (fresh and character in " \t\f")
        kinds.append("indentation" if fresh and character != "\n" else "code")
    lines = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
    started = [(0, 0)]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        started += [token.start] if name == "FSTRING_START" else []
        if name in ("COMMENT", "STRING", "FSTRING_END"):
            begin = started.pop() if name == "FSTRING_END" else token.start
            for i in range(lines[begin[0] - 1] + begin[1], lines[token.end[0] - 1] + token.end[1]):
                kinds[i] = "comments" if name == "COMMENT" else "strings"
    return kinds


def plain_measures(tokenizer: Tokenizer, texts: list[str]) -> dict[str, dict[str, float]]:
    """The measures in all and by kind, from the bytes of each token alone."""
    names = ("characters", "bytes", "words", "tokens", "of_words", "continued")
    sums = {kind: dict.fromkeys(names, 0) for kind in (*KINDS, "all")}
    stored = {number: token for token, number in tokenizer.get_vocab().items()}
    for text in texts:
        kinds = plain_kinds(text)
        owner = [i for i, character in enumerate(text) for _ in character.encode()]  # of each byte, its character
        tokens_at: list[set[int]] = [set() for _ in text]
        at = 0
        for number, token in enumerate(tokenizer.encode(text, add_special_tokens=False).ids):
            inside = owner[at : at + len(stored[token])]
            at += len(stored[token])
            sums[kinds[inside[-1]]]["tokens"] += 1
            for i in inside:
                tokens_at[i].add(number)
        assert at == len(owner)
        word: set[int] = set()
        for i, character in enumerate(text):
            sums[kinds[i]]["characters"] += 1
            sums[kinds[i]]["bytes"] += len(character.encode())
            if character.isalnum() or character == "_":
                word |= tokens_at[i]
                if not (text[i + 1 : i + 2].isalnum() or text[i + 1 : i + 2] == "_"):
                    sums[kinds[i]]["words"] += 1
                    sums[kinds[i]]["of_words"] += len(word)
                    sums[kinds[i]]["continued"] += len(word) > 1
                    word = set()
    for name in names:
        sums["all"][name] = sum(sums[kind][name] for kind in KINDS)
    return {kind: {**each, **_ratios(each)} for kind, each in sums.items()}


def _ratios(sums: dict[str, int]) -> dict[str, float]:
    words = sums["words"] or 1
    return {
        "characters_per_token": sums["characters"] / sums["tokens"],
        "bytes_per_token": sums["bytes"] / sums["tokens"],
        "fertility": sums["of_words"] / words,
        "continued_words": sums["continued"] / words,
    }


def test_every_figure_equals_a_plain_computation(data: Path, tmp_path: Path) -> None:
    texts = [*sources("json", "xml/dom"), "größe = 'größer 中文 🦜'  # naïve\n\tif größe:\n        pass\n"]
    with open(tmp_path / "texts.jsonl", "w") as file:
        file.writelines(json.dumps({"content": text, "path": f"{i}.py"}) + "\n" for i, text in enumerate(texts))
    found = report(data / "tokenizer", [str(tmp_path / "texts.jsonl")]).as_json()
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    (measured,) = found["tokenizers"]
    expected = plain_measures(tokenizer, texts)
    for kind in ("all", *KINDS):
        reported = measured if kind == "all" else measured["by_kind"][kind]
        for name in ("characters", "bytes", "words", "tokens", "characters_per_token", "bytes_per_token"):
            assert reported[name] == expected[kind][name], (kind, name)
        for name in ("fertility", "continued_words"):
            assert (reported[name] or 0) == expected[kind][name], (kind, name)
    assert (measured["coverage"], measured["relative_tokens"]) == (1, 1)
    assert measured["round_trip"] == {"equal": len(texts), "different": []}
    assert found["documents"] == {"read": len(texts), "divided into kinds": len(texts)}
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids]
    size = tokenizer.get_vocab_size()
    assert measured["unused_tokens"]["count"] == size - len(set(ids))
    assert list(measured["unused_tokens"]["tokens"]) == [str(i) for i in range(size) if i not in set(ids)]
    special = len(json.loads(tokenizer.to_str())["added_tokens"])  # the first ids; then come the bytes
    shown = [tokenizer.decode([i]) for i in range(special + 256, size)]
    assert measured["first_tokens"] == shown[:12]
    assert measured["last_tokens"] == shown[-12:]
    assert measured["longest_tokens"] == sorted(shown, key=lambda token: -len(token))[:12]
    counts = {word: len(tokenizer.encode(word).ids) for word in keyword.kwlist}
    assert {word: each["bare"] for word, each in measured["keywords"].items()} == counts
    assert measured["single_keywords"]["bare"] == list(counts.values()).count(1) > 5
    assert measured["keywords"]["nonlocal"]["after_blank"] == len(tokenizer.encode(" nonlocal").ids)


def word_piece() -> Tokenizer:
    """Knows few words, makes all else unknown, and drops white space."""
    words = ["[UNK]", "def", "re", "##turn", "x", "(", ")", ":", "in"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return tokenizer


def test_unknown_words_and_lost_text_are_counted(tmp_path: Path) -> None:
    text = "def x(): return unknown\n"
    (tmp_path / "a.py").write_text(text)
    tokenizer = word_piece()
    tokenizer.add_tokens(["in"])
    (measured,) = report(save(tokenizer, tmp_path / "t"), [str(tmp_path)], suffix=".py").as_json()["tokenizers"]
    # def x (): re ##turn [UNK]; "():" is one piece, which is not in the vocabulary.
    covered = len("def") + len("x") + len("return")
    assert measured["coverage"] == covered / len(text)
    assert (measured["words"], measured["tokens"]) == (4, 6)
    assert (measured["fertility"], measured["continued_words"]) == (5 / 4, 1 / 4)
    assert measured["round_trip"]["different"] == [f"{tmp_path.name} a.py"]
    assert measured["keywords"]["return"]["bare"] == 2
    assert measured["keywords"]["in"]["bare"] == 0, "an added token was not learned"
    assert measured["keywords"]["while"]["bare"] == 0, "unknown"
    assert measured["single_keywords"]["bare"] == 1


def test_places_of_tokens_do_not_depend_on_post_processing(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("if x:\n    '''a\n    b'''\n        # c\n")
    plain = TOKENIZERS["llama3"]()
    trimmed = Tokenizer.from_str(plain.to_str())
    content: dict[str, Any] = json.loads(trimmed.to_str())
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    save(Tokenizer.from_str(json.dumps(content)), tmp_path / "b")
    found = report(save(plain, tmp_path / "a"), [str(tmp_path)], [str(tmp_path / "b")], suffix=".py").as_json()
    a, b = found["tokenizers"]
    assert {**a, "name": ""} == {**b, "name": ""}
    assert a["by_kind"]["strings"]["tokens"] > 1


def test_what_is_not_divided_or_read_is_counted_and_named(data: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"content": "x = 1\n"},
        {"content": "print 'a\n", "path": "bad.py", "repo_name": "old"},
        {"content": "# Title\n\nIt's\n", "path": "README.md"},
        {"content": 7},
        {"content": "", "path": "empty.py"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes.txt2").write_text("x")
    result = CliRunner().invoke(app, ["tokenizer", "report", str(data / "tokenizer"), str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["documents"] == {
        "read": 4,
        "divided into kinds": 2,
        "not divided into kinds": 1,
        "of other languages": 1,
        "not readable": 1,
    }
    assert list(found["not_divided"]) == ["old bad.py"]
    assert "line 1" in found["not_divided"]["old bad.py"]
    assert [where.rpartition("/")[2] for where in found["unreadable"]] == ["a.jsonl:4"]
    assert sum(found["skipped_files"].values()) == 1
    assert found["characters"] == sum(len(row["content"]) for row in rows if isinstance(row["content"], str))
    table = CliRunner().invoke(app, ["tokenizer", "report", str(data / "tokenizer"), str(tmp_path)]).stdout
    for part in ("4 read", "old bad.py (", "a.jsonl:4", "files not read: 1"):
        assert part in table


def test_tokenizers_are_side_by_side(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("".join(sources("json")))
    other = save(TOKENIZERS["sentencepiece-bpe"](), tmp_path / "other")
    arguments = ["tokenizer", "report", str(data / "tokenizer"), str(tmp_path), "--suffix", ".py"]
    lines = CliRunner().invoke(app, [*arguments, "--against", str(other)]).stdout.splitlines()
    assert lines[1].split() == ["tokenizer", "other"]
    a, b = report(data / "tokenizer", [str(tmp_path)], [other], suffix=".py").as_json()["tokenizers"]
    assert b["relative_tokens"] == b["tokens"] / a["tokens"]
    assert f"{b['tokens']:,}" in next(line for line in lines if line.split()[:1] == ["tokens"] and "in" not in line)
    assert "<0x0A>" not in b["first_tokens"], "a byte was not learned"
    assert EOS_TOKEN not in b["first_tokens"]


def test_a_tokenizer_that_cannot_be_loaded_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(DataError, match=r"no-such/model: transformers finds no tokenizer"):
        report(data / "tokenizer", [str(tmp_path)], ["no-such/model"])

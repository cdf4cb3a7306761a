"""Beginnings of documents to try something on."""

import json
from pathlib import Path

from codeparrot_ds.documents.excerpts import read_excerpts, some_pieces
from codeparrot_ds.documents.inputs import find_inputs


def test_pieces_are_evenly_spaced(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.jsonl").write_text('{"content": "x"}\n')
    pieces = find_inputs([str(tmp_path)])
    assert [piece.name for piece in some_pieces(pieces)] == [pieces[number].name for number in range(0, 20, 3)]
    assert some_pieces(pieces[:1]) == pieces[:1]
    assert some_pieces([]) == []


def test_excerpts_are_beginnings_and_unreadable_documents_are_skipped(tmp_path: Path) -> None:
    texts = ["a" * 70_000, "b", "c" * 50_000, "d" * 20_000, "e"]
    (tmp_path / "0.jsonl").write_text(json.dumps({"content": texts[0]}) + "\n" + json.dumps({"content": "f"}) + "\n")
    rows = [json.dumps({"content": text}) for text in texts[1:]]
    (tmp_path / "1.jsonl").write_text("\n".join([rows[0], "{broken", *rows[1:]]) + "\n")
    (tmp_path / "2.jsonl.gz").write_bytes(b"\x1f\x8bnot gzip")
    found = list(read_excerpts(find_inputs([str(tmp_path)]), "content"))
    assert found == ["a" * 64_000, "b", "c" * 50_000, "d" * 20_000]

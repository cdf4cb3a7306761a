"""Completions: equal to transformers' own generation, streamed, from any place that a model can be in."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, GPT2Config, GPT2Model

from codeparrot_ds.cli.complete import _Highlighted, _Screen
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.evaluation.complete import Piece, Sampling, complete, encode_prompt, read_prompt
from codeparrot_ds.evaluation.generate import END_TOKEN, LENGTH, STOP, TextStream
from codeparrot_ds.evaluation.pretrained import Pretrained, find_model, fit_context, limit_threads, load_pretrained
from codeparrot_ds.evaluation.stops import Stops
from codeparrot_ds.run.directory import CERTIFICATE
from codeparrot_ds.tokenizer.encode import Encoder
from tests.conftest import ROOT, once
from tests.hub_server import SHA, TOKEN, Repository, serve
from tests.tiny_models import plain_gpt2

PROMPTS = ["def f(x):", "import os\n\n\nclass A:\n    def __init__(self", "x", ""]


@pytest.fixture(scope="module")
def directory(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "plain_gpt2", lambda made: plain_gpt2(made, data / "tokenizer"))


@pytest.fixture(scope="module")
def tiny(directory: Path) -> Pretrained:
    found = load_pretrained(directory)
    limit_threads(found)
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(0.4, 0.95), (1.0, 1.0), (1.5, 0.5), (0.0, 1.0)])
def test_the_tokens_are_those_of_transformers(tiny: Pretrained, temperature: float, top_p: float) -> None:
    ended = set()
    for seed, text in enumerate(PROMPTS):
        sampling = Sampling(4, temperature, top_p, 24, seed)
        prompt = encode_prompt(tiny, text, 24)
        shown = [""] * 4
        candidates = complete(tiny, prompt, sampling, lambda piece: add_to(shown, piece))  # noqa: B023
        options: dict[str, Any] = {"do_sample": False}
        if temperature:
            warp = {"temperature": temperature, "top_p": top_p, "top_k": 0}
            options = {"do_sample": True, "num_return_sequences": 4, **warp}
        torch.manual_seed(seed)
        output = tiny.model.generate(torch.tensor(prompt.ids[None].astype(np.int64)), max_new_tokens=24, **options)
        assert len(candidates) == len(output)
        for number, (found, ids) in enumerate(zip(candidates, output[:, len(prompt.ids) :].tolist(), strict=True)):
            assert found.ids == ids[: len(found.ids)]
            text_of_all = tiny.encoder.decode(np.array(ids[: ids.index(0)] if 0 in ids else ids))
            assert found.text == shown[number] == Stops().cut(text_of_all).rstrip()
            assert {END_TOKEN: found.ids[-1] == 0, LENGTH: len(found.ids) == 24, STOP: True}[str(found.ended)]
            ended.add(found.ended)
    assert ended >= ({LENGTH} if temperature < 1 else {LENGTH, END_TOKEN})


def add_to(shown: list[str], piece: Piece) -> None:
    shown[piece.number] += piece.text


def test_the_first_piece_is_shown_before_the_last_is_made(tiny: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, shown_at = [], []
    forward = tiny.model.forward

    def counted(**inputs: Any) -> Any:
        steps.append(inputs["input_ids"].shape)
        return forward(**inputs)

    counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(tiny.model, "forward", counted)
    prompt = encode_prompt(tiny, "def f(x):", 32)
    complete(tiny, prompt, Sampling(2, seed=3, max_new_tokens=32), lambda piece: shown_at.append(len(steps)))
    assert steps[0] == (1, len(prompt.ids))  # the prompt is run once for both candidates
    assert set(steps[1:]) == {(2, 1)}
    assert shown_at[0] <= 3 < len(steps)
    assert len(set(shown_at)) > 3


def test_the_end_of_a_long_prompt_is_kept(tiny: Pretrained) -> None:
    text = "".join(f"value_{i} = {i}\n" for i in range(100))
    ids = tiny.encoder.encode(text)
    prompt = encode_prompt(tiny, text, 16)
    assert prompt.ids.tolist() == ids[-48:].tolist()  # a context of 64
    assert (prompt.dropped, prompt.new_tokens) == (len(ids) - 48, 16)
    end = encode_prompt(tiny, tiny.encoder.decode(ids[-48:]), 16)
    assert end.ids.tolist() == prompt.ids.tolist()
    found, expected = (complete(tiny, each, Sampling(max_new_tokens=16)) for each in (prompt, end))
    assert found == expected


@pytest.mark.parametrize(
    ("length", "wanted", "kept", "room"), [(10, 16, 10, 16), (60, 16, 48, 16), (60, 64, 32, 32), (10, 64, 10, 54)]
)
def test_a_prompt_gives_way_to_its_completion_up_to_half_of_the_context(
    tiny: Pretrained, length: int, wanted: int, kept: int, room: int
) -> None:
    assert fit_context(tiny, length, wanted) == (kept, room)


def test_pieces_end_between_characters(data: Path) -> None:
    encoder = Encoder(data / "tokenizer")
    generator = np.random.default_rng(0)
    texts = ["naïve \U0001f99c 你好\n", "\ufffd", "plain"]
    streams = [encoder.encode(text) for text in texts] + [generator.integers(1, 512, 60) for _ in range(200)]
    for ids in streams:
        stream = TextStream(encoder)
        pieces = [stream.add(int(token)) for token in ids]
        assert "".join(pieces) + stream.finish() == encoder.decode(ids)
    stream = TextStream(encoder)
    assert [piece for token in streams[0] if (piece := stream.add(int(token)))][-2:] == ["好", "\n"]


def test_a_run_stands_for_its_newest_export(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000030").mkdir(parents=True)
    (run / "checkpoints" / "step-00000030" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=f"no converted model yet. .*codeparrot-ds convert {run} {run}/hf"):
        find_model(run)
    for name, step in (("exports/step-00000020", 20), ("exports/step-00000010", 10), ("hf", 15)):
        shutil.copytree(directory, run / name)
        (run / name / CERTIFICATE).write_text(json.dumps({"source": [{"step": step}]}))
    shutil.copytree(directory, run / "exports" / "step-00000025")  # unfinished: without a certificate
    assert find_model(str(run))[1] == run / "exports" / "step-00000020"
    assert "(step 20; the newest checkpoint is of step 30)" in capsys.readouterr().err
    (run / "hf" / CERTIFICATE).write_text(json.dumps({"source": [{"step": 10}, {"step": 30}]}))
    assert find_model(str(run))[1] == run / "hf"
    (run / "hf" / CERTIFICATE).write_text("{}")
    with pytest.raises(DataError, match="names no step"):
        find_model(str(run))


def run(*arguments: str | Path, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.cli", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        input=text,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_a_model_on_the_hub_is_downloaded(directory: Path, tmp_path: Path) -> None:
    """By the command, as a user has it: the library reads its settings when it is imported."""
    with serve() as hub:
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        files |= {"pytorch_model.bin": b"not needed", "code.py": b"raise SystemExit(7)"}
        hub.repositories["models/me/tiny"] = Repository(False, {"main": files})
        hub_environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        home = {**hub_environment, "HF_HOME": str(tmp_path)}
        file = tmp_path / "code.py"
        file.write_text("import os\r\ndef f(x):\r\n    pass\n")
        options = ("--file", file, "--line", "2", "--num", "2", "--max-new-tokens", "4")
        done = run("complete", "me/tiny", *options, "--json", **home)
        assert done.returncode == 0, done.stderr
        missing = run("complete", "me/other", "x", **home)
    unreachable = run("complete", "me/other", "x", **home)  # the server has ended
    fetched = {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert fetched >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not fetched & {"pytorch_model.bin", "code.py"}
    for done_without in (missing, unreachable):
        assert done_without.returncode == 1
        assert "me/other: no such run or directory, and not available from the Hugging Face" in done_without.stderr
        assert "Traceback" not in done_without.stderr
    (result,) = json.loads(done.stdout)
    assert result["prompt"] == "import os\r\ndef f(x):"
    local = load_pretrained(directory)
    expected = complete(local, encode_prompt(local, result["prompt"], 4), Sampling(2, max_new_tokens=4))
    assert result["completions"] == [each.text for each in expected]
    assert result["ended"] == [each.ended for each in expected]
    assert (tmp_path / "hub" / "models--me--tiny" / "snapshots" / SHA).is_dir()


def test_a_directory_without_a_model_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^empty: no Hugging Face model here"):
        find_model("empty")


def test_a_line_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_bytes("a = 1\n\x0cb = '\u2028'\r\n\nlast\n".encode())
    assert read_prompt(file, 1) == "a = 1"
    assert read_prompt(file, 2) == "a = 1\n\x0cb = '\u2028'"
    assert read_prompt(file, 4) == read_prompt(file, None) == "a = 1\n\x0cb = '\u2028'\r\n\nlast"
    with pytest.raises(ConfigError, match="has 4 lines, but --line is 5"):
        read_prompt(file, 5)
    file.write_bytes(b"\xff")
    for bad in (file, tmp_path):
        with pytest.raises(DataError, match="not a file of UTF-8 text"):
            read_prompt(bad, None)
    with pytest.raises(DataError, match="no such file"):
        read_prompt(tmp_path / "none.py", None)


def test_what_is_no_causal_model_is_refused(directory: Path, data: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertConfig(vocab_size=512, **small)

    def save(name: str, model: Any) -> Path:
        model.save_pretrained(tmp_path / name)
        for file in (data / "tokenizer").glob("tokenizer*.json"):
            shutil.copy(file, tmp_path / name)
        return tmp_path / name

    with pytest.raises(DataError, match="sees the tokens that it is to predict"):
        load_pretrained(save("bert", BertLMHeadModel(bert)))
    with pytest.raises(DataError, match=r"cls\.predictions.* is missing"):
        load_pretrained(save("encoder", BertModel(bert)))
    (tmp_path / "vision").mkdir()
    shutil.copytree(directory, tmp_path / "vision", dirs_exist_ok=True)
    (tmp_path / "vision" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(DataError, match="vit is not a causal language model"):
        load_pretrained(tmp_path / "vision")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "vision" / "config.json").write_text(json.dumps(own))
    (tmp_path / "vision" / "code.py").write_text("raise SystemExit(7)")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_pretrained(tmp_path / "vision")
    load_pretrained(save("bare", GPT2Model(GPT2Config(vocab_size=512, n_positions=8, n_embd=32, n_layer=1, n_head=2))))
    with pytest.raises(DataError, match="the tokenizer has 512 ids, the model 500"):
        load_pretrained(
            save("few", GPT2Model(GPT2Config(vocab_size=500, n_positions=8, n_embd=32, n_layer=1, n_head=2)))
        )


def test_a_tokenizer_that_loses_text_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(DataError, match="Lowercase: makes capital letters small"):
        load_pretrained(copy)


def test_candidates_are_printed_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    screen = _Screen("def f", 2, False)
    out = capsys.readouterr().out
    for piece in (Piece(1, "second", None), Piece(0, "fir", None)):
        screen.show(piece)
    out += capsys.readouterr().out
    assert out.endswith("--- completion 1 of 2\ndef ffir")
    for piece in (Piece(1, "", STOP), Piece(0, "st\x1b[2J", None), Piece(0, "", LENGTH)):
        screen.show(piece)
    out += capsys.readouterr().out
    assert out == "--- completion 1 of 2\ndef ffirst\\x1b[2J\n--- completion 2 of 2\ndef fsecond\n"


def test_highlighting_adds_colours_and_changes_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = 'def f(x):\n    """Some text.\n\n    More."""\n    return "a" + 1  # end\n\n\n'
    highlighted = _Highlighted()
    for i in range(0, len(text), 3):
        highlighted.write(text[i : i + 3], False)
    highlighted.write("", True)
    out = capsys.readouterr().out
    assert out != text
    assert re.sub(r"\x1b\[[0-9;]*m", "", out) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "--file", "README.md"), "prompts or --file, not both"),
        (("x", "--line", "3"), "--line is a line of --file"),
        (("x", "--color", "red"), "--color 'red': must be auto, always, never"),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from codeparrot_ds.cli import main

    monkeypatch.setattr(sys, "argv", ["codeparrot-ds", "complete", "nothing", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err

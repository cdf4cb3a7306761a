"""Every defect of the original scripts has a test that catches it, and every threshold a test of both its sides."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from codeparrot_ds.cli.tokenizer import tokenizer_train
from codeparrot_ds.corpus.decontamination import Problem, Problems
from codeparrot_ds.corpus.near_duplicates import find_removed, sign
from codeparrot_ds.corpus.options import Cleaning, NearDuplicates
from codeparrot_ds.evaluation.generate import Continuation
from codeparrot_ds.evaluation.pretrained import load_pretrained
from codeparrot_ds.evaluation.stops import Stops
from codeparrot_ds.system.files import read_json, write_json
from codeparrot_ds.tokenizer.trainers import MAX_TEXT_BYTES
from tests.conftest import ROOT
from tests.tiny_models import plain_gpt2
from tests.unit.test_faults import functions, is_nightly

# What was wrong in the original -> tests that fail when it is wrong here.
DEFECTS: dict[str, list[str]] = {
    "Weight decay excluded `LayerNorm.weight`, a name that GPT-2 does not use: its norms were decayed.": [
        "integration/test_step0.py::test_weight_decay_reaches_matrices_and_embeddings_only",
        "unit/test_model.py::test_weight_decay_names_every_parameter_once",
    ],
    "A resumed run counted its steps from 0 and read the data from the start; the latest checkpoint was never found.": [
        "integration/test_training.py::test_a_resumed_run_equals_an_uninterrupted_one",
        "faults/test_training.py::test_damaged_checkpoints_are_named_and_skipped_but_never_all",
    ],
    "Filters drew random numbers without a seed: nobody could make the same corpus again.": [
        "unit/test_heuristics.py::test_a_share_is_removed_and_always_the_same_one",
        "unit/test_heuristics.py::test_clean_removes_what_the_original_removes",
        "unit/test_clean.py::test_workers_do_not_change_a_byte",
    ],
    "Near-duplicates were found, and the corpus was saved with them.": [
        "unit/test_clean.py::test_every_document_is_accounted_for",
        "unit/test_clean.py::test_what_is_removed_has_a_similar_document_that_is_kept",
    ],
    "The last tokens of each buffer were thrown away.": [
        "unit/test_shards.py::test_packed_sequences_use_every_token_once_across_shards",
    ],
    "Checkpoints were saved every so many forward passes, instead of optimizer steps.": [
        "integration/test_training.py::test_every_world_size_has_the_same_data_and_losses",
    ],
    "Two defaults of the tokenizer's training were swapped: 200,000 tokens, from 32,768 files.": [
        "unit/test_original.py::test_the_defaults_of_the_tokenizer_are_not_swapped",
        "unit/test_tokenizer.py::test_of_a_larger_corpus_the_first_by_digest_are_used",
    ],
    "The README made the model of 1.5 billion parameters from the configuration of 774 million.": [
        "unit/test_recipe.py::test_full_size_recipes_have_the_published_figures",
    ],
    "Completions were decoded with spaces cleaned up, which alters code.": [
        "unit/test_original.py::test_completions_are_decoded_to_the_character",
    ],
}
SIDES = "unit/test_heuristics.py::test_both_sides_of_each_threshold"
SECRETS = "unit/test_secrets.py::test_both_sides_of_each_threshold"
THRESHOLDS: dict[str, str] = {
    "heuristics.line_max": SIDES,
    "heuristics.line_mean": SIDES,
    "heuristics.alphanumeric_share": SIDES,
    "heuristics.characters_per_token": "unit/test_heuristics.py::test_characters_per_token_need_a_tokenizer",
    "heuristics.scanned_lines": SIDES,
    "heuristics.config_or_test_per_line": SIDES,
    "heuristics.assignments": SIDES,
    "heuristics.removed_share": "unit/test_heuristics.py::test_both_sides_of_the_removed_share",
    "near_duplicates.jaccard": "unit/test_original.py::test_both_sides_of_the_jaccard_index",
    "near_duplicates.min_tokens": "unit/test_near_duplicates.py::test_short_documents_are_not_compared",
    "near_duplicates.bands": "unit/test_recall.py::test_planted_pairs_are_found",
    "near_duplicates.rows": "unit/test_recall.py::test_planted_pairs_are_found",
    "secrets.password_min": SECRETS,
    "secrets.password_entropy": SECRETS,
    "secrets.token_min": SECRETS,
    "secrets.token_entropy": SECRETS,
    "decontamination.gram": "unit/test_original.py::test_both_sides_of_the_length_of_a_gram",
}


@pytest.mark.parametrize(
    "test", sorted({*THRESHOLDS.values(), *(test for tests in DEFECTS.values() for test in tests)})
)
def test_the_tests_exist_and_ci_runs_them(test: str) -> None:
    file, _, name = test.partition("::")
    found = functions(ROOT / "tests" / file)
    assert name in found
    assert not is_nightly(found[name])


def test_all_defects_and_thresholds_are_listed() -> None:
    assert len(DEFECTS) == 9
    numbers = set()
    for section, rules in Cleaning():
        if isinstance(rules, BaseModel):
            numbers |= {f"{section}.{name}" for name, value in rules if type(value) in (int, float)}
    assert set(THRESHOLDS) == numbers


def test_the_defaults_of_the_tokenizer_are_not_swapped() -> None:
    assert inspect.signature(tokenizer_train).parameters["vocab_size"].default == 32_768
    assert MAX_TEXT_BYTES > 200_000 * 1000  # of text, not a number of files: 200,000 of a kB, at the least


TEXT = "x = f ( 'a' , b ) . c ; y = not z ? do n't : I 'm , we 've  \n\tif a != b : print ( \"a , b .\" ) !"


def test_completions_are_decoded_to_the_character(data: Path, tmp_path: Path) -> None:
    """The original's version of transformers removed blanks before punctuation, and in front of `n't`."""
    directory = plain_gpt2(tmp_path, data / "tokenizer", n_positions=256)
    config = read_json(directory / "tokenizer_config.json", "tokenizer config")
    write_json(directory / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": True})
    found = load_pretrained(directory)
    ids = found.encoder.encode(TEXT).tolist()
    continuation = Continuation(found, Stops(()), len(ids), found.encoder.eos_id)
    assert "".join(map(continuation.add, ids)) == TEXT == continuation.text


@pytest.mark.parametrize(("common", "of_one", "of_other", "removed"), [(17, 0, 3, True), (17, 1, 3, False)])
def test_both_sides_of_the_jaccard_index(common: int, of_one: int, of_other: int, removed: bool) -> None:
    """17 of 20 tokens are 0.85; 17 of 21 are not."""
    rules = NearDuplicates.model_validate({"bands": 64, "rows": 2})
    texts = [
        " ".join(f"{name}{i}" for name, count in (("both", common), (other, more)) for i in range(count))
        for other, more in (("one", of_one), ("other", of_other))
    ]
    found = sign(texts, rules)
    sets = np.split(found.sets, found.ends[:-1])
    assert bool(list(find_removed(sets, found.keys.T, NearDuplicates().jaccard))) is removed


@pytest.mark.parametrize(("shared", "found"), [(10, True), (9, False)])
def test_both_sides_of_the_length_of_a_gram(shared: int, found: bool) -> None:
    names = [f"name_{i}" for i in range(30)]
    problems = Problems([Problem("mine/0", " ".join(names))], Cleaning().decontamination.gram)
    text = f"first second {' '.join(names[5 : 5 + shared])} third fourth fifth"
    assert (problems.find(text) is not None) is found

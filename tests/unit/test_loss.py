"""Merging the losses that hosts computed on their slices."""

import json

import pytest

from codeparrot_ds.errors import DataError
from codeparrot_ds.evaluation.loss import ValidationLoss

ONE = ValidationLoss(2.0, 7.4, 5.0, 148.4, 3, 300)
OTHER = ValidationLoss(5.0, 148.4, 5.0, 148.4, 1, 100)


def test_tokens_have_equal_weight_and_an_empty_slice_has_none() -> None:
    merged = ValidationLoss.merge([ONE, OTHER, ValidationLoss(0.0, 1.0, 5.0, 148.4, 0, 0)])
    assert (merged.loss_valid, merged.sequences, merged.tokens) == (2.75, 4, 400)


def test_slices_of_other_sequences_are_refused() -> None:
    with pytest.raises(DataError, match="different sequences"):
        ValidationLoss.merge([ONE, ValidationLoss(2.0, 7.4, 5.001, 148.5, 3, 300)])


def test_text_that_a_shell_prints_first_is_ignored() -> None:
    assert ValidationLoss.parse("Welcome to {host}\n" + json.dumps(vars(ONE), indent=2)) == ONE
    for output in ("", "command not found", '{"loss_valid": 1.0}', "{"):
        with pytest.raises(DataError, match="returned no loss"):
            ValidationLoss.parse(output)

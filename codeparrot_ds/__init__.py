"""codeparrot-ds: from folders of source code to a trained GPT-2 code model, with every step verified.

The stages, in the order of the data flow: corpus, tokenizer, shards, training, export, evaluation.
docs/reading-the-code.md is a guided tour.
"""

__version__ = "0.1.0"

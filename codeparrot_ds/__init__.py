"""codeparrot-ds: from folders of source code to a trained GPT-2 code model, with proof at every step.

The stages, in the order in which data walks through them: corpus, tokenizer, shards, training, export,
evaluation. Read docs/reading-the-code.md for a tour.
"""

__version__ = "0.1.0"

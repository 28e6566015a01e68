"""Evaluation: how well a model predicts held-out text, in units that do not depend on its tokenizer."""

from dsv3.eval.text import TextScore, bits_per_byte, make_evaluator, text_windows

__all__ = ["TextScore", "bits_per_byte", "make_evaluator", "text_windows"]

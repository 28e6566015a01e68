"""Evaluation: how well a model predicts held-out text, in units that do not depend on its tokenizer, and answers."""

from dsv3.eval.packed import AnswerScore, make_answer_evaluator
from dsv3.eval.text import TextScore, bits_per_byte, make_evaluator, text_windows

__all__ = ["AnswerScore", "TextScore", "bits_per_byte", "make_answer_evaluator", "make_evaluator", "text_windows"]

"""Prompts, labels and grading: everything a run reads about its questions."""

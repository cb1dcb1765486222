"""Contrast data, questions and texts, and how they become tokens."""

"""Scores of components, and the mean effect of a plan's edits."""

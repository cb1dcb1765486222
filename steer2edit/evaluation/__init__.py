"""Measuring what an edit does, on questions that it has not seen, beside what it must beat."""

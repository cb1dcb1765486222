"""Running a model: the only room below capture and evaluation that imports transformers."""

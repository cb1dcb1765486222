"""The embedded tiny model, its invented world, and the demo that runs the pipeline on it."""

"""Engines that write answers: transformers in this process, vLLM, and servers; and the judge."""

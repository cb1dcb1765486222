"""Engines that write answers: transformers in this process, and vLLM."""

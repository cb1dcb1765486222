"""What engines do with biases that a checkpoint's published models lack, by model type: seen in docs/engines.md, or read in code."""

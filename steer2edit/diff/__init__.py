"""What differs between two checkpoints, and the plan that explains it."""

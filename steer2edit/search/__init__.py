"""Finding the edit with the best trade-off."""

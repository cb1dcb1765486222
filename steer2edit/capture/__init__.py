"""Running the model over contrast data: statistics, resumption, and steering vectors."""

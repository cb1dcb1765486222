"""Files on the disk: written whole or not at all, read with bounds, locked, and fetched from the Hub."""

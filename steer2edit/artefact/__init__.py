"""A folder that we wrote: emit it, describe it, verify it, and take it back."""

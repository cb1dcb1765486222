"""From a plan to bytes: what every target shares."""

"""Sets of weights, by the hash of what they hold."""

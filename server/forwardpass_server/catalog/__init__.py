"""Which models and versions there are."""

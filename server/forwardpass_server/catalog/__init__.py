"""The models and versions that a server serves."""

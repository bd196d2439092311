"""Metric sessions: exactly-once updates of a model's metrics state."""

"""The status of a running server: readiness, and the status page."""

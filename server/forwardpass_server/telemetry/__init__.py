"""What the service shows of itself: metrics for Prometheus."""

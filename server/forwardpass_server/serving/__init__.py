"""Decides: which models there are, who runs when, what is refused. Knows neither gRPC nor tensorflow."""

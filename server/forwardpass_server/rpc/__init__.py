"""Speaks gRPC and decides nothing."""

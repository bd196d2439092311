"""Stores sets of weights, each under the hash of its contents."""

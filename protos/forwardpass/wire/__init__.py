"""Encodes and decodes arrays and structures; specs; the error catalogue. Uses no gRPC, no TensorFlow."""

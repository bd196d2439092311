"""Functional models in TensorFlow: written, read, traced, run. The only room that imports tensorflow."""

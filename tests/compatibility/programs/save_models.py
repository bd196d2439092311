"""Saves the models with TFF itself: `save_models.py REPOSITORY`."""

from __future__ import annotations

import pathlib
import sys

import tensorflow_federated as tff
from tff_models import MODELS

for name, (make, _) in MODELS.items():
    tff.learning.models.save_functional_model(make(), str(pathlib.Path(sys.argv[1]) / name / "1"))

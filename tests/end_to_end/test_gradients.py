"""Gradients through the wire: forward_backward and vjp, by value and by id, on pipelines and for asyncio."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
from forwardpass.wire import trees
from forwardpass_client import errors
from support.servers import ServerProcess

SERVER_MODELS = ("gradients", "keras_of_everything", "counting", "two_losses", "numpy_function", "py_function")

"""What an operator is told of a model that cannot be loaded: one sentence."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

from forwardpass.wire import errors
from forwardpass_server.errors import ModelLoadError

_MAX_CHARS = 400

# How an error of a traced function ends that autograph rewrote: "    ValueError: Shapes (3,) and (4,) ...".
_USER_CODE = re.compile(r"^\s*\w+(?:Error|Exception): ", re.MULTILINE)

# What Keras adds to a sentence: the arguments of a call, and how its own code came there.
_TAIL = re.compile(r"\s*(Arguments received by|Call arguments received by|Full object config:|Traceback \(most)")

_MISTAKES = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


@contextlib.contextmanager
def explained(what: str, change: str) -> Iterator[None]:
    """Raises a ModelLoadError for an error of Keras's or TensorFlow's about a model's files or structure.

    what: the file, or what of it. change: what the operator can do.
    """
    try:
        yield
    except (ModelLoadError, errors.ForwardPassError):
        raise
    except Exception as error:
        # A mistake in a file needs no traceback of Keras's. Anything else may be an error of ours.
        unexpected = not isinstance(error, _MISTAKES)
        raise ModelLoadError(f"{what}: {sentence(error)}: {change}", needs_traceback=unexpected) from error


@contextlib.contextmanager
def of_code(what: str) -> Iterator[None]:
    """Raises a ModelLoadError for an error of Python code of the operator's; what it says may be data."""
    try:
        yield
    except (ModelLoadError, errors.ForwardPassError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ImportError):
            raise ModelLoadError(f"{what}: {error}", needs_traceback=True) from error
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise ModelLoadError(
            f"{what} raised {type(error).__name__}{place}: correct the code; the server's log has the traceback",
            needs_traceback=True,
        ) from error


def sentence(error: BaseException) -> str:
    """What an error says, in one line and without a traceback of the model's code."""
    text = str(error)
    if text.lstrip().startswith("in user code:"):
        text = _USER_CODE.split(text)[-1]
    text = " ".join(_TAIL.split(text)[0].split())
    if len(text) > _MAX_CHARS:
        text = text[:_MAX_CHARS] + "..."
    return f"{type(error).__name__}: {text}".removeprefix("ValueError: ").rstrip(".: ")

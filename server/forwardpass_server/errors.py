"""Errors that the operator of a server is told. Those that a caller is told are in `forwardpass.wire.errors`."""


class SettingsError(Exception):
    """A setting cannot be used. The message names the setting, what was expected, and what was found."""


class ModelLoadError(Exception):
    """A model cannot be loaded: its files or its configuration are not as expected.

    needs_traceback: the log shows a traceback. For a mistake in a file, the sentence is enough.
    """

    def __init__(self, message: str, *, needs_traceback: bool = False) -> None:
        super().__init__(message)
        self.needs_traceback = needs_traceback


class DeviceNotFound(Exception):
    """TensorFlow does not have the device that the operator named."""


class UnsupportedLibrary(ImportError):
    """TensorFlow or Keras lacks a private interface that the server needs. The message says which, and what to do."""


class SessionStoreError(Exception):
    """The session store that the operator named cannot be used."""

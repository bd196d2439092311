"""What can go wrong on the server besides what a caller is told."""


class ModelLoadError(Exception):
    """A model cannot be loaded: its files, or what its operator says of them, are not what they should be.

    needs_traceback: the log shows where it came from. A mistake in a file is explained by its sentence alone.
    """

    def __init__(self, message: str, *, needs_traceback: bool = False) -> None:
        super().__init__(message)
        self.needs_traceback = needs_traceback


class DeviceNotFound(Exception):
    """The device that the operator named is not there."""


class SessionStoreError(Exception):
    """The session store that the operator named cannot be used."""

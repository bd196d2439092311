"""What can go wrong on the server besides what a caller is told."""


class ModelLoadError(Exception):
    """A model cannot be loaded: its files, or what its operator says of them, are not what they should be."""


class DeviceNotFound(Exception):
    """The device that the operator named is not there."""


class SessionStoreError(Exception):
    """The session store that the operator named cannot be used."""

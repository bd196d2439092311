"""Commands that run another one with less than a user usually has. They need root: other tests are skipped there."""

from __future__ import annotations

import os

import pytest

_CAPABILITIES = "-dac_override,-dac_read_search"


def without_reading_everything() -> list[str]:
    """Runs a command as root without root's right to read what belongs to others."""
    _need_root()
    return ["setpriv", f"--inh-caps={_CAPABILITIES}", f"--bounding-set={_CAPABILITIES}"]


def as_nobody_in_particular() -> list[str]:
    """Runs a command under a user id that has no entry in /etc/passwd, with no home; it may read everything.

    So it can run a Python that is in the home of another user.
    """
    _need_root()
    user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    return [*user, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "env", "--unset=HOME"]


def with_read_only_root() -> list[str]:
    """Runs a command that sees the root filesystem read-only. /dev/shm is another filesystem, and can be written."""
    _need_root()
    script = 'mount --make-rprivate / && mount -o remount,bind,ro / && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def _need_root() -> None:
    if os.geteuid():
        pytest.skip("needs root, to take rights away")

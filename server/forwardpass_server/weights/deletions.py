"""Sets that other servers have deleted from a shared tier: this server drops them from its device."""

from __future__ import annotations

import asyncio
import contextlib

from forwardpass.wire import errors
from forwardpass_server.weights import tier
from forwardpass_server.weights.store import WeightStore
from forwardpass_server.weights.tier import WeightTier

# How long a server may use a set that another one has deleted. A listing costs 0.005 dollars per 1000 in S3.
_FOLLOW_S = 5.0

# While the tier does not answer: calls fail at once until it is found to answer.
_RETRY_S = 1.0

_CHECKS_AT_ONCE = 16


class Deletions:
    """Follows the deletions in the tier of a store."""

    def __init__(self, store: WeightStore, weights: WeightTier) -> None:
        self._store = store
        self._tier = weights

    async def watch(self) -> None:
        """Calls `follow` every few seconds, until it is cancelled."""
        while True:
            # The failure is counted and logged; the next round tries again.
            with contextlib.suppress(errors.ForwardPassError):
                await self.follow()
            await asyncio.sleep(_RETRY_S if self._tier.problem else _FOLLOW_S)

    async def follow(self) -> None:
        """Drops the sets that other servers have deleted. Raises WeightStoreUnavailable."""
        deleted = await asyncio.get_running_loop().run_in_executor(self._tier.threads, self._tier.follow)
        keys = self._store.keys()
        if deleted is not None:
            ids = {weights_id for _, weights_id in deleted}
            keys = [key for key in keys if key[1].hex() in ids and tier.name_of(*key) in deleted]
        for start in range(0, len(keys), _CHECKS_AT_ONCE):
            await asyncio.gather(*map(self._store.check_kept, keys[start : start + _CHECKS_AT_ONCE]))

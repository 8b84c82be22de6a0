"""What happens after a failure that ended the engine: --on_engine_failure restart or exit. [loop]"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from kt_async.engine.runner import Runner
from kt_async.engine.service import EngineService
from kt_async.errors import EngineError
from kt_async.ffi.scheduler import Scheduler

log = logging.getLogger(__name__)

# A failure that comes back at once is no accident: give up rather than load for ever.
_MOST_RESTARTS = 3
_WINDOW_S = 600.0


async def watch(
    service: EngineService, policy: str, load: Callable[[], tuple[Scheduler, Runner]]
) -> None:
    """Restart the engine after each failure; ends only by raising EngineError.

    policy: restart or exit. load: builds scheduler and runner anew, in a thread. The requests that
    ran have got their error before; until the new engine runs, further ones are answered 503.
    """
    restarts: deque[float] = deque()
    while True:
        reason = await service.wait_failure()
        if policy == "exit":
            raise EngineError(f"the engine has failed: {reason}")
        now = time.monotonic()
        while restarts and now - restarts[0] > _WINDOW_S:
            restarts.popleft()
        if len(restarts) == _MOST_RESTARTS:
            raise EngineError(
                f"the engine has failed: {reason}; it was restarted {_MOST_RESTARTS} times within "
                f"{_WINDOW_S / 60:.0f} minutes already"
            )
        restarts.append(now)
        log.warning("restarting the engine")
        try:
            await service.restart(load)
        except Exception as error:  # a lost CUDA context, too little memory: whatever it is
            log.exception("the engine cannot be restarted")
            raise EngineError(
                f"the engine has failed: {reason}; restarting it failed too: {error}"
            ) from error
        log.info("the engine runs again after %.1f s", time.monotonic() - now)

"""What happens after a failure that ended the engine: --on_engine_failure restart or exit. [loop]"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from kt_async.engine.runner import Runner
from kt_async.engine.service import EngineService
from kt_async.errors import EngineError, EngineStuckError
from kt_async.ffi.scheduler import Scheduler

log = logging.getLogger(__name__)

# No step takes this long; a thread that hangs in a driver cannot be ended, only the process can.
_STEP_LIMIT_S = 900.0
_CHECK_S = 10.0
# A failure that comes back at once is no accident: give up rather than load for ever.
_MOST_RESTARTS = 3
_WINDOW_S = 600.0


async def watch(
    service: EngineService,
    policy: str,
    load: Callable[[], tuple[Scheduler, Runner]],
    *,
    step_limit_s: float = _STEP_LIMIT_S,
    check_s: float = _CHECK_S,
) -> None:
    """Restart the engine after each failure; ends only by raising EngineError.

    policy: restart or exit. load: builds scheduler and runner anew, in a thread. The requests that
    ran have got their error before; until the new engine runs, further ones are answered 503.
    A step that takes longer than step_limit_s (looked at every check_s) ends in EngineStuckError.
    """
    restarts: deque[float] = deque()
    while True:
        reason = await _failure(service, step_limit_s, check_s)
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


async def _failure(service: EngineService, step_limit_s: float, check_s: float) -> str:
    """Wait until the engine has failed; why."""
    while True:
        try:
            async with asyncio.timeout(check_s):
                return await service.wait_failure()
        except TimeoutError:
            if service.busy_s() > step_limit_s:
                message = f"a step has not ended after {step_limit_s:g} s"
                service.abandon(message)
                raise EngineStuckError(f"the engine has failed: {message}") from None

"""Shared by all tests: what is skipped on which machine, and how long hypothesis searches."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# No deadline: the machine may be busy; --timeout ends what hangs. `make fuzz` uses "long".
settings.register_profile("default", deadline=None)
settings.register_profile(
    "long", deadline=None, max_examples=5000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def _missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA GPU"


def _missing_amx() -> str | None:
    from kt_async.ffi.host import query_host

    return None if "amx" in query_host().isas else "needs a CPU with AMX"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by marker, with the reason; the probe runs only when a test asks for it."""
    for marker, probe in (("gpu", _missing_gpu), ("amx", _missing_amx)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = probe() if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))

"""The errors kt_async raises on purpose; anything else is a bug."""

from __future__ import annotations


class KtError(Exception):
    """Base class: the message is one sentence that a user can act on."""


class ConfigError(KtError):
    """A wrong flag, file or model: reported at start-up, exit code 2, no traceback."""


class RequestError(KtError):
    """The client's fault, or a limit it ran into: answered with `status` in OpenAI's shape.

    code: OpenAI's machine-readable code; param: the field at fault; retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after


class EngineError(KtError):
    """The engine could not finish a step; running requests end with an error event."""


class EngineStuckError(EngineError):
    """The engine's thread does not come back from a step: only the whole process can be ended."""


class NativeError(KtError):
    """A native call returned a negative status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

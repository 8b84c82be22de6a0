"""`python -m kt_async`: read the command line, run one command, set the exit code.

The only place that prints for the user, exits, or starts the event loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from kt_async import cli
from kt_async.config import Config
from kt_async.errors import ConfigError, EngineError, EngineStuckError, NativeError
from kt_async.log import setup_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed check or engine, 2 wrong usage, file or machine."""
    try:
        config = cli.parse(sys.argv[1:] if argv is None else argv, os.environ)
        return _run(config)
    except cli.Answer as answer:
        sys.stdout.write(answer.text)
        return 0
    except (ConfigError, NativeError) as error:
        sys.stderr.write(cli.format_error(error) + "\n")
        return 2
    except EngineError as error:
        sys.stderr.write(cli.format_error(error) + "\n")
        if isinstance(error, EngineStuckError):
            # An orderly exit would wait for the thread that hangs.
            sys.stderr.flush()
            os._exit(1)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(config: Config) -> int:
    if config.command == "print_config":
        sys.stdout.write(cli.print_config_text(config))
        return 0
    # Help and --print-config must not wait for tokenizers and the native library.
    from kt_async import commands, serve  # noqa: PLC0415

    if config.command != "serve":
        return commands.run(config)
    setup_logging(config.log_level, json=config.log_json, stream=cli.open_log(config))
    asyncio.run(serve.serve(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())

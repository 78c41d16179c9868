"""What a user is told once, by the package's logger, however often it happens."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("pst_kernels")


@functools.cache
def say_once(message: str) -> None:
    logger.warning(message)

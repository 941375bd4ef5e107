"""Found where hypothesis is not installed, as on a machine with a GPU and no network: its tests are skipped, the others run."""

from __future__ import annotations

from typing import Any

import pytest

from . import strategies

__all__ = ["given", "settings", "strategies"]


def given(*args: Any, **kwargs: Any) -> Any:
    def decorate(test: Any) -> Any:
        def skipped() -> None:
            pytest.skip("needs hypothesis")

        skipped.__name__ = test.__name__
        return skipped

    return decorate


def settings(*args: Any, **kwargs: Any) -> Any:
    return lambda test: test

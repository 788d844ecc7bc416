"""The reference libraries that parity tests compare with; nothing but the tests needs them."""

import importlib
import os
from types import ModuleType

import pytest

MISSING = "missing oracle: "


def oracle(name: str) -> ModuleType:
    """The reference library or submodule `name`; without it the test (at module level: the file) is skipped.

    With REQUIRE_ORACLES=1 in the environment a missing one is a failure.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = f"{MISSING}{name} ({error})"
    if os.environ.get("REQUIRE_ORACLES") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)

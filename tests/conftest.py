"""Slow tests run when asked for, GPU tests where there is a GPU, and the last line says what was left out and why."""

import pytest
import torch

from tests.oracle import MISSING

NO_GPU = "no GPU on this machine"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost, so that its lines come after pytest's own summary
def pytest_sessionfinish(session: pytest.Session):
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return result
    skipped = reporter.stats.get("skipped", [])
    if n := sum(NO_GPU in str(report.longrepr) for report in skipped):
        reporter.write_line(f"not run, {NO_GPU}: {n}")
    if wanting := {report.nodeid for report in skipped if MISSING in str(report.longrepr)}:
        reporter.write_line(
            f"skipped for want of a library to compare with: {len(wanting)} (a whole file counts as one); "
            "to install them: pip install -r requirements-dev.txt"
        )
    return result

"""What needs a browser, Ray or a service of its own process: `make test-slow` installs them, so that nothing is skipped."""

import pytest


def _failed_where_skipped(report) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"nothing is skipped in the slow set: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    _failed_where_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _failed_where_skipped(report)
    return report

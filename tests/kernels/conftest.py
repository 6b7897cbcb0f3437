"""Guard pages around every launch, where GUARD_PAGES=on: see guard_pages.py and test_guard_pages.py."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def guard_pages():
    """Guard every launch of the session, and append what was launched to the file of GUARD_REPORT."""
    if os.environ.get("GUARD_PAGES") != "on":
        yield
        return
    import guard_pages as guards

    with open(os.environ.get("GUARD_REPORT", os.devnull), "a") as report:
        with guards.guarded(report.fileno()):
            yield
        report.write(f"{guards.LAUNCHED}{' '.join(sorted(guards.launched))}\n")

"""Shared fixtures: real data where the shared folder is at hand, Ctrl-C wherever tests are run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_interrupts() -> None:
    """Tests that interrupt themselves can also where the shell began the run in the background, deaf to SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets; tests that need it are left out where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data is not here")
    return SHARED_DATA

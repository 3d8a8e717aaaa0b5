"""Fixtures: farms of real programs; and tests that begin early, since they wait for a minute.

What a test file calls MODULE is mod.py in the folder of each of its farms.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from lab import Farm

settings.register_profile("patient", deadline=None)  # the machine may be busy
settings.load_profile("patient")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the programs would heed it if the tests were started with nohup


def make_farm(request: pytest.FixtureRequest, folder: Path) -> Farm:
    return Farm(folder, getattr(request.module, "MODULE", ""))


@pytest.fixture
def farm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Farm]:
    """A farm without TLS, run by the Python of the tests."""
    with contextlib.closing(make_farm(request, tmp_path)) as farm:
        yield farm


@pytest.fixture
def tls_farm(farm: Farm) -> Farm:
    """A farm with TLS, run by a Python that can do it."""
    return farm.use_tls()


@pytest.fixture(params=["plain", "tls"])
def any_farm(request: pytest.FixtureRequest, farm: Farm) -> Farm:
    """Once without TLS, once with it."""
    return farm.use_tls() if request.param == "tls" else farm


@pytest.fixture(scope="module", autouse=True)
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """The tests of a file that are marked `early`, which all go on at the same time."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function) and item.module is request.module]
    items = [item for item in functions if item.get_closest_marker("early")]
    farms = [make_farm(request, tmp_path_factory.mktemp("early")) for _ in items]
    with ThreadPoolExecutor(len(items) or 1) as pool:
        parameters = [item.callspec.params if hasattr(item, "callspec") else {} for item in items]
        yield {item.nodeid: pool.submit(item.obj, farm, **more) for item, farm, more in zip(items, farms, parameters)}
        for farm in farms:
            farm.close()  # so that those that nobody waits for fail soon


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that has begun already is only waited for."""
    if not pyfuncitem.get_closest_marker("early"):
        return None
    pyfuncitem.funcargs["begun"][pyfuncitem.nodeid].result()
    return True

"""Fixtures shared by all tests."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def seed_everything() -> None:
    """Libraries draw from the global generators where they may not be told a seed; a test must not depend on others."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries read the global state
    torch.manual_seed(0)


LONG = ("test_notebooks.py", "test_readme.py", "test_kills.py", "test_benchmarks.py", "test_exactness.py")
"""Files that take minutes. A process takes whole files, so these come first, and none is left alone with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed_everything()  # before fixtures of any scope


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed_everything()  # whether or not this test had to build a shared fixture


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As for a user, who does not run the library under a run-time type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def real_model_dir() -> str:
    """Folder of SmolLM2-135M-Instruct, from PIGGYBACK_LENS_TEST_MODEL or an installed package."""
    from piggyback_lens.errors import LensError
    from piggyback_lens.models.sources import default_model

    if folder := os.environ.get("PIGGYBACK_LENS_TEST_MODEL"):
        return folder
    try:
        return default_model(offline=True)
    except LensError as error:
        pytest.skip(f"no real model: {error}")


@pytest.fixture(scope="session")
def organism(real_model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter folder of a small organism on the real model, trained once for all processes of a session."""
    from organisms import train_organism

    from piggyback_lens.results.run import locked

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with locked(shared, name="organism.lock", wait=True):
        return train_organism(real_model_dir, shared / "organism")

"""Fixtures shared by all tests."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def real_model_dir() -> str:
    """Folder of SmolLM2-135M-Instruct, from PIGGYBACK_LENS_TEST_MODEL or an installed package."""
    from piggyback_lens.errors import LensError
    from piggyback_lens.sources import default_model

    if folder := os.environ.get("PIGGYBACK_LENS_TEST_MODEL"):
        return folder
    try:
        return default_model(offline=True)
    except LensError as error:
        pytest.skip(f"no real model: {error}")

"""Each test here is named after the silent failure that it would show."""

import pytest
import torch

# Its asserts are to show what they compared, like those of the tests.
pytest.register_assert_rewrite("tests.silent.row_counts")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

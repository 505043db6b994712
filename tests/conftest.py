"""What all tests share: a tiny model, its tokenizer, and shape annotations of `sarm.nn` that are checked while tests run."""

from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

# Before anything imports sarm.nn: the hook rewrites modules as they load.
install_import_hook("sarm.nn", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from sarm.config import Model  # noqa: E402
from sarm.data.chat import ChatTokenizer, load_chat_tokenizer  # noqa: E402
from sarm.data.tiny_source import tiny_model  # noqa: E402

# No deadline: a loaded machine is not a bug. The same examples every time: a failure can be repeated.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on one thread: faster than sharing them out, and sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A random two-layer Llama of width 64 with a ChatML tokenizer."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_chat(tiny_folder: Path) -> ChatTokenizer:
    """The tokenizer of `tiny_folder`."""
    return load_chat_tokenizer(Model(name="tiny:llama", layer=1, max_length=128), tiny_folder)

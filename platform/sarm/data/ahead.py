"""What comes next is made while what is here is worked with."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_END = object()


def ahead(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items in their order, each made in a thread while the caller has the one before; what making one raises, asking for it raises."""
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = thread.submit(next, source, _END)
        while (item := waiting.result()) is not _END:
            waiting = thread.submit(next, source, _END)
            yield item  # type: ignore[misc]  # the end is no item

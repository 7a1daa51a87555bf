"""Tables that are kept from call to call, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

from torch import Tensor


class TableCache:
    """The tables used last, of ``most_bytes`` in all; a single larger one is kept too.

    A bound on their number would not do: the table of a volume of 128x256x256 takes 200 MB.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._tables: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The table of that key, made if it is not there."""
        with self._lock:
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
                return table
        table = make()
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > 1 and self.nbytes > self.most_bytes:
                self._tables.popitem(last=False)
        return table

    @property
    def nbytes(self) -> int:
        """The bytes of all tables."""
        return sum(table.nbytes for table in self._tables.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tables

"""The table of texts that were encoded before."""

import sys
import threading

from ochat_serve.remembered import RememberedIds, _size

MEGABYTE = 2**20


def test_ids_come_back_for_the_same_text_encoded_the_same_way():
    table = RememberedIds(MEGABYTE)
    table.put(("a", False), [1, 2, 2**31])
    assert list(table.get(("a", False))) == [1, 2, 2**31]
    assert ("a", False) in table
    for other in (("a", True), ("A", False), ("", False)):
        assert table.get(other) is None
        assert other not in table


def test_what_was_not_used_for_the_longest_time_goes_first():
    size = sys.getsizeof("a" * 100) + 4 * 10 + 500
    table = RememberedIds(3 * size)
    for letter in "abc":
        table.put((letter * 100, False), range(10))
    table.get(("a" * 100, False))
    table.put(("d" * 100, False), range(10))
    kept = [letter for letter in "abcd" if (letter * 100, False) in table]
    assert kept == ["a", "c", "d"]


def test_memory_is_bounded_whatever_comes():
    table = RememberedIds(MEGABYTE)
    for number in range(2_000):
        table.put((f"{number} " + "x" * (number * 7 % 5_000), False), range(number % 1_000))
    held = sum(sys.getsizeof(text) + 4 * len(ids) for (text, _), ids in table._table.items())
    assert held < MEGABYTE
    assert held > MEGABYTE / 2


def test_a_text_larger_than_the_table_drives_out_nothing():
    table = RememberedIds(MEGABYTE)
    table.put(("small", False), [1])
    table.put(("x" * 2 * MEGABYTE, False), [1])
    assert ("small", False) in table
    assert len(table._table) == 1


def test_with_no_memory_nothing_is_remembered():
    table = RememberedIds(0)
    table.put(("a", False), [1])
    assert table.get(("a", False)) is None


def test_threads_may_share_it():
    """The account of the memory in use stays right."""
    table = RememberedIds(100_000)

    def work(name: int) -> None:
        for number in range(2_000):
            key = (f"{number % 50} " * (number % 50), name % 2 == 0)
            if (ids := table.get(key)) is not None:
                assert list(ids) == list(range(number % 50))
            table.put(key, range(number % 50))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert table._bytes == sum(_size(key, ids) for key, ids in table._table.items())

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from fireopd_jax.remote.cache import Cache


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.fixture
def path(tmp_path):
    with Cache(tmp_path / "answers") as cache:
        for i in range(3):
            cache.add(key(i), {"text": f"a\n{i} é"}, i, 10 * i)
    return tmp_path / "answers"


def test_answers_are_found_again_with_what_was_paid(path):
    with Cache(path) as cache:
        found = [cache.find(key(i)) for i in range(4)]
        assert found == [*(({"text": f"a\n{i} é"},) for i in range(3)), None]
        assert (len(cache), cache.tokens_in, cache.tokens_out) == (3, 3, 30)


def test_a_file_torn_anywhere_loses_its_last_answer_only_and_can_be_continued(path):
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for end in range(second, len(whole)):
        path.write_bytes(whole[:end])
        with Cache(path) as cache:
            assert len(cache) == 2
            assert cache.find(key(2)) is None
            cache.add(key(9), ["later"], 1, 1)
        with Cache(path) as again:
            assert again.find(key(9)) == (["later"],)
            # Complete but for the end of the line: then it counts after all.
            assert (again.find(key(2)) is not None) == (end == len(whole) - 1)
            assert again.find(key(1)) == ({"text": "a\n1 é"},)


def test_lines_that_are_none_of_ours_are_skipped(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[1][:70] + lines[2] + lines[2])
    with Cache(path) as cache:
        assert len(cache) == 2
        assert cache.find(key(1)) is None


def test_two_processes_may_write_and_read_one_file(path):
    with Cache(path) as one, Cache(path) as other, ThreadPoolExecutor(8) as pool:

        def write(number):
            (one, other)[number % 2].add(key(number), "x" * number, 1, 1)

        list(pool.map(write, range(10, 210)))
        one.add(key(999), None, 0, 0)
        assert all(one.find(key(n)) == ("x" * n,) for n in range(10, 210))
        assert one.find(key(999)) == (None,)

"""How many threads a batch may use, and whose threads are too many."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backboned.server.serving.cores import Cores


def test_what_is_alone_has_all_cores() -> None:
    assert Cores(4, 4).take(2, images=1, under_way=1) == 4
    assert Cores(4, 4).take(2, images=8, under_way=8) == 4


@pytest.mark.parametrize(("under_way", "threads"), [(1, 16), (2, 8), (3, 5), (4, 4), (9, 1), (500, 1)])
def test_images_under_way_share_the_cores(under_way: int, threads: int) -> None:
    assert Cores(16, 16).take(0, images=1, under_way=under_way) == threads


def test_a_crowd_is_forgotten_by_and_by() -> None:
    cores = Cores(2, 2)
    threads = [cores.take(0, images=1, under_way=under_way) for under_way in (32, *[1] * 60)]
    assert threads[:10] == [1] * 10
    assert threads[-10:] == [2] * 10
    assert all(before <= after for before, after in pairwise(threads))


def test_threads_that_were_taken_by_two_lanes_are_too_many_for_their_cores() -> None:
    cores = Cores(2, 2)
    cores.take(0, images=1, under_way=1)
    assert cores.too_many(0) == []
    cores.take(1, images=1, under_way=1)
    assert cores.too_many(1) == [0]
    cores.give_back(0)
    assert cores.too_many(1) == []


def test_a_lane_keeps_its_threads_while_it_computes_without_them() -> None:
    cores = Cores(2, 2)
    cores.take(0, images=1, under_way=1)
    cores.take(0, images=1, under_way=32)
    for _ in range(60):
        cores.take(1, images=1, under_way=1)
    assert cores.too_many(1) == [0]


def test_lanes_that_share_the_cores_may_all_keep_theirs() -> None:
    cores = Cores(16, 16)
    for lane in range(4):
        assert cores.take(lane, images=1, under_way=4) == 4
    assert [cores.too_many(lane) for lane in range(4)] == [[]] * 4
    for _ in range(60):
        cores.take(0, images=1, under_way=1)
    assert cores.too_many(0) == [1, 2, 3]


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(0, 63), st.integers(1, 64), st.integers(0, 500))),
)
def test_no_lane_has_more_threads_than_cores(cores: int, lanes: int, batches: list[tuple[int, int, int]]) -> None:
    shared = Cores(cores, lanes)
    for lane, images, others in batches:
        threads = shared.take(lane % lanes, images, images + others)
        assert 1 <= threads <= cores
        for other in shared.too_many(lane % lanes):
            assert other != lane % lanes
            shared.give_back(other)
        assert shared.too_many(lane % lanes) == []

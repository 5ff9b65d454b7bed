"""What may wait is bounded, and a flood of one model leaves room for the others."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backboned.registry import BackbonedError, ErrorKind
from backboned.server.serving.admission import Admission


def make(max_images: int = 100, max_bytes: int = 10**6, seconds: Callable[[int], float] = lambda _: 1.0) -> Admission:
    return Admission(max_images, max_bytes, seconds)


def admitted(admission: Admission, stack: ExitStack, model: str, *, images: int = 1, size: int = 1) -> bool:
    """Whether a call was let in; it stays until `stack` closes."""
    try:
        stack.enter_context(admission.admit(model, images, size))
    except BackbonedError as error:
        assert error.kind is ErrorKind.RESOURCE_EXHAUSTED
        return False
    return True


def flood(admission: Admission, stack: ExitStack, model: str, *, size: int = 1) -> int:
    """How many calls of one image are let in before one is refused."""
    count = 0
    while admitted(admission, stack, model, size=size):
        count += 1
    return count


def test_a_flood_gets_half_and_leaves_the_rest_to_others() -> None:
    admission = make(100)
    with ExitStack() as stack:
        assert flood(admission, stack, "flooding") == 50
        assert admitted(admission, stack, "other", images=20)
        assert not admitted(admission, stack, "flooding")
        assert not admitted(admission, stack, "third", images=31)
        assert admitted(admission, stack, "third", images=30)
        assert admission.images == 100
        assert not admitted(admission, stack, "fourth")
    assert admission.images == 0


def test_each_flood_gets_half_of_what_is_free() -> None:
    admission = make(128)
    with ExitStack() as stack:
        assert [flood(admission, stack, name) for name in "abcd"] == [64, 32, 16, 8]


def test_bytes_are_bounded_as_images_are() -> None:
    admission = make(10**6, 1000)
    with ExitStack() as stack:
        assert flood(admission, stack, "flooding", size=100) == 5
        assert admitted(admission, stack, "other", size=500)
        assert not admitted(admission, stack, "other", size=1)
    assert admitted(admission, ExitStack(), "flooding", size=100)


def test_a_call_that_is_alone_is_let_in_whatever_its_size() -> None:
    admission = make(1, 1)
    with ExitStack() as stack:
        assert admitted(admission, stack, "a", images=256, size=10**9)
        assert not admitted(admission, stack, "b")
    with ExitStack() as stack:
        assert admitted(admission, stack, "b", images=256, size=10**9)


def test_a_refusal_counts_for_nothing() -> None:
    admission = make(4)
    with ExitStack() as stack:
        assert flood(admission, stack, "a") == 2
        for _ in range(100):
            assert not admitted(admission, stack, "a")
        assert admission.images == 2
        assert admitted(admission, stack, "b", images=2)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_room_is_given_back_whatever_ends_a_call(error: type[BaseException]) -> None:
    admission = make(2)
    for _ in range(3):
        with pytest.raises(error), admission.admit("a", 2, 2):
            raise error
        assert admission.images == 0


@pytest.mark.parametrize(("seconds", "delay"), [(0.0, 0.1), (0.3, 0.2), (3.0, 1.5), (20.0, 10.0), (1e9, 10.0)])
def test_the_delay_is_half_of_what_clears_the_queue_within_bounds(seconds: float, delay: float) -> None:
    asked: list[int] = []

    def seconds_to_clear(images: int) -> float:
        asked.append(images)
        return seconds

    admission = make(10, 100, seconds_to_clear)
    with admission.admit("a", 4, 70):
        assert not asked
        with pytest.raises(BackbonedError) as caught, admission.admit("a", 9, 3):
            pytest.fail("it was let in")
    assert asked == [4] and caught.value.retry_delay_seconds == delay
    assert caught.value.message == (
        f"the queue is full (4 images, 70 bytes wait, 4 images of them for a); try again in {delay:.1f} s"
    )


CALLS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 12), st.integers(0, 12), st.integers(0, 3)), max_size=40
)


@settings(deadline=None)
@given(max_images=st.integers(1, 20), max_bytes=st.integers(1, 20), calls=CALLS)
def test_the_bounds_hold_unless_a_call_is_alone(
    max_images: int, max_bytes: int, calls: list[tuple[str, int, int, int]]
) -> None:
    admission, held = make(max_images, max_bytes), list[tuple[int, int, ExitStack]]()
    for model, images, size, leaving in calls:
        stack = ExitStack()
        if admitted(admission, stack, model, images=images, size=size):
            held.append((images, size, stack))
        else:
            assert held
        assert admission.images == sum(each for each, _, _ in held)
        if len(held) > 1 and held[0][0] <= max_images and held[0][1] <= max_bytes:
            assert admission.images <= max_images and sum(each for _, each, _ in held) <= max_bytes
        for _ in range(min(leaving, len(held))):
            held.pop()[2].close()
    for *_, stack in held:
        stack.close()
    assert admission.images == 0


def test_a_call_that_would_be_answered_too_late_is_refused_at_once() -> None:
    admission = Admission(1000, 10**6, lambda images: images / 10)
    with admission.admit("flowers", 50, 1000):
        with admission.admit("flowers", 1, 10, patience_seconds=8.0), admission.admit("flowers", 1, 10):
            pass
        with (
            pytest.raises(BackbonedError, match="too long for the deadline") as caught,
            admission.admit("flowers", 1, 10, patience_seconds=4.0),
        ):
            pass
        assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED
        assert caught.value.retry_delay_seconds == pytest.approx(2.5)
        with pytest.raises(BackbonedError, match="too long"), admission.admit("flowers", 1, 10, patience_seconds=5.1):
            pytest.fail("an image that takes a little longer would be too late")
    with admission.admit("flowers", 1, 10, patience_seconds=0.01):  # nothing is before it
        pass


def test_a_deadline_that_is_too_near_is_told_before_the_call_is_read() -> None:
    admission = Admission(1000, 10**6, lambda images: images / 10)
    admission.check_wait("flowers", 0.01)  # nothing is before it
    with admission.admit("flowers", 50, 1000):
        for patience_seconds in (None, 8.0):
            admission.check_wait("flowers", patience_seconds)
        with pytest.raises(BackbonedError, match=r"too long for the deadline; try again in 2\.5 s") as caught:
            admission.check_wait("flowers", 5.1)
        admission.check_wait("pets", 0.2)
        admission.check_wait("", 0.2)
    assert caught.value.kind is ErrorKind.RESOURCE_EXHAUSTED and caught.value.retry_delay_seconds == 2.5


@pytest.mark.parametrize(
    ("model", "images", "taken", "before"),
    [
        ("new", 1, 0, 2),
        ("new", 1, 8, 10),
        ("new", 30, 0, 40),
        ("few", 1, 0, 21),
        ("few", 5, 8, 33),
        ("few", 500, 0, 110),
        ("flood", 1, 0, 110),
        ("flood", 1, 8, 110),
    ],
)
def test_a_call_waits_for_the_turns_of_its_own_model_and_not_for_a_flood(
    model: str, images: int, taken: int, before: int
) -> None:
    admission = Admission(1000, 10**6, float, lambda: taken)
    with admission.admit("flood", 100, 1), admission.admit("few", 10, 1):
        with admission.admit(model, images, 1, patience_seconds=(before + 0.1) / 0.7):
            pass
        with (
            pytest.raises(BackbonedError, match="too long for the deadline"),
            admission.admit(model, images, 1, patience_seconds=before / 0.7),
        ):
            pytest.fail("it was let in")

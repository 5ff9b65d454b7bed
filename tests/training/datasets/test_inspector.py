import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from backboned.registry.backbone import Preprocessing
from backboned.registry.task import Task
from backboned.server.compute.preprocess import read as read_picture
from backboned.server.training.datasets import Dataset, Findings, Inspector, Record, Sample, inspect
from backboned.server.training.datasets.near import groups_alike
from backboned.server.training.datasets.record import RECORD_BYTES

PREPROCESSING = Preprocessing(crop_size=224, resize_size=256, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")


def scene(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A picture of its own: smooth colours and a few shapes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(240, 320), mode="bicubic", align_corners=False)[0]
    picture = Image.fromarray((smooth.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    for x, y, r, colour in torch.randint(10, 200, (4, 4), generator=generator).tolist():
        draw.ellipse((x, y, x + r, y + r), fill=(colour, 255 - colour, 128))
    return picture.resize(size)


def encoded(picture: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def look(
    train: Iterable[tuple[str, bytes]],
    validation: Iterable[tuple[str, bytes]] = (),
    test: Iterable[tuple[str, bytes]] = (),
) -> Findings:
    """What is found in images by path and bytes; the folder tells the class."""
    parts = [list(part) for part in (train, validation, test)]
    classes = tuple(sorted({path.split("/")[0] for part in parts for path, _ in part}))
    samples = [tuple(Sample(path, (classes.index(path.split("/")[0]),)) for path, _ in part) for part in parts]
    one, two, three = samples
    dataset = Dataset("photos", Task.SINGLE_LABEL, classes, one, two, three, (), (), "", None)  # type: ignore[arg-type]
    inspector = Inspector(dataset, crop_size=224)
    for part, found in zip(parts, samples, strict=True):
        for (_, data), sample in zip(part, found, strict=True):
            inspector.see(sample, data, read_picture(data, PREPROCESSING, max_pixels=10**8))
    return inspector.findings()


def test_images_that_differ_are_no_duplicates() -> None:
    assert look((f"a/{i}.jpg", encoded(scene(i))) for i in range(60)) == Findings()


def test_copies_are_found_with_their_parts_and_labels() -> None:
    data = encoded(scene(1))
    findings = look([("a/1.jpg", data), ("a/2.jpg", encoded(scene(2)))], [("b/3.jpg", data)])
    (group,) = findings.duplicates
    assert group.paths == ("a/1.jpg", "b/3.jpg")
    assert (group.exact, group.across_parts, group.labels_differ) == (True, True, True)
    assert findings.warnings[0].startswith(
        "1 validation image is also in training, as a copy or nearly so (b/3.jpg is a/1.jpg): figures look better"
    )
    assert findings.warnings[1].startswith("2 images show the same as another that is labelled otherwise (a/1.jpg, b/3")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: encoded(p, quality=40),
        lambda p: encoded(p, "PNG"),
        lambda p: encoded(p, "WEBP", quality=60),
        lambda p: encoded(p.resize((160, 120)), quality=85),
        lambda p: encoded(p.resize((1600, 1200), Image.Resampling.LANCZOS), quality=85),
        lambda p: encoded(Image.eval(p, lambda v: min(255, int(v * 1.1)))),
    ],
    ids=["quality", "png", "webp", "smaller", "larger", "brighter"],
)
def test_a_picture_saved_otherwise_is_nearly_the_same(change: Callable[[Image.Image], bytes]) -> None:
    originals = [(f"a/{i}.jpg", encoded(scene(i))) for i in range(20)]
    findings = look(originals, [(f"a/{i}-again.jpg", change(scene(i))) for i in range(20)])
    assert {d.paths for d in findings.duplicates} == {(f"a/{i}-again.jpg", f"a/{i}.jpg") for i in range(20)}
    assert not any(d.exact or d.labels_differ for d in findings.duplicates)
    assert findings.warnings[0].startswith("20 validation images are also in training")


def test_a_test_image_that_validates_too_is_warned_of() -> None:
    data = encoded(scene(1))
    findings = look([("a/1.jpg", encoded(scene(2)))], [("a/2.jpg", data)], [("a/3.jpg", data)])
    assert findings.warnings[0].startswith("1 test image is also in training or validation")


def test_a_chain_of_likes_is_one_group_and_copies_are_in_it() -> None:
    data = encoded(scene(1))
    findings = look([("a/1.jpg", data), ("a/2.jpg", data), ("a/3.jpg", encoded(scene(1), quality=50))])
    assert [(d.paths, d.exact) for d in findings.duplicates] == [
        (("a/1.jpg", "a/2.jpg"), True),
        (("a/1.jpg", "a/2.jpg", "a/3.jpg"), False),
    ]
    assert findings.warnings == ()


def test_tiny_long_and_blank_images_are_named() -> None:
    images = [
        ("a/fine.jpg", encoded(scene(0))),
        ("a/icon.png", encoded(scene(1, (55, 80)), "PNG")),
        ("a/edge.png", encoded(scene(2, (56, 80)), "PNG")),
        ("a/strip.png", encoded(scene(3, (900, 200)), "PNG")),
        ("a/white.png", encoded(Image.new("RGB", (300, 300), "white"), "PNG")),
        ("a/grey.jpg", encoded(Image.new("RGB", (300, 300), (90, 91, 92)))),
    ]
    findings = look(images)
    assert findings.warnings == (
        "1 image is less than 56 pixels high or wide: a/icon.png",
        "1 image is more than 4 times as long as wide, and only the middle is looked at: a/strip.png",
        "2 images are of one colour: a/grey.jpg, a/white.png",
    )
    assert findings.duplicates == ()


def test_a_little_on_a_plain_background_is_not_blank_and_differs_from_another() -> None:
    def dot(x: int) -> bytes:
        picture = Image.new("RGB", (300, 300), "white")
        ImageDraw.Draw(picture).ellipse((x, 100, x + 40, 140), fill="black")
        return encoded(picture)

    assert look([("a/1.jpg", dot(60)), ("a/2.jpg", dot(200))]) == Findings()


def test_a_record_is_the_same_after_it_was_kept() -> None:
    data = encoded(scene(1))
    pixels = read_picture(data, PREPROCESSING, max_pixels=10**8)
    record = inspect(data, pixels)
    assert (record.width, record.height, record.digest) == (320, 240, hashlib.sha256(data).hexdigest())
    assert Record.from_bytes(record.to_bytes()) == record
    assert len(record.to_bytes()) == RECORD_BYTES
    assert inspect(data, pixels.contiguous()) == record
    assert inspect(b"", pixels, digest=record.digest, size=(320, 240)) == record
    with pytest.raises(ValueError, match="bytes, not 3"):
        Record.from_bytes(b"abc")


def test_images_may_be_seen_by_many_threads() -> None:
    samples = tuple(Sample(f"a/{i}.jpg", (0,)) for i in range(400))
    dataset = Dataset("photos", Task.SINGLE_LABEL, ("a",), samples, (), (), (), (), "", source=None)  # type: ignore[arg-type]
    inspector = Inspector(dataset, crop_size=224)
    record = Record("00" * 32, 300, 300, bytes(range(256)), blank=False)
    barrier = threading.Barrier(8)

    def add(start: int) -> None:
        barrier.wait(10)
        for sample in samples[start::8]:
            inspector.add(sample, record)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    (group,) = inspector.findings().duplicates
    assert (len(group.paths), group.exact) == (20, True)


def test_groups_are_those_that_comparing_all_with_all_would_find() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (200, 256))
    noisy = [np.clip(base + rng.normal(0, sigma, base.shape), 0, 255) for sigma in (2, 8, 30)]
    thumbnails = np.concatenate([base, *noisy]).astype(np.uint8)
    groups = groups_alike(thumbnails)
    assert sorted(map(sorted, groups)) == sorted(by_comparing_all(thumbnails))
    assert 100 < len(groups) <= 200


def test_a_thousand_steps_of_a_slow_change_are_one_group() -> None:
    start, change = np.random.default_rng(0).uniform(30, 220, (2, 256))
    thumbnails = np.stack([start + (change - start) * step / 1000 for step in range(1000)]).astype(np.uint8)
    assert groups_alike(thumbnails) == [list(range(1000))]


def by_comparing_all(thumbnails: np.ndarray) -> list[list[int]]:
    cells = thumbnails.reshape(-1, 8, 2, 8, 2).astype(int).sum(axis=(2, 4))
    signs = [(cells > np.roll(cells, -1, axis) + 8).reshape(len(cells), -1) for axis in (2, 1)]
    bits = np.concatenate(signs, axis=1).astype(int)
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True)
    normal = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    same = ((bits @ (1 - bits).T + (1 - bits) @ bits.T) <= 7) & (normal @ normal.T > 0.98)
    left, groups = set(range(len(bits))), []
    while left:
        group = frontier = {min(left)}
        while frontier:
            frontier = {int(j) for i in frontier for j in np.nonzero(same[i])[0]} - group
            group = group | frontier
        left -= group
        groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]

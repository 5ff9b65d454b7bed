"""How images differ from those that validated is told in words, and nothing is told of nothing."""

import pytest

from backboned.server.commands.drift_view import drifted
from backboned.v1 import model_service_pb2 as pb

LIKE = pb.Shift(distance=0.06, by_chance=0.15, lower=True)
LESS = pb.Shift(distance=0.41, by_chance=0.15, lower=True, drifted=True)
MORE = pb.Shift(distance=0.41, by_chance=0.15, drifted=True)


@pytest.mark.parametrize(
    ("drift", "told"),
    [
        (pb.Drift(), []),
        (
            pb.Drift(images=40, uncertain=0.25, unfamiliar=0.025),
            [
                "version 3, its newest 40 images: 25.0 % uncertain, 2.5 % unfamiliar",
                "whether images have drifted is told from 100 on",
            ],
        ),
        (
            pb.Drift(images=1000, confidence=LIKE, features=LIKE),
            [
                "version 3, its newest 1000 images: 0.0 % uncertain, 0.0 % unfamiliar",
                "they are like those that validated, or nearly so: by confidence 0.06 (by chance up to 0.15), "
                "by features 0.06 (by chance up to 0.15)",
            ],
        ),
        (
            pb.Drift(images=1000, confidence=LESS, features=MORE, drifted=True),
            [
                "version 3, its newest 1000 images: 0.0 % uncertain, 0.0 % unfamiliar",
                "they differ from those that validated: by confidence 0.41 (by chance up to 0.15, less certain), "
                "by features 0.41 (by chance up to 0.15, further off)",
            ],
        ),
        (
            pb.Drift(images=1000, confidence=MORE, features=LESS, drifted=True),
            [
                "version 3, its newest 1000 images: 0.0 % uncertain, 0.0 % unfamiliar",
                "they differ from those that validated: by confidence 0.41 (by chance up to 0.15, more certain), "
                "by features 0.41 (by chance up to 0.15, nearer)",
            ],
        ),
    ],
    ids=["none", "few", "alike", "worse", "easier"],
)
def test_what_people_are_told(drift: pb.Drift, told: list[str]) -> None:
    assert list(drifted(pb.Model(serving_version=3, drift=drift))) == told

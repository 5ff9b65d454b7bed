"""A prepared image is the one that a tutorial's PIL pipeline makes; a random view depends on its seed alone."""

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from backboned.registry.backbone import Interpolation, Preprocessing
from backboned.registry.errors import BackbonedError
from backboned.server.compute.decode import decode, decode_picture
from backboned.server.compute.preprocess import augment, normalise, prepare, read, read_pixels, stack

PHOTOS = Path(__file__).parents[3] / "shared" / "data"
SETTINGS = Preprocessing(resize_size=64, crop_size=56)


def scene(width: int, height: int) -> Image.Image:
    """A picture with smooth and with sharp parts, different at every edge."""
    y, x = np.mgrid[0:height, 0:width]
    checks = 127 * ((x // 5 + y // 7) % 2)
    return Image.fromarray(np.stack([x % 256, checks, (3 * y + x * x // 50) % 256], axis=2).astype(np.uint8))


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tutorial(settings: Preprocessing) -> transforms.Compose:
    """The pipeline of the transfer-learning tutorials, for PIL images."""
    return transforms.Compose(
        [
            transforms.Resize(settings.resize_size, transforms.InterpolationMode(settings.interpolation)),
            transforms.CenterCrop(settings.crop_size),
            transforms.ToTensor(),
            transforms.Normalize(settings.mean, settings.std),
        ]
    )


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(200, 133), (133, 200), (64, 64), (64, 99), (31, 45), (301, 300), (1, 1), (640, 41)])
@pytest.mark.parametrize(("resize", "crop"), [(64, 56), (64, 64), (57, 32), (32, 57)])
def test_an_image_is_what_the_tutorial_pipeline_makes_of_it(
    resize: int, crop: int, size: tuple[int, int], interpolation: Interpolation
) -> None:
    settings = replace(SETTINGS, resize_size=resize, crop_size=crop, interpolation=interpolation)
    prepared = prepare(tensor_of(scene(*size)), settings)
    assert prepared.dtype == torch.uint8 and prepared.shape == settings.input_shape
    assert prepared.permute(1, 2, 0).is_contiguous()
    assert torch.equal(normalise(prepared[None], settings)[0], tutorial(settings)(scene(*size)))


def test_a_resized_image_smaller_than_the_crop_is_padded_with_black() -> None:
    prepared = prepare(torch.full((3, 10, 10), 200, dtype=torch.uint8), Preprocessing(resize_size=4, crop_size=8))
    assert (prepared[:, 2:6, 2:6] == 200).all()
    assert int(prepared.sum()) == 3 * 16 * 200


@pytest.mark.parametrize("size", [(3, 900), (900, 3), (2, 1001), (1001, 2)])
def test_a_long_strip_is_the_tutorials_within_a_pixel(size: tuple[int, int]) -> None:
    settings = Preprocessing(resize_size=8, crop_size=7)
    x = np.arange(900 if 900 in size else 1001)
    values = np.broadcast_to(
        (100 + x % 50 if size[0] > size[1] else (100 + x % 50)[:, None])[..., None], (*size[::-1], 3)
    )
    image = Image.fromarray(np.ascontiguousarray(values).astype(np.uint8))
    expected = transforms.CenterCrop(7)(transforms.Resize(8)(image))
    difference = prepare(tensor_of(image), settings).int() - tensor_of(expected).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("shape", [(3, 1, 5000), (3, 5000, 1), (3, 1, 1)])
@pytest.mark.parametrize("settings", [Preprocessing(), Preprocessing(resize_size=2, crop_size=64)])
def test_a_line_of_one_pixel_can_be_prepared(shape: tuple[int, ...], settings: Preprocessing) -> None:
    image = torch.full(shape, 90, dtype=torch.uint8)
    assert prepare(image, settings).shape == settings.input_shape
    assert augment(image, settings, 1).shape == settings.input_shape


def test_the_memory_layout_of_an_image_changes_nothing() -> None:
    image = tensor_of(scene(120, 90))
    assert not image.is_contiguous()
    assert torch.equal(prepare(image, SETTINGS), prepare(image.contiguous(), SETTINGS))
    assert torch.equal(augment(image, SETTINGS, 5), augment(image.contiguous(), SETTINGS, 5))


def test_normalising_leaves_its_batch_as_it_was() -> None:
    batch = torch.stack([prepare(tensor_of(scene(90, 90)), SETTINGS)] * 3)
    before = batch.clone()
    assert normalise(batch, SETTINGS).dtype == torch.float32
    assert torch.equal(batch, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_normalising_on_a_gpu_stays_there_and_is_the_same() -> None:
    batch = prepare(tensor_of(scene(90, 90)), SETTINGS)[None]
    on_gpu = normalise(batch.cuda(), SETTINGS)
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), normalise(batch, SETTINGS), rtol=1e-6, atol=1e-6)


def test_a_view_depends_on_the_image_and_the_seed_alone() -> None:
    image = tensor_of(scene(150, 100))
    random.seed(1)
    torch.manual_seed(1)
    once = augment(image, SETTINGS, 7)
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(augment(image, SETTINGS, 7), once)
    assert once.dtype == torch.uint8 and once.shape == SETTINGS.input_shape
    assert once.permute(1, 2, 0).is_contiguous()


def test_every_seed_gives_another_view() -> None:
    image = tensor_of(scene(150, 100))
    views = {bytes(augment(image, SETTINGS, seed).numpy().data) for seed in range(30)}
    assert len(views) == 30


def test_views_show_at_least_half_of_the_image_and_half_of_them_flipped() -> None:
    width, height = 150, 120
    ramp = torch.arange(width, dtype=torch.uint8).expand(3, height, width)  # brightness is the column
    flipped = 0
    for seed in range(100):
        columns = augment(ramp, replace(SETTINGS, mean=(0, 0, 0)), seed)[0].float().mean(0)
        flipped += bool(columns[0] > columns[-1])
        assert (columns.max() - columns.min()) / 0.64 >= width * 0.55  # 0.8 of the brightness, of the contrast
    assert 35 <= flipped <= 65


def test_jitter_is_light() -> None:
    grey = torch.full((3, 60, 60), 100, dtype=torch.uint8)
    means = [augment(grey, SETTINGS, seed).float().mean() for seed in range(50)]
    assert 79 <= min(means) < 90 and 110 < max(means) <= 121


@pytest.mark.shared
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no real photos beside this checkout")
@pytest.mark.parametrize("settings", [Preprocessing(), Preprocessing(resize_size=232, interpolation="bicubic")])
def test_real_photos_reach_the_model_as_in_the_tutorial_bit_for_bit(settings: Preprocessing) -> None:
    photos = sorted(PHOTOS.glob("sample_photos/*.jpg")) + sorted(PHOTOS.glob("flower_photos/val/*/*.jpg"))[::15]
    assert photos
    for photo in photos:
        data = photo.read_bytes()
        ours = normalise(prepare(decode(data, max_pixels=100_000_000), settings)[None], settings)[0]
        assert torch.equal(ours, tutorial(settings)(Image.open(io.BytesIO(data)).convert("RGB"))), photo.name


def jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def large_picture(width: int, height: int) -> Image.Image:
    """Smooth colours with grain, as of a photo."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1000, 1200), (224, 224), (100, 90)])
def test_reading_is_decoding_and_preparing(size: tuple[int, int]) -> None:
    data, settings = jpeg(large_picture(*size)), Preprocessing()
    found = read(data, settings, max_pixels=10**7)
    assert found.equal(prepare(decode(data, max_pixels=10**7), settings))
    assert found.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_read_at_reduced_scale_within_the_tolerance(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, settings = jpeg(large_picture(2003, 1501), exif=exif), Preprocessing()
    assert decode_picture(data, max_pixels=10**7, short_side=settings.resize_size).reduced == 2
    found = read(data, settings, max_pixels=10**7).int()
    difference = (found - prepare(decode(data, max_pixels=10**7), settings).int()).abs().flatten()
    assert difference.float().mean() < 1
    assert difference.kthvalue(int(0.999 * len(difference))).values <= 6


def test_a_large_jpeg_that_is_cut_short_is_refused_at_reduced_scale_too() -> None:
    data = jpeg(large_picture(2000, 1500))
    with pytest.raises(BackbonedError, match="truncated"):
        read(data[: len(data) // 2], Preprocessing(), max_pixels=10**7)
    with pytest.raises(BackbonedError, match="too large"):
        read(data, Preprocessing(), max_pixels=10**6)


def test_raw_pixels_are_read_like_a_picture() -> None:
    picture = large_picture(300, 260)
    found = read_pixels(picture.tobytes(), (260, 300, 3), SETTINGS, max_pixels=10**6)
    assert found.equal(prepare(torch.from_numpy(np.array(picture)).permute(2, 0, 1), SETTINGS))


def test_a_stack_has_its_channels_last_and_is_normalised_alike() -> None:
    images = [read(jpeg(large_picture(90 + i, 80)), SETTINGS, max_pixels=10**6) for i in range(3)]
    batch = stack(images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert all(a.equal(b) for a, b in zip(batch, images, strict=True))
    found = normalise(batch, SETTINGS)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.equal(normalise(batch.contiguous(), SETTINGS))
    assert normalise(batch, SETTINGS, torch.bfloat16).equal(found.bfloat16())

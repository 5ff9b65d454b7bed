"""What can sensibly be seen is seen right; what can't is refused by its index; raw pixels are a picture too."""

import re
from collections.abc import Callable
from io import BytesIO

import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from PIL import ExifTags, Image, ImageOps

from backboned.client import Client, ClientError
from backboned.v1 import model_service_pb2 as pb
from backboned.v1.model_service_pb2_grpc import ModelServiceStub

Png = Callable[[Image.Image], bytes]
MODELS = ("flowers", "scenes")


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def answer(client: Client, model: str, image: bytes) -> dict[str, float]:
    """The probabilities by label."""
    (prediction,) = client.predict(model, [image]).predictions
    return {c.label: c.probability for c in prediction.classes}


def opened(photo: bytes) -> Image.Image:
    return Image.open(BytesIO(photo)).convert("RGB")


def grey_16_bit(picture: Image.Image) -> Image.Image:
    """`picture` in grey of 16 bits, whose low byte is noise."""
    grey = picture.convert("L")
    values = b"".join(bytes([i * 7 % 256, value]) for i, value in enumerate(grey.tobytes()))
    return Image.frombytes("I;16", grey.size, values)


def with_holes(picture: Image.Image) -> Image.Image:
    """`picture`, more and more transparent to the right."""
    alpha = Image.linear_gradient("L").rotate(90).resize(picture.size)
    return Image.merge("RGBA", [*picture.split(), alpha])


def on_white(picture: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")


def kinds(photo: bytes) -> dict[str, tuple[bytes, Image.Image]]:
    """Files of many kinds, each with the RGB picture that a person sees in it."""
    colour = opened(photo)
    holes, palette = with_holes(colour), colour.quantize(32)
    cmyk, grey = encoded(colour.convert("CMYK"), "JPEG"), encoded(colour, "JPEG", progressive=True)
    frames = [palette, colour.transpose(Image.Transpose.ROTATE_180).quantize(32)]
    return {
        "JPEG": (photo, colour),
        "progressive JPEG": (grey, opened(grey)),
        "grey JPEG": (g := encoded(colour.convert("L"), "JPEG"), opened(g)),
        "CMYK JPEG": (cmyk, Image.open(BytesIO(cmyk)).convert("RGB")),
        "RGBA PNG": (encoded(holes, "PNG"), on_white(holes)),
        "grey PNG with alpha": (encoded(holes.convert("LA"), "PNG"), on_white(holes.convert("LA"))),
        "16-bit PNG": (encoded(grey_16_bit(colour), "PNG"), colour.convert("L").convert("RGB")),
        "palette PNG": (encoded(palette, "PNG"), palette.convert("RGB")),
        "black and white PNG": (encoded(colour.convert("1"), "PNG"), colour.convert("1").convert("RGB")),
        "GIF, its first frame": (
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            palette.convert("RGB"),
        ),
        "WebP": (encoded(colour, "WEBP", lossless=True), colour),
        "BMP": (encoded(colour, "BMP"), colour),
        "TIFF": (encoded(colour, "TIFF", compression="tiff_lzw"), colour),
    }


def test_every_kind_of_file_is_answered_like_the_plain_picture_in_it(client: Client, photo: bytes, png: Png) -> None:
    for kind, (image, seen) in kinds(photo).items():
        for model in MODELS:
            assert answer(client, model, image) == pytest.approx(answer(client, model, png(seen)), abs=1e-6), kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(client: Client, photo: bytes, png: Png, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned = encoded(opened(photo), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(turned)))
    for model in MODELS:
        assert answer(client, model, turned) == pytest.approx(answer(client, model, png(upright)), abs=1e-6)
        as_stored = answer(client, model, png(opened(turned)))
        assert (answer(client, model, turned) == pytest.approx(as_stored, abs=1e-4)) == (orientation == 1)


def test_raw_pixels_are_answered_like_the_file_of_the_same_picture(
    client: Client, photo: bytes, png: Png, stub: ModelServiceStub
) -> None:
    colour = opened(photo)
    tensor = pb.Tensor(shape=[colour.height, colour.width, 3], data=colour.tobytes())
    for model in MODELS:
        request = pb.PredictRequest(model=model, images=[pb.Image(tensor=tensor), pb.Image(encoded=png(colour))])
        raw, file = stub.Predict(request).predictions
        assert list(raw.classes) == list(file.classes)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (pb.Tensor(shape=[4, 4, 3], data=bytes(47)), r"\[4, 4, 3\] take 48 bytes \(uint8\), got 47"),
        (pb.Tensor(shape=[3, 4, 4], data=bytes(48)), r"must be \[height, width, 3\] \(uint8 RGB\), got \[3, 4, 4\]"),
        (pb.Tensor(shape=[4, 4], data=bytes(16)), r"must be \[height, width, 3\]"),
        (pb.Tensor(data=bytes(48)), r"got \[\]"),
        (pb.Tensor(shape=[0, 4, 3]), "no pixels: it is 4x0"),
        (pb.Tensor(shape=[-4, -4, 3], data=bytes(48)), "no pixels"),
        (pb.Tensor(shape=[2**62, 2**62, 3], data=bytes(48)), "too large.*the limit is 100"),
    ],
)
def test_raw_pixels_that_do_not_fit_their_shape_are_refused(
    refusal: Callable[[str, Message], ClientError], tensor: pb.Tensor, message: str
) -> None:
    good = pb.Image(tensor=pb.Tensor(shape=[1, 1, 3], data=bytes(3)))
    error = refusal("Predict", pb.PredictRequest(model="flowers", images=[good, pb.Image(tensor=tensor)]))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "images[1]")
    assert re.search(message, error.message), error.message


def test_what_is_no_picture_is_named_by_its_index_and_its_fault(
    client: Client, photo: bytes, png: Png, bomb: bytes
) -> None:
    file = png(opened(photo))
    flipped = bytearray(file)
    flipped[len(file) // 2] ^= 1
    faults = {
        photo[: len(photo) // 2]: f"JPEG is truncated after {len(photo) // 2} bytes",
        photo[:3] + bytes(500): "JPEG is ",
        file[:-100]: "PNG is ",
        bytes(flipped): "PNG is damaged",
        encoded(opened(photo), "WEBP")[:1000]: "WebP is ",
        b"": "0 bytes; send the bytes of an image file",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": 'begins with b"<svg xmlns=\'http"',
        b"%PDF-1.7": "none of JPEG, PNG, WebP, GIF, BMP, TIFF",
        bomb: "20000x20000 = 400 megapixels; the limit is 100",
        encoded(Image.new("F", (4, 4)), "TIFF"): "save it with 8 or 16 bits a channel",
    }
    for index, (image, fault) in enumerate(faults.items()):
        good = [photo] * index
        with pytest.raises(ClientError, match=re.escape(fault)) as caught:
            client.predict("flowers", [*good, image, photo])
        assert (caught.value.code, caught.value.field) == (StatusCode.INVALID_ARGUMENT, f"images[{index}]")
        assert caught.value.message.startswith(f"image {index}: ")
    assert client.predict("flowers", [photo]).version == 3


def test_an_image_without_a_source_is_named(refusal: Callable[[str, Message], ClientError]) -> None:
    error = refusal("Predict", pb.PredictRequest(model="flowers", images=[pb.Image()]))
    assert (error.code, error.field) == (StatusCode.INVALID_ARGUMENT, "images[0]")
    assert "set `encoded`, `dataset_image` or `tensor`" in error.message


def test_answers_are_ranked_cut_at_top_k_and_carry_features_when_asked(client: Client, photo: bytes) -> None:
    whole, cut = client.predict("flowers", photo), client.predict("flowers", photo, top_k=2, return_embedding=True)
    probabilities = [c.probability for c in whole.predictions[0].classes]
    assert probabilities == sorted(probabilities, reverse=True) and len(probabilities) == 5
    assert sum(probabilities) == pytest.approx(1)
    assert list(cut.predictions[0].classes) == list(whole.predictions[0].classes)[:2]
    assert len(cut.predictions[0].embedding) == 256 and not whole.predictions[0].embedding
    assert cut.predictions[0].id != whole.predictions[0].id

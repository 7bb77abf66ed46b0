"""Every kind of image by every way in: the same pixels, or the same refusal, and nothing recorded then."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from bundle import preprocessing
from service.settings import Settings
from tests.bundle import bombs
from tests.bundle import encoders as enc
from tests.service import networks, v2
from tests.service.conftest import client_by

RNG = np.random.default_rng(4)
SMOOTH = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((40, 30))
SAID = networks.flat_manifest("flat")
INFER = "/v2/models/flat/infer"


def encoded(kind, mode="RGB", image=SMOOTH, **options):
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def wide(channels):
    return RNG.integers(0, 65536, (12, 11, channels)).astype(np.uint16)


MORE = {"save_all": True, "append_images": [SMOOTH.rotate(90)]}
TAKEN = {
    **{kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")},
    "JPEG progressive": encoded("JPEG", progressive=True),
    "JPEG grey": encoded("JPEG", "L"),
    "JPEG CMYK": encoded("JPEG", "CMYK"),
    **{f"JPEG turned by EXIF {n}": encoded("JPEG", exif=exif(n)) for n in range(2, 9)},
    "PNG turned by EXIF": encoded("PNG", exif=exif(6)),
    "TIFF CMYK": encoded("TIFF", "CMYK"),
    "PNG palette": encoded("PNG", "P"),
    "PNG palette with a clear colour": encoded("PNG", "P", transparency=3),
    "PNG of one bit": encoded("PNG", "1"),
    "PNG grey with alpha": encoded("PNG", "LA"),
    "PNG with alpha": encoded("PNG", "RGBA", SMOOTH.convert("RGBA").rotate(30)),
    "WebP with alpha": encoded("WEBP", "RGBA", SMOOTH.convert("RGBA").rotate(30), lossless=True),
    "PNG of 16 bits": enc.png(wide(3), enc.RGB, 16),
    "PNG of 16 bits with alpha": enc.png(wide(4), enc.RGBA, 16),
    "PNG of 16-bit greys": enc.png(wide(1)[..., 0], enc.GREY, 16),
    "TIFF of 16 bits": enc.tiff(wide(3), 2),
    **{f"{kind} animated": encoded(kind, **MORE) for kind in ("PNG", "WEBP", "GIF", "TIFF", "MPO")},
    "PNG 1x1": encoded("PNG", image=SMOOTH.resize((1, 1))),
    "JPEG 1x1": encoded("JPEG", image=SMOOTH.resize((1, 1))),
    "PNG 10000x1": encoded("PNG", image=SMOOTH.resize((10_000, 1))),
    "PNG 1x10000": encoded("PNG", image=SMOOTH.resize((1, 10_000))),
    "JPEG 10000x1": encoded("JPEG", image=SMOOTH.resize((10_000, 1))),
    "PNG of the network's size": encoded("PNG", image=SMOOTH.resize((8, 8))),
    "JPEG of the network's size": encoded("JPEG", image=SMOOTH.resize((8, 8))),
}


def cut(data):
    """The file cut off in every class of length: in its signature, header, pixels, last pixels."""
    for end in (1, 2, 4, 8, 11, 20, 33, len(data) // 4, len(data) // 2, len(data) - 40):
        yield end, data[:end]


def refusal_of_a_part(part):
    """Of what is cut off: without a whole signature it is nothing known."""
    try:
        preprocessing.sniff(part)
    except preprocessing.UnknownFormatError:
        return 415, "unknown-image-format"
    return 422, "undecodable-image"


REFUSED = {
    **{name: (data, 413, "too-many-pixels") for name, data in bombs.TOO_LARGE.items()},
    **{name: (data, 422, "undecodable-image") for name, data in bombs.LABORIOUS.items()},
    **{
        f"{kind} cut off after {end} bytes": (part, *refusal_of_a_part(part))
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
        for end, part in cut(TAKEN[kind])
    },
    "nothing": (b"", 415, "unknown-image-format"),
    "a page": (b"<html>", 415, "unknown-image-format"),
    "a picture in words": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unknown-image-format"),
    "TIFF of 32-bit numbers": (encoded("TIFF", "F"), 422, "undecodable-image"),
    "TIFF of 16 bits in planes": (enc.tiff(wide(3), 2, planes_apart=True), 422, "undecodable-image"),
}


@pytest.fixture(scope="module", params=[pytest.param("asgi", marks=pytest.mark.slow), "http"])
def client(request, tmp_path_factory):
    """The application itself, and its server, which takes single images before the application."""
    folder = tmp_path_factory.mktemp("ways")
    networks.bundle(folder / "models" / "flat", networks.flat(), SAID)
    settings = Settings(models_dir=folder / "models", state_dir=folder / "state", lone_threads=1)
    with client_by(request.param, settings) as client:
        yield client


def by_every_way(client, data, good):
    """Send the image alone, in a form, and as BYTES in both forms: yield the answer and the image's place."""
    yield client.post("/predict?include=logits", content=data), 0
    yield client.post("/predict?include=logits", files=[("a", good), ("b", data)]), 1
    yield v2.post(client, *v2.images([good, data]), path=INFER), 1
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"}}
    sent = {**tensor, "data": [base64.b64encode(data).decode()]}
    yield v2.post(client, {"inputs": [sent]}, path=INFER), 0


@pytest.mark.parametrize("name", TAKEN)
def test_an_image_is_decoded_by_the_shared_rule_whichever_way_it_comes(client, name):
    expected = networks.flat_logits(preprocessing.decode(TAKEN[name], SAID.input)[None])[0]
    found = []
    for answer, place in by_every_way(client, TAKEN[name], TAKEN["BMP"]):
        assert answer.status_code == 200, answer.text
        if "predictions" in answer.json():
            found.append(answer.json()["predictions"][place]["logits"])
        else:
            found.append(v2.outputs(answer)["logits"][place])
    np.testing.assert_allclose(found, [expected] * 4, rtol=1e-5, atol=1e-2)  # of sums of 192 numbers to 255


def recorded(client):
    return client.get("/monitor").json()["predictions"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_alike_whichever_way_it_comes(client, name):
    data, status, code = REFUSED[name]
    before = recorded(client)
    for answer, place in by_every_way(client, data, TAKEN["BMP"]):
        assert answer.status_code == status, answer.text
        if "code" in answer.json():
            assert (answer.json()["code"], answer.json()["position"]) == (code, place)
        else:
            assert v2.error(answer, status).startswith(f"Input {place}, counted from 0: ")
    assert recorded(client) == before


def test_the_test_would_see_one_pixel_that_is_another():
    pixels = preprocessing.decode(TAKEN["PNG"], SAID.input)
    other = pixels.copy()
    other[3, 4, 1] ^= 1
    found = networks.flat_logits(np.stack([pixels, other, pixels[::-1]]))
    assert np.abs(found[1:] - found[0]).max(axis=1).min() > 0.02

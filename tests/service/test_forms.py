"""Forms: files in order, and what is no form or no file."""

import pytest

from service.api.forms import MAX_FILES, images_of
from service.core.exceptions import Invalid, Malformed, TooLarge

TYPE = "multipart/form-data; boundary=edge"


def part(content: bytes, disposition: str = 'form-data; name="a"; filename="a.png"', kind: str = "") -> bytes:
    headers = f"Content-Disposition: {disposition}\r\n" + (f"Content-Type: {kind}\r\n" if kind else "")
    return b"--edge\r\n" + headers.encode() + b"\r\n" + content + b"\r\n"


def test_a_body_of_any_other_type_is_one_image():
    for kind in ("", "image/png", "text/plain", "application/json", "multipart/mixed; boundary=edge", ";;;"):
        assert images_of(b"bytes", kind) == [b"bytes"]


def test_files_come_in_order_whatever_their_fields_are_called():
    contents = [b"one", b"", b"\r\n--edg\r\n", b"\x00\xff" * 1000, b"--edge-"]
    body = b"".join(map(part, contents)) + b"--edge--\r\n"
    assert images_of(body, TYPE) == contents


def test_the_type_may_be_written_in_capitals_and_the_boundary_in_quotes():
    body = part(b"one") + b"--edge--\r\n"
    assert images_of(body, 'Multipart/Form-Data; charset=utf-8; boundary="edge"') == [b"one"]


def test_a_part_with_a_content_type_of_its_own_is_a_file_without_a_name():
    body = part(b"one", 'form-data; name="a"', "image/png") + b"--edge--\r\n"
    assert images_of(body, TYPE) == [b"one"]


def test_a_field_that_is_no_file_is_refused_by_name():
    body = part(b"1.5", 'form-data; name="tau"') + part(b"one") + b"--edge--\r\n"
    with pytest.raises(Invalid, match=r"^tau: ") as caught:
        images_of(body, TYPE)
    assert caught.value.fields == {"field": "tau"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--edge",
        b"nonsense",
        part(b"one"),
        part(b"one") + b"--edge",
        b"--edge\r\nContent-Disposition: form-data",
        b"--edge\r\n: \r\n\r\n\r\n--edge--",
        b"--edge\r\n" + b"X: y\r\n" * 1000 + b"\r\n\r\n--edge--",
    ],
)
def test_a_form_that_is_cut_off_or_does_not_parse_is_malformed(body):
    with pytest.raises(Malformed) as caught:
        images_of(body, TYPE)
    assert caught.value.code == "malformed-form"


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'e' * 999}"],
)
def test_a_form_without_a_usable_boundary_is_malformed(kind):
    with pytest.raises(Malformed):
        images_of(part(b"one") + b"--edge--\r\n", kind)


def test_a_form_without_a_file_says_so():
    with pytest.raises(Malformed) as caught:
        images_of(b"--edge--\r\n", TYPE)
    assert caught.value.code == "form-without-file"


def test_one_file_too_many_is_too_large():
    whole = part(b"one") * MAX_FILES
    assert len(images_of(whole + b"--edge--", TYPE)) == MAX_FILES
    with pytest.raises(TooLarge):
        images_of(whole + part(b"one") + b"--edge--", TYPE)

"""Takes the files out of a multipart/form-data body that is already in memory: no temporary file is made."""

from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.core.exceptions import Invalid, Malformed, TooLarge

MAX_FILES: Final = 64


def images_of(body: bytes, content_type: str) -> list[bytes]:
    """Return the images of a request: the files of a form in their order, else the body itself.

    Raises Malformed for a form that is cut off or has no file, TooLarge above MAX_FILES, Invalid for a field
    that is no file.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return [body]
    boundary = options.get(b"boundary")
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    form = _Form()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.part_begins,
                "on_header_field": form.header_name,
                "on_header_value": form.header_value,
                "on_header_end": form.header_ends,
                "on_headers_finished": form.headers_end,
                "on_part_data": form.content,
                "on_part_end": form.part_ends,
                "on_end": form.ends,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as failure:
        raise _malformed("it does not parse") from failure
    if not form.complete:
        raise _malformed("it is cut off")
    if not form.files:
        raise Malformed("form-without-file", f"The form has no file; send 1 to {MAX_FILES}.")
    return form.files


class _Form:
    """Collects the files while the parser calls back, with slices of the one body."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.complete = False
        self._headers: dict[bytes, bytes] = {}
        self._name = b""
        self._value = b""
        self._content: list[bytes] = []

    def part_begins(self) -> None:
        self._headers = {}
        self._content = []

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_ends(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"filename" not in options and b"content-type" not in self._headers:
            name = options.get(b"name", b"").decode("utf-8", "replace")[:64]
            raise Invalid(
                "unknown-field",
                f"{name}: the form's parts are files; what else there is to say goes into the query.",
                field=name,
            )
        if len(self.files) == MAX_FILES:
            raise TooLarge(
                "too-many-files", f"The form has more than {MAX_FILES} files; send several requests."
            )

    def content(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def part_ends(self) -> None:
        self.files.append(b"".join(self._content))

    def ends(self) -> None:
        self.complete = True


def _malformed(why: str) -> Malformed:
    return Malformed("malformed-form", f"The form cannot be read: {why}; let the client library make it.")

"""Images for a model: read from files or requests, checked before anything is computed, decoded when they are needed.

Training, `inference.py` and the servers use the same checks. Decoded pixels are never kept: a batch decodes the images
that it needs, so that memory does not grow with their number.
"""

import base64
import binascii
import hashlib
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.errors import UserError
from medicalgpt.formats.turns import IMAGE_PART
from medicalgpt.readers.problems import Place, RowError, shorten

# Two formats are known to Pillow only once their modules are imported.
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

if TYPE_CHECKING:
    from medicalgpt.models.vision import ImageTokens

# Of more pixels than the limit here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Each image is decoded in full before it is scaled down, at 3 bytes per pixel: 200 MB.
MAX_PIXELS = 64_000_000
MAX_BYTES = 32 * 1024 * 1024
# The longer side over the shorter one; beyond it the processor refuses an image.
MAX_RATIO = 200
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# What becomes red, green and blue without a loss. Others have more than 8 bits per pixel, which would be cut off.
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
# Photos of phones, JPEG with a preview as a second picture.
SINGLE_FORMATS = ("MPO",)
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
# Requests are checked in threads; each of these may take as much memory as the largest image does.
_DECODING = threading.Semaphore(2)
_DATA_ADDRESS = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


class ImageError(UserError, ValueError):
    """An image that cannot be used.

    Attributes:
        reason: what is wrong, without a full stop.
        remedy: what to do, a sentence.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Picture:
    """An image that has been checked.

    Attributes:
        width, height: in pixels, upright.
        path: of its file; empty for one of a request.
        content: the bytes of its file, of one of a request.
        sha256: of these bytes.
    """

    width: int
    height: int
    path: str = ""
    content: bytes = b""
    sha256: str = ""

    @classmethod
    def read(cls, path: str | Path) -> "Picture":
        """Check the image in a file.

        Raises:
            ImageError: it is missing, too large, damaged, or not an image that a model can be shown.
        """
        content = _read_file(Path(path))
        width, height = _check(content)
        return cls(width, height, str(path), sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def from_data_address(cls, address: str) -> "Picture":
        """Check the image in an address `data:image/png;base64,...`.

        Raises:
            ImageError: another address, which is not fetched, or an image that cannot be used (see `read`).
        """
        found = _DATA_ADDRESS.match(address)
        if not found:
            raise ImageError(
                f"the image is at {shorten(address, 40)!r}, and nothing is fetched from an address",
                "Send it within the request: data:image/png;base64,...",
            )
        if len(address) > MAX_BYTES * 4 // 3 + 100:
            raise _too_many_bytes(len(address) * 3 // 4)
        try:
            content = base64.b64decode(address[found.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError("the image is not valid base64", "Encode the bytes of its file.") from error
        return cls.from_bytes(content)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Picture":
        """Check the bytes of an image's file. Raises ImageError, see `read`."""
        if len(content) > MAX_BYTES:
            raise _too_many_bytes(len(content))
        with _DECODING:
            width, height = _check(content)
        return cls(width, height, content=content, sha256=hashlib.sha256(content).hexdigest())

    def decode(self) -> Image.Image:
        """Its pixels, upright, in red, green and blue or what the processor converts to it.

        Raises:
            ImageError: the file has changed since it was checked.
        """
        upright = _decode(self.content or _read_file(Path(self.path)))
        if upright.size != (self.width, self.height):
            raise ImageError(
                f"{self.path} has {upright.size[0]} x {upright.size[1]} pixels, and had {self.width} x {self.height} "
                "when it was checked",
                "Start again, and leave the images as they are meanwhile.",
            )
        return upright


def decode_file(path: str) -> Image.Image:
    """The pixels of a file that was checked, upright. Raises ImageError if it is not as it was."""
    return _decode(_read_file(Path(path)))


def _decode(content: bytes) -> Image.Image:
    with _opened(content) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _too_many_bytes(size)
        if not path.is_file():
            raise ImageError(f"{path} is not a file", "Correct the path.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(
            f"{path} does not exist",
            "Correct the path; in a data file, a relative one starts at the folder of that file.",
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} cannot be read ({error})", "Correct the path, or its permissions.") from error


def _too_many_bytes(size: int) -> ImageError:
    return ImageError(f"the image has {size:,} bytes, more than {MAX_BYTES:,}", "Scale it down, or save it as JPEG.")


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(
            f"not an image that can be read ({', '.join(FORMATS)})", "Convert it to PNG or JPEG, or remove the row."
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels() from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, KeyError, OverflowError) as error:
        # What Pillow raises for damaged files differs from format to format.
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"the image is damaged ({error})", "Get the file again, or remove the row.") from error


def _too_many_pixels(width: int = 0, height: int = 0) -> ImageError:
    size = f"{width:,} x {height:,} pixels, " if width else ""
    return ImageError(f"the image has {size}more than {MAX_PIXELS:,} pixels", "Scale it down.")


def _check(content: bytes) -> tuple[int, int]:
    """Width and height of an image, upright. Raises ImageError."""
    with _opened(content) as image:
        width, height = image.size
        # Before anything is decoded.
        if width * height > MAX_PIXELS:
            raise _too_many_pixels(width, height)
        if max(width, height) > MAX_RATIO * min(width, height):
            raise ImageError(
                f"the image has {width} x {height} pixels, one side more than {MAX_RATIO} times the other",
                "Cut it into pieces.",
            )
        if image.mode not in MODES:
            raise ImageError(
                f"the image has pixels of the type {image.mode}, which are cut off above 255",
                "Convert it to 8 bits, with the window that shows what matters.",
            )
        if getattr(image, "n_frames", 1) > 1 and image.format not in SINGLE_FORMATS:
            raise ImageError(
                f"the file has {image.n_frames} pictures, of which only the first would be seen",
                "Save each that matters as a file.",
            )
        image.verify()
    with _opened(content) as image:
        # A JPEG is read to its end also where it is decoded at an eighth of its size.
        image.draft(None, (image.size[0] // 8, image.size[1] // 8))
        image.load()
    with _opened(content) as image:
        sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
    return (height, width) if sideways else (width, height)


def check_images(paths: Sequence[str], place: Place) -> list[dict[str, Any]]:
    """What a row keeps of its images: `path`, `width`, `height` and `sha256` of each.

    Args:
        paths: relative ones start at the folder of the data file.
        place: of the row.

    Raises:
        RowError: images that cannot be used, all of them.
    """
    folder = Path(place.file).parent
    found, problems = [], []
    for path in paths:
        try:
            picture = Picture.read(folder / path)
        except ImageError as error:
            problems.append((path, error))
            continue
        found.append({name: getattr(picture, name) for name in ("path", "width", "height", "sha256")})
    if not problems:
        return found
    path, first = problems[0]
    reason = first.reason if path in first.reason else f"{path}: {first.reason}"
    if others := "; ".join(f"{each}: {error.reason}" for each, error in problems[1:]):
        reason += f"; {len(problems) - 1} more of its images: {others}"
    raise RowError(reason, first.remedy, path)


def pictures_of(row: dict[str, Any]) -> list[Picture]:
    """The images of a converted row."""
    return [Picture(**image) for image in row.get("images") or ()]


def question_with_images(text: str, images: int) -> dict[str, Any]:
    """A turn of the user about so many images, which come before the text."""
    parts = [dict(IMAGE_PART) for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if images else text}


def parts_of(content: Any) -> list[dict[str, Any]]:
    """The parts of a message's content: text, and images."""
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def write_image_tokens(
    messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture], images: "ImageTokens"
) -> list[dict[str, Any]]:
    """The messages with each content as one text, which has the tokens of an image where the image is.

    Call it after texts were searched for special tokens.

    Args:
        pictures: the images of all messages, in their order; of a beginning of the messages, those of all.
    """
    remaining = iter(pictures)
    written = []
    for message in messages:
        if isinstance(message.get("content"), list):
            text = ""
            for part in message["content"]:
                if part["type"] == "text":
                    text += part["text"]
                else:
                    picture = next(remaining)
                    text += images.text(picture.width, picture.height)
            message = {**message, "content": text}
        written.append(dict(message))
    return written

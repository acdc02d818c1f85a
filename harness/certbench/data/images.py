"""Encoded images to pixels, each failure with the name of its file."""

from __future__ import annotations

import io

from PIL import Image

from certbench.errors import DataError

MOST_PIXELS = 1 << 27
"""A compressed image of a few bytes may claim any size; the largest of ImageNet has 2^24 pixels."""


def decode_image(name: str, content: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """The image in RGB; grey and CMYK ones are converted, as torchvision's loader does.

    Args:
        name: what to call it in errors.
        size: the (width, height) that it must have.

    Raises:
        DataError: it is broken, truncated, too large or of another size.
    """
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MOST_PIXELS:
            raise DataError(f"image {name} claims {image.width} x {image.height} pixels; refused")
        if size is not None and image.size != size:
            raise DataError(f"image {name} is {image.width} x {image.height}, not {size[0]} x {size[1]}")
        return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken image makes the decoder raise anything at all
        reason = " ".join(str(error).split())
        raise DataError(f"image {name} is broken ({reason}); get the file again") from None

"""Container images on this node: read from OCI layouts and archives, verified, unpacked, kept within a budget."""

from .errors import ImageError
from .layer import Limits
from .manifest import Config, Platform
from .store import Image, ImageStore

__all__ = ["Config", "Image", "ImageError", "ImageStore", "Limits", "Platform"]

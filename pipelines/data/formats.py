"""Formats of image files by the suffixes of their names."""

SUFFIXES_OF = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in SUFFIXES_OF.items() for suffix in suffixes}
FORMATS = "PNG, JPEG, WebP, BMP or TIFF"

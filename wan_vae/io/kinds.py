"""What a file is by its content, for an error that says so: downloads go wrong, and names lie.

Nothing here decides how a file is read. A reader that cannot read a file asks what it is instead.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What a reader expected.
Wanted = Literal["VAE", "latent", "video"]
# How much of a file is looked at.
_START_BYTES = 4096
# A text longer than this is quoted no more.
_QUOTED = 80
_MOST_JSON = 1 << 22

_AGAIN = "the download went wrong; download it again"
_WEIGHTS = "pass the VAE as .safetensors or .pth"


@dataclass(frozen=True)
class Kind:
    """What a file is, in words that follow "this is", and what to do about it.

    group: "picture" and "video" for what `encode` takes, "numbers" for what a latent may be in.
    """

    name: str
    cure: str = ""
    group: Literal["picture", "video", "numbers", "other"] = "other"

    def instead_of(self, wanted: Wanted) -> str:
        """The sentence of an error, without a full stop."""
        return f"this is {self.name}, not a {wanted}: {self._advice(wanted)}"

    def _advice(self, wanted: Wanted) -> str:
        if self.cure:
            return self.cure
        if wanted == "latent" and self.group in ("picture", "video"):
            return "encode it first (wan-vae encode)"
        if wanted == "video":
            return "pass a video or a picture"
        if wanted == "latent":
            return "pass a .latent, .safetensors, .pt or .npy file"
        return _WEIGHTS


NUMPY_ARCHIVE = Kind("an .npz archive of NumPy arrays", group="numbers")
PYTORCH = Kind("a PyTorch file", group="numbers")
_PICTURE: Literal["picture"] = "picture"
_VIDEO: Literal["video"] = "video"
_UNPACK = "unpack it, and pass a file in it"
# The first bytes of a file, and what it is.
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"GGUF", Kind("a GGUF file (weights that are quantized for other loaders)")),
    (b"lmgg", Kind("a GGML file (weights that are quantized for other loaders)")),
    (b"tjgg", Kind("a GGML file (weights that are quantized for other loaders)")),
    (b"\x89PNG\r\n\x1a\n", Kind("a PNG picture", group=_PICTURE)),
    (b"\xff\xd8\xff", Kind("a JPEG picture", group=_PICTURE)),
    (b"GIF87a", Kind("a GIF picture", group=_PICTURE)),
    (b"GIF89a", Kind("a GIF picture", group=_PICTURE)),
    (b"BM", Kind("a BMP picture", group=_PICTURE)),
    (b"II*\x00", Kind("a TIFF picture", group=_PICTURE)),
    (b"MM\x00*", Kind("a TIFF picture", group=_PICTURE)),
    (b"8BPS", Kind("a Photoshop picture", group=_PICTURE)),
    (b"v/1\x01", Kind("an OpenEXR picture", group=_PICTURE)),
    (b"\xff\x0a", Kind("a JPEG XL picture", group=_PICTURE)),
    (b"\x00\x00\x00\x0cJXL ", Kind("a JPEG XL picture", group=_PICTURE)),
    (b"\x1aE\xdf\xa3", Kind("a Matroska or WebM video", group=_VIDEO)),
    (b"FLV\x01", Kind("a Flash video", group=_VIDEO)),
    (b"\x00\x00\x01\xba", Kind("an MPEG video", group=_VIDEO)),
    (b"\x00\x00\x01\xb3", Kind("an MPEG video", group=_VIDEO)),
    (b"ID3", Kind("an MP3 sound file")),
    (b"fLaC", Kind("a FLAC sound file")),
    (b"OggS", Kind("an Ogg file (sound or video)")),
    (b"%PDF", Kind("a PDF document")),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (b"Rar!\x1a\x07", Kind("a RAR archive", _UNPACK)),
    (b"\x1f\x8b", Kind("a gzip archive", _UNPACK)),
    (b"\xfd7zXZ\x00", Kind("an xz archive", _UNPACK)),
    (b"(\xb5/\xfd", Kind("a zstd archive", _UNPACK)),
    (b"BZh", Kind("a bzip2 archive", _UNPACK)),
    (b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file (Keras weights)")),
    (b"\x93NUMPY", Kind("a NumPy array", group="numbers")),
    (b"ftrt", Kind("a TensorRT engine")),
    (b"SQLite format 3\x00", Kind("an SQLite database")),
    (b"MZ", Kind("a Windows program")),
    (b"\x7fELF", Kind("a Linux program or library")),
    (b"\xcf\xfa\xed\xfe", Kind("a macOS program or library")),
)
_LFS = b"version https://git-lfs.github.com/spec/"
_XET = b"# xet version"
_BRANDS = {
    b"avif": Kind("an AVIF picture", group=_PICTURE),
    b"avis": Kind("an animated AVIF picture", group=_PICTURE),
    b"heic": Kind("a HEIC picture", group=_PICTURE),
    b"mif1": Kind("a HEIF picture", group=_PICTURE),
}
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", re.I | re.S)


# The longest header that the safetensors library reads.
_MOST_HEADER_BYTES = 100_000_000
SAFETENSORS = Kind("a safetensors file", group="numbers")
_PORTABLE = re.compile(rb"P[1-7Ff][ \t\r\n]")


def is_safetensors(start: bytes) -> bool:
    """Whether nine or more bytes at the start of a file are those of a safetensors file: the length
    of its header, which is JSON."""
    return start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= _MOST_HEADER_BYTES


def kind_of(path: Path) -> Kind | None:
    """What the regular file `path` is, None for what nobody knows. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    return (
        _of_download(path, start)
        or _of_magic(start)
        or _of_container(start)
        or _of_zip(path, start)
        or _of_text(path, start)
    )


def what_is_it(path: Path, wanted: Wanted) -> str | None:
    """The sentence that says what `path` is instead of what was `wanted`; None if unknown."""
    try:
        kind = kind_of(path)
    except OSError:  # the reader has its own words for a file that cannot be read
        return None
    return None if kind is None else kind.instead_of(wanted)


def _of_download(path: Path, start: bytes) -> Kind | None:
    if not start:
        return Kind("an empty file", _AGAIN)
    if start.startswith(_LFS):
        return Kind(
            f"a Git LFS pointer{_lfs_size(start)}",
            "the repository was cloned without its large files: run `git lfs pull`, or download "
            "the file itself",
        )
    if start.startswith(_XET):
        return Kind("an Xet pointer", "download the file itself")
    if path.suffix in (".crdownload", ".part", ".partial", ".aria2", ".download", ".incomplete"):
        return Kind("an unfinished download", "wait for it, or download it again")
    if len(start) == _START_BYTES and not any(start):
        return Kind(f"{path.stat().st_size} bytes that begin with zeros", _AGAIN)
    return None


def _lfs_size(start: bytes) -> str:
    found = re.search(rb"^size (\d{1,18})", start, re.MULTILINE)
    return "" if found is None else f" (to a file of {int(found[1])} bytes)"


def _of_magic(start: bytes) -> Kind | None:
    if is_safetensors(start):
        return SAFETENSORS
    if _PORTABLE.match(start):
        return Kind("a PPM or PGM picture", group=_PICTURE)
    # "BM" and "MZ" are letters too: a header, not a text, follows them.
    return next(
        (
            kind
            for magic, kind in _MAGIC
            if start.startswith(magic) and (len(magic) > 2 or not _is_text(start))
        ),
        None,
    )


def _of_container(start: bytes) -> Kind | None:
    """Formats whose mark is not at the start."""
    if start[:4] == b"RIFF":
        kinds = {
            b"WEBP": Kind("a WebP picture", group=_PICTURE),
            b"AVI ": Kind("an AVI video", group=_VIDEO),
            b"WAVE": Kind("a WAV sound file"),
        }
        return kinds.get(start[8:12])
    if start[4:8] == b"ftyp":
        return _BRANDS.get(start[8:12], Kind("an MP4 or MOV video", group=_VIDEO))
    if start[4:8] in (b"moov", b"mdat"):
        return Kind("a MOV video", group=_VIDEO)
    if start[4:8] == b"TFL3":
        return Kind("a TensorFlow Lite model")
    if start[257:262] == b"ustar":
        return Kind("a tar archive", _UNPACK)
    # The first fields of ONNX's ModelProto: the version of the format, then the producer's name.
    if re.match(rb"\x08[\x01-\x20]\x12[\x01-\x40][ -~]{2}", start):
        return Kind("an ONNX model")
    return None


def _of_zip(path: Path, start: bytes) -> Kind | None:
    if start[:4] != b"PK\x03\x04":
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return Kind("a PyTorch file or a zip archive that is cut short", _AGAIN)
    if any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names):
        return Kind("a TorchScript model")
    if any(name.endswith("data.pkl") for name in names):
        return PYTORCH
    if names and all(name.endswith(".npy") for name in names):
        return NUMPY_ARCHIVE
    shown = f" with {names[0]}" if names else ""
    return Kind(f"a zip archive{shown[:_QUOTED]}", _UNPACK)


def _of_text(path: Path, start: bytes) -> Kind | None:
    text = start.removeprefix(b"\xef\xbb\xbf")
    if _HTML.match(text):
        return Kind(
            "a web page",
            "the page was saved in place of the file, or a sign-in is needed; use the download "
            "button (on Hugging Face a link with /resolve/, not /blob/)",
        )
    if not _is_text(text):
        return None
    stripped = text.lstrip()
    if stripped.startswith((b"[InternetShortcut]", b"[Desktop Entry]")):
        return Kind("a shortcut to a page", "open it, and download the file itself")
    if stripped[:1] in (b"{", b"["):
        return _of_json(path)
    if b"<svg" in stripped:
        return Kind("an SVG drawing", "save it as PNG and pass that, if it is what you mean")
    if stripped.startswith(b"<?xml") or stripped.startswith(b"<Error"):
        return Kind(f"an XML text ({_quote(text)})", _AGAIN)
    if stripped.startswith(b"#EXTM3U"):
        return Kind("a playlist", "pass the video itself")
    return Kind(f"a text ({_quote(text)})", _AGAIN)


def _of_json(path: Path) -> Kind:
    found: object = None
    if path.stat().st_size <= _MOST_JSON:
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError):
            return Kind("a damaged JSON text", _AGAIN)
    if isinstance(found, dict):
        if "weight_map" in found:
            return Kind("the index of a checkpoint of several files", "name it *.index.json")
        if "nodes" in found or "last_node_id" in found:
            return Kind("a ComfyUI workflow")
        if "_class_name" in found:
            return Kind("the configuration of a model", "pass its weights, or the folder")
        said = next((found[k] for k in ("error", "message", "detail") if k in found), None)
        if said is not None:
            words = _quote(str(said).encode())
            return Kind(f"a JSON text with an error ({words})", _AGAIN)
    return Kind("a JSON text", _AGAIN)


def _is_text(start: bytes) -> bool:
    """Whether `start` is a text: printable, in UTF-8 (which may be cut at its end)."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(start) < _START_BYTES or error.start < len(start) - 4:
            return False
        text = start[: error.start].decode("utf-8")
    return bool(text.strip()) and all(c.isprintable() or c in "\r\n\t\f" for c in text)


def _quote(text: bytes) -> str:
    words = " ".join(text.decode("utf-8", "replace").split())
    return f"{words[:_QUOTED]!r}{'...' if len(words) > _QUOTED else ''}"

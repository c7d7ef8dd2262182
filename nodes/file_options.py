"""What kind of file a video becomes: inputs with the names of core's Save Video, and what they say.

Where core nests its options (format holds codec, codec holds encoding, encoding holds crf), these
are nested too. Elsewhere they lie side by side, as in workflows of before, which mean the same in
both forms; js/video_options.js moves their widgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from comfy_api.latest import io
from comfy_execution.graph_utils import is_link
from comfy_extras.nodes_video import SaveVideo

from ..wan_vae import OutputError
from ..wan_vae.io.video_encode import CODECS, Codec
from ..wan_vae.said import expected_one_of, said
from .saved_video import FORMATS
from .schema import advanced

CRF = 16.0
# Of a stream that is encoded in any case: with the quality of above, or with a chosen one.
ENCODINGS = ("auto", "re-encode")
# What a decoded video can have of core's words for colours.
_COLOURS = ("auto", "sRGB")

_FORMAT = "The kind of file, as in Save Video. auto is mp4."
_CODEC = "How pictures are stored, as in Save Video. auto is H.264, and AV1 in webm."
_ENCODING = "auto encodes with crf 16, re-encode with the crf that you choose."
_CRF = (
    "Quality: lower values look better and make larger files. Save Video takes 23 for H.264 (at "
    "most 51) and 30 for AV1 (at most 63)."
)


@dataclass(frozen=True)
class FileOptions:
    """Container, codec and quality of a file, each in the words of `io.video_encode`."""

    format: str
    codec: Codec
    crf: float


def file_inputs() -> list[io.Input]:
    """The inputs format, codec and crf, in the form in which this ComfyUI's Save Video has them."""
    if not _core_nests():
        return [
            advanced(
                io.Combo.Input, "format", options=list(FORMATS), default="auto", tooltip=_FORMAT
            ),
            advanced(io.Combo.Input, "codec", options=list(CODECS), default="auto", tooltip=_CODEC),
            _crf_input(),
        ]
    option = io.DynamicCombo.Option
    formats = [option(name, [_nested_codec(codecs_of(name))]) for name in FORMATS]
    # The flat names stay for prompts, links and subgraphs of before. A page shows none of them.
    return [
        _nested("format", formats, _FORMAT),
        _hidden(advanced(io.Combo.Input, "codec", options=list(CODECS), default="auto")),
        _hidden(_crf_input()),
    ]


def codecs_of(container: str) -> tuple[Codec, ...]:
    """The codecs that core's Save Video offers for a container."""
    return tuple(codec for codec in CODECS if (container, codec) != ("webm", "h264"))


def file_options(hidden: Any, format: Any, codec: Codec, crf: float) -> FileOptions:
    """What a node was told by nested inputs, or by flat ones. Raises OutputError.

    hidden: the node's hidden inputs. format: a word, or a dictionary that has it and what is nested
    in it. A flat codec or crf counts where the nested one is not chosen.
    """
    told = _told(hidden)
    for name, value, words in _wrong(told):
        raise OutputError(expected_one_of(name, value, words))
    for name, value in _left_out(told, format):
        raise OutputError(
            said(
                "video.left_out",
                "{name} is {value}, which this ComfyUI leaves out: what it is nested in was not "
                "chosen or is linked, or nothing is nested here; take the inputs codec and crf, "
                "which may be linked",
                name=name,
                value=repr(value),
            )
        )
    if not isinstance(format, Mapping):
        return FileOptions(str(format), codec, crf)
    nested = format.get("codec") or {}
    encoding = nested.get("encoding") or {}
    chosen = nested.get("codec", "auto")
    return FileOptions(
        str(format["format"]),
        cast("Codec", codec if chosen == "auto" else chosen),
        float(encoding.get("crf", crf)),
    )


def _told(hidden: Any) -> Mapping[str, Any]:
    """The node's inputs as they stand in the prompt."""
    dynprompt, node = hidden.dynprompt, hidden.unique_id
    if dynprompt is None or node is None or not dynprompt.has_node(node):
        return {}
    inputs: Mapping[str, Any] = dynprompt.get_node(node)["inputs"]
    return inputs


def _wrong(told: Mapping[str, Any]) -> Iterator[tuple[str, object, Iterable[str]]]:
    """Nested choices that are none: ComfyUI passes a node nothing at all for them, without a word.

    Each with its value and the words that it may be. What is linked is checked by the file.
    """
    container = told.get("format", "auto")
    choices = (
        ("format", FORMATS),
        ("format.codec", codecs_of(container) if isinstance(container, str) else CODECS),
        ("format.codec.encoding", ENCODINGS),
    )
    for name, words in choices:
        value = told.get(name)
        if value is not None and not is_link(value) and value not in words:
            yield name, value, words


def _left_out(told: Mapping[str, Any], format: Any) -> Iterator[tuple[str, object]]:
    """Nested inputs of the prompt that are not in `format`, unless they say what is usual."""
    for name, value in told.items():
        first, *path = name.split(".")
        if first != "format" or not path or value in ("auto", CRF):
            continue
        place = format
        for part in path:
            place = place.get(part) if isinstance(place, Mapping) else None
        if place is None:
            yield name, value


def _core_nests() -> bool:
    dynamic = getattr(io, "DynamicCombo", None)
    if dynamic is None:
        return False
    inputs = SaveVideo.define_schema().inputs
    return any(isinstance(one, dynamic.Input) for one in inputs if one.id == "format")


def _crf_input() -> io.Input:
    return advanced(io.Float.Input, "crf", default=CRF, min=0.0, max=63.0, step=1.0, tooltip=_CRF)


def _nested_codec(codecs: Iterable[str]) -> io.Input:
    option = io.DynamicCombo.Option
    return _nested(
        "codec",
        [option(name, [] if name == "auto" else [_nested_encoding()]) for name in codecs],
        _CODEC,
    )


def _nested_encoding() -> io.Input:
    option = io.DynamicCombo.Option
    colours = advanced(
        io.Combo.Input,
        "color_space",
        options=list(_COLOURS),
        default="auto",
        tooltip="The colours of a decoded video are sRGB.",
    )
    return _nested(
        "encoding",
        [option("auto", []), option("re-encode", [_crf_input(), colours])],
        _ENCODING,
    )


def _nested(name: str, options: list[Any], tooltip: str) -> io.Input:
    made: io.Input = io.DynamicCombo.Input(
        name, options=options, optional=True, tooltip=tooltip, extra_dict={"advanced": True}
    )
    return made


def _hidden(made: io.Input) -> io.Input:
    made.extra_dict = {**(made.extra_dict or {}), "hidden": True}
    return made

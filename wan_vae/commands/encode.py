"""`wan-vae encode`: a video or an image to a latent."""

from __future__ import annotations

from .. import geometry
from ..config import WanVAEConfig
from ..errors import OutputError
from ..io.files import Partial, check_output
from ..io.latents import save_latent
from ..io.video_read import open_clip
from .console import ProgressBar, log
from .load import last_report, load_vae
from .outputs import refuse_to_overwrite
from .report_text import report_text
from .requests import EncodeRequest


def run_encode(request: EncodeRequest) -> int:
    """Encode the file and write the latent; returns the exit code."""
    output, options = request.output, request.options
    check_output(output)
    if output.suffix.lower() not in (".latent", ".safetensors"):
        raise OutputError(f"{output}: a latent is written as .latent or .safetensors")
    if not request.overwrite:
        refuse_to_overwrite([output])
    clip = open_clip(request.video)
    vae = load_vae(request.vae, request.device, options.precision)
    clip = clip.with_colours(vae.config.colours)
    bar = ProgressBar(output.name)
    partial = Partial(output)  # a folder without write permission is refused before the encode
    try:
        latent = vae.encode(
            clip,
            chunk_frames=options.chunk_frames,
            memory_format=options.memory_format,
            precision=options.precision,
            strips=options.strips,
            backend=options.backend,
            on_progress=bar,
            should_stop=bar.show,
        )
        assert latent is not None  # it is None only on some ranks of a sharded encode
        save_latent(partial.path, latent, name=output)
        partial.publish()
    except BaseException:
        partial.discard()
        raise
    finally:
        bar.close()
        clip.close()
    report = last_report(vae)
    for text in (*clip.warnings, *_crop_notes(clip.shape, vae.config), *report.warnings):
        log(f"wan-vae: warning: {text}")
    print(report_text(report))
    print(f"written   {output}")
    return 0


def _crop_notes(shape: tuple[int, ...], config: WanVAEConfig) -> list[str]:
    """Sentences about frames, rows and columns that have no latent."""
    _, _, frames, height, width = shape
    window = geometry.encode_window(shape, config)
    kept = (window.rows.stop - window.rows.start, window.columns.stop - window.columns.start)
    notes = []
    if window.frames < frames:
        notes.append(
            f"{window.frames} of {frames} frames are encoded: latents hold "
            f"{config.temporal_factor}n + 1 frames"
        )
    if kept != (height, width):
        notes.append(
            f"{width}x{height} is cropped to {kept[1]}x{kept[0]}: latent pixels hold "
            f"{config.spatial_factor}x{config.spatial_factor}"
        )
    return notes

"""A report as lines of text, for the node that hands it on as a string."""

from __future__ import annotations

from collections import Counter


def report_text(report: dict, dtypes: dict[str, int]) -> str:
    """The facts of an inspection's report in the wire format.

    `dtypes`: how many of the VAE's own weights are of each dtype.
    """
    config, layout = report["config"], report["layout"]
    found, used = layout["weights_found"], layout["weights_used"]
    lines = [
        f"{config['family']} VAE: {config['z_dim']} latent channels, width {config['dim']} / "
        f"{config['decoder_dim']}, {config['spatial_factor']}x{config['spatial_factor']} pixels "
        "for a latent pixel" + ("" if config.get("has_encoder", True) else ", no encoder"),
        f"would compute in {report['dtype']} on {report['device']} ({report['device_name']})",
        f"layout: {layout['chosen']} ({layout['reason']})",
        f"weights as loaded: {_counts(dtypes)}",
        f"conv3d weights as loaded: {_counts(found)}",
        f"conv3d weights as used: {_counts(used)}",
        "backends: " + ", ".join(f"{op} {name}" for op, name in report["backends"]["used"].items()),
    ]
    lines += [
        f"off: {off['op']} {off['backend']}: {off['reason']}" for off in report["backends"]["off"]
    ]
    lines += [f"warning: {text}" for text in report["warnings"]]
    groups = Counter((e["op"], e["format"], e["backend"]) for e in report["layers"])
    lines += [f"layers: {count} {' '.join(group)}" for group, count in groups.items()]
    lines += [
        f"{layer['name']}  {layer['op']}  {'x'.join(map(str, layer['shape']))}  {layer['format']}  "
        f"{layer['backend']}"
        for layer in report["layers"]
    ]
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"

"""Thin ComfyUI glue: schemas, one bridge to the library, one store of reports. No arithmetic."""

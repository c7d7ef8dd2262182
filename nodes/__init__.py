"""Thin ComfyUI glue: schemas, one session for each run, one store of reports. No arithmetic."""

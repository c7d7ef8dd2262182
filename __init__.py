"""ComfyUI finds its nodes, its panel and its routes here; `import wan_vae` needs none of it."""

import importlib.util

# ComfyUI imports this folder as a package. Test runners import it too, by themselves, where there
# is no ComfyUI (and, run from inside the folder, no package for the relative import).
if __package__ and importlib.util.find_spec("comfy_api") is not None:
    from .nodes.twice import is_first_copy

    if is_first_copy():
        from .nodes.extension import comfy_entrypoint

        WEB_DIRECTORY = "./js"

        __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
    else:
        from .nodes.twice import comfy_entrypoint

        __all__ = ["comfy_entrypoint"]

"""Files, latents, images and videos, and the sinks where pixels go."""

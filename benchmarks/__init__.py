"""Benchmarks of this repository, outside what users install; `wan-vae bench` runs them."""

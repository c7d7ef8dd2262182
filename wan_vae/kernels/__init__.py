"""How a layer is computed faster: kernels proven on the card before use. See README.md."""

"""How a layer is computed faster: kernels by family, proven on the card before use."""

"""What the kernels take of a card: compiled here, held to the card's limits; no GPU is needed."""

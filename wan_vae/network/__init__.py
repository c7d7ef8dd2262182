"""The causal network: encoder, decoder, their layers, and where each of them is."""

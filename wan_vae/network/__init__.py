"""The causal network: encoder, decoder, their layers, and a list of where each layer is."""

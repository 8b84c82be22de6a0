"""How the built-in demo model was made: data, tokenizer, training, quantisation, measurement."""

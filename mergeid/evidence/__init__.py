"""Do neurons correspond? What activations, weights and fixed parts say of it."""

"""Memory of training: optimizers, activations, adapters, ranks."""

"""One check a file: `run(method, data, seed)` judges a method beside its baseline and controls."""
